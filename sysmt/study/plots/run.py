"""Plots of one run, drawn from its own tables, which lie beside them as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sysmt.errors import ConfigError
from sysmt.files import read_csv, read_toml
from sysmt.study.plots.energy_against_accuracy import plot_energy
from sysmt.study.plots.style import COLOURS, FLOAT_GREY, LEAST_SPAN_POINTS, MARKERS, figure

__all__ = ["draw_run", "plot_accuracy", "plot_collisions"]


def plot_accuracy(summary: pd.DataFrame, path: str | Path, title: str = "") -> None:
    """Plot top-1 accuracy by setting, in percent, with the float network as a line.

    Error bars are one standard error of the difference to the float network, paired by image.

    Parameters
    ----------
    summary : DataFrame
        As `sysmt.study.evaluate.summary_table` makes it.
    path : str or Path
    title : str
    """
    rows = summary[summary["threads"] > 0].copy()
    base = rows["setting"].str.replace(" recalibrated", "")
    places = list(dict.fromkeys(base))
    rows["place"] = [places.index(name) for name in base]
    with figure(path, width_in=max(5.0, 1.4 + 0.95 * len(places))) as (drawing, axes):
        floats = summary[summary["threads"] == 0]
        if len(floats):
            accuracy = 100 * float(floats["top1"].iloc[0])
            axes.axhline(
                accuracy, color=FLOAT_GREY, linestyle="--", linewidth=1, label=f"float, {accuracy:.2f}"
            )
        groups = [
            ("as calibrated", rows[~rows["recalibrated"]]),
            ("BatchNorm recalibrated", rows[rows["recalibrated"]]),
        ]
        present = [(label, group) for label, group in groups if len(group)]
        for index, (label, group) in enumerate(present):
            shift = 0.12 * (index - (len(present) - 1) / 2)
            axes.errorbar(
                group["place"] + shift,
                100 * group["top1"],
                yerr=100 * group["top1_difference_se"].fillna(0),
                color=COLOURS[index],
                marker=MARKERS[index],
                linestyle="none",
                capsize=3,
                label=label,
            )
        speedups = rows.groupby("place")["speedup"].first()
        axes.set_xticks(range(len(places)), [f"{name}\n{speedups[i]:.2f}x" for i, name in enumerate(places)])
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("top-1 accuracy, %\n(bars: s.e. of the difference to float)")
        axes.set_xlabel("setting, and its MAC-weighted speedup")
        axes.set_title(title)
        drawing.legend(loc="outside lower center", ncols=3)
        low, high = axes.get_ylim()
        missing = max(0.0, LEAST_SPAN_POINTS - (high - low)) / 2  # noise should not look like a cliff
        axes.set_ylim(low - missing, high + missing)


def plot_collisions(layers: pd.DataFrame, path: str | Path, title: str = "") -> None:
    """Plot the collision rate of each simulated layer, in percent, one line per setting with collisions.

    Recalibrated settings are left out: they differ from the plain ones by less than a line's width.

    Parameters
    ----------
    layers : DataFrame
        As `sysmt.study.evaluate.layer_table` makes it.
    path : str or Path
    title : str
    """
    rows = layers[(layers["threads"] > 0) & (layers["macs"] > 0)]
    names = list(dict.fromkeys(rows["name"]))
    colliding = [
        setting
        for setting, group in rows.groupby("setting", sort=False)
        if (group["threads"] > 1).any() and not str(setting).endswith(" recalibrated")
    ]
    with figure(path, width_in=min(11.0, max(4.5, 2.0 + 0.24 * len(names))), height_in=4.0) as (
        drawing,
        axes,
    ):
        for index, setting in enumerate(colliding):
            group = rows[rows["setting"] == setting].set_index("name").reindex(names)
            axes.plot(
                np.arange(len(names)),
                100 * group["collision_rate"],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                linestyle="--" if "throttled" in str(setting) else "-",
                zorder=3 - index / len(colliding),  # variants lie under the setting they vary
                label=setting,
            )
        _layer_ticks(axes, names)
        axes.set_ylim(0, 100)
        axes.set_ylabel("slots with a collision, %")
        axes.set_title(title)
        if colliding:
            drawing.legend(loc="outside lower center", ncols=min(4, len(colliding)))
        else:
            axes.text(0.5, 0.5, "one thread: no collisions", transform=axes.transAxes, ha="center")


def _layer_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Name the layers below the axis; of very many, every n-th."""
    step = -(-len(names) // 60)
    places = range(0, len(names), step)
    axes.set_xticks(list(places), [names[place] for place in places], rotation=90, fontsize=7)
    axes.set_xlim(-0.5, max(0.5, len(names) - 0.5))
    axes.grid(axis="x", visible=False)


def draw_run(directory: str | Path, title: str | None = None) -> list[Path]:
    """Draw the plots of a directory that `sysmt run` wrote, from its summary.csv and layers.csv.

    Parameters
    ----------
    directory : str or Path
    title : str, optional
        By default the one in its config.toml, if it has that.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    ConfigError
        If a table is missing, unreadable, or has no setting on the array.
    OutputError
        If a plot cannot be written.
    """
    directory = Path(directory)
    summary = read_csv(
        directory / "summary.csv",
        ("setting", "threads", "recalibrated", "top1", "top1_difference_se", "speedup"),
        ("threads", "top1", "top1_difference_se", "speedup"),
    )
    numbers = ("threads", "macs", "collision_rate")
    layers = read_csv(directory / "layers.csv", ("setting", "name", *numbers), numbers)
    if not (summary["threads"] > 0).any() or not len(layers):
        raise ConfigError(f"{directory} has no setting on the array; there is nothing to plot")
    config = directory / "config.toml"
    if title is None:
        title = str(read_toml(config).get("made_by", {}).get("title", "")) if config.is_file() else ""
    accuracy, collisions = directory / "accuracy.png", directory / "collisions.png"
    plot_accuracy(summary, accuracy, title)
    plot_collisions(layers, collisions, title)
    written = [accuracy, collisions]
    if any(column.startswith("energy_") for column in summary.columns):
        written.append(directory / "energy.png")
        plot_energy(summary, written[-1], title)
    return written

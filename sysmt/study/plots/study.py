"""Plots of studies: fronts, thread maps, sensitivities, searches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from sysmt.config import THREAD_COUNTS, THREADS_OF, RecalibrationMode
from sysmt.errors import ConfigError
from sysmt.files import read_csv
from sysmt.study.pareto import pareto_front
from sysmt.study.plots.style import COLOURS, FLOAT_GREY, MARKERS, figure

__all__ = [
    "draw_study",
    "plot_accuracy_speedup",
    "plot_collisions_sparsity",
    "plot_hypervolume",
    "plot_sensitivities",
    "plot_threads",
]

THREAD_SHADES = ("#f0f0f0", "#9ecae1", "#08519c")
"""For 1, 2, 4 threads: one hue whose lightness falls evenly, so that grey print keeps the order."""


def plot_accuracy_speedup(points: pd.DataFrame, path: str | Path, title: str = "") -> None:
    """Plot top-1 accuracy against MAC-weighted speedup, as in the recalibration paper's figure 1.

    Parameters
    ----------
    points : DataFrame
        With ``speedup``, ``top1`` in [0, 1]; told apart by ``recalibrate`` where that differs, else by
        ``method`` where there is one. The Pareto front of each group is drawn as a line. ``float_top1``,
        where it is there, becomes a dashed line.
    path : str or Path
    title : str
    """
    with figure(path, width_in=5.5, height_in=3.8) as (_, axes):
        if "float_top1" in points and points["float_top1"].nunique() == 1:
            top1 = 100 * float(points["float_top1"].iloc[0])
            axes.axhline(top1, color=FLOAT_GREY, linestyle="--", linewidth=1, label=f"float, {top1:.2f}")
        for index, (label, group) in enumerate(_groups(points)):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            axes.plot(
                group["speedup"], 100 * group["top1"], marker, color=colour, alpha=0.35, markeredgewidth=0
            )
            front = group[pareto_front(group["speedup"], group["top1"])].sort_values("speedup")
            axes.plot(
                front["speedup"],
                100 * front["top1"],
                color=colour,
                marker=marker,
                markeredgecolor="black",
                markeredgewidth=0.5,
                label=label,
            )
        axes.set_xlabel("speedup of the simulated layers, MAC-weighted")
        axes.set_ylabel("top-1 accuracy, %")
        axes.set_title(title)
        axes.legend(loc="best")


def _groups(points: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    keys = [
        key for key in ("sparsity", "policy", "recalibrate") if key in points and points[key].nunique() > 1
    ]
    if not keys and "method" in points:
        keys = ["method"]
    if not keys:
        return [("points, and their front", points)]
    return [
        (", ".join(_word(key, value) for key, value in zip(keys, values, strict=True)), group)
        for values, group in points.groupby(keys, sort=False)
    ]


def _word(key: str, value: Any) -> str:
    if key == "sparsity":
        return f"{100 * value:.0f} % pruned"
    if key == "recalibrate":
        return "as calibrated" if value == RecalibrationMode.NONE else f"recalibrated ({value})"
    return str(value)


def plot_threads(front: pd.DataFrame, path: str | Path, title: str = "") -> None:
    """Plot the threads of each layer as a heat map, a row per point, the fastest on top.

    Parameters
    ----------
    front : DataFrame
        With ``speedup``, ``top1`` and a column ``threads of <layer>`` for each layer.
    path : str or Path
    title : str
    """
    columns = [name for name in front.columns if name.startswith(THREADS_OF)]
    rows = front.sort_values("speedup", ascending=False)
    shades = np.searchsorted(THREAD_COUNTS, rows[columns].to_numpy())
    width, height = max(4.5, 2.2 + 0.24 * len(columns)), 1.8 + 0.22 * len(rows)
    with figure(path, width_in=min(width, 11.0), height_in=min(height, 9.0)) as (drawing, axes):
        axes.imshow(
            shades,
            aspect="auto",
            cmap=ListedColormap(THREAD_SHADES),
            vmin=-0.5,
            vmax=2.5,
            interpolation="none",
        )
        _layer_names(axes, [name.removeprefix(THREADS_OF) for name in columns])
        step = -(-len(rows) // 40)
        labels = [f"{x:.2f}x  {100 * y:.2f} %" for x, y in zip(rows["speedup"], rows["top1"], strict=True)]
        axes.set_yticks(range(0, len(rows), step), labels[::step], fontsize=7)
        axes.grid(visible=False)
        axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1, visible=True)
        axes.tick_params(which="both", length=0)
        axes.set_title(title)
        patches = [
            Patch(facecolor=shade, edgecolor=FLOAT_GREY, linewidth=0.5, label=f"{count}T")
            for shade, count in zip(THREAD_SHADES, THREAD_COUNTS, strict=True)
        ]
        drawing.legend(handles=patches, loc="outside upper right", ncols=3, fontsize=8)


def plot_sensitivities(table: pd.DataFrame, path: str | Path, title: str = "") -> None:
    """Plot what each layer's thread count does to the network's output, on a logarithmic scale.

    Parameters
    ----------
    table : DataFrame
        As `sysmt.study.sensitivity.Sensitivities.table`.
    path : str or Path
    title : str
    """
    names = list(dict.fromkeys(table["layer"]))
    with figure(path, width_in=min(11.0, max(4.5, 2.0 + 0.24 * len(names))), height_in=4.0) as (_, axes):
        for index, (threads, group) in enumerate(table.groupby("threads")):
            values = group.set_index("layer")["kl"].reindex(names)
            axes.plot(
                range(len(names)),
                values.where(values > 0),  # a layer without any effect has no place on this scale
                color=COLOURS[index],
                marker=MARKERS[index],
                label=f"{threads}T in this layer alone",
            )
        axes.set_yscale("log")
        _layer_names(axes, names)
        axes.set_ylabel("KL divergence of the output, nats")
        axes.set_title(title)
        axes.legend(loc="best")


def plot_hypervolume(curves: pd.DataFrame, path: str | Path, title: str = "") -> None:
    """Plot hypervolume against the number of evaluated points: each method's mean, and its range over seeds.

    Parameters
    ----------
    curves : DataFrame
        ``method``, ``seed``, ``evaluations``, ``hypervolume``.
    path : str or Path
    title : str
    """
    most = int(curves["evaluations"].max())
    with figure(path, width_in=5.5, height_in=3.6) as (_, axes):
        for index, (method, group) in enumerate(curves.groupby("method", sort=False)):
            table = group.pivot_table(index="evaluations", columns="seed", values="hypervolume")
            table = table.reindex(
                range(1, most + 1)
            ).ffill()  # a method without more points stays where it is
            colour = COLOURS[index % len(COLOURS)]
            axes.fill_between(
                table.index, table.min(axis=1), table.max(axis=1), color=colour, alpha=0.18, linewidth=0
            )
            axes.plot(
                table.index,
                table.mean(axis=1),
                color=colour,
                marker=MARKERS[index % len(MARKERS)],
                markevery=max(1, most // 10),
                label=method,
            )
        axes.set_xlabel("evaluated points")
        axes.set_ylabel("hypervolume, share of the reference rectangle")
        axes.set_title(title)
        axes.legend(loc="lower right")


def plot_collisions_sparsity(points: pd.DataFrame, path: str | Path, title: str = "") -> None:
    """Plot the collision rate of uniform thread counts against the share of pruned weights.

    Parameters
    ----------
    points : DataFrame
        With ``sparsity`` in [0, 1), ``collision_rate`` in [0, 1] and columns ``threads of <layer>``.
    path : str or Path
    title : str
    """
    columns = [name for name in points.columns if name.startswith(THREADS_OF)]
    same = points[points[columns].nunique(axis=1) == 1]
    with figure(path, width_in=4.6, height_in=3.4) as (_, axes):
        for index, (threads, group) in enumerate(same.groupby(columns[0])):
            rates = group.groupby("sparsity")["collision_rate"].mean()
            axes.plot(
                100 * rates.index.to_numpy(),
                100 * rates.to_numpy(),
                color=COLOURS[index],
                marker=MARKERS[index],
                label=f"{threads}T",
            )
        axes.set_ylim(0, 100)
        axes.set_xlabel("weights set to zero, %")
        axes.set_ylabel("slots with a collision, %")
        axes.set_title(title)
        axes.legend(loc="best")


def _layer_names(axes: mpl.axes.Axes, names: Sequence[str]) -> None:
    step = -(-len(names) // 60)
    axes.set_xticks(range(0, len(names), step), list(names)[::step], rotation=90, fontsize=7)
    axes.set_xlim(-0.5, max(0.5, len(names) - 0.5))
    axes.grid(axis="x", visible=False)


def draw_study(directory: str | Path, title: str = "") -> list[Path]:
    """Draw the plots of a directory that `sysmt sweep` or `sysmt search` wrote, from its CSVs.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    ConfigError
        If the points are missing, unreadable or none.
    OutputError
        If a plot cannot be written.
    """
    directory = Path(directory)
    numbers = ("speedup", "top1", "sparsity", "collision_rate")
    points = read_csv(directory / "points.csv", numbers, numbers)
    points = points[points["top1"].notna()]  # without those that were given up
    if not len(points):
        raise ConfigError(f"{directory / 'points.csv'} has no points; there is nothing to plot")
    drawn = [directory / "accuracy_speedup.png"]
    plot_accuracy_speedup(points, drawn[0], title)
    front = points[pareto_front(points["speedup"], points["top1"])]
    drawn.append(directory / "threads.png")
    plot_threads(front, drawn[-1], title)
    if points["sparsity"].nunique() > 1:
        drawn.append(directory / "collisions_sparsity.png")
        plot_collisions_sparsity(points, drawn[-1], title)
    if (directory / "sensitivities.csv").is_file():
        drawn.append(directory / "sensitivities.png")
        table = read_csv(directory / "sensitivities.csv", ("layer", "threads", "kl"), ("threads", "kl"))
        plot_sensitivities(table, drawn[-1], title)
    if (directory / "hypervolume.csv").is_file():
        drawn.append(directory / "hypervolume.png")
        columns = ("seed", "evaluations", "hypervolume")
        curves = read_csv(directory / "hypervolume.csv", ("method", *columns), columns)
        plot_hypervolume(curves, drawn[-1], title)
    return drawn

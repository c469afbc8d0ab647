"""Energy against accuracy: the second curve of a study."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from sysmt.errors import ConfigError
from sysmt.study.plots.style import COLOURS, FLOAT_GREY, LEAST_SPAN_POINTS, MARKERS, figure

__all__ = ["plot_energy"]

_KNOWN = {"energy_pj_per_image": ("µJ", 1e-6), "energy_relative_per_image": ("conventional PE-cycles", 1.0)}


def plot_energy(points: pd.DataFrame, path: str | Path, title: str = "") -> None:
    """Plot top-1 accuracy, in percent, over the energy of the simulated layers per image.

    Settings with and without recalibrated BatchNorm are two series; the float network is a line, since its
    energy is not counted.

    Parameters
    ----------
    points : DataFrame
        ``setting``, ``threads`` (0: float), ``recalibrated``, ``top1`` in [0, 1], and one of
        ``energy_pj_per_image`` and ``energy_relative_per_image``.
    path : str or Path
    title : str

    Raises
    ------
    ConfigError
        If no energy column is there.
    """
    column = next((name for name in _KNOWN if name in points.columns), None)
    if column is None:
        raise ConfigError(f"the table has no energy; one of {', '.join(_KNOWN)} is needed")
    unit, scale = _KNOWN[column]
    with figure(path, width_in=5.5, height_in=3.6) as (_, axes):
        floats = points[points["threads"] == 0]
        if len(floats):
            accuracy = 100 * float(floats["top1"].iloc[0])
            axes.axhline(
                accuracy, color=FLOAT_GREY, linestyle="--", linewidth=1, label=f"float, {accuracy:.2f}"
            )
        simulated = points[points["threads"] > 0]
        labels = {False: "as calibrated", True: "BatchNorm recalibrated"}
        for index, (recalibrated, group) in enumerate(simulated.groupby("recalibrated")):
            group = group.sort_values(column)
            axes.plot(
                scale * group[column],
                100 * group["top1"],
                color=COLOURS[index],
                marker=MARKERS[index],
                label=labels[bool(recalibrated)],
            )
            for energy, top1, name in zip(group[column], group["top1"], group["setting"], strict=True):
                if not recalibrated:
                    axes.annotate(
                        str(name),
                        (scale * energy, 100 * top1),
                        textcoords="offset points",
                        xytext=(4, 4),
                        fontsize=7,
                    )
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, high - LEAST_SPAN_POINTS), high)
        axes.set_xlabel(f"energy of the simulated layers per image, {unit}")
        axes.set_ylabel("top-1 accuracy, %")
        axes.set_title(title)
        axes.legend(loc="best")

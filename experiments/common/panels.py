"""Figures of several panels in the house style, with one legend for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sysmt.study.plots.style import COLOURS, MARKERS, figure


@contextlib.contextmanager
def panels(
    path: Path, width_in: float, height_in: float, rows: int = 1, columns: int = 1, **more: Any
) -> Iterator[tuple[Figure, np.ndarray]]:
    """Hand out a figure and its panels (rows, columns); it is saved at the end, whole or not at all.

    Parameters
    ----------
    path : Path
        Ends in ``.png``.
    width_in, height_in : float
        Size in inches.
    rows, columns : int
    **more
        As `matplotlib.figure.Figure.subplots` takes it, such as ``sharey``.
    """
    with figure(path, width_in=width_in, height_in=height_in) as (drawing, axes):
        axes.remove()
        yield drawing, drawing.subplots(rows, columns, squeeze=False, **more)


def markers(axes: Axes, places: Any, shares: Any, errors: Any, index: int, **more: Any) -> None:
    """Draw shares in [0, 1] as percent with their errors, in the colour and the marker of an index."""
    style = {"color": COLOURS[index], "marker": MARKERS[index], "linestyle": "none", "capsize": 2}
    axes.errorbar(places, 100 * shares, yerr=100 * errors, **(style | more))


def legend_below(
    drawing: Figure, panel: Axes, columns: int | None = None, place: str = "outside lower center"
) -> None:
    """Put one panel's legend below all of them: each label once, side by side unless `columns` says less."""
    handles, labels = panel.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    drawing.legend(shown.values(), shown.keys(), loc=place, ncols=columns or len(shown))

"""The house style of plots: colour-blind safe, told apart by markers too, readable in print."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sysmt.files import written_whole

__all__ = ["COLOURS", "FLOAT_GREY", "LEAST_SPAN_POINTS", "MARKERS", "figure"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito's palette, which the common kinds of colour blindness tell apart."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")

FLOAT_GREY = "#555555"

LEAST_SPAN_POINTS = 2.0
"""Least height of an accuracy axis, in percentage points."""

_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.markersize": 5,
    "lines.linewidth": 1.4,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
}


@contextlib.contextmanager
def figure(path: str | Path, width_in: float = 5.5, height_in: float = 3.5) -> Iterator[tuple[Figure, Axes]]:
    """Hand out a figure in the house style, and save it as PNG, whole or not at all, at the end.

    Parameters
    ----------
    path : str or Path
        Ends in ``.png``.
    width_in, height_in : float
        Size in inches.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    with mpl.rc_context(_STYLE):
        drawing = Figure(figsize=(width_in, height_in))  # without pyplot: no state, no display
        yield drawing, drawing.add_subplot()
        with written_whole(path) as temporary:
            drawing.savefig(temporary, format="png")

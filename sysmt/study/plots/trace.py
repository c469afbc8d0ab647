"""Plots of one traced tile: where the collisions are, and how busy the array is over time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from sysmt.hw.activity import Activity
from sysmt.study.plots.style import COLOURS, figure

__all__ = ["pe_table", "plot_pe_collisions", "plot_utilization"]


def pe_table(activity: Activity) -> pd.DataFrame:
    """Tabulate what each PE did: a row per PE.

    Returns
    -------
    DataFrame
        ``row``, ``col``; ``slots`` that the PE worked on, ``active_slots`` with an active thread,
        ``collisions`` with two or more; ``collision_rate`` per slot, in [0, 1], 0 for PEs without slots.
    """
    row, col = np.indices(activity.busy_rc.shape)
    slots, collisions = activity.busy_rc.ravel(), activity.collisions_rc.ravel()
    return pd.DataFrame(
        {
            "row": row.ravel(),
            "col": col.ravel(),
            "slots": slots,
            "active_slots": activity.active_rc.ravel(),
            "collisions": collisions,
            "collision_rate": collisions / np.maximum(slots, 1),
        }
    )


def plot_pe_collisions(pes: pd.DataFrame, path: str | Path, title: str = "") -> None:
    """Draw the collision rate of each PE, in percent of its slots, as a map of the array.

    PEs without a slot (outside of an edge tile) stay empty.

    Parameters
    ----------
    pes : DataFrame
        As `pe_table` makes it.
    path : str or Path
    title : str
    """
    rate = pes["collision_rate"].where(pes["slots"] > 0)
    grid = pes.assign(rate=100 * rate).pivot(index="row", columns="col", values="rate")
    with figure(path, width_in=5.0, height_in=4.2) as (drawing, axes):
        image = axes.imshow(grid.to_numpy(), cmap="cividis", vmin=0, interpolation="nearest")
        bar = drawing.colorbar(image, ax=axes)
        bar.set_label("slots with a collision, %")
        axes.grid(visible=False)
        axes.set_xlabel("PE column (output channels)")
        axes.set_ylabel("PE row (output pixels)")
        axes.set_title(title)


def plot_utilization(cycles: pd.DataFrame, pes: int, path: str | Path, title: str = "") -> None:
    """Draw the share of PEs at work over time, in percent: with a slot, active, in a collision.

    Parameters
    ----------
    cycles : DataFrame
        As `sysmt.hw.trace.TileTrace.write_csv` writes it.
    pes : int
        PEs of the array.
    path : str or Path
    title : str
    """
    shown = (
        ("busy_pes", "with a slot", "-"),
        ("active_pes", "with an active thread", "--"),
        ("collisions", "with a collision", ":"),
    )
    with figure(path, width_in=7.5, height_in=3.2) as (_, axes):
        for colour, (column, label, line) in zip(COLOURS, shown, strict=False):
            axes.step(
                cycles["cycle"],
                100 * cycles[column] / pes,
                where="post",
                color=colour,
                linestyle=line,
                label=label,
            )
        draining = cycles["cycle"][cycles["phase"] == "drain"]
        if len(draining):
            axes.axvspan(draining.min(), draining.max() + 1, color="#dddddd", label="draining")
        axes.set_ylim(0, 105)
        axes.set_xlabel("cycle of the tile")
        axes.set_ylabel("PEs, %")
        axes.set_title(title)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

"""`sysmt plot`: draw a run's plots again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sysmt.cli.app import say

__all__ = ["plot"]


def plot(
    directory: Annotated[Path, typer.Argument(help="Directory that `sysmt run` wrote.", metavar="DIR")],
    title: Annotated[
        str | None, typer.Option(help="Title of the plots.", show_default="model, data and policy")
    ] = None,
) -> None:
    """Draw the plots of a run again, from its summary.csv and layers.csv."""
    from sysmt.study.plots import draw_run

    for path in draw_run(directory, title):
        say(f"drawn: {path}")

"""`sysmt plot`: draw a run's plots again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sysmt.cli.app import say

__all__ = ["plot"]


def plot(
    directory: Annotated[
        Path, typer.Argument(help="Directory that `sysmt run`, `sweep` or `search` wrote.", metavar="DIR")
    ],
    title: Annotated[
        str | None, typer.Option(help="Title of the plots.", show_default="model, data and policy")
    ] = None,
) -> None:
    """Draw the plots of a run, sweep or search again, from its tables."""
    from sysmt.study.plots.run import draw_run
    from sysmt.study.plots.study import draw_study

    is_study = (directory / "points.csv").is_file()
    for path in draw_study(directory, title or "") if is_study else draw_run(directory, title):
        say(f"drawn: {path}")

"""Tables of an experiment: figures as text, Markdown, and the files that follow from the points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from common.networks import Workload
from sysmt.study.ledger import Ledger


def percent(share: float, digits: int = 2) -> str:
    """Write a share in [0, 1] as percent."""
    return f"{100 * share:.{digits}f}"


def signed(difference: float) -> str:
    """Write a difference of shares as percentage points with their sign; zero is +0.00."""
    return f"{round(100 * difference, 2) + 0.0:+.2f}"


def give_or_take(text: str, error: float) -> str:
    """Write a value with its standard error, a share in [0, 1], in percentage points."""
    return f"{text} ± {percent(error)}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a Markdown table whose columns line up in plain text, too: the first is text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if not index else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)]) + "\n"


def publish(
    ledger: Ledger,
    name: str,
    networks: Sequence[Workload],
    table: pd.DataFrame,
    layout_of: Callable[[pd.DataFrame, str], str],
    draw: Callable[[pd.DataFrame, Path, str], None],
) -> None:
    """Write and print what follows from the points of some networks: NAME.md, NAME.png, NAME-2.png ...

    Parameters
    ----------
    ledger : Ledger
    name : str
    networks : sequence of Workload
    table : DataFrame
        With a column ``network``.
    layout_of : callable
        Takes the table and a network's name; returns that network's part of NAME.md.
    draw : callable
        Takes that network's rows, a path and its name.
    """
    layout = "\n".join(layout_of(table, network.name) for network in networks)
    ledger.write_text(f"{name}.md", layout)
    for index, network in enumerate(networks):
        path = ledger.path / (f"{name}-{index + 1}.png" if index else f"{name}.png")
        draw(table[table["network"] == network.name], path, network.name)
    print(layout)

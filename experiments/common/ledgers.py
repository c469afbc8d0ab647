"""How an experiment opens its ledger, or the directory of its studies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sysmt.cli.app import say
from sysmt.progress import Bar
from sysmt.study.ledger import Ledger
from sysmt.study.run_directory import provenance
from sysmt.study.store import Point


class Measured(Protocol):
    """What points are measured of: a network with its images, or images to train on."""

    @property
    def name(self) -> str:
        """What tables and figures call it."""

    @property
    def key(self) -> str:
        """Short, for file names."""

    def facts(self) -> dict[str, Any]:
        """Return what the points depend on."""

    def remarks(self) -> dict[str, Any]:
        """Return what stands beside it, for the record."""


@contextlib.contextmanager
def open_ledger(
    name: str,
    measured: Sequence[Measured],
    keys: tuple[str, ...],
    out: Path | None,
    preset: str | None,
    quick: bool,
    **settings: Any,
) -> Iterator[Ledger]:
    """Open the ledger of an experiment, and say at the end where its results are.

    Parameters
    ----------
    name : str
    measured : sequence of Measured
    keys : tuple of str
        Columns that tell its points apart.
    out : Path or None
        By default a directory in results/ named after the experiment and what is run.
    preset, quick
        As given on the command line.
    **settings
        What the points depend on besides the facts of what is measured.
    """
    kind = preset.partition(":")[0] if preset else measured[0].key
    with Ledger(out or _place(f"{name}-{kind}", quick), name, settings, keys) as ledger:
        for one in measured:
            ledger.identify(one.name, one.facts(), one.remarks())
        try:
            yield ledger
        except KeyboardInterrupt:
            say("stopped; the same command goes on from here", "yellow")
            raise
        print(
            f"{len(ledger.points())} points in {ledger.seconds:.0f} s, CPU time {ledger.cpu_seconds:.0f} s; "
            f"results are in {ledger.path}"
        )


def open_studies(name: str, out: Path | None, quick: bool) -> Path:
    """Make the directory of an experiment whose points are in studies; it says what it was made by."""
    path = out or _place(name, quick)
    path.mkdir(parents=True, exist_ok=True)
    (path / "made_by.txt").write_text("".join(f"{k} = {v}\n" for k, v in provenance().items()))
    return path


def teller(bar: Bar, name: str) -> Callable[[Point, Mapping[str, Any]], None]:
    """Return what a study calls after each point: it advances the bar and tells speedup and accuracy."""

    def on_point(point: Point, measured: Mapping[str, Any]) -> None:
        bar.advance(1, f"{name}: {measured['speedup']:.2f}x {100 * measured['top1']:.1f} %")

    return on_point


def slug(text: str) -> str:
    """Return a text as a part of a file's name."""
    return "".join(sign if sign.isalnum() else "-" for sign in text.lower())


def _place(name: str, quick: bool) -> Path:
    return Path("results") / f"{name}{'-quick' if quick else ''}"

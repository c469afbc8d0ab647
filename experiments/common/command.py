"""The command line of an experiment: the options that all take, lists among them, and how it starts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from sysmt.cli import options
from sysmt.cli.app import say
from sysmt.config import RECALIBRATION_MODES
from sysmt.errors import ConfigError, SysmtError, nearest

OPTIONS = (
    *options.NETWORK,
    *options.ARRAY,
    *options.MACHINE,
    "images",
    "calibration_images",
    "recalibration_images",
)
"""Choices of `RunConfig` that every experiment takes."""

Preset = Annotated[
    str | None,
    typer.Option(
        help="shared, or shared:NAME,NAME: networks and images in $SYSMT_DATA or ../shared/data.",
        metavar="NAME",
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help="Few images and points: a trial in a minute or two.")]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Directory for the results; the same command goes on with what it finds there.",
        metavar="DIR",
        show_default="results/EXPERIMENT-MODEL",
    ),
]
Mode = Annotated[str, typer.Option(help=f"Recalibration: {', '.join(RECALIBRATION_MODES)}.", metavar="MODE")]

Number = TypeVar("Number", int, float)


def names_in(text: str | None, field: str, known: Iterable[str], default: Iterable[str]) -> tuple[str, ...]:
    """Read a list such as ``population,final``; in the order of `known`, each name once."""
    allowed = tuple(known)
    wanted = default if text is None else [part.strip() for part in text.split(",")]
    for name in wanted:
        if name not in allowed:
            raise ConfigError(
                f"{field}={text!r}: {name!r} is unknown{nearest(name, allowed)}; "
                f"allowed: {', '.join(allowed)}"
            )
    return tuple(name for name in allowed if name in wanted)


def numbers_in(text: str, field: str, kind: Callable[[str], Number], such_as: str) -> tuple[Number, ...]:
    """Read a list of numbers such as ``8,6,4``, in the order in which it stands there."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{field}={text!r} is no list of numbers, such as {such_as}") from None


def main(command: Callable[..., None]) -> None:
    """Run an experiment's command line; an error is one line and exit code 2."""
    try:
        typer.run(command)
    except SysmtError as error:
        say(f"error: {' '.join(str(error).split())}", "bold red")
        sys.exit(2)

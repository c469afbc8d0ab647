"""What the experiments share: their options, the networks they run on, and how they start."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import shared_data
import typer

from sysmt.cli import options
from sysmt.cli.app import say
from sysmt.errors import ConfigError, SysmtError
from sysmt.study.ledger import Ledger
from sysmt.study.run_config import RunConfig
from sysmt.study.workload import OpenWorkload

OPTIONS = (
    *options.NETWORK,
    *options.ARRAY,
    *options.MACHINE,
    "images",
    "calibration_images",
    "recalibration_images",
)
"""Choices of `RunConfig` that every experiment takes."""

QUICK = {"images": 200, "calibration_images": 256, "recalibration_images": 512}
"""What ``--quick`` makes of them, where they are not given."""

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


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network with its weights and its images.

    Attributes
    ----------
    name : str
        What tables and figures call it.
    config : RunConfig
    prepare : callable
        Unpacks or trains what `config` names, where that is still to be done.
    key : str
        Short, for file names; by default the model's name.
    """

    name: str
    config: RunConfig
    prepare: Callable[[], object] = lambda: None
    key: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.key or self.config.model)

    def open(self, ledger: Ledger) -> OpenWorkload:
        """Open it, and make sure that the points in `ledger` are its own."""
        self.prepare()
        subject = OpenWorkload(self.config)
        ledger.identify(self.name, subject.identity())
        return subject


def workloads(
    chosen: Mapping[str, Any], preset: str | None, quick: bool, shared: tuple[str, ...], **defaults: Any
) -> list[Workload]:
    """Decide which networks an experiment runs on.

    Parameters
    ----------
    chosen : mapping
        `OPTIONS` that stand on the command line.
    preset : str or None
        ``"shared"``, ``"shared:NAME,NAME"`` or None.
    quick : bool
    shared : tuple of str
        The networks of `shared_data.NETWORKS` that ``"shared"`` alone stands for.
    **defaults
        Values of `RunConfig` that the experiment prefers to its defaults.
    """
    values = {**defaults, **(QUICK if quick else {}), **chosen}
    if preset is None:
        config = RunConfig(**values)
        return [Workload(config.model, config)]
    kind, _, names = preset.partition(":")
    if kind != "shared":
        raise ConfigError(f"preset={preset!r} is unknown; allowed: shared, shared:NAME,NAME")
    clash = [name for name in ("model", "weights", "data", "train_data") if name in chosen]
    if clash:
        raise ConfigError(f"--preset brings networks and images of its own; leave out --{clash[0]}")
    keys = names.split(",") if names else shared
    networks = {key: shared_data.network(key) for key in keys}
    return [
        Workload(one.title, RunConfig(**(values | one.values())), one.prepare, key)
        for key, one in networks.items()
    ]


@contextlib.contextmanager
def open_ledger(
    name: str,
    networks: list[Workload],
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
    networks : list of Workload
    keys : tuple of str
        Columns that tell its points apart.
    out : Path or None
        By default a directory in results/ named after the experiment and what is run.
    preset, quick
        As given on the command line.
    **settings
        What the points depend on besides the networks' own configurations.
    """
    kind = preset.partition(":")[0] if preset else networks[0].config.model
    path = out or Path("results") / f"{name}-{kind}{'-quick' if quick else ''}"
    with Ledger(path, name, settings, keys) as ledger:
        for network in networks:
            every = [field.name for field in dataclasses.fields(network.config)]
            record = dict.fromkeys(every, "none") | network.config.to_record()
            remarks = {key: record.pop(key) for key in _REMARKS if key in record}
            ledger.identify(network.name, record, remarks)
        try:
            yield ledger
        except KeyboardInterrupt:
            say("stopped; the same command goes on from here", "yellow")
            raise
        print(
            f"{len(ledger.points())} points in {ledger.seconds:.0f} s, CPU time {ledger.cpu_seconds:.0f} s; "
            f"results are in {ledger.path}"
        )


_REMARKS = ("weights", "data", "train_data", "cpu_threads")
"""Of a network's configuration, what no point depends on: weights and images are told by their hashes."""


def percent(share: float, digits: int = 2) -> str:
    """Write a share in [0, 1] as percent."""
    return f"{100 * share:.{digits}f}"


def signed(difference: float) -> str:
    """Write a difference of shares as percentage points with their sign; zero is +0.00."""
    return f"{round(100 * difference, 2) + 0.0:+.2f}"


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


def main(command: Callable[..., None]) -> None:
    """Run an experiment's command line; an error is one line and exit code 2."""
    try:
        typer.run(command)
    except SysmtError as error:
        say(f"error: {' '.join(str(error).split())}", "bold red")
        sys.exit(2)

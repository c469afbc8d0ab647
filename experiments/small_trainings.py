"""What the experiments that train small networks from scratch share: their images, and one training each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import shared_data
import typer
from torch import nn

from sysmt.cli.app import say
from sysmt.errors import ConfigError, DivergedError, nearest
from sysmt.files import cache_directory
from sysmt.nn.data.labelled_images import ImageData, open_data
from sysmt.nn.networks.training import History, train
from sysmt.study.ledger import Ledger

Data = Annotated[
    str | None,
    typer.Option(
        help="Images to learn: digits, cifar10:DIR, npz:FILE or imagefolder:DIR.",
        metavar="SPEC",
        show_default="digits",
    ),
]
SmallPreset = Annotated[
    str | None,
    typer.Option(
        help="shared: the CIFAR-10 JPEG images in $SYSMT_DATA or ../shared/data, 5,000 of them for training "
        "and 1,000 for tests.",
        metavar="NAME",
    ),
]
Epochs = Annotated[
    int | None, typer.Option(help="Passes over the training images.", min=1, show_default="30")
]
TrainingImages = Annotated[
    int | None, typer.Option(help="Training images.", min=2, show_default="all; 5,000 of the preset")
]
TEST_BATCH = 250


@dataclasses.dataclass(frozen=True)
class Images:
    """Images to train on, and how many.

    Attributes
    ----------
    title : str
        What tables and figures call them.
    data : ImageData
    images, test_images : int
    """

    title: str
    data: ImageData
    images: int
    test_images: int

    def facts(self) -> dict[str, Any]:
        """Return what the points depend on, for the ledger."""
        record = {"images": self.images, "test_images": self.test_images}
        return record | self.data.preprocessing.to_record() | {"fingerprint": self.data.fingerprint()}


def open_images(
    data: str | None,
    preset: str | None,
    images: int | None,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Images:
    """Open what ``--data`` or ``--preset`` name.

    Parameters
    ----------
    data, preset : str or None
        As given on the command line.
    images : int or None
        Training images; by default all of them, and 5,000 of the preset.
    mean, std : tuple of float
        Of the inputs' normalisation, per RGB channel; grey images take the first channel's.
    """
    if preset not in (None, "shared"):
        raise ConfigError(f"preset={preset!r} is unknown; allowed: shared")
    if preset and data:
        raise ConfigError("--preset brings images of its own; leave out --data")
    test_images = None
    if preset:
        spec, title = f"cifar10:{shared_data.unpack('cifar10-jpeg')}", "CIFAR-10 JPEG"
        images, test_images = images or 5000, 1000
    else:
        spec = title = data or "digits"
    opened = open_data(spec, cache_dir=cache_directory() / "decoded" if preset else None)
    channels = opened.preprocessing.channels
    preprocessing = opened.preprocessing.replace(mean=mean[:channels], std=std[:channels])
    available = opened.images("train")
    return Images(
        title,
        dataclasses.replace(opened, preprocessing=preprocessing),
        min(images or available, available),
        min(test_images or opened.images("test"), opened.images("test")),
    )


def learn(
    model: nn.Module, images: Images, ledger: Ledger, point: Mapping[str, Any], **options: Any
) -> History | None:
    """Train a network, going on with a training of the same point that was stopped.

    Parameters
    ----------
    model : nn.Module
    images : Images
    ledger : Ledger
        Its directory keeps the checkpoint until `finish` is called.
    point : mapping
        The point's key.
    **options
        Of `sysmt.nn.networks.training.train`.

    Returns
    -------
    History or None
        None if the loss stopped being a number.
    """
    test = images.data.loader("test", images=images.test_images, batch_size=TEST_BATCH)
    try:
        return train(
            model,
            images.data,
            images=images.images,
            test=test,
            checkpoint=checkpoint_of(ledger, point),
            progress=False,
            **options,
        )
    except DivergedError:
        return None


def checkpoint_of(ledger: Ledger, point: Mapping[str, Any]) -> Path:
    """Return where the training of a point is kept while it is under way."""
    name = "-".join(str(value) for value in point.values())
    return ledger.path / f"training-{''.join(c if c.isalnum() else '-' for c in name.lower())}.pt"


def finish(ledger: Ledger, point: Mapping[str, Any]) -> None:
    """Drop the checkpoint of a point that is in the ledger."""
    checkpoint_of(ledger, point).unlink(missing_ok=True)


@contextlib.contextmanager
def open_small_ledger(
    name: str, path: Path, settings: Mapping[str, Any], keys: tuple[str, ...], images: Images
) -> Iterator[Ledger]:
    """Open an experiment's ledger for one set of images, and say at the end where its results are."""
    with Ledger(path, name, settings, keys) as ledger:
        ledger.identify(images.title, images.facts())
        try:
            yield ledger
        except KeyboardInterrupt:
            say("stopped; the same command goes on from here", "yellow")
            raise
        print(
            f"{len(ledger.points())} trainings in {ledger.seconds:.0f} s, CPU time "
            f"{ledger.cpu_seconds:.0f} s; results are in {ledger.path}"
        )


def parse_list(text: str | None, name: str, default: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Read a list such as ``population,final`` of the command line."""
    wanted = tuple(default) if text is None else tuple(dict.fromkeys(text.split(",")))
    for one in wanted:
        if one not in known:
            raise ConfigError(
                f"{name}={text!r}: {one!r} is unknown{nearest(one, known)}; allowed: {', '.join(known)}"
            )
    return wanted

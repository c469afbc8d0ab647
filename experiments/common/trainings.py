"""What the experiments that train small networks from scratch share: options, images, trainings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from torch import nn

from common import preset as presets
from common.ledgers import slug
from common.points import Key, still_missing
from sysmt.errors import ConfigError, DivergedError
from sysmt.files import cache_directory
from sysmt.nn.data.labelled_images import ImageData, open_data
from sysmt.nn.networks.training import History, train
from sysmt.progress import progress_bar
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
Runs = Annotated[int, typer.Option(help="Trainings of each, seeds 0, 1, ...", min=1)]
BatchSize = Annotated[int, typer.Option(help="Images of a batch; the papers' have 100.", min=2)]
LearningRate = Annotated[float, typer.Option(help="Learning rate, at first.")]

TEST_BATCH = 250
EPOCHS, QUICK_EPOCHS = 30, 4


@dataclasses.dataclass(frozen=True)
class Images:
    """Images to train on, and how many.

    Attributes
    ----------
    name : str
        What tables and figures call them.
    data : ImageData
    images, test_images : int
    key : str
        For file names.
    """

    name: str
    data: ImageData
    images: int
    test_images: int
    key: str = "digits"

    def facts(self) -> dict[str, Any]:
        """Return what the points depend on, for the ledger."""
        record = {"images": self.images, "test_images": self.test_images}
        return record | self.data.preprocessing.to_record() | {"fingerprint": self.data.fingerprint()}

    def remarks(self) -> dict[str, Any]:
        """Return nothing: all about them is a fact."""
        return {}


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
        spec, name = f"cifar10:{presets.unpack('cifar10-jpeg')}", "CIFAR-10 JPEG"
        images, test_images = images or 5000, 1000
    else:
        spec = name = data or "digits"
    opened = open_data(spec, cache_dir=cache_directory() / "decoded" if preset else None)
    channels = opened.preprocessing.channels
    preprocessing = opened.preprocessing.replace(mean=mean[:channels], std=std[:channels])
    available = opened.images("train")
    return Images(
        name,
        dataclasses.replace(opened, preprocessing=preprocessing),
        min(images or available, available),
        min(test_images or opened.images("test"), opened.images("test")),
    )


def recipe(epochs: int | None, batch_size: int, lr: float, quick: bool) -> dict[str, Any]:
    """Return these options as `sysmt.nn.networks.training.train` takes them."""
    usual = QUICK_EPOCHS if quick else EPOCHS
    return {"epochs": epochs or usual, "batch_size": batch_size, "lr": lr}


def learn(model: nn.Module, images: Images, ledger: Ledger, point: Key, **options: Any) -> History | None:
    """Train a network, going on with a training of the same point that was stopped.

    Parameters
    ----------
    model : nn.Module
    images : Images
    ledger : Ledger
        Its directory keeps the checkpoint until the point is noted there.
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
            checkpoint=_checkpoint_of(ledger, point),
            progress=False,
            **options,
        )
    except DivergedError:
        return None


def _checkpoint_of(ledger: Ledger, point: Key) -> Path:
    """Return where the training of a point is kept while it is under way."""
    return ledger.path / f"training-{slug('-'.join(map(str, point.values())))}.pt"


def train_missing(
    points: Sequence[Key],
    ledger: Ledger,
    train_one: Callable[[Key], tuple[dict[str, Any], dict[str, pd.DataFrame], str]],
) -> None:
    """Train what is missing, point by point, and note each in the ledger.

    Parameters
    ----------
    points : sequence of mapping
    ledger : Ledger
    train_one : callable
        Takes a point; returns its values, further tables, and what to say of it.
    """
    with progress_bar("trainings", len(points), "trainings") as bar:
        for point in still_missing(points, ledger, bar):
            values, tables, note = train_one(point)
            ledger.add({**point, **values}, tables=tables)
            _checkpoint_of(ledger, point).unlink(missing_ok=True)
            bar.advance(1, f"{' '.join(map(str, point.values()))}: {note}")

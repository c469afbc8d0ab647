"""The networks and images of ``--preset shared``: CIFAR-10 ResNets and a ResNet-18 on Tiny-ImageNet-100.

They lie in ``$SYSMT_DATA`` or in ../shared/data beside the repository, and are no part of it. Archives are
unpacked, and ResNet-20 is fine-tuned on the JPEG images, once: both are kept in sysmt's cache directory.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from sysmt.errors import ConfigError, DataError, nearest
from sysmt.files import cache_directory
from sysmt.nn.data.labelled_images import open_data
from sysmt.nn.networks.checkpoints import save_weights
from sysmt.nn.networks.models import load_model
from sysmt.nn.networks.training import train

FINE_TUNING = {"epochs": 3, "lr": 0.03}
"""Of ResNet-20 on the 50,000 JPEG training images: SGD, one cycle up to this learning rate."""


@dataclasses.dataclass(frozen=True)
class SharedNetwork:
    """One network of the preset.

    Attributes
    ----------
    title : str
        What tables call it.
    model : str
    weights, data : callable
        Return the checkpoint's path and the data specification.
    prepare : callable
        Makes both where they are made here.
    """

    title: str
    model: str
    weights: Callable[[], Path]
    data: Callable[[], str]
    prepare: Callable[[], object] = lambda: None

    def values(self) -> dict[str, str]:
        """Return the values of `RunConfig` that open it, once it is prepared."""
        return {"model": self.model, "weights": str(self.weights()), "data": self.data()}


def network(name: str) -> SharedNetwork:
    """Return a network of `NETWORKS` by name."""
    if name not in NETWORKS:
        raise ConfigError(
            f"--preset has no network {name!r}{nearest(name, NETWORKS)}; it has {', '.join(NETWORKS)}"
        )
    return NETWORKS[name]


def shared(path: str) -> Path:
    """Find a file of the shared data.

    Raises
    ------
    ConfigError
        If it is not there.
    """
    root = Path(os.environ.get("SYSMT_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not (root / path).is_file():
        raise ConfigError(f"--preset shared needs {path} in $SYSMT_DATA or ../shared/data; {root} lacks it")
    return root / path


def unpacked(name: str) -> Path:
    """Return where the archives of a data set are or will be unpacked, side by side."""
    return cache_directory() / "unpacked" / name


def unpack(name: str) -> Path:
    """Unpack the archives of a data set into the cache, unless that is done already."""
    target = unpacked(name)
    if target.is_dir():
        return target
    archives = [shared(path) for path in ARCHIVES[name]]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}-"))
    try:
        for archive in archives:
            with tarfile.open(archive) as tar:
                tar.extractall(partial, filter="data")
        partial.chmod(0o755)
        partial.rename(target)  # whole or not at all
    except (OSError, tarfile.TarError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not target.is_dir():  # another process may have been faster
            raise DataError(f"{archives[0].parent} cannot be unpacked to {target}: {error}") from error
    return target


def fine_tuned() -> Path:
    """Return the checkpoint that `fine_tune` writes."""
    return cache_directory() / "resnet20-cifar10-jpeg.pt"


def fine_tune() -> None:
    """Fine-tune ResNet-20 on the JPEG images, whose artefacts the published weights do not know.

    Goes on where it was stopped, and is done only once.
    """
    where = unpack("cifar10-jpeg")
    path = fine_tuned()
    if path.is_file():
        return
    data = open_data(f"cifar10:{where}")
    model = load_model("resnet20", shared("weights/resnet20-12fca82f.th"))
    train(model, data, **FINE_TUNING, checkpoint=path.with_name("resnet20-cifar10-jpeg-training.pt"))
    save_weights(model, path, {"model": "resnet20", **FINE_TUNING})


ARCHIVES = {
    "cifar10-jpeg": ("cifar10/train-jpeg.tar", "cifar10/test-jpeg.tar"),
    "tiny-imagenet-100": ("tiny-imagenet-100/train.tar", "tiny-imagenet-100/val.tar"),
}
"""What is unpacked to which directory of the cache."""

NETWORKS = {
    "resnet20": SharedNetwork(
        "ResNet-20, CIFAR-10",
        "resnet20",
        lambda: shared("weights/resnet20-12fca82f.th"),
        lambda: f"npz:{shared('cifar10/lossless.npz')}",
    ),
    "resnet32": SharedNetwork(
        "ResNet-32, CIFAR-10",
        "resnet32",
        lambda: shared("weights/resnet32-d509ac18.th"),
        lambda: f"npz:{shared('cifar10/lossless.npz')}",
    ),
    "resnet20-jpeg": SharedNetwork(
        "ResNet-20, CIFAR-10 JPEG",
        "resnet20",
        fine_tuned,
        lambda: f"cifar10:{unpacked('cifar10-jpeg')}",
        fine_tune,
    ),
    "resnet18-tiny": SharedNetwork(
        "ResNet-18, Tiny-ImageNet-100",
        "resnet18",
        lambda: shared("weights/resnet18-tiny100-fp16.pt"),
        lambda: f"imagefolder:{unpacked('tiny-imagenet-100')}",
        lambda: unpack("tiny-imagenet-100"),
    ),
}

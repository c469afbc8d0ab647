"""The kinds of data sets that `sysmt.nn.data.labelled_images.open_data` reads, each as it lies there."""

from __future__ import annotations

import dataclasses
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch

from sysmt.errors import DataError, nearest
from sysmt.nn.data.pixels import find_images
from sysmt.nn.data.preprocessing import add_noise, pad_crop_flip, preset

__all__ = ["RawData", "read_data"]

_MAX_CLASSES = 100_000


@dataclasses.dataclass
class RawData:
    """A data set before its preprocessing is known: arrays or lists of files, by split.

    Attributes
    ----------
    arrays : dict
        Split to pixels, uint8 (N, C, H, W), and labels, int64 (N,).
    files : dict
        Split to the directory, the paths of the images and their labels, int64 (N,).
    class_names : tuple of str or None
        In the order of the labels.
    preset : str
        Preprocessing that suits it, or ``"auto"``.
    """

    arrays: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    files: dict[str, tuple[Path, list[Path], np.ndarray]] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    preset: str = "auto"

    def labels(self) -> list[np.ndarray]:
        """Labels of each split."""
        return [pair[1] for pair in self.arrays.values()] + [triple[2] for triple in self.files.values()]


def read_data(spec: str) -> RawData:
    """Read what a specification names; `labelled_images.open_data` raises the same errors."""
    kind, _, path = str(spec).partition(":")
    kinds = {
        "digits": "digits",
        "digits32": "digits32",
        "cifar10": "cifar10:DIR",
        "npz": "npz:FILE",
        "imagefolder": "imagefolder:DIR",
    }
    if kind not in kinds:
        raise DataError(
            f"data {spec!r} is unknown{nearest(kind, kinds)}; allowed: {', '.join(kinds.values())}"
        )
    if kind in ("digits", "digits32"):
        if path:
            raise DataError(f"data {spec!r} takes no path; write {kind!r}")
        return _read_digits(kind)
    if not path:
        raise DataError(f"data {spec!r} needs a path; write {kinds[kind]}")
    where = Path(path).expanduser()
    if not where.exists():
        raise DataError(f"{where} is missing (data {spec!r})")
    if kind == "npz":
        return _read_npz(where)
    if not where.is_dir():
        raise DataError(f"{where} is no directory (data {spec!r})")
    if kind == "cifar10" and not (where / "train").is_dir():
        return _read_cifar10(where)
    return _read_folders(where)


def _read_digits(kind: str) -> RawData:
    """Split scikit-learn's digits, scale them to 16 × 16, and shift and smudge the test images.

    ``"digits32"`` sets them into the middle of 32 × 32 black pixels first. Every third image of a class
    is a test image. Training images get their shifts and noise from the augmentation; a test image has
    its own, always the same.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(np.round(digits.images * (255 / 16))).unsqueeze(1)
    large = torch.nn.functional.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
    recipe = preset(kind)
    margin = (recipe.image_size - large.shape[-1]) // 2
    pixels = torch.nn.functional.pad(large.round().to(torch.uint8), (margin, margin, margin, margin))
    labels = digits.target.astype(np.int64)
    rank = np.empty_like(labels)
    for digit in range(10):
        rank[labels == digit] = np.arange(np.count_nonzero(labels == digit))
    is_test = rank % 3 == 2
    rng = np.random.default_rng(0)
    count = int(is_test.sum())
    offsets = torch.from_numpy(rng.integers(0, 2 * recipe.pad_pixels + 1, (count, 2)))
    test = pad_crop_flip(pixels[torch.from_numpy(is_test)], recipe.pad_pixels, offsets)
    test = add_noise(test, recipe.noise_std, rng)
    return RawData(
        arrays={
            "train": (pixels[torch.from_numpy(~is_test)].numpy(), labels[~is_test]),
            "test": (test.numpy(), labels[is_test]),
        },
        class_names=tuple("0123456789"),
        preset=kind,
    )


def _read_npz(path: Path) -> RawData:
    try:
        with np.load(path, allow_pickle=False) as content:
            found = {key: content[key] for key in content.files if key[1:] in ("_train", "_test")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(f"{path} is no readable .npz file of plain arrays ({error})") from error
    raw = RawData()
    for split in ("test", "train"):
        x, y = found.get(f"x_{split}"), found.get(f"y_{split}")
        if x is None and y is None:
            continue
        if x is None or y is None:
            raise DataError(f"{path} has {'y' if x is None else 'x'}_{split} without its counterpart")
        raw.arrays[split] = (
            _checked_pixels(x, f"{path}: x_{split}"),
            _checked_labels(y, len(x), f"{path}: y_{split}"),
        )
    if not raw.arrays:
        raise DataError(f"{path} has none of the arrays x_test, y_test, x_train, y_train")
    shapes = {pixels.shape[1:] for pixels, _ in raw.arrays.values()}
    if len(shapes) > 1:
        raise DataError(f"{path}: x_train and x_test hold images of different shapes")
    return raw


def _checked_pixels(x: np.ndarray, name: str) -> np.ndarray:
    """Turn uint8 (N, H, W, C) or (N, H, W) into (N, C, H, W)."""
    if (
        x.dtype != np.uint8
        or x.ndim not in (3, 4)
        or (x.ndim == 4 and x.shape[3] not in (1, 3))
        or not x.size
    ):
        raise DataError(
            f"{name} has dtype {x.dtype} and shape {x.shape}; uint8 (N > 0, height, width, 1 or 3) is needed"
        )
    return np.ascontiguousarray(x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2))


def _checked_labels(y: np.ndarray, count: int, name: str) -> np.ndarray:
    if not np.issubdtype(y.dtype, np.integer) or y.shape != (count,):
        raise DataError(
            f"{name} has dtype {y.dtype} and shape {y.shape}; {count} integers are needed, one per image"
        )
    if int(y.min()) < 0 or int(y.max()) >= _MAX_CLASSES:
        raise DataError(
            f"{name} has labels from {y.min()} to {y.max()}; they must lie in 0..{_MAX_CLASSES - 1}"
        )
    return y.astype(np.int64)


def _read_cifar10(path: Path) -> RawData:
    from sysmt.nn.torchvision_import import torchvision

    root = path.parent if path.name == "cifar-10-batches-py" else path
    if not (root / "cifar-10-batches-py").is_dir():
        raise DataError(f"{path} has neither cifar-10-batches-py/ (the python version) nor train/ and test/")
    raw = RawData()
    for split in ("test", "train"):
        try:
            part = torchvision.datasets.CIFAR10(str(root), train=split == "train", download=False)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise DataError(f"{root / 'cifar-10-batches-py'} is incomplete or damaged: {error}") from error
        raw.arrays[split] = (
            _checked_pixels(part.data, f"{path} ({split})"),
            _checked_labels(np.asarray(part.targets), len(part.data), f"{path} ({split})"),
        )
        raw.class_names = tuple(part.classes)
    return raw


def _read_folders(root: Path) -> RawData:
    """Find train/ and val/ (or test/) with a folder per class, or class folders directly."""
    split_names = {"train": ("train",), "test": ("val", "test")}
    below = {
        split: next((root / name for name in names if (root / name).is_dir()), None)
        for split, names in split_names.items()
    }
    folders = {split: folder for split, folder in below.items() if folder is not None} or {"test": root}
    classes = {split: _class_folders(folder) for split, folder in folders.items()}
    names = max((tuple(found) for found in classes.values()), key=len)
    for split, found in classes.items():
        if strange := sorted(set(found) - set(names)):
            raise DataError(
                f"{folders[split]} has class folders that its counterpart lacks: {', '.join(strange[:3])}; "
                f"labels would not mean the same in both"
            )
    raw = RawData(class_names=names)
    for split, found in classes.items():
        paths = [path for name in found for path in found[name]]
        labels = [names.index(name) for name in found for _ in found[name]]
        raw.files[split] = (folders[split], paths, np.asarray(labels, dtype=np.int64))
    return raw


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    """Image files by class folder, both sorted by name."""
    found = {
        entry.name: find_images(entry)
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and not entry.name.startswith(".")
    }
    if not found:
        loose = "; images must lie in a folder per class" if find_images(folder) else ""
        raise DataError(f"{folder} has no class folders{loose}")
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        raise DataError(f"{folder / empty[0]} has no images")
    return found

"""The kinds of data sets that `sysmt.nn.data.labelled_images.open_data` reads, each as it lies there."""

from __future__ import annotations

import dataclasses
import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sysmt.archives import read_npz
from sysmt.errors import DataError, nearest
from sysmt.nn.data.pixels import find_images
from sysmt.nn.data.preprocessing import add_noise, pad_crop_flip, preset
from sysmt.nn.own_code import call_own, is_own_code, takes_own

__all__ = ["CLASSES_FILE", "RawData", "read_data"]

CLASSES_FILE = "classes.txt"
"""Names of all classes in the order of the labels, one a line, beside the folders with the images."""

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
    notes : list of str
        What was decided while reading.
    """

    arrays: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    files: dict[str, tuple[Path, list[Path], np.ndarray]] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    preset: str = "auto"
    notes: list[str] = dataclasses.field(default_factory=list)

    def relabel(self, names: tuple[str, ...]) -> RawData:
        """Return the same images labelled by another list of classes, which has all of these."""
        assert self.class_names is not None
        to = np.array([names.index(name) for name in self.class_names], dtype=np.int64)
        return dataclasses.replace(
            self,
            arrays={split: (pixels, to[labels]) for split, (pixels, labels) in self.arrays.items()},
            files={split: (root, paths, to[labels]) for split, (root, paths, labels) in self.files.items()},
            class_names=names,
        )

    def labels(self) -> list[np.ndarray]:
        """Labels of each split."""
        return [pair[1] for pair in self.arrays.values()] + [triple[2] for triple in self.files.values()]


def read_data(spec: str, classes: str | Path | Sequence[str] | None = None) -> RawData:
    """Read what a specification names, `classes` in the order given; see `labelled_images.open_data`."""
    if is_own_code(str(spec)):
        return _read_own(str(spec))
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
            f"data {spec!r} is unknown{nearest(kind, kinds)}; allowed: {', '.join(kinds.values())}, "
            "and your own as path/to/data.py:build"
        )
    if classes is not None and kind not in ("imagefolder", "cifar10"):
        raise DataError(f"classes are for image folders; data {spec!r} has labels that are numbers already")
    if kind in ("digits", "digits32"):
        if path:
            raise DataError(f"data {spec!r} takes no path; write {kind!r}")
        return _read_digits(kind)
    if not path:
        raise DataError(f"data {spec!r} needs a path; write {kinds[kind]}")
    where = Path(path).expanduser()
    if not os.path.exists(where):  # unlike Path's own, this takes names of any length
        raise DataError(f"{where} is missing (data {spec!r})")
    if kind == "npz":
        return _read_npz(where)
    if not where.is_dir():
        raise DataError(f"{where} is no directory (data {spec!r})")
    if kind == "cifar10" and not (where / "train").is_dir() and classes is None:
        return _read_cifar10(where)
    return _read_folders(where, classes)


def _read_own(spec: str) -> RawData:
    """Call the user's function, for each split if it has a parameter `split`, and keep its images."""
    raw = RawData()
    for split in ("test", "train"):
        made = call_own(spec, DataError, split=split)
        if made is None:
            continue
        if not hasattr(made, "__getitem__") or not hasattr(made, "__len__"):
            raise DataError(
                f"{spec} gave a {type(made).__name__}; a data set with a length and items is needed"
            )
        items = [made[index] for index in range(len(made))]
        if not items or not all(isinstance(item, Sequence) and len(item) == 2 for item in items):
            raise DataError(
                f"{spec} gave a {type(made).__name__} of {len(items)} items; (image, label) pairs are needed"
            )
        pixels = [np.asarray(image) for image, _ in items]
        shapes = Counter((image.shape, str(image.dtype)) for image in pixels)
        if len(shapes) > 1 or pixels[0].dtype != np.uint8:
            kinds = ", ".join(f"{shape} of {dtype}" for shape, dtype in list(shapes)[:2])
            raise DataError(
                f"{spec} gave images of {kinds}; PIL images or uint8 arrays (height, width, 1 or 3) of one "
                "size are needed, without transforms: scaling and normalising are the preprocessing's"
            )
        raw.arrays[split] = (
            _checked_pixels(np.stack(pixels), f"{spec} ({split})"),
            _checked_labels(np.asarray([label for _, label in items]), len(items), f"{spec} ({split})"),
        )
        names = getattr(made, "classes", None)
        raw.class_names = tuple(map(str, names)) if names is not None else raw.class_names
        if not takes_own(spec, "split", DataError):
            break
    if not raw.arrays:
        raise DataError(f"{spec} gave None for both splits; a data set is needed")
    return raw


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
        found = read_npz(path, lambda name: name[1:] in ("_train", "_test"))
    except (OSError, zipfile.BadZipFile) as error:
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


def _read_folders(root: Path, classes: str | Path | Sequence[str] | None) -> RawData:
    """Find train/ and val/ (or test/) with a folder per class, or class folders directly.

    Labels are positions in `classes`, in a file `CLASSES_FILE` below `root`, or else among the names of the
    split that has most.
    """
    split_names = {"train": ("train",), "test": ("val", "test")}
    below = {
        split: next((root / name for name in names if (root / name).is_dir()), None)
        for split, names in split_names.items()
    }
    folders = {split: folder for split, folder in below.items() if folder is not None} or {"test": root}
    found = {split: _class_folders(folder) for split, folder in folders.items()}
    if classes is None and os.path.isfile(root / CLASSES_FILE):
        classes = root / CLASSES_FILE
    if classes is None:
        names = max((tuple(split) for split in found.values()), key=len)
        where = "its counterpart"
    else:
        names = _class_names(classes, [name for split in found.values() for name in split])
        where = str(classes) if isinstance(classes, str | Path) else "the classes given"
    for split, own in found.items():
        if strange := sorted(set(own) - set(names)):
            raise DataError(
                f"{folders[split]} has class folders that {where} lacks: {', '.join(strange[:3])}"
                f"{nearest(strange[0], names)}; labels would not mean the same in both"
            )
    raw = RawData(class_names=names)
    if classes is not None:
        raw.notes.append(f"labels by the {len(names)} class names of {where}")
    position = {name: label for label, name in enumerate(names)}
    for split, own in found.items():
        paths = [path for name in own for path in own[name]]
        labels = [position[name] for name in own for _ in own[name]]
        raw.files[split] = (folders[split], paths, np.asarray(labels, dtype=np.int64))
    return raw


def _class_names(classes: str | Path | Sequence[str], folders: Sequence[str]) -> tuple[str, ...]:
    """Return names in the order of their labels, read from a file with one a line if it is a path.

    Where the folders are not named as whole lines are, the lines' first words count: lists of ImageNet's
    classes have an explanation behind each.
    """
    if isinstance(classes, str | Path):
        try:
            text = Path(classes).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{classes} is no readable list of classes ({error})") from error
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if not set(folders) <= set(names):
            first_words = [name.split()[0] for name in names]
            names = first_words if set(folders) <= set(first_words) else names
        where = str(classes)
    else:
        names, where = [str(name) for name in classes], "the list of classes"
    if not names:
        raise DataError(f"{where} is empty; a name for each class is needed, one a line")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{where} has {twice[0]!r} more than once; a class has one label")
    return tuple(names)


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
    owners: dict[Path, str] = {}
    for name, paths in found.items():
        for place in {path.parent.resolve() for path in paths}:
            other = owners.setdefault(place, name)
            if other != name:
                raise DataError(
                    f"{place} belongs to two classes, {other} and {name}, through links in {folder}; "
                    "its images cannot have both labels"
                )
    return found

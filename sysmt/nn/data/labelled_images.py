"""Labelled images by specification, such as ``"digits"``, ``"npz:FILE"`` or ``"imagefolder:DIR"``.

One object, `ImageData`, holds both splits and hands out loaders that give the same batches each time
they are iterated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sysmt.config import parse_count
from sysmt.errors import DataError
from sysmt.nn.data.pixels import FileImages, ImageSource, MemoryImages, image_extent
from sysmt.nn.data.preprocessing import (
    Preprocessing,
    add_noise,
    normalise,
    pad_crop_flip,
    pick_preset,
    preset,
)
from sysmt.nn.data.sources import RawData, read_data
from sysmt.nn.own_code import is_own_code

__all__ = ["ImageData", "Loader", "Split", "open_data"]

Split = Literal["train", "test"]

_log = logging.getLogger(__name__)


class Loader:
    """Batches of one split: an iterable of (float32 (N, C, S, S), int64 (N,)), the same each time.

    An image's augmentation follows from the seed and the image alone, whatever the batch size.

    Attributes
    ----------
    images : int
        Images per pass.
    num_classes : int
        Labels are below this number.
    class_names : tuple of str or None
        Where the data set names its classes, it has just these.
    """

    def __init__(
        self,
        source: ImageSource,
        preprocessing: Preprocessing,
        indices: np.ndarray,
        batch_size: int,
        augment: bool,
        seed: tuple[int, int],
        num_classes: int,
        class_names: tuple[str, ...] | None,
    ) -> None:
        self.images = len(indices)
        self.num_classes = num_classes
        self.class_names = class_names
        self._source, self._preprocessing, self._indices = source, preprocessing, indices
        self._batch_size, self._augment, self._seed = batch_size, augment, seed

    def __len__(self) -> int:
        """Batches per pass."""
        return -(-self.images // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        p = self._preprocessing
        rng = np.random.default_rng([*self._seed, 1])
        offsets = torch.from_numpy(rng.integers(0, 2 * p.pad_pixels + 1, (len(self._source), 2)))
        flips = torch.from_numpy(rng.random(len(self._source)) < 0.5)
        crop_seed = int(rng.integers(1 << 32)) if self._augment and p.random_resized_crop else None
        starts = range(self._batch_size, self.images, self._batch_size)
        for pixels, indices in self._source.batches(np.array_split(self._indices, starts), crop_seed):
            if self._augment:
                at = torch.from_numpy(indices)
                pixels = pad_crop_flip(pixels, p.pad_pixels, offsets[at], flips[at] if p.flip else None)
                if p.noise_std:
                    pixels = add_noise(pixels, p.noise_std, rng)
            yield normalise(pixels, p), torch.from_numpy(self._source.labels[indices])


@dataclasses.dataclass
class ImageData:
    """A data set with up to two splits, ``"train"`` and ``"test"`` (which evaluation uses).

    Attributes
    ----------
    name : str
        Kind and last part of the path, such as ``"npz:lossless"``.
    preprocessing : Preprocessing
    num_classes : int
    class_names : tuple of str or None
        In the order of the labels, where they are known.
    notes : list of str
        What was decided while opening, for the user to see.
    seed : int
        For loaders that are given none.
    """

    name: str
    preprocessing: Preprocessing
    num_classes: int
    class_names: tuple[str, ...] | None
    sources: Mapping[str, ImageSource] = dataclasses.field(repr=False)
    notes: list[str] = dataclasses.field(default_factory=list)
    seed: int = 0

    def has(self, split: Split) -> bool:
        """Whether the data set has images in this split."""
        return split in self.sources

    def images(self, split: Split) -> int:
        """Number of images in a split; 0 where it has none."""
        return len(self.sources[split]) if split in self.sources else 0

    def class_counts(self, split: Split) -> np.ndarray:
        """Images of each class in a split, int64 (num_classes,)."""
        return np.bincount(self._source(split).labels, minlength=self.num_classes)

    def skipped(self) -> list[Path]:
        """Files that were left out so far because they cannot be read."""
        return [path for s in self.sources.values() if isinstance(s, FileImages) for path in s.skipped]

    def fingerprint(self) -> str:
        """SHA-256 of the images and labels; of their files' names and sizes for image folders."""
        digest = hashlib.sha256()
        for split in sorted(self.sources):
            digest.update(f"{split} {self.sources[split].fingerprint()}\n".encode())
        return digest.hexdigest()

    def loader(
        self,
        split: Split,
        *,
        images: int | None = None,
        batch_size: int = 128,
        augment: bool = False,
        shuffle: bool | None = None,
        seed: int | None = None,
        epoch: int = 0,
    ) -> Loader:
        """Return batches of a split.

        Parameters
        ----------
        split : {"train", "test"}
        images : int, optional
            Use this many, drawn without regard to the class: of the training images by the seed, of the
            test images always the same ones, so that results stay comparable. Asking for more
            than there are warns.
        batch_size : int
            Images per batch; the last one may be smaller.
        augment : bool
            Apply the training augmentation. Calibration and BatchNorm recalibration want it.
        shuffle : bool, optional
            Mix the order by the seed; by default only of training images.
        seed : int, optional
            By default the data set's.
        epoch : int
            Another number gives the same images in another order and with other augmentation.

        Returns
        -------
        Loader

        Raises
        ------
        DataError
            If the data set has no such split.
        """
        source = self._source(split)
        source.prepare()
        batch_size = parse_count(batch_size, "batch_size")
        seed = self.seed if seed is None else parse_count(seed, "seed", minimum=0)
        shuffle = split == "train" if shuffle is None else shuffle
        wanted = len(source) if images is None else parse_count(images, "images")
        if wanted > len(source):
            warnings.warn(
                f"{self.name}: {wanted} images were asked for, the {split} split has {len(source)}",
                stacklevel=2,
            )
        drawn = np.random.default_rng([seed if split == "train" else 0, 0]).permutation(len(source))
        chosen = np.sort(drawn[:wanted])
        if shuffle:
            chosen = np.random.default_rng([seed, epoch, 2]).permutation(chosen)
        return Loader(
            source,
            self.preprocessing,
            chosen,
            batch_size,
            augment,
            (seed, epoch),
            self.num_classes,
            self.class_names,
        )

    def _source(self, split: str) -> ImageSource:
        if split not in ("train", "test"):
            raise DataError(f"split={split!r} is unknown; allowed: train, test")
        if split not in self.sources:
            what = "training" if split == "train" else "test"
            raise DataError(
                f"{self.name} has no {what} images"
                + (
                    "; name a second data set for them: open_data(..., train=SPEC)"
                    if split == "train"
                    else ""
                )
            )
        return self.sources[split]


def open_data(
    spec: str,
    *,
    train: str | None = None,
    preprocessing: str | Preprocessing | None = None,
    image_size: int | None = None,
    classes: str | Path | Sequence[str] | None = None,
    skip_bad_images: bool = False,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> ImageData:
    """Open a data set.

    Parameters
    ----------
    spec : str
        ``"digits"``: the 1,797 handwritten digits of scikit-learn, 16 × 16, made harder with shifts
        and noise. ``"digits32"``: the same digits, each anywhere on 32 × 32 black pixels.
        ``"cifar10:DIR"``: the python version of CIFAR-10, or image folders train/ and test/.
        ``"npz:FILE"``: uint8 arrays x_train, x_test (N, H, W, C) or (N, H, W) with labels y_train, y_test.
        ``"imagefolder:DIR"``: a folder per class below train/ and val/ (or test/), or below DIR itself,
        which then serves for evaluation only. ``"path/to/data.py:build"`` or
        ``"package.module:build"``: what a function of your own returns (so its code runs), anything with
        a length and items (image, label), images as PIL's or uint8; called for each split if it takes
        `split`.
    train : str, optional
        A second specification to take the training images from: its training split, or its only one.
    preprocessing : str or Preprocessing, optional
        One of ``"auto"`` (the default), ``"cifar"``, ``"small"``, ``"imagenet"``, ``"digits"``,
        ``"digits32"``, or your own. ``"auto"`` goes by the size of the images and leaves a note.
    image_size : int, optional
        Scale the images to this input size.
    classes : str, Path or sequence of str, optional
        The network's classes in the order of its logits: names of class folders, or a file with one a line
        (behind the first word a line may explain it). Needed where only some of the classes have a folder. By
        default a file ``classes.txt`` in DIR, then the training folders, then the folders themselves.
    skip_bad_images : bool
        Leave unreadable files out, with a warning, instead of raising.
    seed : int
        Default seed of the loaders.
    cache_dir : str or Path, optional
        Keep decoded small images there, so that the next run need not decode them.

    Returns
    -------
    ImageData

    Raises
    ------
    DataError
        If something is missing, empty, unreadable or of the wrong form.
    ConfigError
        If the preprocessing is unknown.
    """
    raw = read_data(spec, classes)
    name = _short_name(spec)
    if train is not None:
        folders = train.partition(":")[0] in ("imagefolder", "cifar10")
        raw = _with_training(raw, read_data(train, classes if folders else None), spec, train)
        name = f"{name}, train {_short_name(train)}"
    chosen, notes = _choose_preprocessing(raw, preprocessing, image_size, skip_bad_images)
    notes = raw.notes + notes
    for note in notes:
        _log.info("%s: %s", name, note)
    sources: dict[str, ImageSource] = {
        split: MemoryImages(pixels, labels, chosen) for split, (pixels, labels) in raw.arrays.items()
    }
    for split, (root, paths, labels) in raw.files.items():
        sources[split] = FileImages(
            root, paths, labels, chosen, skip_bad_images, Path(cache_dir) if cache_dir else None
        )
    if raw.class_names is not None:
        num_classes = len(raw.class_names)
    else:
        num_classes = 1 + max(int(labels.max()) for labels in raw.labels())
    return ImageData(name, chosen, num_classes, raw.class_names, sources, notes, parse_count(seed, "seed", 0))


def _short_name(spec: str) -> str:
    if is_own_code(spec):
        return Path(spec).name
    kind, _, path = spec.partition(":")
    return f"{kind}:{Path(path).stem}" if path else kind


def _with_training(raw: RawData, other: RawData, spec: str, train: str) -> RawData:
    """Take the training images of a second data set; labels follow the one that has more classes."""
    own, others = raw.class_names, other.class_names
    if own is not None and others is not None and own != others:
        names = max(own, others, key=len)
        if not set(own) | set(others) == set(names):
            raise DataError(f"{spec!r} and {train!r} have different classes; labels would not mean the same")
        raw, other = raw.relabel(names), other.relabel(names)
    split = "train" if "train" in other.arrays or "train" in other.files else "test"
    arrays = {key: value for key, value in raw.arrays.items() if key == "test"}
    files = {key: value for key, value in raw.files.items() if key == "test"}
    if split in other.arrays:
        arrays["train"] = other.arrays[split]
    else:
        files["train"] = other.files[split]
    return RawData(arrays, files, raw.class_names or other.class_names, raw.preset, raw.notes)


def _choose_preprocessing(
    raw: RawData, asked: str | Preprocessing | None, image_size: int | None, skip_bad: bool
) -> tuple[Preprocessing, list[str]]:
    if isinstance(asked, Preprocessing):
        if image_size not in (None, asked.image_size):
            raise DataError(
                f"image_size={image_size} contradicts the preprocessing given ({asked.image_size})"
            )
        return asked, []
    height, width, channels = _extent(raw, skip_bad)
    name = raw.preset if asked in (None, "auto") else str(asked)
    if name == "auto":
        chosen = pick_preset(height, width, image_size, channels)
        return chosen, [f"images of {width} x {height}: preprocessing picked: {chosen.describe()}"]
    chosen = preset(name, image_size, channels)
    if name == "small" and image_size is None and height == width:
        chosen = preset(name, height, channels).replace(resize=None)
    return chosen, []


def _extent(raw: RawData, skip_bad: bool) -> tuple[int, int, int]:
    """Height, width and channels of the first image (the first readable one, if bad ones are skipped)."""
    for pixels, _ in raw.arrays.values():
        return pixels.shape[2], pixels.shape[3], pixels.shape[1]
    for _, paths, _ in raw.files.values():
        for path in paths:
            try:
                return *image_extent(path), 3
            except DataError:
                if not skip_bad:
                    raise
    raise DataError("not one image can be read")

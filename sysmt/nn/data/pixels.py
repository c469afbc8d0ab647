"""Where pixels come from: arrays in memory, or image files that are decoded once or streamed."""

from __future__ import annotations

import collections
import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sysmt.archives import read_npz
from sysmt.errors import DataError
from sysmt.files import written_whole
from sysmt.nn.data.preprocessing import Preprocessing
from sysmt.progress import progress_bar

__all__ = ["FileImages", "ImageSource", "MemoryImages", "find_images", "image_extent"]

MEMORY_LIMIT_BYTES = 2 << 30
"""Decoded images of one split are kept in memory up to this size; beyond it they are streamed."""

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
_AHEAD = 2
"""Batches that are decoded while the network works on an earlier one."""


class Pixels(NamedTuple):
    """A batch of uint8 pixels (n, C, S, S) and which of the indices asked for it holds."""

    values: Tensor
    indices: np.ndarray


class ImageSource:
    """Labelled images of one split.

    Attributes
    ----------
    labels : int64 array (N,)
    """

    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def prepare(self) -> None:
        """Do what must be done before the number of images is final, such as decoding small files."""

    def batches(self, batches: Iterable[np.ndarray], crop_seed: int | None = None) -> Iterator[Pixels]:
        """Yield the pixels of each batch of indices.

        Parameters
        ----------
        batches : iterable of int array
            Indices of each batch.
        crop_seed : int, optional
            With it, each image is a random resized crop; without it, as evaluation sees it.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hash that tells this set of images from others."""
        raise NotImplementedError


class MemoryImages(ImageSource):
    """Images as one uint8 array.

    Parameters
    ----------
    pixels : uint8 array (N, C, H, W)
    labels : int64 array (N,)
    preprocessing : Preprocessing
        Images are brought to its size at once.

    Raises
    ------
    DataError
        If the images have another size or number of channels than the network needs.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, preprocessing: Preprocessing) -> None:
        self.labels = labels
        self._originals = pixels
        self._preprocessing = preprocessing
        if pixels.shape[1] != preprocessing.channels:
            raise DataError(
                f"the images have {pixels.shape[1]} channels, preprocessing {preprocessing.name!r} is for "
                f"{preprocessing.channels}"
            )
        size = (preprocessing.image_size, preprocessing.image_size)
        if pixels.shape[2:] == size:
            self._pixels = torch.from_numpy(np.ascontiguousarray(pixels))
        else:
            images = (_for_evaluation(_as_image(one), preprocessing, "an image") for one in pixels)
            self._pixels = torch.stack([_as_tensor(image) for image in images])

    def batches(self, batches: Iterable[np.ndarray], crop_seed: int | None = None) -> Iterator[Pixels]:
        """Index the array; random crops go image by image."""
        for indices in batches:
            if crop_seed is None:
                yield Pixels(self._pixels[torch.from_numpy(indices)], indices)
            else:
                crops = (
                    _random_resized(_as_image(self._originals[i]), self._preprocessing, crop_seed, int(i))
                    for i in indices
                )
                yield Pixels(torch.stack([_as_tensor(crop) for crop in crops]), indices)

    def fingerprint(self) -> str:
        """Hash pixels and labels."""
        digest = hashlib.sha256(str(self._originals.shape).encode())
        digest.update(self._originals.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


class FileImages(ImageSource):
    """Image files, decoded when they are first needed and kept where they fit into memory.

    Parameters
    ----------
    root : Path
        Directory that `paths` are relative to in hashes.
    paths : sequence of Path
    labels : int64 array (N,)
    preprocessing : Preprocessing
    skip_bad : bool
        Leave out files that cannot be decoded, count them in `skipped` and warn, instead of raising.
    cache_dir : Path, optional
        Keep the decoded pixels of small images there, as an .npz.

    Attributes
    ----------
    skipped : list of Path
        Files left out so far.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[Path],
        labels: np.ndarray,
        preprocessing: Preprocessing,
        skip_bad: bool = False,
        cache_dir: Path | None = None,
    ) -> None:
        self.root, self.paths, self.labels = root, list(paths), labels
        self.skipped: list[Path] = []
        self._preprocessing = preprocessing
        self._skip_bad = skip_bad
        self._cache_dir = cache_dir
        self._decoded: MemoryImages | None = None
        self._kept: dict[int, Tensor] = {}
        bytes_all = len(self.paths) * preprocessing.channels * preprocessing.image_size**2
        self._fits = bytes_all <= MEMORY_LIMIT_BYTES

    def prepare(self) -> None:
        """Decode all files, unless they are too many or each epoch crops them anew."""
        if self._fits and not self._preprocessing.random_resized_crop and self._decoded is None:
            self._decoded = self._in_memory()

    def batches(self, batches: Iterable[np.ndarray], crop_seed: int | None = None) -> Iterator[Pixels]:
        """Index the decoded array, or decode on the way."""
        self.prepare()
        return self._decoded.batches(batches) if self._decoded else self._stream(batches, crop_seed)

    def fingerprint(self) -> str:
        """Hash names, sizes and labels of the files; their contents would take too long to read."""
        return self._hash(with_times=False)

    def _hash(self, with_times: bool) -> str:
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
            facts = path.stat()
            time = facts.st_mtime_ns if with_times else ""
            digest.update(f"{path.relative_to(self.root)} {label} {facts.st_size} {time}\n".encode())
        return digest.hexdigest()

    # -- all of them in memory -----------------------------------------------------------------

    def _in_memory(self) -> MemoryImages:
        cached = self._cache_path()
        found = _read_cache(cached) if cached else None
        pixels, kept = found or self._decode_all()
        if cached and found is None:
            with written_whole(cached) as temporary:
                np.savez(temporary, pixels=pixels, kept=kept)
        if len(kept) < len(self.paths):
            gone = np.setdiff1d(np.arange(len(self.paths)), kept)
            self.skipped = [self.paths[i] for i in gone]
            if found:
                warnings.warn(f"{self.root}: {len(gone)} unreadable images left out", stacklevel=2)
            self.paths = [self.paths[i] for i in kept]
            self.labels = self.labels[kept]
        return MemoryImages(pixels, self.labels, self._preprocessing)

    def _decode_all(self) -> tuple[np.ndarray, np.ndarray]:
        size, channels = self._preprocessing.image_size, self._preprocessing.channels
        pixels = np.empty((len(self), channels, size, size), dtype=np.uint8)
        everything = np.arange(len(self))
        kept: list[np.ndarray] = []
        with progress_bar(f"decoding {self.root.name}", len(self)) as bar:
            for batch in self._stream(np.array_split(everything, range(128, len(self), 128)), None):
                start = sum(map(len, kept))
                pixels[start : start + len(batch.indices)] = batch.values.numpy()
                kept.append(batch.indices)
                bar.advance(len(batch.indices))
        indices = np.concatenate(kept) if kept else everything[:0]
        return pixels[: len(indices)], indices

    def _cache_path(self) -> Path | None:
        if self._cache_dir is None:
            return None
        p = self._preprocessing
        recipe = f"{self._hash(with_times=True)} {p.image_size} {p.resize} {p.channels} {self._skip_bad}"
        key = hashlib.sha256(recipe.encode()).hexdigest()[:16]
        return Path(self._cache_dir) / f"{self.root.name}-{key}.npz"

    # -- one batch after the other -------------------------------------------------------------

    def _stream(self, batches: Iterable[np.ndarray], crop_seed: int | None) -> Iterator[Pixels]:
        """Decode in threads, a few batches ahead of the reader."""
        pending: collections.deque[tuple[np.ndarray, list[Future[Tensor | None]]]] = collections.deque()
        with ThreadPoolExecutor(max(1, torch.get_num_threads()), "decode") as pool:
            try:
                for indices in batches:
                    pending.append((indices, [pool.submit(self._pixels, int(i), crop_seed) for i in indices]))
                    if len(pending) > _AHEAD:
                        yield from self._finish(*pending.popleft())
                while pending:
                    yield from self._finish(*pending.popleft())
            finally:
                for _, futures in pending:
                    for future in futures:
                        future.cancel()

    def _finish(self, indices: np.ndarray, futures: list[Future[Tensor | None]]) -> Iterator[Pixels]:
        decoded = [future.result() for future in futures]
        good = [image for image in decoded if image is not None]
        if good:
            yield Pixels(torch.stack(good), indices[[image is not None for image in decoded]])

    def _pixels(self, index: int, crop_seed: int | None) -> Tensor | None:
        if crop_seed is None and index in self._kept:
            return self._kept[index]
        path = self.paths[index]
        try:
            image = _decode(path, self._preprocessing.channels)
        except DataError as error:
            if not self._skip_bad:
                raise
            if path not in self.skipped:
                self.skipped.append(path)
                warnings.warn(f"{error}; left out", stacklevel=2)
            return None
        if crop_seed is not None:
            return _as_tensor(_random_resized(image, self._preprocessing, crop_seed, index))
        pixels = _as_tensor(_for_evaluation(image, self._preprocessing, str(path)))
        if self._fits and self._preprocessing.random_resized_crop:  # otherwise they are in memory anyway
            self._kept[index] = pixels
        return pixels


def find_images(folder: Path) -> list[Path]:
    """List the image files below a folder, sorted by path.

    Links are followed, but no folder is entered twice: a link to a folder that was listed already, such as
    one that the link lies in, is left out with a warning. Pipes, sockets and devices are no images.
    """
    found: list[Path] = []
    entered: dict[tuple[int, int], Path] = {}
    folders, links = [folder], list[Path]()
    while folders or links:
        place = folders.pop() if folders else links.pop()  # links last, so that they are what is left out
        try:
            facts = place.stat()
            before = entered.setdefault((facts.st_dev, facts.st_ino), place)
            if before is not place:
                what = f"{place} leads to {before}, whose images are counted already; left out"
                warnings.warn(what, stacklevel=2)
                continue
            with os.scandir(place) as entries:
                inside = list(entries)
        except OSError as error:
            raise DataError(f"{place} cannot be read ({error.strerror})") from error
        for entry in inside:
            path = place / entry.name
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(path)
            elif path.suffix.lower() in _SUFFIXES and not entry.name.startswith(".") and _may_be_image(entry):
                found.append(path)
    return sorted(found)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; false for a link to itself, where `is_dir` raises."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _may_be_image(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file, or a link to one; a broken link counts, and reading it will say so."""
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()


def image_extent(path: Path) -> tuple[int, int]:
    """Height and width from an image's header; raise `DataError` if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} is no readable image ({error})") from error


def _decode(path: Path, channels: int) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no readable image ({error})") from error


def _for_evaluation(image: Image.Image, preprocessing: Preprocessing, name: str) -> Image.Image:
    """Scale the shorter side and crop the centre, as torchvision does it."""
    size = preprocessing.image_size
    if preprocessing.resize is not None:
        from sysmt.nn.torchvision_import import torchvision

        functional = torchvision.transforms.functional
        image = functional.center_crop(functional.resize(image, preprocessing.resize), [size, size])
    if image.size != (size, size):
        raise DataError(
            f"{name} has {image.width} x {image.height} pixels, preprocessing {preprocessing.name!r} is for "
            f"{size} x {size}; give image_size={size} to scale the images"
        )
    return image


def _random_resized(image: Image.Image, preprocessing: Preprocessing, seed: int, index: int) -> Image.Image:
    """Crop 8 to 100 % of the area, aspect ratio 3/4 to 4/3, and scale it (arXiv 1409.4842, section 6)."""
    from sysmt.nn.torchvision_import import torchvision

    rng = np.random.default_rng([seed, index])
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        crop_width, crop_height = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            break
    else:  # a very long image: its centre, as far as the allowed ratios reach
        crop_width = min(width, round(height * 4 / 3))
        crop_height = min(height, round(width * 4 / 3))
    top = int(rng.integers(height - crop_height + 1))
    left = int(rng.integers(width - crop_width + 1))
    size = [preprocessing.image_size] * 2
    return torchvision.transforms.functional.resized_crop(  # type: ignore[no-any-return]
        image, top, left, crop_height, crop_width, size
    )


def _as_tensor(image: Image.Image) -> Tensor:
    pixels = np.array(image, dtype=np.uint8)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def _as_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _read_cache(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        content = read_npz(path)
        return content["pixels"], content["kept"]
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        warnings.warn(f"{path} is damaged ({error}); decoding the images again", stacklevel=2)
        return None

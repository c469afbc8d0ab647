"""What happens to an image between the file and the network: sizes, training augmentation, normalisation.

Augmentation works on whole uint8 batches at once. BatchNorm recalibration depends on it being just
what the network was trained with, down to the colour of the padding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sysmt.config import parse_count
from sysmt.errors import ConfigError, nearest

__all__ = ["PRESETS", "Preprocessing", "add_noise", "normalise", "pad_crop_flip", "pick_preset", "preset"]

IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)
IMAGENET_STD: tuple[float, ...] = (0.229, 0.224, 0.225)
_DIGITS_NOISE_STD = 0.15


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images become network inputs, for evaluation and for training.

    Attributes
    ----------
    name : str
        The preset it came from, or any name.
    image_size : int
        Side of the square network input, in pixels; also the side of training crops.
    resize : int or None
        Evaluation: scale the shorter side to this many pixels, then crop the centre to
        `image_size`. None: images must be `image_size` pixels wide and high already.
    pad_pixels : int
        Training: black pixels added on each side before a random crop to `image_size`. Black
        means 0 before normalisation.
    flip : bool
        Training: mirror every second image, at random, left to right.
    random_resized_crop : bool
        Training: crop 8 to 100 % of the area with an aspect ratio of 3/4 to 4/3 and scale that to
        `image_size` (as ImageNet networks are trained), instead of padding and cropping.
    noise_std : float
        Training: standard deviation of Gaussian noise added to each pixel, white = 1.
    mean, std : tuple of float
        Per channel, in units of white = 1: inputs are (pixel / 255 − mean) / std.
    """

    name: str
    image_size: int
    resize: int | None = None
    pad_pixels: int = 0
    flip: bool = False
    random_resized_crop: bool = False
    noise_std: float = 0.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        parse_count(self.image_size, "image_size")
        parse_count(self.pad_pixels, "pad_pixels", minimum=0)
        if self.resize is not None and parse_count(self.resize, "resize") < self.image_size:
            raise ConfigError(f"resize={self.resize} is below image_size={self.image_size}: nothing to crop")
        if self.pad_pixels and self.random_resized_crop:
            raise ConfigError("pad_pixels and random_resized_crop exclude each other")
        if not self.noise_std >= 0:
            raise ConfigError(f"noise_std={self.noise_std} must be at least 0")
        for field in ("mean", "std"):
            object.__setattr__(self, field, tuple(float(value) for value in getattr(self, field)))
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ConfigError(f"mean={self.mean} and std={self.std} must have 1 value, or 3 for RGB, each")
        if not all(value > 0 for value in self.std):
            raise ConfigError(f"std={self.std} must be positive")

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return len(self.mean)

    def replace(self, **changes: Any) -> Preprocessing:
        """Return a copy with the named fields changed (and validated again)."""
        fields = [field.name for field in dataclasses.fields(self)]
        for name in set(changes).difference(fields):
            hint = nearest(name, fields)
            raise ConfigError(f"Preprocessing has no field {name!r}{hint}; it has {', '.join(fields)}")
        return dataclasses.replace(self, **changes)

    def to_record(self) -> dict[str, Any]:
        """Return plain values, as they go into TOML, JSON and CSV files."""
        record = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        return record | {"mean": list(self.mean), "std": list(self.std)}

    def describe(self) -> str:
        """Say it in one line, for logs and the command line."""
        size = f"{self.image_size} x {self.image_size}"
        before = f"shorter side to {self.resize}, centre crop {size}" if self.resize else f"images of {size}"
        if self.random_resized_crop:
            training = ["random resized crop"]
        elif self.pad_pixels:
            training = [f"crop after {self.pad_pixels} black pixels on each side"]
        else:
            training = []
        if self.flip:
            training.append("random flip")
        if self.noise_std:
            training.append(f"noise {self.noise_std:g}")
        return f"{self.name}: {before}; training: {', '.join(training) or 'the same'}"


PRESETS = ("auto", "cifar", "digits", "digits32", "imagenet", "small")
"""Names that `preset` takes; ``"auto"`` is resolved by `pick_preset`."""


def preset(name: str, image_size: int | None = None, channels: int = 3) -> Preprocessing:
    """Return a named preprocessing.

    Parameters
    ----------
    name : str
        ``"cifar"``: 32 × 32, pad 4, flip. ``"small"``: `image_size` (64 by default), padded by a tenth
        of it, flip. ``"imagenet"``: shorter side to 256, centre crop 224, random resized crop, flip.
        ``"digits"``: 16 × 16 grey, pad 2, noise. ``"digits32"``: 32 × 32 grey, pad 8, noise.
    image_size : int, optional
        Side of the network's input; images of another size are scaled to it.
    channels : int
        1 or 3.

    Raises
    ------
    ConfigError
        If the name is unknown or a number impossible.
    """
    if image_size is not None:
        image_size = parse_count(image_size, "image_size")
    if name not in PRESETS or name == "auto":
        raise ConfigError(
            f"preprocessing={name!r} is unknown{nearest(str(name), PRESETS)}; allowed: {', '.join(PRESETS)}"
        )
    mean, std = ((0.5,), (0.5,)) if channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)
    if name == "imagenet":
        size = image_size or 224
        resize = round(size * 256 / 224)
        return Preprocessing(name, size, resize, flip=True, random_resized_crop=True, mean=mean, std=std)
    if name in ("digits", "digits32"):
        size, pad = (16, 2) if name == "digits" else (32, 8)
        return Preprocessing(
            name,
            image_size or size,
            image_size,
            pad_pixels=pad,
            noise_std=_DIGITS_NOISE_STD,
            mean=(0.5,),
            std=(0.5,),
        )
    size = image_size or (32 if name == "cifar" else 64)
    pad = 4 if name == "cifar" else round(size / 10.5)
    return Preprocessing(name, size, image_size, pad_pixels=pad, flip=True, mean=mean, std=std)


def pick_preset(height: int, width: int, image_size: int | None, channels: int) -> Preprocessing:
    """Choose a preset by the size of the images: ``"auto"``.

    Square images of 32 pixels are taken for CIFAR, other square ones of up to 96 for ``"small"``, all
    else for ImageNet.
    """
    if height == width == 32 and image_size in (None, 32):
        return preset("cifar", None, channels)
    if height == width <= 96 and image_size in (None, height):
        return preset("small", height, channels).replace(resize=None)
    if max(height, width) <= 96:
        return preset("small", image_size or min(height, width), channels)
    return preset("imagenet", image_size, channels)


def pad_crop_flip(
    pixels: Tensor, pad: int, offsets: Tensor | None = None, flips: Tensor | None = None
) -> Tensor:
    """Pad with black, crop back to the old size and mirror, each image in its own way.

    Parameters
    ----------
    pixels : uint8 tensor (N, C, H, W)
    pad : int
        Pixels added on each side.
    offsets : int64 tensor (N, 2), optional
        Row and column, 0..2·pad, at which each crop starts; None leaves the images where they are.
    flips : bool tensor (N,), optional
        Images to mirror left to right.

    Returns
    -------
    uint8 tensor (N, C, H, W)
    """
    if offsets is not None and pad:
        count, _, height, width = pixels.shape
        windows = F.pad(pixels, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
        pixels = windows[torch.arange(count), :, offsets[:, 0], offsets[:, 1]]
    if flips is not None:
        pixels = torch.where(flips[:, None, None, None], pixels.flip(3), pixels)
    return pixels


def add_noise(pixels: Tensor, std: float, rng: np.random.Generator) -> Tensor:
    """Add Gaussian noise to uint8 pixels; `std` in units of white = 1. Results stay in 0..255."""
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32))
    return (pixels.float() + noise * (255.0 * std)).round_().clamp_(0, 255).to(torch.uint8)


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Turn uint8 pixels (N, C, H, W) into float32 inputs (pixel / 255 − mean) / std."""
    mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    return pixels.float().div_(255.0).sub_(mean).div_(std)

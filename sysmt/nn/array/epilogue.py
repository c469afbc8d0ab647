"""Epilogues: BatchNorm in evaluation mode, and ReLU, done while a layer stores its output.

They save reading and writing the output once more for each, and change no bit.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["NOTHING", "Affine", "Epilogue", "batch_norm_is_fused", "fixed_affine"]

Affine = tuple[np.ndarray, np.ndarray]
"""Gain and shift by channel, float32 (C,)."""


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What is done to an output before it is stored: ``x * gain + shift``, rounded once, then ReLU."""

    affine: Affine | None = None
    relu: bool = False


NOTHING = Epilogue()


@functools.cache
def batch_norm_is_fused() -> bool:
    """Whether torch's BatchNorm, in evaluation mode, is one fused multiply-add a value.

    It is wherever torch runs its AVX2 or AVX-512 code. Elsewhere BatchNorm stays torch's own.
    """
    factor = 1 + 2.0**-12  # factor² - 1, rounded once, keeps the 2**-24 that a rounded product loses
    for shape in ((1, 3, 1, 1), (3, 19, 5, 5), (2, 16, 8, 8)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.full(shape, factor, dtype=torch.float32, device="cpu").to(memory_format=memory_format)
            zero, one = x.new_zeros(shape[1]), x.new_ones(shape[1])
            y = F.batch_norm(x, zero, one, factor * one, -one, eps=0.0)
            if not bool((y == 2.0**-11 + 2.0**-24).all()):
                return False
    return True


def fixed_affine(module: nn.BatchNorm2d) -> Affine | None:
    """Return gain and shift of a BatchNorm, or None where it is not ``x * gain + shift``, bit for bit.

    Both are what torch's own function says, asked about one pixel.
    """
    mean, var, weight, bias = module.running_mean, module.running_var, module.weight, module.bias
    if module.training or mean is None or var is None or not batch_norm_is_fused():
        return None
    for tensor in (mean, var, weight, bias):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
            return None
    if any(tensor is not None and tensor.shape != mean.shape for tensor in (var, weight, bias)):
        return None  # torch says what is wrong with it
    with torch.no_grad():
        one = torch.ones(1, mean.numel(), 1, 1, dtype=torch.float32)
        centre = torch.zeros_like(mean)
        gain = F.batch_norm(one, centre, var, weight, None, eps=module.eps)
        if not np.isfinite(gain.numpy()).all():
            return None
        zero = torch.copysign(0 * one, -gain)  # gain * zero is -0, which leaves even a shift of -0 as it is
        shift = F.batch_norm(zero, mean, var, weight, bias, eps=module.eps)
    return gain.numpy().reshape(-1), shift.numpy().reshape(-1)

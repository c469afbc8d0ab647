"""How a Conv2d or Linear becomes GEMMs: geometry, padding, and im2col.

Rows m are output pixels, columns n output channels, and K runs over (in_channel, kernel_row,
kernel_col), the order of the weight tensor. Each image and each group is a GEMM of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["LayerGeometry", "Pair", "im2col"]

Pair = tuple[int, int]

_NONE: tuple[Pair, Pair] = ((0, 0), (0, 0))


@dataclasses.dataclass(frozen=True)
class LayerGeometry:
    """What the array needs to know of a layer's shape; a Linear is a 1 x 1 convolution over its rows.

    Attributes
    ----------
    in_channels, out_channels, groups : int
        As in torch; a Linear has one group.
    kernel, stride, dilation : (int, int)
        Rows, columns.
    padding : ((int, int), (int, int))
        Zeros added (above, below), (left, right) by the lowering itself.
    pre_padding : ((int, int), (int, int))
        Padding in a mode other than zeros, applied to the float input beforehand.
    pre_padding_mode : str
        ``"reflect"``, ``"replicate"``, ``"circular"``; ``"constant"`` where there is none.
    """

    in_channels: int
    out_channels: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    padding: tuple[Pair, Pair] = _NONE
    pre_padding: tuple[Pair, Pair] = _NONE
    pre_padding_mode: Literal["constant", "reflect", "replicate", "circular"] = "constant"

    @classmethod
    def of(cls, module: nn.Conv2d | nn.Linear) -> LayerGeometry:
        """Read the geometry off a torch module, "same" and "valid" padding resolved to numbers."""
        if isinstance(module, nn.Linear):
            return cls(module.in_features, module.out_features)
        shape = (module.out_channels, module.in_channels // module.groups, *_pair(module.kernel_size))
        geometry = cls.of_call(shape, module.stride, module.padding, module.dilation, module.groups)
        if module.padding_mode == "zeros":
            return geometry
        return dataclasses.replace(
            geometry,
            padding=_NONE,
            pre_padding=geometry.padding,
            pre_padding_mode=module.padding_mode,
        )

    @classmethod
    def of_call(
        cls,
        weight_shape: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> LayerGeometry:
        """Return the geometry of a call of `torch.nn.functional.conv2d`, or of `linear`.

        Parameters
        ----------
        weight_shape : sequence of int
            (N, C / groups, kernel rows, kernel columns), or (N, K) of a Linear.
        stride, padding, dilation, groups
            As torch takes them: a number, one in a sequence, or one for rows and one for columns; padding
            also ``"same"`` or ``"valid"``.
        """
        if len(weight_shape) == 2:
            return cls(weight_shape[1], weight_shape[0])
        out_channels, per_group, *kernel = weight_shape
        rows, cols = _pair(kernel)
        dilations = _pair(dilation)
        if padding == "valid":
            zeros = _NONE
        elif padding == "same":  # as torch: the odd pixel goes below and right
            totals = [d * (k - 1) for d, k in zip(dilations, (rows, cols), strict=True)]
            zeros = (totals[0] // 2, -(-totals[0] // 2)), (totals[1] // 2, -(-totals[1] // 2))
        else:
            above, left = _pair(padding)  # type: ignore[arg-type]
            zeros = (above, above), (left, left)
        return cls(
            per_group * groups, out_channels, (rows, cols), _pair(stride), dilations, groups, padding=zeros
        )

    @property
    def depthwise(self) -> bool:
        """Whether every input channel is a group of its own."""
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def gemm_n(self) -> int:
        """Columns of one group's GEMM."""
        return self.out_channels // self.groups

    @property
    def gemm_k(self) -> int:
        """Inner dimension of one group's GEMM."""
        return self.in_channels // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def pre_padded(self) -> LayerGeometry:
        """The geometry that is left once `pad_float` has been applied to the input."""
        return dataclasses.replace(self, pre_padding=_NONE, pre_padding_mode="constant")

    def output_size(self, height: int, width: int) -> Pair:
        """Output rows and columns for an input of `height` x `width`; not positive if it is too small."""
        sizes = []
        for axis, size in enumerate((height, width)):
            padded = size + sum(self.padding[axis]) + sum(self.pre_padding[axis])
            span = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            sizes.append((padded - span) // self.stride[axis] + 1)
        return sizes[0], sizes[1]

    def pad_float(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the padding that is not zeros to a float NCHW input."""
        if self.pre_padding_mode == "constant":
            return x
        (top, bottom), (left, right) = self.pre_padding
        return F.pad(x, (left, right, top, bottom), mode=self.pre_padding_mode)


def _pair(value: int | Sequence[int]) -> Pair:
    """Take a number twice, as torch does, also where it stands alone in a sequence."""
    values = [value, value] if isinstance(value, int) else [*value]
    rows, cols = values * 2 if len(values) == 1 else values
    return int(rows), int(cols)


def im2col(x: np.ndarray, geometry: LayerGeometry) -> np.ndarray:
    """Lower a batch of (pre-padded) images to GEMM operands.

    Parameters
    ----------
    x : ndarray (B, C, H, W), any dtype
        The input, after `LayerGeometry.pad_float`.
    geometry : LayerGeometry

    Returns
    -------
    ndarray (groups, B, M, K), dtype of `x`
        M = output pixels, K = C / groups * kernel rows * kernel columns.
    """
    batch, channels, height, width = x.shape
    geometry = geometry.pre_padded
    out_h, out_w = geometry.output_size(height, width)
    x = np.pad(x, ((0, 0), (0, 0), *geometry.padding))
    (kh, kw), (sh, sw), (dh, dw) = geometry.kernel, geometry.stride, geometry.dilation
    s_b, s_c, s_h, s_w = x.strides
    windows = np.lib.stride_tricks.as_strided(
        x,
        (batch, channels, kh, kw, out_h, out_w),
        (s_b, s_c, s_h * dh, s_w * dw, s_h * sh, s_w * sw),
        writeable=False,
    )
    per_group = windows.reshape(batch, geometry.groups, geometry.gemm_k, out_h * out_w)
    return np.ascontiguousarray(per_group.transpose(1, 0, 3, 2))

"""The shape of one layer's work: a convolution over an input that has its padding, or a plain GEMM."""

from __future__ import annotations

import dataclasses

import numpy as np

from sysmt.config import parse_count
from sysmt.errors import ConfigError

__all__ = ["Layer"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One GEMM, as the convolution it was lowered from.

    There is no padding: the input has it already, as SCALE-Sim's topologies do. A partial window at the
    right or lower edge makes an output, too: ``out = ceil((size - span + stride) / stride)``.

    Attributes
    ----------
    name : str
    ifmap_height, ifmap_width : int
        Input pixels, padding included.
    filter_height, filter_width : int
        Kernel rows and columns.
    channels : int
        Input channels (of the group, in a grouped convolution).
    filters : int
        Output channels N (of the group).
    stride_height, stride_width, dilation_height, dilation_width : int
    density : (int, int)
        (n, m): of m weights in a row along K, n are not zero. (1, 1) is dense.

    Raises
    ------
    ConfigError
        If a size is no integer of at least 1, the filter does not fit into the input, or the density
        is not 1 <= n <= m.
    """

    name: str
    ifmap_height: int
    ifmap_width: int
    filter_height: int
    filter_width: int
    channels: int
    filters: int
    stride_height: int = 1
    stride_width: int = 1
    dilation_height: int = 1
    dilation_width: int = 1
    density: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in ("name", "density"):
                parse_count(getattr(self, field.name), f"{field.name} of layer {self.name!r}")
        for axis, size, span in zip(("height", "width"), self.ifmap, self.span, strict=True):
            if span > size:
                raise ConfigError(
                    f"layer {self.name!r}: a filter {axis} of {span} does not fit an input {axis} of {size}"
                )
        if not 1 <= self.density[0] <= self.density[1]:
            raise ConfigError(
                f"layer {self.name!r}: sparsity {self.density[0]}:{self.density[1]} is no N:M, 1 <= N <= M"
            )

    @classmethod
    def gemm(cls, name: str, m: int, n: int, k: int, density: tuple[int, int] = (1, 1)) -> Layer:
        """Return a plain M x N x K GEMM: M windows of 1 x K that share nothing, as in SCALE-Sim."""
        return cls(name, m, k, 1, k, 1, n, density=density)

    def renamed(self, name: str) -> Layer:
        """Return the same work under another name."""
        return dataclasses.replace(self, name=name)

    @property
    def ifmap(self) -> tuple[int, int]:
        """Input rows and columns."""
        return self.ifmap_height, self.ifmap_width

    @property
    def span(self) -> tuple[int, int]:
        """Input rows and columns from a window's first pixel to its last."""
        return (
            self.dilation_height * (self.filter_height - 1) + 1,
            self.dilation_width * (self.filter_width - 1) + 1,
        )

    @property
    def ofmap(self) -> tuple[int, int]:
        """Output rows and columns."""
        strides = (self.stride_height, self.stride_width)
        rows, cols = (
            -(-(size - span + stride) // stride)
            for size, span, stride in zip(self.ifmap, self.span, strides, strict=True)
        )
        return rows, cols

    @property
    def m(self) -> int:
        """Rows of the GEMM: output pixels."""
        return self.ofmap[0] * self.ofmap[1]

    @property
    def n(self) -> int:
        """Columns of the GEMM: filters."""
        return self.filters

    @property
    def k(self) -> int:
        """Inner dimension of the GEMM: weights of a filter."""
        return self.channels * self.filter_height * self.filter_width

    @property
    def macs(self) -> int:
        """Multiplications M * N * K."""
        return self.m * self.n * self.k

    def window_rows(self) -> np.ndarray:
        """Input row of each output row and kernel row (out rows, kernel rows), intp; may lie outside."""
        return _positions(self.ofmap[0], self.stride_height, self.filter_height, self.dilation_height)

    def window_cols(self) -> np.ndarray:
        """Input column of each output column and kernel column (out columns, kernel columns), intp."""
        return _positions(self.ofmap[1], self.stride_width, self.filter_width, self.dilation_width)

    def im2col(self, ifmap: np.ndarray) -> np.ndarray:
        """Lower an input (channels, rows, cols) to activations (M, K); outside of it there are zeros.

        K runs over (channel, kernel row, kernel column), as everywhere in sysmt.
        """
        rows, cols = self.window_rows(), self.window_cols()
        beyond = [max(0, int(at.max()) + 1 - size) for at, size in zip((rows, cols), self.ifmap, strict=True)]
        padded = np.pad(ifmap, ((0, 0), (0, beyond[0]), (0, beyond[1])))
        windows = padded[:, rows[:, None, :, None], cols[None, :, None, :]]  # (C, out_h, out_w, r, s)
        return np.ascontiguousarray(windows.transpose(1, 2, 0, 3, 4).reshape(self.m, self.k))


def _positions(outputs: int, stride: int, taps: int, dilation: int) -> np.ndarray:
    return np.arange(outputs)[:, None] * stride + np.arange(taps) * dilation

"""How many input pixels the windows of a convolution touch, in closed form: overlapping windows share them.

Windows are numbered row by row, as the M axis of the GEMM is. All functions take arrays of such numbers at
once, so that a layer of millions of windows is a matter of milliseconds.
"""

from __future__ import annotations

import math

import numpy as np

from sysmt.cost.layer_shape import Layer

__all__ = ["Axis", "Windows"]


class Axis:
    """One axis of a convolution: which input pixels its output positions touch.

    Parameters
    ----------
    outputs, inputs, stride, taps, dilation : int
        Output position y touches the pixels y · stride + k · dilation, 0 <= k < taps, below `inputs`.
    """

    def __init__(self, outputs: int, inputs: int, stride: int, taps: int, dilation: int) -> None:
        self.outputs, self.taps = outputs, taps
        common = math.gcd(stride, dilation)
        # Tap k of position y touches the pixel that tap k + shift of the position `back` before it does.
        self.back, self.shift = dilation // common, stride // common
        #: Taps of each position whose pixels lie inside of the input: they are its first ones.
        self.inside = np.clip(-(-(inputs - np.arange(outputs) * stride) // dilation), 0, taps)
        fresh = np.maximum(self.inside - max(0, taps - self.shift), 0)
        self._all = np.concatenate([[0], np.cumsum(self.inside)])
        self._fresh = np.concatenate([[0], np.cumsum(fresh)])

    def touched(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Count the distinct pixels that the positions `first` .. `last` touch; none where last < first."""
        end = np.maximum(last + 1, first)
        # The first ones find nothing touched before them; the others, all but their last `shift` taps.
        alone = np.minimum(first + self.back, end)
        counts: np.ndarray = self._all[alone] - self._all[first] + self._fresh[end] - self._fresh[alone]
        return counts

    def touched_twice(self, last: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Count the distinct pixels that 0 .. `last` and `first` .. the end both touch; last < first."""
        counts = np.zeros(np.broadcast(last, first).shape, np.int64)
        for offset in range(min(self.back, self.outputs)):
            at = first + offset
            steps = -(-(at - last) // self.back)  # to the nearest position up to `last` that may share
            there = (at < self.outputs) & (at - steps * self.back >= 0)
            shared = np.clip(self.taps - steps * self.shift, 0, self.inside[np.where(there, at, 0)])
            counts += np.where(there, shared, 0)
        return counts


class Windows:
    """The windows of a convolution, numbered row by row.

    Parameters
    ----------
    layer : Layer
    """

    def __init__(self, layer: Layer) -> None:
        self._across = layer.ofmap[1]
        self._rows, self._cols = (
            Axis(*sizes)
            for sizes in zip(
                layer.ofmap,
                layer.ifmap,
                (layer.stride_height, layer.stride_width),
                (layer.filter_height, layer.filter_width),
                (layer.dilation_height, layer.dilation_width),
                strict=True,
            )
        )

    def pixels(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Count the distinct input pixels of one channel that the windows `first` .. `last` touch.

        Parameters
        ----------
        first, last : int64 ndarray
            Both included; there are none if last < first.

        Returns
        -------
        int64 ndarray
        """
        across = self._across
        (top, left), (bottom, right) = np.divmod(first, across), np.divmod(np.maximum(last, first), across)
        end = np.full_like(left, across - 1)
        zero = np.zeros_like(left)
        one_row = self._rows.touched(top, top) * self._cols.touched(left, right)
        # Else a first row from `left` on, whole rows, and a last row up to `right`. What pixel rows the first
        # and the last alone touch, and what both touch, follows from ranges with and without them.
        every, whole = self._rows.touched(top, bottom), self._rows.touched(top + 1, bottom - 1)
        first_alone = every - self._rows.touched(top + 1, bottom)
        last_alone = every - self._rows.touched(top, bottom - 1)
        both = every - whole - first_alone - last_alone
        of_first, of_last, of_all = (
            self._cols.touched(left, end), self._cols.touched(zero, right), self._cols.touched(zero, end)
        )  # fmt: skip
        apart = right < left
        twice = self._cols.touched_twice(np.where(apart, right, 0), np.where(apart, left, across))
        of_either = np.where(apart, of_first + of_last - twice, of_all)
        several = whole * of_all + first_alone * of_first + last_alone * of_last + both * of_either
        return np.where(last < first, 0, np.where(top == bottom, one_row, several))

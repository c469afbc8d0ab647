"""The compiled kernels: weights packed once, then whole convolutions or GEMMs at speed.

Arrays are checked here; csrc/ computes. Every path gives the same bits, whatever the thread count.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sysmt.config import ArrayConfig
from sysmt.errors import OperandError, PathError, nearest
from sysmt.hw import _native
from sysmt.hw.operands import MAX_K, check_order
from sysmt.hw.stats import Counters
from sysmt.hw.timing import slot_count

__all__ = [
    "TIMES",
    "ConvResult",
    "PackedConv",
    "PackedGemm",
    "active_path",
    "available_paths",
    "fingerprint",
    "keep_heap",
]

TIMES = ("stage", "count", "pack", "multiply", "store")
"""What the vector paths spend their time on, in csrc/'s order."""

_LEAST_SCALE, _LARGEST_SCALE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

Padding = tuple[tuple[int, int], tuple[int, int]]


def fingerprint(values: np.ndarray, cpu_threads: int = 1) -> int:
    """Return 64 bits that tell whether an array still holds the same values at the same places.

    Parameters
    ----------
    values : ndarray, C-contiguous
    cpu_threads : int
        CPU threads; the result does not depend on it.
    """
    return _native.fingerprint(values, cpu_threads)


def keep_heap() -> None:
    """Let the C library keep what is freed, for whole networks to run faster.

    Fresh pages from the kernel cost a network of large activations a fifth of its forward. This sets
    glibc's thresholds (256 MB at the top of the heap) for the whole process, for good, unless the
    environment has tuned them (MALLOC_*, GLIBC_TUNABLES); elsewhere it does nothing.
    """
    _native.keep_heap()


def available_paths() -> tuple[str, ...]:
    """Return the kernel paths that this CPU and build offer, best first."""
    return _native.path_names()


def active_path() -> str:
    """Return the path in use: the one that SYSMT_PATH names, else the best.

    Raises
    ------
    PathError
        If SYSMT_PATH names a path that is unknown or not available here.
    """
    forced = os.environ.get("SYSMT_PATH", "")
    return _check_path(forced, "SYSMT_PATH") if forced else available_paths()[0]


def _check_path(name: str, where: str) -> str:
    available = available_paths()
    if name not in available:
        raise PathError(
            f"{where}={name!r} is not a kernel path of this machine{nearest(name, available)}; "
            f"available: {', '.join(available)}"
        )
    return name


class ConvResult(NamedTuple):
    """What one forward of a layer gives.

    Attributes
    ----------
    y : ndarray (B, N, OH, OW), float32
        Dequantised outputs; undefined when `saw_nonfinite`.
    counters : Counters or None
        Summed over images and groups; None unless counting was asked for.
    saw_nonfinite : bool
        A pixel that the layer reads was NaN or infinite.
    saw_negative : bool
        A pixel that the layer reads was below 0 (and clamped to 0, if the layer is unsigned).
    """

    y: np.ndarray
    counters: Counters | None
    saw_nonfinite: bool
    saw_negative: bool


def _pack(
    weights: np.ndarray,
    config: ArrayConfig,
    geometry: tuple[int, ...],
    groups: int,
    signed: bool,
    order: Sequence[npt.ArrayLike] | None,
    path: str | None,
) -> tuple[_native.Layer, str]:
    """Hand (N, C, kh, kw) weights of `groups` groups to a path."""
    n, c, kh, kw = weights.shape
    k = c * kh * kw
    if k > MAX_K:
        raise OperandError(f"K={k} could overflow a 32-bit accumulator; K must be at most {MAX_K}")
    if groups < 1 or n % groups:
        raise OperandError(f"groups={groups} does not divide the {n} output channels")
    policy = config.policy
    rule = {
        "threads": config.threads,
        "skips_zeros": policy.skips_zeros,
        "reduces_always": policy.reduces_always,
        "reduces_weight": policy.reduced_operand == "weight",
        "needs_both": policy.needs_both_wide,
        "saturate": config.saturate,
        "truncate": config.rounding == "truncate",
        "is_signed": signed,
    }
    path = active_path() if path is None else _check_path(path, "path")
    layer = _native.Layer(
        path,
        (groups, n // groups, c, kh, kw, *geometry),
        rule,
        np.ascontiguousarray(weights),
        _positions(k, groups, config.threads, order),
    )
    return layer, path


def _positions(k: int, groups: int, threads: int, order: Sequence[npt.ArrayLike] | None) -> np.ndarray:
    """Return which k stands at each position of the padded, reordered K axis: (groups, T·L), -1 = padding."""
    positions = np.full((groups, threads * slot_count(k, threads)), -1, np.int32)
    if order is None:
        positions[:, :k] = np.arange(k)
        return positions
    if len(order) != groups:
        raise OperandError(f"order has {len(order)} permutations; one per group is needed, {groups} in all")
    for row, permutation in zip(positions, order, strict=True):
        checked = check_order(permutation, k, threads)
        row[: checked.size] = np.where(checked < k, checked, -1)
    return positions


def _aligned(array: np.ndarray) -> np.ndarray:
    """Return the array itself where its strides are whole elements, else a copy."""
    whole = all(stride % array.itemsize == 0 for stride in array.strides)
    return array if whole and array.flags.aligned and array.dtype.isnative else np.array(array, order="C")


def _contiguous(vector: np.ndarray | None) -> np.ndarray | None:
    return None if vector is None else np.ascontiguousarray(vector)


def _without_products(
    n: int, bias: np.ndarray | None, affine: tuple[np.ndarray, np.ndarray] | None, relu: bool
) -> np.ndarray:
    """Return what an output is of which K is empty, by channel: float32 (N,)."""
    y = np.zeros(n, np.float64) if bias is None else bias.astype(np.float64)
    if affine is not None:
        y = y * affine[0] + affine[1]
    y32 = y.astype(np.float32)
    return np.maximum(y32, 0) if relu else y32


class PackedGemm:
    """A (K, N) weight matrix packed for the array; `run` multiplies integer operands by it.

    Parameters
    ----------
    b_kn : ndarray (K, N), int8
        Weights; any strides.
    config : ArrayConfig
        Threads, policy, rounding and saturation matter here.
    signed : bool
        Whether the activations will be int8.
    order : array of int, optional
        Permutation of the K axis, as in `sysmt.hw.operands.check_order`.
    path : str, optional
        Kernel path; the default is `active_path()`.

    Raises
    ------
    OperandError
        If dtype, shape or order do not fit, or K > 65,535.
    PathError
        If the path is unknown or not available.
    """

    def __init__(
        self,
        b_kn: np.ndarray,
        config: ArrayConfig,
        signed: bool = False,
        order: npt.ArrayLike | None = None,
        path: str | None = None,
    ) -> None:
        if b_kn.ndim != 2 or b_kn.dtype != np.int8:
            raise OperandError(
                f"b_kn has shape {b_kn.shape} and dtype {b_kn.dtype}; int8 weights (K, N) are needed"
            )
        self.k, self.n = b_kn.shape
        self.config = config
        self.signed = signed
        geometry = (1, 1, 0, 0, 0, 0, 1, 1)
        orders = None if order is None else [order]
        self._layer, self.path = _pack(b_kn.T[:, :, None, None], config, geometry, 1, signed, orders, path)

    @property
    def weight_bytes(self) -> int:
        """Bytes that the packed weights take."""
        return self._layer.weight_bytes

    def run(
        self, a_mk: np.ndarray, cpu_threads: int = 1, count: bool = True
    ) -> tuple[np.ndarray, Counters | None]:
        """Multiply.

        Parameters
        ----------
        a_mk : ndarray (M, K), uint8, or int8 if `signed`
            Activations, not reordered; any strides.
        cpu_threads : int
            CPU threads; the result does not depend on it.
        count : bool
            Whether to count collisions and reductions.

        Returns
        -------
        out_mn : ndarray (M, N), int32
        counters : Counters or None

        Raises
        ------
        OperandError
            If dtype or shape do not fit.
        """
        wanted = np.int8 if self.signed else np.uint8
        if a_mk.ndim != 2 or a_mk.shape[1] != self.k or a_mk.dtype != wanted:
            raise OperandError(
                f"a_mk has shape {a_mk.shape} and dtype {a_mk.dtype}; "
                f"(M, {self.k}) of {np.dtype(wanted).name} is needed"
            )
        m = a_mk.shape[0]
        out_mn = np.zeros((m, self.n), np.int32)
        counters = Counters((0,) * (self.config.threads + 1))
        if 0 not in (m, self.n, self.k):
            # Rows of A are the pixels of one image row, columns its channels.
            pixels, outputs = _aligned(a_mk).T[None, :, None, :], out_mn.T[None, :, None, :]
            active, reduced_a, reduced_w, *_ = self._layer.run(
                pixels, outputs, cpu_threads=cpu_threads, count=count
            )
            counters = Counters(active, reduced_a, reduced_w)
        return out_mn, counters if count else None

    def profile(self, a_mk: np.ndarray, count: bool = True) -> dict[str, float]:
        """Run on one CPU thread and return the CPU seconds that each part took (zeros on the scalar path).

        Parameters
        ----------
        a_mk : ndarray (M, K), uint8, or int8 if `signed`
            Activations.
        count : bool
            Whether to count collisions and reductions.

        Returns
        -------
        dict of str to float
            Seconds by `TIMES`: bytes made, counters, planes packed, products, outputs stored.
        """
        self._layer.is_timed = True
        try:
            self.run(a_mk, count=count)
        finally:
            self._layer.is_timed = False
        return {name: 1e-9 * ns for name, ns in zip(TIMES, self._layer.nanoseconds, strict=True)}


class PackedConv:
    """One convolution's quantised weights packed for one configuration; `forward` runs float images.

    Parameters
    ----------
    weight_q : ndarray (N, C // groups, kh, kw), int8
        Quantised weights.
    config : ArrayConfig
        Threads, policy, rounding and saturation matter here.
    stride, dilation : (int, int)
        Vertical, horizontal; in pixels.
    padding : ((int, int), (int, int))
        Zero pixels ((top, bottom), (left, right)).
    groups : int
        Groups; each is a GEMM of its own.
    signed : bool
        Whether activations are quantised to int8 (clamped to ±127) instead of uint8.
    order : sequence of array of int, optional
        One permutation of K per group, as in `sysmt.hw.operands.check_order`.
    path : str, optional
        Kernel path; the default is `active_path()`.

    Raises
    ------
    OperandError
        If dtype, shape or order do not fit, or K > 65,535.
    PathError
        If the path is unknown or not available.
    """

    def __init__(
        self,
        weight_q: np.ndarray,
        config: ArrayConfig,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: Padding = ((0, 0), (0, 0)),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        signed: bool = False,
        order: Sequence[npt.ArrayLike] | None = None,
        path: str | None = None,
    ) -> None:
        if weight_q.ndim != 4 or weight_q.dtype != np.int8:
            raise OperandError(
                f"weight_q has shape {weight_q.shape} and dtype {weight_q.dtype}; "
                "(N, C // groups, kh, kw) of int8 is needed"
            )
        if min(*stride, *dilation) < 1 or min(padding[0] + padding[1]) < 0:
            raise OperandError(
                f"stride={stride}, dilation={dilation}, padding={padding}; "
                "strides and dilations start at 1, padding at 0"
            )
        self.shape = weight_q.shape
        self.config = config
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.signed = groups, signed
        geometry = (*stride, *padding[0], *padding[1], *dilation)
        self._layer, self.path = _pack(weight_q, config, geometry, groups, signed, order, path)

    @property
    def weight_bytes(self) -> int:
        """Bytes that the packed weights take."""
        return self._layer.weight_bytes

    def output_shape(self, x_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Return (B, N, OH, OW) for an input of shape (B, C, H, W).

        Raises
        ------
        OperandError
            If the input does not have four axes, or not the layer's channels.
        """
        n, c, *kernel = self.shape
        if len(x_shape) != 4 or x_shape[1] != c * self.groups:
            raise OperandError(f"x has shape {tuple(x_shape)}; (B, {c * self.groups}, H, W) is needed")
        sizes = [
            max(0, (size + sum(pad) - dilation * (taps - 1) - 1) // stride + 1)
            for size, pad, dilation, taps, stride in zip(
                x_shape[2:], self.padding, self.dilation, kernel, self.stride, strict=True
            )
        ]
        return (x_shape[0], n, sizes[0], sizes[1])

    def forward(
        self,
        x: np.ndarray,
        scale_a: float,
        scale_w: np.ndarray,
        bias: np.ndarray | None = None,
        *,
        out: np.ndarray | None = None,
        affine: tuple[np.ndarray, np.ndarray] | None = None,
        relu: bool = False,
        cpu_threads: int = 1,
        count: bool = True,
    ) -> ConvResult:
        """Quantise, convolve on the array and dequantise (docs/semantics.md, "Quantisation").

        Parameters
        ----------
        x : ndarray (B, C, H, W), float32
            Images; any strides.
        scale_a : float
            Activation scale: x is close to ``scale_a * q``.
        scale_w : ndarray (N,), float32
            Weight scale of each output channel.
        bias : ndarray (N,), float32, optional
            Added after dequantisation.
        out : ndarray (B, N, OH, OW), float32, optional
            Where to write y; any strides. The default is a new C-ordered array.
        affine : (ndarray (N,), ndarray (N,)), float32, optional
            Gain and shift: y becomes ``y * gain + shift`` on the way out, rounded once.
        relu : bool
            Whether to clamp y at 0 on the way out, after everything else.
        cpu_threads : int
            CPU threads; the result does not depend on it.
        count : bool
            Whether to count collisions and reductions.

        Returns
        -------
        ConvResult

        Raises
        ------
        OperandError
            If a dtype, shape or scale does not fit.
        """
        shape = self.output_shape(x.shape)
        n = shape[1]
        self._check_input(x)
        inverse = self._inverse(scale_a)
        gain, shift = (None, None) if affine is None else affine
        vectors = {"scale_w": scale_w, "bias": bias, "gain": gain, "shift": shift}
        for name, vector in vectors.items():
            if vector is not None and (vector.shape != (n,) or vector.dtype != np.float32):
                raise OperandError(
                    f"{name} has shape {vector.shape} and dtype {vector.dtype}; ({n},) of float32 is needed"
                )
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.writeable:
            raise OperandError(
                f"out has shape {out.shape} and dtype {out.dtype}; writeable {shape} of float32 is needed"
            )
        y = _aligned(out)
        scale = (float(scale_a) * scale_w.astype(np.float64)).astype(np.float32)
        if 0 in shape or 0 in self.shape:
            y[...] = _without_products(n, bias, affine, relu)[:, None, None]
            active, reduced, flags = (0,) * (self.config.threads + 1), (0, 0), (False, False)
        else:
            active, reduced_a, reduced_w, *seen = self._layer.run(
                _aligned(x),
                y,
                inverse_scale=inverse,
                scale=scale,
                bias=_contiguous(bias),
                gain=_contiguous(gain),
                shift=_contiguous(shift),
                relu=relu,
                cpu_threads=cpu_threads,
                count=count,
            )
            reduced, flags = (reduced_a, reduced_w), (seen[0], seen[1])
        if y is not out:
            out[...] = y
        return ConvResult(out, Counters(active, *reduced) if count else None, *flags)

    def quantize(self, x: np.ndarray, scale_a: float) -> np.ndarray:
        """Quantise a batch and lower it to the operand that each group's GEMM sees.

        Parameters
        ----------
        x : ndarray (B, C, H, W), float32
            Images.
        scale_a : float
            Activation scale.

        Returns
        -------
        ndarray (groups, B * OH * OW, K), uint8, or int8 if `signed`
            Rows image-major, columns (channel, kernel row, kernel column); not reordered.
        """
        batch, _, height, width = self.output_shape(x.shape)
        self._check_input(x)
        low, high, dtype = (-127, 127, np.int8) if self.signed else (0, 255, np.uint8)
        scaled = x * np.float32(self._inverse(scale_a))
        q = np.rint(np.clip(scaled, np.float32(low), np.float32(high))).astype(dtype)
        q = np.pad(q, ((0, 0), (0, 0), *self.padding))
        _, c, kh, kw = self.shape
        taps = [
            q[
                :,
                :,
                i * self.dilation[0] : i * self.dilation[0] + (height - 1) * self.stride[0] + 1 : self.stride[
                    0
                ],
                j * self.dilation[1] : j * self.dilation[1] + (width - 1) * self.stride[1] + 1 : self.stride[
                    1
                ],
            ]
            for i in range(kh)
            for j in range(kw)
        ]
        if not taps or 0 in (batch, height, width):
            return np.zeros((self.groups, batch * height * width, c * kh * kw), dtype)
        windows = np.stack(taps, axis=2)  # (B, C, taps, OH, OW)
        windows = windows.reshape(batch, self.groups, c * kh * kw, height * width)
        return windows.transpose(1, 0, 3, 2).reshape(self.groups, batch * height * width, c * kh * kw)

    def _check_input(self, x: np.ndarray) -> None:
        if x.dtype != np.float32:
            raise OperandError(f"x has dtype {x.dtype}; float32 is needed")

    def _inverse(self, scale_a: float) -> float:
        scale = float(scale_a)
        if not _LEAST_SCALE <= scale <= _LARGEST_SCALE:
            raise OperandError(
                f"scale_a={scale_a!r} is no scale: a positive, finite, normal float32 is needed "
                f"({_LEAST_SCALE:.3g} to {_LARGEST_SCALE:.2g})"
            )
        return ctypes.c_float(1.0 / scale).value  # rounded to float32

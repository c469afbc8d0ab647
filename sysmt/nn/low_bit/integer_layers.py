"""Convolution and BatchNorm in Q format: 8-bit codes into 32-bit accumulators, on the array.

The integer layers of the article "Batch Normalization: A different perspective from Quantized Inference
Model". 8-bit inputs are multiplied by 8-bit weights into 32-bit accumulators; the bias is aligned with them
and added; the sum is shifted (floor) and saturated to the output's format. `sysmt.quant.fixedpoint` says what
the article's listings get wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sysmt.config import ArrayConfig
from sysmt.errors import ConfigError, OperandError
from sysmt.hw.gemm import gemm_stats
from sysmt.hw.kernels import PackedGemm
from sysmt.hw.stats import Counters, GemmStats
from sysmt.nn.array.lowering import LayerGeometry, im2col
from sysmt.quant.fixedpoint import ACCUMULATOR_BITS, QFormat, align_bias, floor_shift, round_shift, saturate

__all__ = ["accumulate", "add_bias", "conv2d", "pack", "parse_rounding", "requantize", "scale_and_shift"]

Codes = npt.NDArray[Any]

SHIFTS = {"floor": floor_shift, "nearest": round_shift}
"""How the bits below the output's point go."""


def pack(weights: Codes, geometry: LayerGeometry, config: ArrayConfig) -> list[PackedGemm]:
    """Pack weight codes (N, C / groups, kh, kw), int8, for the array: one GEMM per group."""
    per_group = weights.reshape(geometry.groups, geometry.gemm_n, geometry.gemm_k)
    return [PackedGemm(one.T, config, signed=True) for one in per_group]


def accumulate(
    x: Codes, packed: list[PackedGemm], geometry: LayerGeometry, cpu_threads: int = 1
) -> tuple[Codes, GemmStats]:
    """Convolve codes with packed weights on the array, into 32-bit accumulators.

    Parameters
    ----------
    x : ndarray (B, C, H, W), int8
        Padded already where the padding is not zeros.
    packed : list of PackedGemm
        As `pack` gives it.
    geometry : LayerGeometry
    cpu_threads : int
        The result does not depend on it.

    Returns
    -------
    ndarray (B, N, OH, OW), int32
    GemmStats
        Summed over images and groups.
    """
    images, _, height, width = x.shape
    geometry = geometry.pre_padded
    out_h, out_w = geometry.output_size(height, width)
    if out_h < 1 or out_w < 1:
        raise OperandError(f"input of {height} x {width} is too small for a kernel of {geometry.kernel}")
    m, n, k = out_h * out_w, geometry.gemm_n, geometry.gemm_k
    outputs = []
    counters = Counters(())
    for operand, gemm in zip(im2col(x, geometry), packed, strict=True):
        # Rows do not depend on each other: all images make one tall operand.
        out, counted = gemm.run(operand.reshape(images * m, k), cpu_threads=cpu_threads)
        assert counted is not None
        counters += counted
        outputs.append(out.reshape(images, m, n).transpose(0, 2, 1))
    stats = gemm_stats(counters, m, n, k, packed[0].config, count=images * geometry.groups)
    return np.concatenate(outputs, axis=1).reshape(images, geometry.out_channels, out_h, out_w), stats


def conv2d(
    x: Codes,
    weights: Codes,
    bias: Codes | None = None,
    *,
    formats: tuple[QFormat, QFormat, QFormat],
    bias_fraction: int | None = None,
    config: ArrayConfig | None = None,
    geometry: LayerGeometry | None = None,
    rounding: str = "floor",
) -> tuple[Codes, GemmStats]:
    """Convolve in Q format on the array: int8 times int8 into int32, bias aligned, shifted, saturated.

    The article's ``conv_single_step_quantized``, for all outputs at once.

    Parameters
    ----------
    x : ndarray (B, C, H, W), int8
        Codes of the input; signed activations of the array.
    weights : ndarray (N, C / groups, kh, kw), int8
    bias : ndarray (N,) of integers, optional
    formats : (QFormat, QFormat, QFormat)
        Of input, weights and output; the first two of at most 8 bits.
    bias_fraction : int, optional
        Fraction bits of the bias; by default the weights', as in the article.
    config : ArrayConfig, optional
        The array and its threads; by default one thread, which is exact.
    geometry : LayerGeometry, optional
        Stride, padding, dilation and groups; by default strides of 1 and no padding.
    rounding : {"floor", "nearest"}
        Of the shift to the output's format; the article's is floor.

    Returns
    -------
    codes : ndarray (B, N, OH, OW), int8 (or wider, as the output's format asks)
    stats : GemmStats

    Raises
    ------
    OperandError
        If dtypes or shapes do not fit.
    """
    for name, codes in (("x", x), ("weights", weights)):
        if not isinstance(codes, np.ndarray) or codes.dtype != np.int8 or codes.ndim != 4:
            dtype = getattr(codes, "dtype", type(codes).__name__)
            raise OperandError(
                f"{name} has shape {np.shape(codes)} and dtype {dtype}; int8 with four axes is needed"
            )
    n, _, *kernel = weights.shape
    if geometry is None:
        geometry = LayerGeometry(x.shape[1], n, (kernel[0], kernel[1]))
    wanted = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)
    if weights.shape != wanted or x.shape[1] != geometry.in_channels:
        raise OperandError(
            f"x has shape {x.shape} and weights {weights.shape}; (B, {geometry.in_channels}, H, W) and "
            f"{wanted} are needed"
        )
    if bias is not None and np.shape(bias) != (n,):
        raise OperandError(f"bias has shape {np.shape(bias)}; ({n},) is needed")
    config = ArrayConfig(threads=1) if config is None else config
    sums, stats = accumulate(x, pack(weights, geometry, config), geometry)
    of_input, of_weights, of_output = formats
    fraction = of_input.fraction_bits + of_weights.fraction_bits
    if bias is not None:
        own = of_weights.fraction_bits if bias_fraction is None else bias_fraction
        sums = add_bias(sums, align_bias(bias, own, fraction))
    return requantize(sums, fraction, of_output, rounding), stats


def scale_and_shift(
    x: Codes,
    scale: Codes,
    bias: Codes,
    *,
    formats: tuple[QFormat, QFormat, QFormat],
    bias_fraction: int,
    rounding: str = "floor",
) -> Codes:
    """Multiply and add per channel in Q format: BatchNorm by equation (1.4), the article's ``calculate_bn``.

    Parameters
    ----------
    x : ndarray (B, C, ...) of integers
        Codes of the input, of at most 16 bits.
    scale : ndarray (C,) of integers
        gamma / sqrt(variance + eps), of at most 16 bits.
    bias : ndarray (C,) of integers
        The combined bias, beta - mean * gamma / sqrt(variance + eps).
    formats : (QFormat, QFormat, QFormat)
        Of input, scale and output.
    bias_fraction : int
        Fraction bits of the bias.
    rounding : {"floor", "nearest"}
        Of the shift to the output's format.

    Returns
    -------
    ndarray (B, C, ...), int8 (or wider, as the output's format asks)

    Raises
    ------
    OperandError
        If shapes do not fit, or `x` or `scale` are no integers of at most 16 bits.
    """
    if x.ndim < 2 or np.shape(scale) != (x.shape[1],) or np.shape(bias) != (x.shape[1],):
        raise OperandError(
            f"x has shape {x.shape}, scale {np.shape(scale)} and bias {np.shape(bias)}; "
            "one scale and one bias for each channel of (B, C, ...) are needed"
        )
    for what, codes in (("x", x), ("scale", np.asarray(scale))):
        if codes.dtype.kind not in "iu" or np.abs(codes.astype(np.int64)).max(initial=0) >= 1 << 16:
            raise OperandError(
                f"{what} ({codes.dtype}) must hold integers of at most 16 bits; quantise it first"
            )
    fraction = formats[0].fraction_bits + formats[1].fraction_bits
    channels = (-1, *[1] * (x.ndim - 2))
    product = x.astype(np.int64) * np.asarray(scale).astype(np.int64).reshape(channels)
    return requantize(
        add_bias(product, align_bias(bias, bias_fraction, fraction)), fraction, formats[2], rounding
    )


def add_bias(sums: Codes, bias: npt.NDArray[np.int32]) -> Codes:
    """Add an aligned bias (C,) to sums (B, C, ...) as the 32-bit accumulator does, which saturates."""
    total = sums.astype(np.int64) + bias.astype(np.int64).reshape(-1, *[1] * (sums.ndim - 2))
    return saturate(total, ACCUMULATOR_BITS)


def requantize(sums: Codes, fraction: int, to: QFormat, rounding: str = "floor") -> Codes:
    """Shift sums with so many fraction bits to another format, and saturate.

    Parameters
    ----------
    sums : ndarray of integers
    fraction : int
    to : QFormat
    rounding : {"floor", "nearest"}
        Down, as the article does, or to nearest, half up.
    """
    shift = SHIFTS[parse_rounding(rounding)]
    return saturate(shift(sums, fraction - to.fraction_bits), to.bits)


def parse_rounding(rounding: str) -> str:
    """Return the name of a rounding, checked.

    Raises
    ------
    ConfigError
        If it is none of `SHIFTS`.
    """
    if rounding not in SHIFTS:
        raise ConfigError(f"rounding={rounding!r} is unknown; allowed: {', '.join(SHIFTS)}")
    return rounding

"""Fixed point by dynamic range: Qm.n formats, and the integer steps between two of them.

The scheme of the article "Batch Normalization: A different perspective from Quantized Inference Model". Its
listings are followed in what they mean, not to the letter, because some of them overflow:

* ``2 << frac`` is 2^(frac + 1), twice the factor of `frac` fraction bits, and fails for a negative `frac`:
  `QFormat.quantize` scales by 2^frac, whatever its sign.
* ``astype('int8')`` wraps (131 becomes -125, and 130 out of a BatchNorm becomes -126), and turns a fraction
  above 127 bits negative: everything here saturates, and fraction bits are Python's integers.
* ``Z >> (ip_fract + wt_fract - fract_dout)`` shifts by a negative amount where the output has more fraction
  bits than the sum, ``b << ip_fract`` where the input has negative ones: `floor_shift` goes both ways.
* The BatchNorm's sum is held in 16 bits, which ``bias << ...`` overflows: `align_bias` has 32, and saturates.
* ``np.log2(0)`` of an all-zero tensor is minus infinity: it gets ``bits - 1`` fraction bits.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from sysmt.config import parse_count
from sysmt.errors import ConfigError, OperandError
from sysmt.quant.error import sqnr_db

__all__ = ["QFormat", "align_bias", "floor_shift", "fraction_bits", "round_shift", "saturate", "sqnr_db"]

MAX_BITS = 32
FRACTION_BITS = (-1023, 1105)  # what float64 asks for: its largest number in 2 bits, its smallest in 32
ACCUMULATOR_BITS = 32

Int64Array = npt.NDArray[np.int64]
IntegerArray = npt.NDArray[Any]


def _parse_bits(bits: object) -> int:
    count = parse_count(bits, "bits", minimum=2)
    if count > MAX_BITS:
        raise ConfigError(f"bits={count} is too large; a format has 2 to {MAX_BITS} bits, sign included")
    return count


def _finite(x: npt.ArrayLike, what: str) -> npt.NDArray[np.float64]:
    try:
        given: np.ndarray[Any, Any] = np.asarray(x)
        if given.dtype.kind not in "biuf":
            raise TypeError(f"dtype {given.dtype}")
        values = given.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # torch tensors that require gradients, too
        raise OperandError(f"{what} must be an array of real numbers ({error})") from None
    if not np.isfinite(values).all():
        raise OperandError(f"{what} holds NaN or infinity; fixed point has neither")
    return values


def _integers(values: npt.ArrayLike, what: str) -> Int64Array:
    given: np.ndarray[Any, Any] = np.asarray(values)
    if given.dtype.kind not in "iu" or given.dtype == np.uint64:
        raise OperandError(f"{what} has dtype {given.dtype}; integers of at most 64 bits, signed, are needed")
    return given.astype(np.int64)


def fraction_bits(x: npt.ArrayLike, bits: int = 8) -> int:
    """Fraction bits that the dynamic range of `x` leaves: ``bits - 1 - ceil(log2(max|x|))``.

    One bit is for the sign (the article's ``get_fract_bits``). Negative for a range beyond 2^(bits - 1): the
    step is then above 1. The logarithm is exact. A maximum above (1 - 2^-bits) of its power of two saturates
    by a step, as 1.0 in Q1.7 does. The article gives its own input, -123.68 .. 131.32, 0 fraction
    bits by hand, where this rule says -1.

    Parameters
    ----------
    x : array of float
        Any shape, finite.
    bits : int
        Of the format, sign included: 2 .. 32.

    Returns
    -------
    int
        ``bits - 1`` for an empty or all-zero `x`.

    Raises
    ------
    OperandError
        If `x` is no array of real, finite numbers.
    ConfigError
        If `bits` is out of range.
    """
    bits = _parse_bits(bits)
    values = _finite(x, "x")
    largest = float(np.abs(values).max(initial=0.0))
    if largest == 0:
        return bits - 1
    mantissa, exponent = math.frexp(largest)  # in [0.5, 1)
    return bits - 1 - (exponent - 1 if mantissa == 0.5 else exponent)


@dataclasses.dataclass(frozen=True)
class QFormat:
    """Signed fixed point: codes of `bits` bits that count steps of 2^-fraction_bits.

    Attributes
    ----------
    fraction_bits : int
        n of Qm.n; negative for steps above 1.
    bits : int
        m + n, sign included, 2 .. 32: Q2.6 has 8 bits, 6 of them after the point.

    Raises
    ------
    ConfigError
        If `bits` is out of range, or `fraction_bits` no integer or beyond -1023 .. 1105.
    """

    fraction_bits: int
    bits: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", _parse_bits(self.bits))
        fraction = parse_count(self.fraction_bits, "fraction_bits", minimum=FRACTION_BITS[0])
        if fraction > FRACTION_BITS[1]:
            raise ConfigError(f"fraction_bits={fraction} is too large; it must be at most {FRACTION_BITS[1]}")
        object.__setattr__(self, "fraction_bits", fraction)

    @classmethod
    def of(cls, x: npt.ArrayLike, bits: int = 8) -> QFormat:
        """Return the format that the dynamic range of `x` asks for; see `fraction_bits`."""
        return cls(fraction_bits(x, bits), bits)

    def __str__(self) -> str:
        return f"Q{self.bits - self.fraction_bits}.{self.fraction_bits}"

    @property
    def low(self) -> int:
        """Smallest code, -2^(bits - 1)."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest code, 2^(bits - 1) - 1."""
        return (1 << (self.bits - 1)) - 1

    @property
    def step(self) -> float:
        """Difference between neighbouring values, in the unit of the signal."""
        return math.ldexp(1.0, -self.fraction_bits)

    def quantize(self, x: npt.ArrayLike) -> IntegerArray:
        """Return the nearest codes, half to even, saturated to [`low`, `high`].

        Parameters
        ----------
        x : array of float
            Any shape, finite.

        Returns
        -------
        ndarray of int8, int16 or int32
            The smallest of them that holds `bits` bits.

        Raises
        ------
        OperandError
            If `x` is no array of real, finite numbers.
        """
        values = _finite(x, "x")
        with np.errstate(over="ignore", under="ignore"):  # infinity saturates like any other large number
            scaled = np.ldexp(values, self.fraction_bits)
        return np.clip(np.rint(scaled), self.low, self.high).astype(_smallest_dtype(self.bits))

    def dequantize(self, codes: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the values of codes: ``codes * step``, exact in float64."""
        return np.ldexp(_integers(codes, "codes").astype(np.float64), -self.fraction_bits)


def _smallest_dtype(bits: int) -> type[np.signedinteger[Any]]:
    return np.int8 if bits <= 8 else np.int16 if bits <= 16 else np.int32


def saturate(values: npt.ArrayLike, bits: int = 8) -> IntegerArray:
    """Hold integers in `bits` bits, sign included: [-2^(bits - 1), 2^(bits - 1) - 1].

    Returns
    -------
    ndarray of int8, int16 or int32
        The smallest of them that holds `bits` bits.

    Raises
    ------
    OperandError
        If the values are no integers.
    ConfigError
        If `bits` is not in 2 .. 32.
    """
    bits = _parse_bits(bits)
    limit = 1 << (bits - 1)
    return np.clip(_integers(values, "values"), -limit, limit - 1).astype(_smallest_dtype(bits))


def floor_shift(values: npt.ArrayLike, right: int) -> Int64Array:
    """Shift integers right by `right` bits, rounding down; left where `right` is negative.

    A right shift is floor(v / 2^right), so that -1 stays -1: on average it costs half a step. A left shift
    is exact; what does not fit 64 bits saturates instead of wrapping.

    Parameters
    ----------
    values : array of integers
    right : int
        Any sign and size.

    Returns
    -------
    ndarray of int64

    Raises
    ------
    OperandError
        If the values are no integers.
    """
    v = _integers(values, "values")
    right = parse_count(right, "right", minimum=-(1 << 32))
    if right >= 0:
        return v >> min(right, 63)  # 63 leaves the sign alone, as any larger shift does
    left = min(-right, 63)
    limits = np.iinfo(np.int64)
    fits = (v >= limits.min >> left) & (v <= limits.max >> left)
    shifted = np.where(fits, v, 0) << left
    return np.where(fits, shifted, np.where(v < 0, limits.min, limits.max))


def round_shift(values: npt.ArrayLike, right: int) -> Int64Array:
    """Shift integers right by `right` bits, rounding to nearest, half up; left where `right` is negative.

    This equals adding half a step before `floor_shift`. The article does not do it.

    Parameters
    ----------
    values : array of integers
    right : int
        Any sign and size.

    Returns
    -------
    ndarray of int64

    Raises
    ------
    OperandError
        If the values are no integers.
    """
    shifted = floor_shift(values, right)
    return shifted + (floor_shift(values, right - 1) & 1) if right > 0 else shifted


def align_bias(bias: npt.ArrayLike, fraction: int, accumulator_fraction: int) -> npt.NDArray[np.int32]:
    """Bring bias codes to the point of the accumulator, which they are added to.

    The article's ``b << ip_fract``, which holds for a bias with the weights' fraction bits. A bias that is
    finer than the accumulator is shifted right; one that does not fit its 32 bits saturates.

    Parameters
    ----------
    bias : array of integers
    fraction, accumulator_fraction : int
        Fraction bits of the codes, and of the accumulator: input's plus weights'.

    Returns
    -------
    ndarray of int32
    """
    aligned: npt.NDArray[np.int32] = saturate(
        floor_shift(bias, fraction - accumulator_fraction), ACCUMULATOR_BITS
    )
    return aligned

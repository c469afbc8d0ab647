"""Numbers of two to eight bits on fixed scales: logarithmic, uniform, and one between them.

The eight formulae of Table 1 of B. Graham, "Low-Precision Batch-Normalized Activations" (2017), for values
that BatchNorm has normalised: their scale is fixed, since the mean is 0 and the variance about 1. Each
is a staircase of exactly 2^bits levels, for which two things that the table leaves open are needed:
logarithms are of the absolute value, and sign(0) is +1.

All functions take numpy arrays and torch tensors alike, and give back the same kind, on the same device.
torch is imported when the first tensor comes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from sysmt.errors import ConfigError, OperandError, nearest

if TYPE_CHECKING:
    import torch

__all__ = [
    "FORMATS",
    "GRADIENT_FORMAT",
    "NumberFormat",
    "approximate",
    "decode",
    "encode",
    "pack",
    "packed_bytes",
    "parse_format",
    "unpack",
]

Array = TypeVar("Array", np.ndarray, "torch.Tensor")

_Codes = Callable[[Any, ModuleType], Any]
"""Turns float32 or float64 values into codes, integers of any type, given their module: numpy or torch."""


@dataclasses.dataclass(frozen=True)
class NumberFormat:
    """One low-precision representation: a code is the rank of its level, 0 the lowest.

    Attributes
    ----------
    name : str
        Such as ``"L4"``.
    bits : int
        Bits of a code.
    levels : tuple of float
        The 2^bits values that can be represented, ascending.
    formula : str
        As in Table 1.
    """

    name: str
    bits: int
    levels: tuple[float, ...]
    formula: str
    codes: _Codes = dataclasses.field(repr=False, compare=False)


# -- the staircases ----------------------------------------------------------------------------


def _logarithmic(
    name: str, bits: int, steps_per_octave: int, scale: float, lowest: int, shift: float = 0.0
) -> NumberFormat:
    """Return sign(x) · base^(shift + clamp(floor(log_base scale·|x|))) with base 2 or its root.

    Floats of one sign are ordered as their bits are, and a factor of 2 adds 1 to the exponent's field.
    So floor(log2 y) is a subtraction and a shift, exactly, as the paper says; and half-octaves add up:
    floor(2 log2 y) = floor(log2 y) + floor(log2 y + 1/2).
    """
    half = 1 << (bits - 1)
    exponents = [(lowest + step) / steps_per_octave for step in range(half)]
    magnitudes = [2.0 ** (shift + exponent) for exponent in exponents]
    starts = [2.0 ** (-step / steps_per_octave) / scale for step in range(steps_per_octave)]

    def codes(x: Any, xp: ModuleType) -> Any:
        wide = x.dtype == xp.float64
        integers, mantissa_bits = (xp.int64, 52) if wide else (xp.int32, 23)
        pattern = (x + 0.0).view(integers)  # of -0.0, too, the sign becomes +
        sign = pattern >> (63 if wide else 31)  # -1 for a negative number, else 0
        pattern &= xp.iinfo(integers).max
        exponent = xp.zeros_like(pattern)
        for start in starts:
            exponent += (pattern - _bits_at_least(start, wide)) >> mantissa_bits
        return ((exponent - lowest).clip(0, half - 1) ^ sign) + half  # m ^ -1 is -1 - m

    levels = (*(-m for m in reversed(magnitudes)), *magnitudes)
    base = "2" if steps_per_octave == 1 else "√2"
    half_step = "1/2 + " if shift else ""
    return NumberFormat(
        name,
        bits,
        levels,
        f"sign(x)·{base}^({half_step}clamp[{lowest},{lowest + half - 1}] floor(log_{base} {scale}|x|))",
        codes,
    )


def _bits_at_least(value: float, wide: bool) -> int:
    """Bit pattern of the least float64 or float32 that is not below `value`."""
    if wide:
        return int(np.float64(value).view(np.int64))
    near = np.float32(value)
    return int((near if float(near) >= value else np.nextafter(near, np.float32(np.inf))).view(np.int32))


def _uniform(name: str, bits: int, steps: int) -> NumberFormat:
    """Return (1/2 + clamp(floor(steps·x))) / steps."""
    half = 1 << (bits - 1)

    def codes(x: Any, xp: ModuleType) -> Any:
        return xp.floor(x * steps).clip(-half, half - 1) + half

    levels = tuple((0.5 + k) / steps for k in range(-half, half))
    return NumberFormat(
        name, bits, levels, f"(1/2 + clamp[{-half},{half - 1}] floor({steps}x))/{steps}", codes
    )


def _offset_logarithmic(name: str, bits: int, base: float) -> NumberFormat:
    """Return sign(x) · (base^(1/2 + clamp(floor(log_base(1 + |x|)))) - 1)."""
    half = 1 << (bits - 1)
    magnitudes = [base ** (0.5 + k) - 1 for k in range(half)]

    def codes(x: Any, xp: ModuleType) -> Any:
        exponent = xp.floor(xp.log1p(abs(x)) * (1 / math.log(base))).clip(0, half - 1)
        return xp.where(x < 0, half - 1 - exponent, half + exponent)

    levels = (*(-m for m in reversed(magnitudes)), *magnitudes)
    formula = f"sign(x)·[{base}^(1/2 + clamp[0,{half - 1}] floor(log_{base} 1+|x|)) - 1]"
    return NumberFormat(name, bits, levels, formula, codes)


FORMATS: Mapping[str, NumberFormat] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            _logarithmic("L2", 2, 1, 1.034, -1, shift=0.5),
            _logarithmic("L3", 3, 1, 1.316, -1),
            _logarithmic("L4", 4, 1, 1.36, -3),
            _logarithmic("L5", 5, 2, 1.177, -6),
            _uniform("U4", 4, 2),
            _uniform("U5", 5, 3),
            _uniform("U8", 8, 8),
            _offset_logarithmic("O4", 4, 1.29),
        )
    }
)
"""Table 1, in its order."""

GRADIENT_FORMAT = _logarithmic("±2^(k/2), k = -127..0", 8, 2, 1.177, -127)
"""Section 2.5's set for gradients. The paper gives no constant; this is L5's, whose steps it has."""


def parse_format(fmt: str | NumberFormat) -> NumberFormat:
    """Return a format by name.

    Raises
    ------
    ConfigError
        If Table 1 has no such format.
    """
    if isinstance(fmt, NumberFormat):
        return fmt
    if not isinstance(fmt, str) or fmt not in FORMATS:
        raise ConfigError(
            f"format {fmt!r} is unknown{nearest(str(fmt), FORMATS)}; allowed: {', '.join(FORMATS)}"
        )
    return FORMATS[fmt]


_PIECE = 1 << 17
"""Values converted at a time: their intermediate results stay in the cache."""


# -- values and codes --------------------------------------------------------------------------


def approximate(x: Array, fmt: str | NumberFormat) -> Array:
    """Replace each value by its level: L2(x) .. O4(x) of Table 1.

    Parameters
    ----------
    x : ndarray or Tensor, floating
        Normalised values of any shape. Float32 and float64 use their own arithmetic, narrower types
        float32's.
    fmt : str or NumberFormat
        ``"L2"``, ``"L3"``, ``"L4"``, ``"L5"``, ``"U4"``, ``"U5"``, ``"U8"`` or ``"O4"``.

    Returns
    -------
    ndarray or Tensor
        Same kind, shape, dtype and device. Infinities become the outermost levels; NaN stays NaN. It
        carries no gradient: `sysmt.nn.low_bit.low_precision_batchnorm` has the layers that pass one through.

    Raises
    ------
    ConfigError
        If the format is unknown.
    OperandError
        If `x` is no array or tensor of floats.
    """
    fmt = parse_format(fmt)
    xp, values = _values(x, "approximate")
    result: Any = decode(_codes(values, fmt, xp), fmt, values.dtype, check=False)
    result = xp.where(xp.isnan(values), values, result)
    return cast("Array", result.astype(x.dtype) if xp is np else result.to(x.dtype))


def encode(x: Array, fmt: str | NumberFormat, *, check: bool = True) -> Array:
    """Return the code of each value, uint8: the rank of its level, 0 for the lowest.

    Parameters
    ----------
    x : ndarray or Tensor, floating
    fmt : str or NumberFormat
    check : bool
        Look for NaN. Without it, a NaN gets the code of some outermost level.

    Raises
    ------
    ConfigError
        If the format is unknown.
    OperandError
        If `x` is no array or tensor of floats, or holds NaN, which has no code.
    """
    fmt = parse_format(fmt)
    xp, values = _values(x, "encode")
    if check and bool(xp.isnan(values).any()):
        raise OperandError(f"the values to encode as {fmt.name} hold NaN, which has no code")
    return cast("Array", _codes(values, fmt, xp))


def decode(codes: Array, fmt: str | NumberFormat, dtype: Any = None, *, check: bool = True) -> Array:
    """Return the level of each code.

    Parameters
    ----------
    codes : ndarray or Tensor, uint8
        As `encode` gives them.
    fmt : str or NumberFormat
    dtype : dtype, optional
        Of the result, numpy's or torch's as `codes` are; by default float32.
    check : bool
        Look for codes that the format does not have.

    Raises
    ------
    ConfigError
        If the format is unknown.
    OperandError
        If the codes are not uint8, or beyond the format's largest.
    """
    fmt = parse_format(fmt)
    xp = _module_of(codes, "decode")
    _check_codes(codes, fmt.bits, xp, "decode", check)
    flat: Any = codes.reshape(-1)
    if xp is np:
        values = np.asarray(fmt.levels, dtype or np.float32)[flat]
    else:
        levels = _levels(fmt, dtype or xp.float32, flat.device)
        values = levels.new_empty(len(flat))
        for piece in _pieces(flat, xp):
            xp.index_select(levels, 0, flat[piece].to(xp.int32), out=values[piece])
    return cast("Array", values.reshape(codes.shape))


def _codes(values: Any, fmt: NumberFormat, xp: ModuleType) -> Any:
    flat = values.reshape(-1)
    codes = xp.empty(len(flat), dtype=xp.uint8, **_where(values, xp))
    with np.errstate(
        over="ignore", under="ignore", invalid="ignore"
    ):  # infinities are clamped; NaN is the caller's to see
        for piece in _pieces(flat, xp):
            codes[piece] = fmt.codes(flat[piece], xp)
    return codes.reshape(values.shape)


def _pieces(flat: Any, xp: ModuleType) -> Iterator[slice]:
    """Cut a long row up on a CPU; a GPU takes it whole."""
    size = _PIECE if xp is np or flat.device.type == "cpu" else max(1, len(flat))
    return (slice(start, start + size) for start in range(0, len(flat), size))


@lru_cache(maxsize=64)
def _levels(fmt: NumberFormat, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    import torch

    return torch.tensor(fmt.levels, dtype=dtype, device=device)


# -- codes and bytes ---------------------------------------------------------------------------


def packed_bytes(count: int, bits: int) -> int:
    """Return the size of `count` packed codes, in bytes."""
    elements, size = _group(bits)
    return -(-count // elements) * size


def pack(codes: Array, bits: int, *, check: bool = True) -> Array:
    """Pack codes of 2 to 8 bits into bytes without gaps, up to seven bytes at the end aside.

    The codes are cut into as many equal rows as it takes for whole bytes to come out (two rows for
    4 bits, eight for 3, 5 and 7). What is packed together is one code of each row, the first row's in the
    lowest bits: so all work is on long contiguous rows.

    Parameters
    ----------
    codes : ndarray or Tensor, uint8
        Of any shape; each below 2^bits.
    bits : int
        2 to 8.
    check : bool
        Look for codes that are too large.

    Returns
    -------
    ndarray or Tensor, uint8
        Flat, of `packed_bytes` elements.

    Raises
    ------
    ConfigError
        If `bits` is out of range.
    OperandError
        If the codes are not uint8, or too large for `bits`.
    """
    elements, size = _group(bits)
    xp = _module_of(codes, "pack")
    _check_codes(codes, bits, xp, "pack", check)
    flat: Any = codes.reshape(-1)
    missing = -len(flat) % elements
    if missing:
        flat = xp.concatenate(
            [flat, xp.zeros_like(flat, shape=missing) if xp is np else flat.new_zeros(missing)]
        )
    rows = flat.reshape(elements, -1)
    packed = xp.empty((size, rows.shape[1]), dtype=xp.uint8, **_where(codes, xp))
    for byte in range(size):
        first = 8 * byte // bits
        packed[byte] = rows[first] >> (8 * byte - first * bits)
        for element in range(first + 1, -(-8 * (byte + 1) // bits)):
            packed[byte] |= rows[element] << (element * bits - 8 * byte)  # what leaves the byte is dropped
    return cast("Array", packed.reshape(-1))


def unpack(packed: Array, bits: int, count: int) -> Array:
    """Undo `pack`.

    Parameters
    ----------
    packed : ndarray or Tensor, uint8, flat
    bits : int
    count : int
        Number of codes that were packed.

    Returns
    -------
    ndarray or Tensor (count,), uint8

    Raises
    ------
    ConfigError
        If `bits` is out of range.
    OperandError
        If `packed` does not have the size of `count` codes.
    """
    elements, size = _group(bits)
    xp = _module_of(packed, "unpack")
    if packed.dtype != xp.uint8 or packed.ndim != 1 or len(packed) != packed_bytes(count, bits):
        raise OperandError(
            f"unpack got {packed.dtype} of shape {tuple(packed.shape)}; {count} codes of {bits} bits are "
            f"{packed_bytes(count, bits)} bytes (uint8) in one row"
        )
    columns: Any = packed.reshape(size, -1)
    codes = xp.empty((elements, columns.shape[1]), dtype=xp.uint8, **_where(packed, xp))
    for element in range(elements):
        byte, at = divmod(element * bits, 8)
        codes[element] = columns[byte] >> at
        if at + bits > 8:
            codes[element] |= columns[byte + 1] << (8 - at)
    if bits < 8:
        codes &= (1 << bits) - 1
    return cast("Array", codes.reshape(-1)[:count])


def _group(bits: int) -> tuple[int, int]:
    """Return how many codes fill how many bytes exactly."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ConfigError(f"bits={bits!r} is out of range; codes have 2 to 8 bits")
    size = bits // math.gcd(bits, 8)
    return 8 * size // bits, size


# -- what was given ----------------------------------------------------------------------------


def _module_of(x: object, where: str) -> ModuleType:
    """Return numpy or torch, whichever `x` belongs to."""
    if isinstance(x, np.ndarray):
        return np
    if type(x).__module__.partition(".")[0] == "torch" or hasattr(x, "__torch_function__"):
        import torch

        if isinstance(x, torch.Tensor):
            return torch
    raise OperandError(f"{where} got {type(x).__name__}; a numpy array or torch tensor is needed")


def _where(x: Any, xp: ModuleType) -> dict[str, Any]:
    return {} if xp is np else {"device": x.device}


def _values(x: Any, where: str) -> tuple[ModuleType, Any]:
    """Return the module of `x`, and `x` as float32 or float64 without its history."""
    xp = _module_of(x, where)
    floats = [xp.float16, xp.float32, xp.float64] + ([] if xp is np else [xp.bfloat16])
    if x.dtype not in floats:
        raise OperandError(f"{where} got {x.dtype}; floating-point values are needed")
    if xp is np:
        return xp, x if x.dtype == np.float64 else x.astype(np.float32, copy=False)
    return xp, x.detach() if x.dtype == xp.float64 else x.detach().float()


def _check_codes(codes: Any, bits: int, xp: ModuleType, where: str, values_too: bool) -> None:
    if codes.dtype != xp.uint8:
        raise OperandError(f"{where} got codes of {codes.dtype}; uint8 is needed")
    if values_too and math.prod(codes.shape) and int(codes.max()) >> bits:
        raise OperandError(
            f"{where} got the code {int(codes.max())}; codes of {bits} bits end at {2**bits - 1}"
        )

"""Uniform post-training quantisation by ranges: unsigned or signed activations, symmetric weights.

The scheme of the recalibration paper (Shomron & Weiser, "Post-Training BatchNorm Recalibration",
section 3): activations per layer, scaled by the mean over images of each image's maximum; weights
per output channel, scaled by their largest magnitude. All arithmetic is float32, in one fixed
order, so that every path gives the same bits.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from sysmt.config import parse_number
from sysmt.errors import ConfigError

__all__ = [
    "ActivationRange",
    "WEIGHT_LIMIT",
    "activation_range",
    "dequantize",
    "inverse_scale",
    "is_scale",
    "parse_scale",
    "quantize_activations",
    "quantize_weights",
    "weight_scales",
]

WEIGHT_LIMIT = 127
"""Quantised weights, and signed activations, lie in [-127, 127]."""

SCALES = "a positive, finite, normal float32 (1.18e-38 to 3.4e38)"
"""What error messages say of a value that `is_scale` does not take."""

Float32Array = npt.NDArray[np.float32]

_QUIET = np.errstate(over="ignore", under="ignore", divide="ignore")
"""Rounding to 0 or infinity is part of the arithmetic, whatever numpy is told about it elsewhere."""


@dataclasses.dataclass(frozen=True)
class ActivationRange:
    """How one layer's input is quantised.

    Attributes
    ----------
    scale : float
        Float value of one quantisation step; a float32 value for which `is_scale` holds.
    signed : bool
        Whether the codes are int8 in [-127, 127] instead of uint8 in [0, 255].

    Raises
    ------
    ConfigError
        If the scale is not a positive, finite, normal float32.
    """

    scale: float
    signed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", parse_scale(self.scale, "activation scale"))
        if type(self.signed).__name__ not in ("bool", "bool_"):  # "false" would count as True
            raise ConfigError(f"signed={self.signed!r} must be True or False")
        object.__setattr__(self, "signed", bool(self.signed))

    @property
    def limit(self) -> int:
        """Largest code: 255 unsigned, 127 signed."""
        return WEIGHT_LIMIT if self.signed else 255


@_QUIET
def parse_scale(value: object, field: str) -> float:
    """Turn a number into a usable float32 scale; raise `ConfigError` otherwise.

    Scales of activations and of weights alike: 0, NaN and infinity quantise nothing, and of a number whose
    inverse overflows float32 the codes are undefined.
    """
    return float(np.float32(parse_number(value, field, SCALES, lambda number: bool(is_scale(number)))))


@_QUIET
def inverse_scale(scale: float | np.float32) -> np.float32:
    """Return float32(1 / scale), the factor that quantisation multiplies with."""
    return np.float32(1.0 / np.float64(scale))


def is_scale(values: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Tell which values can be the scale of activations or weights: positive, finite, normal float32 numbers.

    The inverse of a normal number is finite in float32, that of a smaller one may be infinite: zeros
    would then be quantised to 0 * inf, which is no number.

    Parameters
    ----------
    values : array, float32
        Any shape.

    Returns
    -------
    ndarray of bool
        Same shape.
    """
    with np.errstate(over="ignore"):
        scale = np.asarray(values, np.float32)
    return (scale >= np.finfo(np.float32).tiny) & (scale < np.inf)


@_QUIET
def _usable(scale: Float32Array) -> Float32Array:
    """Replace scales of all-zero (or vanishing) data by 1."""
    return np.where(is_scale(scale), scale, np.float32(1)).astype(np.float32)


@_QUIET
def activation_range(image_maxima: npt.ArrayLike, signed: bool) -> ActivationRange:
    """Turn per-image maxima into a layer's range.

    Parameters
    ----------
    image_maxima : array (images,), float
        For each calibration image the maximum of x, or of ``|x|`` if `signed` (or a percentile of them).
    signed : bool
        Whether calibration saw a negative activation.

    Returns
    -------
    ActivationRange
        Scale = mean of the maxima / 255 (/ 127 if signed); 1 if the layer only ever saw zeros.
    """
    limit = WEIGHT_LIMIT if signed else 255
    mean = np.mean(np.asarray(image_maxima, dtype=np.float64)) if np.size(image_maxima) else 0.0
    return ActivationRange(float(_usable(np.array([mean / limit], np.float32))[0]), signed)


@_QUIET
def quantize_activations(
    x: npt.ArrayLike, range_: ActivationRange
) -> npt.NDArray[np.uint8] | npt.NDArray[np.int8]:
    """Quantise finite float32 activations: ``clamp(rint(x * inv))``.

    Parameters
    ----------
    x : array, float32
        Any shape. An unsigned range clamps negative values to 0.
    range_ : ActivationRange

    Returns
    -------
    ndarray of uint8 or int8
        Codes, same shape; int8 if the range is signed.
    """
    low = -WEIGHT_LIMIT if range_.signed else 0
    rounded = np.rint(np.asarray(x, np.float32) * inverse_scale(range_.scale))
    codes: npt.NDArray = np.clip(rounded, low, range_.limit).astype(np.int8 if range_.signed else np.uint8)
    return codes


@_QUIET
def weight_scales(weight: npt.ArrayLike, per_channel: bool = True) -> Float32Array:
    """Scale of each output channel: max|w| / 127, and 1 for an all-zero channel.

    Parameters
    ----------
    weight : array (N, ...), float32
        Weights, output channels first.
    per_channel : bool
        One scale for each output channel, or one for the whole layer repeated N times.

    Returns
    -------
    ndarray (N,), float32
    """
    w = np.asarray(weight, np.float32)
    maxima = np.abs(w).max(axis=tuple(range(1, w.ndim)), initial=0.0)
    if not per_channel:
        maxima = np.full_like(maxima, maxima.max(initial=0.0))
    return _usable((maxima.astype(np.float64) / WEIGHT_LIMIT).astype(np.float32))


@_QUIET
def quantize_weights(weight: npt.ArrayLike, scales: Float32Array) -> npt.NDArray[np.int8]:
    """Quantise weights symmetrically to [-127, 127]; a zero weight stays exactly 0.

    Parameters
    ----------
    weight : array (N, ...), float32
    scales : ndarray (N,), float32
        As `weight_scales` gives them.

    Returns
    -------
    ndarray (N, ...), int8

    Raises
    ------
    ConfigError
        If a value is no scale (`is_scale`).
    """
    if not is_scale(scales).all():
        bad = int(np.argmin(is_scale(scales)))
        raise ConfigError(
            f"weight scale {scales[bad]:.3g} of output channel {bad} is no scale: {SCALES} is needed"
        )
    w = np.asarray(weight, np.float32)
    inverse = (1.0 / scales.astype(np.float64)).astype(np.float32).reshape(-1, *[1] * (w.ndim - 1))
    with np.errstate(over="ignore"):  # clamped below
        scaled = w * inverse
    np.rint(scaled, out=scaled)  # in place: a copy of the largest layer may be a forward's peak
    np.clip(scaled, -WEIGHT_LIMIT, WEIGHT_LIMIT, out=scaled)
    codes: npt.NDArray[np.int8] = scaled.astype(np.int8)
    return codes


@_QUIET
def dequantize(
    accumulators: npt.NDArray[np.int32],
    activation_scale: float,
    weight_scale: Float32Array,
    bias: Float32Array | None = None,
    channel_axis: int = -1,
) -> Float32Array:
    """Turn accumulators into float32: ``float32(acc) * float32(scale_a * scale_w[n])``, then + bias.

    Parameters
    ----------
    accumulators : ndarray, int32
    activation_scale : float
    weight_scale : ndarray (N,), float32
    bias : ndarray (N,), float32, optional
    channel_axis : int
        Axis of `accumulators` that runs over the N output channels.

    Returns
    -------
    ndarray, float32
    """
    shape = [1] * accumulators.ndim
    shape[channel_axis] = -1
    y = accumulators.astype(np.float32) * (np.float32(activation_scale) * weight_scale).reshape(shape)
    return y if bias is None else y + bias.astype(np.float32).reshape(shape)

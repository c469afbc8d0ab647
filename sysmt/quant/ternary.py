"""Ternary weights: -1, 0 and +1 by a threshold, and what the threshold does to their variance.

The scheme of Sari & Partovi Nia, "Understanding BatchNorm in Ternary Training", whose equation numbers
stand below. A weight starts uniform in ±√(6 / K) with K the fan-in of its layer, the inputs that one
output sums over (in_channels · kernel height · kernel width for a convolution); it keeps the variance
of a ReLU network's signals and gradients if its own variance is 2 / K.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from sysmt.config import parse_count
from sysmt.errors import ConfigError, OperandError

__all__ = ["nonzero_share", "ternarize", "twn_scale", "twn_threshold", "variance_threshold"]

TWN_FACTOR = 0.7
"""Threshold over mean magnitude in ternary weight networks (Li & Liu, arXiv 1605.04711)."""


def ternarize(w: npt.ArrayLike, threshold: npt.ArrayLike) -> np.ndarray:
    """Replace weights by -1, 0 or +1: equation (1).

    Parameters
    ----------
    w : array
        Finite weights, any shape.
    threshold : float or array that broadcasts to `w`
        Δ, at least 0. Weights in [-Δ, Δ], both ends included, become 0.

    Returns
    -------
    ndarray
        Of `w`'s shape and dtype; no -0.0.

    Raises
    ------
    ConfigError
        If a threshold is negative or no finite number.
    OperandError
        If a weight is NaN or infinite, or the shapes do not fit.
    """
    weights, limit = _finite(w), _threshold(threshold)
    try:
        np.broadcast_to(limit, weights.shape)
    except ValueError:
        raise OperandError(
            f"thresholds of shape {limit.shape} do not fit weights of shape {weights.shape}"
        ) from None
    signs = (weights > limit).astype(np.int8) - (weights < -limit).astype(np.int8)
    ternary: np.ndarray = signs.astype(weights.dtype)
    return ternary


def twn_threshold(w: npt.ArrayLike) -> float:
    """Return the threshold of ternary weight networks, Δ = 0.7 · E|w|.

    For weights uniform in ±√(6 / K) that is equation (10), Δ = 0.35 · √(6 / K), which leaves 65 % of them
    non-zero.

    Parameters
    ----------
    w : array
        The finite weights of one layer, at least one.

    Raises
    ------
    OperandError
        If there are none, or one is NaN or infinite.
    """
    weights = _finite(w)
    if not weights.size:
        raise OperandError("a layer without weights has no mean magnitude to take a threshold from")
    return TWN_FACTOR * float(np.mean(np.abs(weights.astype(np.float64))))


def twn_scale(w: npt.ArrayLike, threshold: float) -> float:
    """Return the magnitude that fits ternary weights best: the mean of those ``|w|`` above the threshold.

    The α of ternary weight networks (arXiv 1605.04711, equation 4), which the paper above leaves out.
    It is 1 where no weight is above the threshold.

    Raises
    ------
    ConfigError
        If the threshold is negative or no finite number.
    OperandError
        If a weight is NaN or infinite.
    """
    magnitudes = np.abs(_finite(w).astype(np.float64))
    above = magnitudes[magnitudes > _threshold(threshold)]
    return float(above.mean()) if above.size else 1.0


def variance_threshold(fan_in: int) -> float:
    """Return the threshold that keeps the variance of gradients, Δ = 2 √(6 / K) (1/2 - 1/K): equation (8).

    It makes p₁ = P(w < -Δ) = 1 / K and so the variance of ternary weights 2 p₁ = 2 / K. The columns "Sparse
    BN" and "Sparse No BN" of the paper's Table 1 use it; the text there refers to equation (10), which is
    a slip: (10) is the threshold of the other two columns.

    Parameters
    ----------
    fan_in : int
        K, at least 2: below, no ternary weight has a variance of 2 / K.

    Raises
    ------
    ConfigError
        If `fan_in` is impossible.
    """
    k = parse_count(fan_in, "fan_in", minimum=2)
    return 2 * math.sqrt(6 / k) * (0.5 - 1 / k)


def nonzero_share(threshold: float, fan_in: int) -> float:
    """Return the share of weights that start non-zero, 2 p₁ = 1 - Δ / √(6 / K): equations (7) and (9).

    It is the variance of the ternary weights as well (equation (3)).

    Parameters
    ----------
    threshold : float
        Δ, at least 0.
    fan_in : int
        K; the weights are uniform in ±√(6 / K).

    Raises
    ------
    ConfigError
        If one of them is impossible.
    """
    k = parse_count(fan_in, "fan_in")
    return max(0.0, 1.0 - float(_threshold(threshold)) / math.sqrt(6 / k))


def _finite(w: npt.ArrayLike) -> np.ndarray[Any, Any]:
    try:
        weights: np.ndarray[Any, Any] = np.asarray(w)
    except (TypeError, ValueError, RuntimeError) as error:  # torch tensors that require gradients, too
        raise OperandError(f"weights must be an array of real numbers ({error})") from None
    if weights.dtype.kind not in "fiub":
        raise OperandError(f"weights have dtype {weights.dtype}; real numbers are needed")
    if not np.isfinite(weights).all():
        raise OperandError("weights are NaN or infinite somewhere; they cannot be made ternary")
    return weights


def _threshold(threshold: npt.ArrayLike) -> np.ndarray[Any, Any]:
    try:
        limit = np.asarray(threshold, np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"threshold={threshold!r} is no number") from None
    if not (np.isfinite(limit) & (limit >= 0)).all():
        raise ConfigError(f"threshold={threshold!r} must be at least 0 and finite")
    return limit

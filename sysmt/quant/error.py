"""How far a quantised signal is from the real one."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from sysmt.errors import OperandError

__all__ = ["mse", "sqnr_db", "sqnr_db_from_energies"]


def _difference(signal: npt.ArrayLike, quantized: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    try:
        s, q = np.asarray(signal, np.float64), np.asarray(quantized, np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # torch tensors that require gradients, too
        raise OperandError(f"signal and quantized must be arrays of real numbers ({error})") from None
    if s.shape != q.shape:
        raise OperandError(f"signal has shape {s.shape} and quantized {q.shape}; they must be equal")
    return s, s - q


def mse(signal: npt.ArrayLike, quantized: npt.ArrayLike) -> float:
    """Mean squared error, in the signal's own unit squared; 0.0 for empty arrays."""
    _, noise = _difference(signal, quantized)
    return float(np.mean(noise**2)) if noise.size else 0.0


def sqnr_db_from_energies(signal_energy: float, noise_energy: float) -> float:
    """Signal-to-quantisation-noise ratio in dB from two sums of squares.

    Returns
    -------
    float
        10 log10(signal / noise); +inf without noise, -inf for noise without a signal.
    """
    if noise_energy == 0:
        return math.inf
    if signal_energy == 0:
        return -math.inf
    return 10 * math.log10(signal_energy / noise_energy)


def sqnr_db(signal: npt.ArrayLike, quantized: npt.ArrayLike) -> float:
    """Signal-to-quantisation-noise ratio in dB: sum of squares of the signal over that of the error.

    Parameters
    ----------
    signal, quantized : array
        The real signal and its quantised version in the same unit, same shape.

    Returns
    -------
    float
        dB; +inf if they are equal.

    Raises
    ------
    OperandError
        If the shapes differ.
    """
    s, noise = _difference(signal, quantized)
    return sqnr_db_from_energies(float(np.sum(s**2)), float(np.sum(noise**2)))

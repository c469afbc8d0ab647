"""The operands of a GEMM: checked, reordered, and cut into the slots of T threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sysmt.errors import OperandError
from sysmt.hw.timing import slot_count

__all__ = ["MAX_K", "apply_order", "check_operands", "check_order", "split_threads"]

MAX_K = 65_535
"""Largest K whose worst-case sum, K * 256 * 128, still fits a signed 32-bit accumulator."""


def check_operands(a_mk: npt.ArrayLike, b_kn: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Check dtypes, ranks and shapes of the two operands, without copying them.

    Parameters
    ----------
    a_mk : array (M, K), uint8 or int8
        Activations; int8 means signed activations.
    b_kn : array (K, N), int8
        Weights.

    Returns
    -------
    tuple of ndarray
        The operands as arrays.

    Raises
    ------
    OperandError
        If a dtype, rank or shape does not fit, or K is above `MAX_K`.
    """
    try:
        a, b = np.asarray(a_mk), np.asarray(b_kn)
    except ValueError as error:
        raise OperandError(f"a_mk and b_kn must be matrices, not ragged ({error})") from None
    if a.ndim != 2 or b.ndim != 2:
        raise OperandError(
            f"a_mk has shape {a.shape} and b_kn {b.shape}; both must be matrices: (M, K) times (K, N)"
        )
    if a.dtype not in (np.uint8, np.int8):
        raise OperandError(f"a_mk has dtype {a.dtype}; activations must be uint8 (unsigned) or int8 (signed)")
    if b.dtype != np.int8:
        raise OperandError(f"b_kn has dtype {b.dtype}; weights must be int8")
    if a.shape[1] != b.shape[0]:
        raise OperandError(
            f"a_mk has shape {a.shape} and b_kn {b.shape}: K differs, {a.shape[1]} against {b.shape[0]}"
        )
    if a.shape[1] > MAX_K:
        raise OperandError(f"K={a.shape[1]} could overflow a 32-bit accumulator; K must be at most {MAX_K}")
    return a, b


def check_order(order: npt.ArrayLike, k: int, threads: int) -> np.ndarray:
    """Check that `order` is a permutation of 0..K-1, or of 0..T*ceil(K/T)-1.

    Parameters
    ----------
    order : array of int
        Position i of the reordered K axis takes element ``order[i]``; elements >= K are padding zeros.
    k, threads : int
        Length of the K axis, and T.

    Returns
    -------
    ndarray of intp

    Raises
    ------
    OperandError
        If it is neither permutation.
    """
    try:
        given: np.ndarray[Any, Any] = np.asarray(order)
    except ValueError as error:
        raise OperandError(f"order must be one axis of integers ({error})") from None
    padded = threads * slot_count(k, threads)
    if given.ndim != 1 or not (np.issubdtype(given.dtype, np.integer) or given.size == 0):
        raise OperandError(
            f"order has shape {given.shape} and dtype {given.dtype}; one axis of integers is needed"
        )
    if given.size not in (k, padded):
        raise OperandError(
            f"order has {given.size} elements; it must be a permutation of 0..{k - 1} or of 0..{padded - 1}"
        )
    if not np.array_equal(np.sort(given), np.arange(given.size)):
        raise OperandError(
            f"order is no permutation of 0..{given.size - 1}: an index is missing or out of range"
        )
    return given.astype(np.intp, copy=False)


def apply_order(
    a: np.ndarray, b: np.ndarray, order: npt.ArrayLike | None, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Apply a permutation of K to both operands; indices >= K pick zeros. ``None`` changes nothing."""
    k = a.shape[1]
    if order is None:
        return a, b
    permutation = check_order(order, k, threads)
    if permutation.size > k:
        extra = permutation.size - k
        a = np.pad(a, ((0, 0), (0, extra)))
        b = np.pad(b, ((0, extra), (0, 0)))
    return a[:, permutation], b[permutation]


def split_threads(a: np.ndarray, b: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Zero-pad K at its end and cut it into T contiguous chunks.

    Returns
    -------
    tuple of ndarray
        Activations (M, T, L) and weights (T, L, N), L = ceil(K / T): slot l holds
        ``a[:, :, l]`` and ``b[:, l, :]``.
    """
    length = slot_count(a.shape[1], threads)
    padding = threads * length - a.shape[1]
    if padding:
        a = np.pad(a, ((0, 0), (0, padding)))
        b = np.pad(b, ((0, padding), (0, 0)))
    return a.reshape(a.shape[0], threads, length), b.reshape(threads, length, b.shape[1])

"""The fast exact engine: one GEMM through the compiled kernels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sysmt.config import ArrayConfig
from sysmt.hw.kernels import PackedGemm
from sysmt.hw.stats import Counters

__all__ = ["simulate"]


def simulate(
    a: np.ndarray,
    b: np.ndarray,
    config: ArrayConfig,
    order: npt.ArrayLike | None = None,
    cpu_threads: int = 1,
    path: str | None = None,
) -> tuple[np.ndarray, Counters]:
    """Compute ``a @ b`` as the array does, with the same integers and counters as the reference.

    Parameters
    ----------
    a : ndarray (M, K), uint8 or int8
        Activations, checked but not reordered; any strides.
    b : ndarray (K, N), int8
        Weights, checked but not reordered; any strides.
    config : ArrayConfig
        The array; only threads, policy, rounding and saturate matter here.
    order : array of int, optional
        Permutation of the K axis, as in `sysmt.hw.operands.check_order`.
    cpu_threads : int
        CPU threads; the result does not depend on it.
    path : str, optional
        Kernel path; the default is `sysmt.hw.kernels.active_path()`.

    Returns
    -------
    out_mn : ndarray (M, N), int32
    counters : Counters

    Raises
    ------
    OperandError
        If `order` is no permutation of K.
    PathError
        If the path is unknown or not available.
    """
    out_mn, counters = PackedGemm(b, config, a.dtype == np.int8, order, path).run(a, cpu_threads)
    assert counters is not None
    return out_mn, counters

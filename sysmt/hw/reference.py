"""The reference engine: it sends every output through `pe.py`, slot by slot. It is slow and obvious."""

from __future__ import annotations

import numpy as np

from sysmt.config import ArrayConfig
from sysmt.hw.operands import split_threads
from sysmt.hw.pe import work_slot
from sysmt.hw.stats import Counters

__all__ = ["simulate"]


def simulate(a: np.ndarray, b: np.ndarray, config: ArrayConfig) -> tuple[np.ndarray, Counters]:
    """Compute every output of ``a @ b`` with one PE.

    Parameters
    ----------
    a : ndarray (M, K), uint8 or int8
        Activations, checked and reordered.
    b : ndarray (K, N), int8
        Weights, checked and reordered.
    config : ArrayConfig
        The array; only threads, policy, rounding and saturate matter here.

    Returns
    -------
    out_mn : ndarray (M, N), int32
    counters : Counters
    """
    signed = a.dtype == np.int8
    a_mtl, b_tln = split_threads(a, b, config.threads)
    out_mn = np.zeros((a.shape[0], b.shape[1]), np.int32)
    active = [0] * (config.threads + 1)
    reduced_activations = reduced_weights = 0
    for m, n in np.ndindex(out_mn.shape):
        accumulator = 0
        for activations, weights in zip(a_mtl[m].T.tolist(), b_tln[:, :, n].T.tolist(), strict=True):
            slot = work_slot(activations, weights, config, signed)
            accumulator += slot.value
            active[slot.active] += 1
            reduced_activations += slot.reduced_activations
            reduced_weights += slot.reduced_weights
        out_mn[m, n] = accumulator
    return out_mn, Counters(tuple(active), reduced_activations, reduced_weights)

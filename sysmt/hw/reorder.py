"""Which activations meet in a slot: an order of K that pairs often-wide positions with rarely-wide ones.

Reordering of the NB-SMT paper (arXiv 2004.09309, section 4.2); off by default, as in the
recalibration paper.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sysmt.hw.timing import slot_count

__all__ = ["order_from_wide_counts"]


def order_from_wide_counts(wide_counts: npt.ArrayLike, threads: int) -> np.ndarray:
    """Make the `order` of one GEMM from how often each K position was wide.

    Positions (padding included, counted 0) are ranked by count, ascending and stable. With T = 2
    the second half is reversed, so rank i shares its slot with rank K-1-i; with T = 4 the second
    and the fourth quarter are, so slot i holds ranks i, K/2-1-i, K/2+i and K-1-i.

    Parameters
    ----------
    wide_counts : array (K,), int
        How often the activation at each K position was wide in the calibration data.
    threads : int
        T: 1, 2 or 4.

    Returns
    -------
    ndarray (T*ceil(K/T),), intp
        A permutation; indices >= K stand for padding zeros.
    """
    counts = np.asarray(wide_counts)
    length = slot_count(counts.size, threads)
    padded = np.pad(counts, (0, threads * length - counts.size))
    chunks = np.argsort(padded, kind="stable").reshape(threads, length)
    chunks[1::2] = chunks[1::2, ::-1]
    return chunks.reshape(-1)

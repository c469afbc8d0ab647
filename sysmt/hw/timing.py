"""Tiles and cycles of a GEMM on an R x C output-stationary array, in closed form."""

from __future__ import annotations

from sysmt.config import ArrayConfig, Drain

__all__ = ["gemm_cycles", "slot_count", "tile_count"]


def slot_count(k: int, threads: int) -> int:
    """Slots per output L = ceil(K / T): K is cut into T contiguous chunks of this length."""
    return -(-k // threads)


def tile_count(m: int, n: int, config: ArrayConfig) -> int:
    """Tiles that cover the M x N output; edge tiles occupy the whole array."""
    return -(-m // config.rows) * -(-n // config.cols)


def gemm_cycles(m: int, n: int, k: int, config: ArrayConfig) -> int:
    """Array cycles of one M x N x K GEMM.

    Operands enter skewed, so PE (i, j) works on slot l at cycle i + j + l of its tile and the last
    PE finishes after L + R + C - 2 cycles. ``serial`` adds R cycles a tile for the accumulators
    to shift out; ``overlapped`` hides them behind the next tile, and pays R once at the end.

    Returns
    -------
    int
        Cycles; 0 if M, N or K is 0.
    """
    if 0 in (m, n, k):
        return 0
    compute_cycles = slot_count(k, config.threads) + config.rows + config.cols - 2
    tiles = tile_count(m, n, config)
    if config.drain is Drain.SERIAL:
        return tiles * (compute_cycles + config.rows)
    if config.drain is Drain.OVERLAPPED:
        return tiles * compute_cycles + config.rows
    return tiles * compute_cycles

"""Whole GEMMs: what the array is fed with, and what must come out and when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from twin import KINDS, Kind, draw_bytes

from sysmt.config import ArrayConfig, Policy
from sysmt.hw.operands import split_threads
from sysmt.hw.reference import simulate
from sysmt.hw.timing import gemm_cycles, slot_count, tile_count

__all__ = ["ARRAYS", "MUTANT_ARRAYS", "Array", "Job", "jobs"]


class Array(NamedTuple):
    """An array as hardware."""

    rows: int
    cols: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.rows} x {self.cols} {self.kind}"

    @property
    def config(self) -> ArrayConfig:
        """The configuration that the model calls the same; its drain is the serial one."""
        return ArrayConfig(self.rows, self.cols, self.kind.threads, self.kind.policy)

    @property
    def parameters(self) -> dict[str, int]:
        """The parameters of systolic_array.v."""
        return {
            "ROWS": self.rows,
            "COLS": self.cols,
            "THREADS": self.kind.threads,
            "POLICY": int(self.kind.policy.needs_both_wide),
            "SIGNED": int(self.kind.signed),
        }


ARRAYS = (
    *(Array(4, 3, kind) for kind in KINDS),
    *(Array(16, 16, Kind(threads, Policy.SA, signed=False)) for threads in (1, 2, 4)),
    *(Array(1, 1, Kind(threads, Policy.SA, signed=False)) for threads in (1, 2, 4)),
    Array(2, 5, Kind(4, Policy.SAW, signed=False)),
)
"""The arrays that run GEMMs: every kind of slot, square, wide, high, and a single PE."""

MUTANT_ARRAYS = tuple(Array(rows, cols, Kind(2, Policy.SA, signed=False)) for rows, cols in ((4, 3), (1, 1)))
"""The arrays on which a fault in the array's frame must show."""


class Job(NamedTuple):
    """One GEMM in the form that bench/gemm_bench.cpp reads, and the cycles that it must take."""

    shape: tuple[int, int, int]
    words: bytes
    outputs: int
    cycles: int


def pack(a: np.ndarray, b: np.ndarray, array: Array) -> Job:
    """Cut a GEMM into tiles and slots, and compute what must come out.

    Parameters
    ----------
    a : ndarray (M, K), uint8 or int8
    b : ndarray (K, N), int8
    array : Array
    """
    config, threads = array.config, array.kind.threads
    m, k, n = *a.shape, b.shape[1]
    expected, _ = simulate(a, b, config)
    high, wide = -(-m // array.rows) * array.rows, -(-n // array.cols) * array.cols
    a_mtl, b_tln = split_threads(
        np.pad(a, ((0, high - m), (0, 0))), np.pad(b, ((0, 0), (0, wide - n))), threads
    )
    out = np.pad(expected, ((0, high - m), (0, wide - n)))
    slots = slot_count(k, threads)
    parts = [np.array([slots, tile_count(m, n, config)], "<u4").tobytes()]
    for i in range(0, high, array.rows):
        for j in range(0, wide, array.cols):
            a_lrt = a_mtl[i : i + array.rows].transpose(2, 0, 1).reshape(slots, -1)
            w_lct = b_tln[:, :, j : j + array.cols].transpose(1, 2, 0).reshape(slots, -1)
            parts.append(np.hstack([a_lrt.view(np.uint8), w_lct.view(np.uint8)]).tobytes())
            parts.append(out[i : i + array.rows, j : j + array.cols].astype("<i4").tobytes())
    return Job((m, n, k), b"".join(parts), out.size, gemm_cycles(m, n, k, config))


def jobs(array: Array, rng: np.random.Generator) -> Iterator[Job]:
    """Make the GEMMs of an array: one tile, many tiles, edge tiles, K shorter than T, K no multiple of T.

    A single PE gets the longest K at the largest magnitudes instead: the accumulator's limits.
    """
    a_type = np.int8 if array.kind.signed else np.uint8
    if array.rows == array.cols == 1:
        for weight in (-128, 127):
            yield pack(np.full((1, 65_535), 255, np.uint8), np.full((65_535, 1), weight, np.int8), array)
    r, c = array.rows, array.cols
    shapes = [
        (1, 1, 1),
        (r, c, 8),
        (2 * r + 1, 3 * c - 1, 21),
        (3 * r, 2 * c, 3),
        (r + 2, c + 1, 38),
        (r, 2 * c, 5),
    ]
    if r * c == 1:
        shapes = [(3, 2, 9)]
    for m, n, k in shapes:
        yield pack(draw_bytes((m, k), rng).view(a_type), draw_bytes((k, n), rng).view(np.int8), array)

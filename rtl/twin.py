"""The slots that the RTL is fed with, and their sums: `sysmt.hw.slots`, a million at a time.

It is itself proved against `sysmt.hw.pe.work_slot` in every run, see `prove_twin`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np

from sysmt.config import ArrayConfig, Policy
from sysmt.hw.pe import work_slot
from sysmt.hw.slots import work_slots

__all__ = [
    "KINDS",
    "POLICIES",
    "Kind",
    "draw_bytes",
    "exhaustive_slots",
    "EXHAUSTIVE_SLOTS",
    "prove_twin",
    "random_slots",
    "slot_values",
]

POLICIES = (Policy.SA, Policy.SAW)
"""The policies that the RTL has; the index is its parameter POLICY."""


class Kind(NamedTuple):
    """A slot as hardware: its threads, its policy and the sign of its activations."""

    threads: int
    policy: Policy
    signed: bool

    def __str__(self) -> str:
        policy = self.policy.value if self.threads > 1 else ""
        return f"{self.threads}T {policy:5} {'s8' if self.signed else 'u8'}"

    @property
    def config(self) -> ArrayConfig:
        """The configuration that the model calls the same."""
        return ArrayConfig(threads=self.threads, policy=self.policy)


KINDS = (
    *(Kind(1, Policy.SA, signed) for signed in (False, True)),
    *(Kind(threads, policy, signed) for threads, policy, signed in product((2, 4), POLICIES, (False, True))),
)
"""The slots of bench/slot_bench.v, in its order."""


def slot_values(activations: np.ndarray, weights: np.ndarray, kind: Kind) -> np.ndarray:
    """Sums of many slots.

    Parameters
    ----------
    activations, weights : ndarray (slots, bytes), uint8
        Operand bytes; thread t takes column t, further columns are ignored.
    kind : Kind
        How to read the bytes, and what a collision does.

    Returns
    -------
    ndarray (slots,), int32
    """
    a = activations[:, : kind.threads].view(np.int8 if kind.signed else np.uint8).astype(np.int32)
    w = weights[:, : kind.threads].view(np.int8).astype(np.int32)
    return work_slots(a, w, kind.config, kind.signed).value


EDGES = np.array([0, 1, 7, 8, 15, 16, 23, 24, 40, 119, 120, 127, 128, 136, 240, 247, 248, 249, 255], np.uint8)
"""Bytes beside which something changes: wide, rounded up or down, tie, sign, one bit more."""


EXHAUSTIVE_SLOTS = 33 << 16
"""How many slots `exhaustive_slots` yields in all."""


def draw_bytes(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Random operand bytes (uint8) with zeros, narrow values and `EDGES` well represented.

    The first quarter of the rows is uniform, so that no combination is out of reach.
    """
    values = rng.integers(0, 256, shape, np.uint8)
    choice = rng.integers(0, 8, shape, np.uint8)
    choice[: shape[0] // 4] = 7
    narrow = (values & 15) - np.where(values & 64, 8, 0).astype(np.uint8)
    return np.select(
        [choice == 0, choice == 1, choice == 2], [np.uint8(0), narrow, EDGES[values % EDGES.size]], values
    )


def random_slots(slots: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random operand bytes of slots: activations and weights, each (slots, 4) uint8."""
    return draw_bytes((slots, 4), rng), draw_bytes((slots, 4), rng)


def exhaustive_slots(rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All 256 x 256 operand pairs in each thread, beside each set of other active threads, and in all alike.

    33 x 65,536 slots: every pair meets every unit of the multiplier in every mode (4 threads x 8
    sets), and every pair meets itself in all units at once, which reaches the largest sums. The
    partners are random, zero exactly where their thread is inactive; an inactive thread has a
    zero activation, a zero weight, or both.
    """
    pairs = np.arange(65_536)
    pair_a, pair_w = (pairs >> 8).astype(np.uint8), (pairs & 255).astype(np.uint8)
    for thread, others in product(range(4), range(8)):
        a, w = rng.integers(1, 256, (2, pairs.size, 4), np.uint8)
        partners = [t for t in range(4) if t != thread]
        for bit, partner in enumerate(partners):
            if not others >> bit & 1:
                which = rng.integers(0, 3, pairs.size)
                a[which != 1, partner] = 0
                w[which != 0, partner] = 0
        a[:, thread], w[:, thread] = pair_a, pair_w
        yield a, w
    yield np.tile(pair_a[:, None], 4), np.tile(pair_w[:, None], 4)


def prove_twin(slots: int, seed: int) -> dict[Kind, int]:
    """Compare the twin with `work_slot` on random slots; the differences of each kind.

    The policies that do not matter at T = 1 are left out.
    """
    differences = {}
    for kind in KINDS:
        a, w = random_slots(slots, np.random.default_rng(seed))
        got = slot_values(a, w, kind)
        a_lists = a[:, : kind.threads].view(np.int8 if kind.signed else np.uint8).tolist()
        w_lists = w[:, : kind.threads].view(np.int8).tolist()
        config = kind.config
        want = [work_slot(*pair, config, kind.signed).value for pair in zip(a_lists, w_lists, strict=True)]
        differences[kind] = int((got != np.array(want)).sum())
    return differences

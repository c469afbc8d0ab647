"""Counters of a simulated GEMM: exact integers that add up."""

from __future__ import annotations

import dataclasses
from itertools import zip_longest

__all__ = ["Counters", "GemmStats"]


@dataclasses.dataclass(frozen=True)
class Counters:
    """What happened in the shared multipliers, summed over all outputs and slots.

    Attributes
    ----------
    active : tuple of int
        ``active[c]``: slots in which exactly c threads had two non-zero operands, c = 0..T.
    reduced_activations, reduced_weights : int
        Operands of active pairs that the policy selected for reduction.
    """

    active: tuple[int, ...]
    reduced_activations: int = 0
    reduced_weights: int = 0

    def __add__(self, other: Counters) -> Counters:
        """Add counter by counter; the longer `active` sets the length."""
        if not isinstance(other, Counters):
            return NotImplemented
        return Counters(
            tuple(x + y for x, y in zip_longest(self.active, other.active, fillvalue=0)),
            self.reduced_activations + other.reduced_activations,
            self.reduced_weights + other.reduced_weights,
        )

    @property
    def slots(self) -> int:
        """All slots that ran, idle and padding slots included."""
        return sum(self.active)

    @property
    def collisions(self) -> int:
        """Slots in which two or more threads wanted the multiplier."""
        return sum(self.active[2:])

    @property
    def collision_rate(self) -> float:
        """Collisions per slot, in [0, 1]; 0.0 where nothing ran."""
        return self.collisions / self.slots if self.slots else 0.0

    @property
    def utilization(self) -> float:
        """Share of slots with at least one active thread, in [0, 1]; 0.0 where nothing ran."""
        return 1.0 - self.active[0] / self.slots if self.slots else 0.0


@dataclasses.dataclass(frozen=True)
class GemmStats(Counters):
    """Counters, work and time of one GEMM, or of several added up.

    Attributes
    ----------
    macs : int
        M·N·K with the real K, without padding.
    cycles : int
        Array cycles, by the closed form of the configured drain.
    single_thread_cycles : int
        Cycles that the same work takes at T = 1 with the same drain.
    """

    macs: int = 0
    cycles: int = 0
    single_thread_cycles: int = 0

    def __add__(self, other: Counters) -> GemmStats:
        """Add all counters, macs and cycles."""
        if not isinstance(other, GemmStats):
            return NotImplemented
        counters = Counters.__add__(self, other)
        return GemmStats(
            counters.active,
            counters.reduced_activations,
            counters.reduced_weights,
            self.macs + other.macs,
            self.cycles + other.cycles,
            self.single_thread_cycles + other.single_thread_cycles,
        )

    @property
    def speedup_cycles(self) -> float:
        """Cycles at T = 1 over cycles at the configured T; 1.0 where there are no cycles."""
        return self.single_thread_cycles / self.cycles if self.cycles else 1.0

    def to_record(self) -> dict[str, int | float]:
        """Return a flat mapping, one value per table column."""
        return {
            "macs": self.macs,
            "cycles": self.cycles,
            **{f"active_{c}": count for c, count in enumerate(self.active)},
            "collisions": self.collisions,
            "collision_rate": self.collision_rate,
            "utilization": self.utilization,
            "reduced_activations": self.reduced_activations,
            "reduced_weights": self.reduced_weights,
            "speedup_cycles": self.speedup_cycles,
        }

"""Countable events of a GEMM, for energy: products by width, accumulations, hops, memory accesses, idleness.

All follow from the counters, the shape and the tiles; nothing is counted while simulating.

- Policies with S: c active threads make c products: c = 1 one 8b x 8b, c = 2 two 4b x 8b, c >= 3 c of
  4b x 4b. A slot with an active thread is one accumulation; one without leaves both alone.
- Policies without S do not look for zeros: every slot that runs multiplies with all T threads, padding and
  zeros included: one 8b x 8b (T = 1), two 4b x 8b (T = 2) or four 4b x 4b (T = 4), and accumulates.
- A byte read from an operand SRAM passes through all PEs of its row (C hops) or column (R hops).
- A finished accumulator is shifted down to the bottom edge and out, R - i hops from row i; with drain
  "none" it is read where it is.
- What DRAM sends is written to an SRAM first, and what goes to DRAM is read from the output SRAM.
- An idle PE-cycle is one without an accumulation: fill, drain, edge tiles, stalls, slots without an
  active thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sysmt.config import ArrayConfig, Drain
from sysmt.cost.layer_shape import Layer
from sysmt.cost.memory import Memory, layer_traffic
from sysmt.hw.stats import Counters

__all__ = ["EventCounts", "count_events"]


@dataclasses.dataclass(frozen=True)
class EventCounts:
    """Events of one or several GEMMs; they add up.

    Attributes
    ----------
    products_8x8, products_4x8, products_4x4 : int
        Multiplications, by the widths of their operands in bits.
    accumulations : int
        Slots that added to their accumulator.
    operand_hops, accumulator_hops : int
        Bytes that entered a PE's operand register; 32-bit accumulators that moved one PE down or out.
    sram_ifmap_reads, sram_ifmap_writes, sram_filter_reads, sram_filter_writes : int
        Bytes.
    sram_ofmap_reads, sram_ofmap_writes : int
        Bytes.
    dram_reads, dram_writes : int
        Bytes.
    pe_cycles : int
        PEs times cycles, stalls included.
    cycles : int
        Compute and stall cycles of the array.
    """

    products_8x8: int = 0
    products_4x8: int = 0
    products_4x4: int = 0
    accumulations: int = 0
    operand_hops: int = 0
    accumulator_hops: int = 0
    sram_ifmap_reads: int = 0
    sram_ifmap_writes: int = 0
    sram_filter_reads: int = 0
    sram_filter_writes: int = 0
    sram_ofmap_reads: int = 0
    sram_ofmap_writes: int = 0
    dram_reads: int = 0
    dram_writes: int = 0
    pe_cycles: int = 0
    cycles: int = 0

    @property
    def idle_pe_cycles(self) -> int:
        """PE-cycles without an accumulation."""
        return self.pe_cycles - self.accumulations

    def __add__(self, other: EventCounts) -> EventCounts:
        """Add event by event."""
        if not isinstance(other, EventCounts):
            return NotImplemented
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return EventCounts(*(x + y for x, y in zip(mine, theirs, strict=True)))


def count_events(
    counters: Counters, gemms: Mapping[Layer, int], config: ArrayConfig, memory: Memory
) -> EventCounts:
    """Derive the events of some GEMMs that ran with the same configuration.

    Parameters
    ----------
    counters : Counters
        Summed over all of them.
    gemms : mapping of Layer to int
        Their shapes, and how many there were of each: images times groups.
    config : ArrayConfig
        With the thread count that they ran with.
    memory : Memory

    Returns
    -------
    EventCounts
    """
    one, two, four = _products(counters, config)
    accumulations = sum(counters.active[1:]) if config.policy.skips_zeros else counters.slots
    events = EventCounts(one, two, four, accumulations)
    for layer, count in gemms.items():
        events += _movements(layer, count, config, memory)
    return events


def _movements(layer: Layer, count: int, config: ArrayConfig, memory: Memory) -> EventCounts:
    """Everything that follows from the shape alone."""
    traffic = layer_traffic(layer, config, memory)
    cycles = count * traffic.cycles
    output_bytes = count * traffic.dram_ofmap_bytes
    hops = traffic.sram_ifmap_reads * config.cols + traffic.sram_filter_reads * config.rows
    return EventCounts(
        operand_hops=count * hops,
        accumulator_hops=count * _accumulator_hops(layer, config),
        sram_ifmap_reads=count * traffic.sram_ifmap_reads,
        sram_ifmap_writes=count * traffic.dram_ifmap_bytes,
        sram_filter_reads=count * traffic.sram_filter_reads,
        sram_filter_writes=count * traffic.dram_filter_bytes,
        sram_ofmap_reads=output_bytes,
        sram_ofmap_writes=output_bytes,
        dram_reads=count * (traffic.dram_ifmap_bytes + traffic.dram_filter_bytes),
        dram_writes=output_bytes,
        pe_cycles=cycles * config.rows * config.cols,
        cycles=cycles,
    )


def _products(counters: Counters, config: ArrayConfig) -> tuple[int, int, int]:
    """Products 8b x 8b, 4b x 8b and 4b x 4b."""
    skips = config.policy.skips_zeros
    contending = counters.active if skips else (*(0,) * config.threads, counters.slots)
    _, one, two, three, four = (*contending, 0, 0, 0, 0, 0)[:5]
    return one, 2 * two, 3 * three + 4 * four


def _accumulator_hops(layer: Layer, config: ArrayConfig) -> int:
    if config.drain is Drain.NONE:
        return 0
    rows, full = config.rows, layer.m // config.rows
    last = layer.m - full * rows
    hops_of_column = full * _hops(rows, rows) + _hops(last, rows)
    return layer.n * hops_of_column


def _hops(used: int, rows: int) -> int:
    """Hops of the accumulators of the first `used` of a column's `rows` PEs: R + (R - 1) + ..."""
    return used * rows - used * (used - 1) // 2

"""What happened on the array since the last reset: a row for each layer, and speedups over several."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import pandas as pd

from sysmt.cost.energy import EnergyTable, load_table
from sysmt.cost.memory import Memory
from sysmt.nn.array.layer import ArrayLayer
from sysmt.nn.array.layer_energy import layer_energy, layer_stalls
from sysmt.nn.array.selection import NOT_REACHED

__all__ = ["cycle_speedup", "layer_report", "mac_speedup"]

_COUNTERS = (
    "collisions",
    "collision_rate",
    "utilization",
    "reduced_activations",
    "reduced_weights",
    "speedup_cycles",
)


def layer_report(
    layers: Iterable[ArrayLayer], errors: bool, energy: EnergyTable | None, memory: Memory | None
) -> pd.DataFrame:
    """Return a row for each layer, as `sysmt.nn.array.simulation.Simulation.report` describes it."""
    layers, energy, memory = [*layers], energy or load_table(), memory or Memory()
    errors = errors or any(layer.counts.compared for layer in layers)
    return pd.DataFrame([_row(layer, errors, energy, memory) for layer in layers])


def _row(layer: ArrayLayer, errors: bool, energy: EnergyTable, memory: Memory) -> dict[str, Any]:
    counts, geometry = layer.counts, layer.geometry
    m, n, k = counts.gemm_shape or (0, geometry.gemm_n, geometry.gemm_k)
    record = counts.stats.to_record()
    row: dict[str, Any] = {
        "name": layer.name,
        "M": m,
        "N": n,
        "K": k,
        "groups": geometry.groups,
        "images": counts.images,
        "threads": layer.threads if layer.reason is None else 0,
        "macs": record["macs"],
        "cycles": record["cycles"],
    }
    row |= {f"active_{c}": record.get(f"active_{c}", 0) for c in range(5)}
    row |= {key: record[key] for key in _COUNTERS}
    if memory.bandwidth is not None:
        row |= _with_stalls(layer, memory)
    row |= layer_energy(layer, energy, memory)
    if errors:
        row |= {"sqnr_db": counts.sqnr_db, "mse": counts.mse}
    row["reason"] = layer.reason or ("" if counts.images else NOT_REACHED)
    return row


def _with_stalls(layer: ArrayLayer, memory: Memory) -> dict[str, Any]:
    """Cycles and speedup with the stalls of a bandwidth, and those of the array alone beside them."""
    stats = layer.counts.stats
    alone = layer_stalls(layer, memory, 1)
    stalls = layer_stalls(layer, memory, layer.threads) if layer.reason is None else alone
    cycles = stats.cycles + stalls
    return {
        "cycles": cycles,
        "compute_cycles": stats.cycles,
        "stall_cycles": stalls,
        "speedup_cycles": (stats.single_thread_cycles + alone) / cycles if cycles else 1.0,
        "speedup_compute_cycles": stats.speedup_cycles,
    }


def mac_speedup(layers: Iterable[ArrayLayer]) -> float:
    """Sum of macs over sum of (macs / T), T = 1 in float; 1.0 without macs."""
    total, time = 0, Fraction(0)
    for layer in layers:
        total += layer.counts.stats.macs
        time += Fraction(layer.counts.stats.macs, layer.threads if layer.reason is None else 1)
    return float(total / time) if time else 1.0


def cycle_speedup(layers: Iterable[ArrayLayer]) -> float:
    """Cycles at T = 1 over cycles as configured; 1.0 without cycles."""
    stats = [layer.counts.stats for layer in layers]
    cycles = sum(s.cycles for s in stats)
    return sum(s.single_thread_cycles for s in stats) / cycles if cycles else 1.0

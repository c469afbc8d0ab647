"""Reports of a topology run: SCALE-Sim's three, with its column names, and SMT_REPORT for everything else.

Every column is defined in docs/reports.md.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

from sysmt.config import Drain
from sysmt.hw.timing import slot_count, tile_count
from sysmt.scalesim.simulate import LayerResult

__all__ = ["REPORTS", "bandwidth_report", "compute_report", "detailed_access_report", "smt_report", "smt_row"]

_COMPUTE = (
    "Total Cycles (incl. prefetch)",
    "Total Cycles",
    "Stall Cycles",
    "Overall Util %",
    "Mapping Efficiency %",
    "Compute Util %",
)
_BANDWIDTH = tuple(
    f"Avg {name} {level} BW" for level in ("SRAM", "DRAM") for name in ("IFMAP", "FILTER", "OFMAP")
)
_DETAILED = tuple(
    f"{level} {name} {what}"
    for level in ("SRAM", "DRAM")
    for name, moved in (("IFMAP", "Reads"), ("Filter", "Reads"), ("OFMAP", "Writes"))
    for what in ("Start Cycle", "Stop Cycle", moved)
)


def compute_report(results: Sequence[LayerResult]) -> str:
    """Write COMPUTE_REPORT.csv: cycles, stalls and utilization of each layer."""
    return _scalesim_csv(_COMPUTE, [_compute_row(result) for result in results])


def bandwidth_report(results: Sequence[LayerResult]) -> str:
    """Write BANDWIDTH_REPORT.csv: average words per cycle of each memory and operand."""
    return _scalesim_csv(_BANDWIDTH, [_bandwidth_row(result) for result in results])


def detailed_access_report(results: Sequence[LayerResult]) -> str:
    """Write DETAILED_ACCESS_REPORT.csv: first cycle, last cycle and accesses of each memory and operand."""
    return _scalesim_csv(_DETAILED, [_detailed_row(result) for result in results])


def _scalesim_csv(columns: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    """Write a table the way SCALE-Sim does: a blank after each comma, and a comma at the end."""
    lines = [["LayerID", *columns], *([str(index), *map(str, row)] for index, row in enumerate(rows))]
    return "".join(f"{', '.join(line)},\n" for line in lines)


def _compute_row(result: LayerResult) -> list[float]:
    layer, config, traffic = result.layer, result.config, result.traffic
    pes = config.rows * config.cols
    mapping = layer.m * layer.n / (tile_count(layer.m, layer.n, config) * pes)
    slots = slot_count(layer.k, config.threads)
    tile_cycles = slots + config.rows + config.cols - 2
    overall = layer.macs / (traffic.cycles * pes * config.threads)
    computing = mapping * layer.k / (tile_cycles * config.threads)
    cycles = (traffic.overall_cycles, traffic.cycles, traffic.stall_cycles)
    return [*cycles, 100 * overall, 100 * mapping, 100 * computing]


def _bandwidth_row(result: LayerResult) -> list[float]:
    traffic, cycles = result.traffic, result.traffic.cycles
    row = [traffic.sram_ifmap_reads / cycles, traffic.sram_filter_reads / cycles]
    row.append(traffic.sram_ofmap_writes / cycles)
    detailed = dict(zip(_DETAILED, _detailed_row(result), strict=True))
    for name, moved in (("IFMAP", "Reads"), ("Filter", "Reads"), ("OFMAP", "Writes")):
        start, stop = detailed[f"DRAM {name} Start Cycle"], detailed[f"DRAM {name} Stop Cycle"]
        row.append(detailed[f"DRAM {name} {moved}"] / (stop - start + 1))
    return row


def _detailed_row(result: LayerResult) -> list[int]:
    layer, config, traffic = result.layer, result.config, result.traffic
    slots = slot_count(layer.k, config.threads)
    last_rows = (layer.m - 1) % config.rows + 1
    last_cols = (layer.n - 1) % config.cols + 1
    unused_rows = max(0, config.rows - layer.m)  # of the first tile; the bottom row leaves first
    last = traffic.last_tile_start
    if config.drain is Drain.NONE:
        first_out = slots - 1 + unused_rows
        last_out = last + slots - 1 + config.rows - 1 + last_cols - 1
    else:
        first_out = slots + config.rows + config.cols - 2 + unused_rows
        last_out = traffic.cycles - 1
    return [
        *(1, last + slots + last_rows - 1, traffic.sram_ifmap_reads),
        *(1, last + slots + last_cols - 1, traffic.sram_filter_reads),
        *(first_out, last_out, traffic.sram_ofmap_writes),
        *(-traffic.prefetch_cycles.ifmap, traffic.ifmap_fetch_end, traffic.dram_ifmap_bytes),
        *(-traffic.prefetch_cycles.filter, traffic.filter_fetch_end, traffic.dram_filter_bytes),
        *(
            min(traffic.first_tile_end, traffic.cycles),
            traffic.cycles + traffic.writeback_cycles - 1,
            traffic.dram_ofmap_bytes,
        ),
    ]


def smt_row(result: LayerResult, energy_unit: str) -> dict[str, Any]:
    """Return a layer's row of SMT_REPORT: plain column names, ratios in [0, 1], energies in their unit."""
    layer, config, stats, traffic = result.layer, result.config, result.stats, result.traffic
    counters = stats.to_record()
    row: dict[str, Any] = {
        "name": layer.name,
        "M": layer.m,
        "N": layer.n,
        "K": layer.k,
        "threads": config.threads,
        "policy": config.policy.value,
        "drain": config.drain.value,
        "macs": stats.macs,
        "tiles": tile_count(layer.m, layer.n, config),
        "cycles": traffic.cycles,
        "compute_cycles": traffic.compute_cycles,
        "stall_cycles": traffic.stall_cycles,
        "speedup_cycles": result.speedup_cycles,
        "speedup_compute_cycles": result.speedup_compute_cycles,
        **{f"active_{c}": counters.get(f"active_{c}", 0) for c in range(5)},
    }
    kept = ("collisions", "collision_rate", "utilization", "reduced_activations", "reduced_weights")
    row |= {name: counters[name] for name in kept}
    row |= dataclasses.asdict(result.events)
    row["idle_pe_cycles"] = result.events.idle_pe_cycles
    row["sram_peak_words"] = traffic.sram_peak_words
    required = traffic.required._asdict().items()
    row |= {f"required_{name}_bytes_per_cycle": value for name, value in required}
    row |= {f"energy_{part}_{energy_unit}": value for part, value in result.energy.items()}
    row[f"energy_{energy_unit}"] = result.total_energy
    row[f"energy_delay_{energy_unit}_cycles"] = result.energy_delay
    if result.area is not None:
        row["area_relative" if energy_unit == "relative" else "area_um2"] = result.area
    return row


def smt_report(results: Sequence[LayerResult], energy_unit: str) -> str:
    """Write SMT_REPORT.csv: collisions, reductions, events, needed bandwidth and energy of each layer."""
    rows = [{"LayerID": index} | smt_row(result, energy_unit) for index, result in enumerate(results)]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys() if rows else ["LayerID"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


REPORTS: dict[str, Callable[[Sequence[LayerResult]], str]] = {
    "COMPUTE_REPORT.csv": compute_report,
    "BANDWIDTH_REPORT.csv": bandwidth_report,
    "DETAILED_ACCESS_REPORT.csv": detailed_access_report,
}
"""SCALE-Sim's reports by file name."""

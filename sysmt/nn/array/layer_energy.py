"""Energy of an attached network: the events of its simulated layers, priced by a table."""

from __future__ import annotations

import math
from collections.abc import Iterable

from sysmt.cost.energy import EnergyTable, load_table
from sysmt.cost.events import EventCounts, count_events
from sysmt.cost.layer_shape import Layer
from sysmt.cost.memory import Memory, layer_traffic
from sysmt.nn.array.layer import ArrayLayer
from sysmt.nn.array.lowering import LayerGeometry

__all__ = ["energy_facts", "layer_energy", "layer_events", "layer_of", "layer_stalls"]


def layer_of(name: str, geometry: LayerGeometry, out_size: tuple[int, int]) -> Layer:
    """Return one group's GEMM as a layer whose input has its padding, cut to the pixels that are used.

    Parameters
    ----------
    name : str
    geometry : LayerGeometry
    out_size : (int, int)
        Output rows and columns.
    """
    height, width = (
        (out - 1) * stride + dilation * (kernel - 1) + 1
        for out, stride, dilation, kernel in zip(
            out_size, geometry.stride, geometry.dilation, geometry.kernel, strict=True
        )
    )
    return Layer(
        name,
        height,
        width,
        *geometry.kernel,
        geometry.in_channels // geometry.groups,
        geometry.gemm_n,
        *geometry.stride,
        *geometry.dilation,
    )


def layer_events(layer: ArrayLayer, memory: Memory) -> EventCounts:
    """Count the events of everything that a layer computed on the array since the last reset."""
    gemms: dict[Layer, int] = {}
    for (geometry, out_size), images in layer.counts.sizes.items():
        if 0 not in out_size and images:
            shape = layer_of("", geometry, out_size)
            gemms[shape] = gemms.get(shape, 0) + images * geometry.groups
    return count_events(layer.counts.stats, gemms, layer.settings.array(layer.threads), memory)


def layer_stalls(layer: ArrayLayer, memory: Memory, threads: int) -> int:
    """Return the cycles for which the array would have waited for DRAM, with that many threads."""
    config = layer.settings.array(threads)
    return sum(
        images
        * geometry.groups
        * layer_traffic(layer_of("", geometry, out_size), config, memory).stall_cycles
        for (geometry, out_size), images in layer.counts.sizes.items()
        if 0 not in out_size and images
    )


def layer_energy(layer: ArrayLayer, table: EnergyTable, memory: Memory) -> dict[str, float]:
    """Return a layer's columns of the report: energy, and energy times cycles (stalls included).

    0 for layers in float, whose activity is not counted.
    """
    names = _columns(table)
    if layer.reason is not None:
        return dict.fromkeys(names, 0.0)
    events = layer_events(layer, memory)
    energy = sum(table.energy(events, layer.settings.array(layer.threads), memory).values())
    return dict(zip(names, (energy, energy * events.cycles), strict=True))


def energy_facts(
    layers: Iterable[ArrayLayer],
    images: int,
    table: EnergyTable | None = None,
    memory: Memory | None = None,
) -> dict[str, float]:
    """Sum up the energy of simulated layers, per image.

    Parameters
    ----------
    layers : iterable of ArrayLayer
        Such as `Simulation.simulated` gives them.
    images : int
        How many went through the network.
    table : EnergyTable, optional
        By default the 45 nm table.
    memory : Memory, optional

    Returns
    -------
    dict
        ``energy_pj_per_image``, and ``energy_delay_pj_cycles_per_image``: that times the cycles that the
        same layers take per image, stalls included. The unit in the names is the table's; NaN before
        any image.
    """
    table, memory = table or load_table(), memory or Memory()
    energy, cycles = 0.0, 0
    for layer in layers:
        events = layer_events(layer, memory)
        energy += sum(table.energy(events, layer.settings.array(layer.threads), memory).values())
        cycles += events.cycles
    count = images or math.nan
    values = (energy / count, energy / count * (cycles / count))
    return {f"{name}_per_image": value for name, value in zip(_columns(table), values, strict=True)}


def _columns(table: EnergyTable) -> tuple[str, str]:
    return f"energy_{table.unit}", f"energy_delay_{table.unit}_cycles"

"""Energy of an attached network: the events of its simulated layers, priced by a table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sysmt.config import ArrayConfig
from sysmt.cost.energy import EnergyTable, load_table
from sysmt.cost.events import EventCounts, count_events
from sysmt.cost.layer_shape import Layer
from sysmt.cost.memory import Memory
from sysmt.nn.array.lowering import LayerGeometry

if TYPE_CHECKING:
    from sysmt.nn.array.hooked_layer import HookedLayer
    from sysmt.nn.array.simulation import Simulation

__all__ = ["energy_facts", "layer_energy", "layer_events", "layer_of"]


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


def layer_events(layer: HookedLayer, memory: Memory) -> EventCounts:
    """Return the events of a simulated layer since the last reset."""
    gemms = {
        layer_of("", layer.geometry, out_size): images * layer.geometry.groups
        for out_size, images in layer.images_of_size.items()
        if 0 not in out_size and images
    }
    return count_events(layer.stats, gemms, _config(layer), memory)


def layer_energy(layer: HookedLayer, table: EnergyTable, memory: Memory) -> dict[str, float]:
    """Return a layer's columns of the report: energy, and energy times cycles (stalls included).

    0 for layers in float, whose activity is not counted.
    """
    names = _columns(table)
    if layer.reason is not None:
        return dict.fromkeys(names, 0.0)
    events = layer_events(layer, memory)
    energy = sum(table.energy(events, _config(layer), memory).values())
    return dict(zip(names, (energy, energy * events.cycles), strict=True))


def energy_facts(
    sim: Simulation, table: EnergyTable | None = None, memory: Memory | None = None
) -> dict[str, float]:
    """Sum up the energy of the simulated layers, per image.

    Parameters
    ----------
    sim : Simulation
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
    for layer in sim.simulated():
        events = layer_events(layer, memory)
        energy += sum(table.energy(events, _config(layer), memory).values())
        cycles += events.cycles
    images = sim.images or math.nan
    values = (energy / images, energy / images * (cycles / images))
    return {f"{name}_per_image": value for name, value in zip(_columns(table), values, strict=True)}


def _config(layer: HookedLayer) -> ArrayConfig:
    return layer.simulation.config.replace(threads=layer.threads)


def _columns(table: EnergyTable) -> tuple[str, str]:
    return f"energy_{table.unit}", f"energy_delay_{table.unit}_cycles"

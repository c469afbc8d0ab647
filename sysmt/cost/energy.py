"""Energy and area: events times a table that says what each costs, or ratios that others published.

Tables are TOML files; `load_table` names those that come with sysmt and reads a user's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import itertools
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sysmt.config import THREAD_COUNTS, ArrayConfig, parse_number
from sysmt.cost.events import EventCounts
from sysmt.cost.memory import Memory
from sysmt.errors import ConfigError, nearest
from sysmt.files import read_toml

__all__ = ["TABLES", "EnergyTable", "EventTable", "RatioTable", "accelergy_yaml", "load_table"]

TABLES = {
    "45nm": "energy_45nm.toml",
    "sysmt-micro2020": "energy_sysmt_micro2020.toml",
    "sysmt-rtl": "energy_sysmt_rtl.toml",
}
"""Tables that come with sysmt, by name; the first is the default."""

_EVENTS = (
    "product_8x8",
    "product_4x8",
    "product_4x4",
    "accumulation",
    "operand_hop",
    "accumulator_hop",
    "dram_byte",
    "idle_pe_cycle",
)


class EnergyTable(Protocol):
    """What an event table and a ratio table have in common."""

    @property
    def name(self) -> str:
        """How the table calls itself."""

    @property
    def unit(self) -> str:
        """Unit of energy, as it ends the names of report columns: ``pj``, or ``relative``."""

    @property
    def source(self) -> str:
        """Where the figures come from."""

    def energy(self, events: EventCounts, config: ArrayConfig, memory: Memory) -> dict[str, float]:
        """Return energy by what spends it, in `unit`."""

    def area(self, config: ArrayConfig) -> float | None:
        """Return the array's area, µm² or relative to the conventional array; None if unknown."""


@dataclasses.dataclass(frozen=True)
class EventTable:
    """Energy per event.

    Attributes
    ----------
    name, unit, source : str
    per_event : mapping of str to float
        Energy of each event, in `unit`.
    sram_kib, sram_byte : sequence of float
        Energy per byte of SRAMs of these capacities (KiB, rising).
    pe_area_um2 : mapping of int to float
        Area of a PE by its threads, µm²; may be empty.
    """

    name: str
    unit: str
    source: str
    per_event: Mapping[str, float]
    sram_kib: Sequence[float]
    sram_byte: Sequence[float]
    pe_area_um2: Mapping[int, float] = dataclasses.field(default_factory=dict)

    def sram_energy(self, capacity_kib: float) -> float:
        """Energy per byte of an SRAM, interpolated in logarithms; the nearest value outside the table."""
        return math.exp(np.interp(math.log(capacity_kib), np.log(self.sram_kib), np.log(self.sram_byte)))

    def energy(self, events: EventCounts, config: ArrayConfig, memory: Memory) -> dict[str, float]:
        """Return what multiply, accumulate, registers, sram, dram and idle cycles spend."""
        cost = self.per_event
        return {
            "multiply": events.products_8x8 * cost["product_8x8"]
            + events.products_4x8 * cost["product_4x8"]
            + events.products_4x4 * cost["product_4x4"],
            "accumulate": events.accumulations * cost["accumulation"],
            "registers": events.operand_hops * cost["operand_hop"]
            + events.accumulator_hops * cost["accumulator_hop"],
            "sram": (events.sram_ifmap_reads + events.sram_ifmap_writes) * self.sram_energy(memory.ifmap_kib)
            + (events.sram_filter_reads + events.sram_filter_writes) * self.sram_energy(memory.filter_kib)
            + (events.sram_ofmap_reads + events.sram_ofmap_writes) * self.sram_energy(memory.ofmap_kib),
            "dram": (events.dram_reads + events.dram_writes) * cost["dram_byte"],
            "idle": events.idle_pe_cycles * cost["idle_pe_cycle"],
        }

    def area(self, config: ArrayConfig) -> float | None:
        """Return the area of all PEs, µm²; None if the table has none for this thread count."""
        pe_area = self.pe_area_um2.get(config.threads)
        return None if pe_area is None else pe_area * config.rows * config.cols


@dataclasses.dataclass(frozen=True)
class RatioTable:
    """Area and power of a T-thread array as multiples of a conventional one's, as somebody published them.

    Energy is power times PE-cycles: it knows nothing of collisions, memories or what the PEs do.

    Attributes
    ----------
    name, unit, source : str
    area_ratio, power_ratio : mapping of int to float
        By threads.
    """

    name: str
    unit: str
    source: str
    area_ratio: Mapping[int, float]
    power_ratio: Mapping[int, float]

    def energy(self, events: EventCounts, config: ArrayConfig, memory: Memory) -> dict[str, float]:
        """Return the energy of the ``array``, in PE-cycles of a conventional array."""
        return {"array": events.pe_cycles * self.power_ratio[config.threads]}

    def area(self, config: ArrayConfig) -> float | None:
        """Return the area over that of a conventional array of as many PEs."""
        return self.area_ratio[config.threads]


def load_table(name_or_path: str | Path = "45nm") -> EnergyTable:
    """Return a table that comes with sysmt, or read one from a TOML file.

    Parameters
    ----------
    name_or_path : str or Path
        A name in `TABLES`, or the path of a file of the same form (``kind = "events"`` or ``"ratios"``).

    Returns
    -------
    EventTable or RatioTable

    Raises
    ------
    ConfigError
        If the file is missing or unreadable, or an entry is missing, unknown, no number or negative.
    """
    if name_or_path in TABLES:
        file = importlib.resources.files("sysmt.cost").joinpath(TABLES[str(name_or_path)])
        return _parse(tomllib.loads(file.read_text(encoding="utf-8")), str(name_or_path))
    if not os.path.isfile(name_or_path):
        names = ", ".join(TABLES)
        hint = "" if os.sep in str(name_or_path) else nearest(str(name_or_path), TABLES)
        raise ConfigError(f"energy table {str(name_or_path)!r} is neither {names}{hint} nor a file")
    return _parse(read_toml(name_or_path), str(name_or_path))


def _parse(record: dict[str, Any], where: str) -> EnergyTable:
    texts = {key: _text(record, key, where) for key in ("name", "kind", "unit", "source")}
    kind = texts.pop("kind")
    if kind == "events":
        _only(record, {*texts, "kind", "energy", "sram", "area_um2"}, where)
        energies = _section(record, "energy", where)
        _only(energies, set(_EVENTS), f"{where} [energy]")
        sram = _section(record, "sram", where)
        _only(sram, {"capacity_kib", "byte"}, f"{where} [sram]")
        capacities = _numbers(sram, "capacity_kib", where)
        costs = _numbers(sram, "byte", where)
        rising = all(x < y for x, y in itertools.pairwise(capacities))
        if len(capacities) != len(costs) or not rising or min(*capacities, *costs) <= 0:
            raise ConfigError(
                f"energy table {where} [sram]: capacity_kib must rise, byte have as many values, all positive"
            )
        areas = _section(record, "area_um2", where) if "area_um2" in record else {}
        _only(areas, {f"threads_{t}" for t in THREAD_COUNTS}, f"{where} [area_um2]")
        return EventTable(
            **texts,
            per_event={event: _number(energies, event, f"{where} [energy]") for event in _EVENTS},
            sram_kib=capacities,
            sram_byte=costs,
            pe_area_um2={int(key[-1]): _number(areas, key, f"{where} [area_um2]") for key in areas},
        )
    if kind == "ratios":
        names = {t: f"threads_{t}" for t in THREAD_COUNTS}
        _only(record, {*texts, "kind", *names.values()}, where)
        area, power = {}, {}
        for threads, name in names.items():
            section = _section(record, name, where)
            place = f"{where} [{name}]"
            _only(section, {"area", "speedup", "energy_saving"}, place)
            area[threads] = _number(section, "area", place)
            saving = _number(section, "energy_saving", place)
            if saving >= 1:
                raise ConfigError(f"energy table {place}: energy_saving={saving} must be in [0, 1)")
            power[threads] = (1 - saving) * _number(section, "speedup", place)
        return RatioTable(**texts, area_ratio=area, power_ratio=power)
    raise ConfigError(f"energy table {where}: kind={kind!r} is unknown; allowed: events, ratios")


def _only(record: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in record:
        if key not in known:
            raise ConfigError(
                f"energy table {where}: {key!r} is unknown{nearest(key, known)}; "
                f"known: {', '.join(sorted(known))}"
            )


def _entry(record: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in record:
        raise ConfigError(f"energy table {where} lacks {key!r}")
    return record[key]


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    value = _entry(record, key, where)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"energy table {where}: {key}={value!r} must be text")
    return value.strip()


def _section(record: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = _entry(record, key, where)
    if not isinstance(value, dict):
        raise ConfigError(f"energy table {where}: {key} must be a section [{key}]")
    return value


def _number(record: Mapping[str, Any], key: str, where: str) -> float:
    return _checked(_entry(record, key, where), key, where)


def _numbers(record: Mapping[str, Any], key: str, where: str) -> list[float]:
    value = _entry(record, key, where)
    if not isinstance(value, list) or not value:
        raise ConfigError(f"energy table {where}: {key}={value!r} must be a list of numbers")
    return [_checked(one, key, where) for one in value]


def _checked(value: object, key: str, where: str) -> float:
    with contextlib.suppress(ConfigError):
        return parse_number(value, key, "a number of at least 0", lambda number: number >= 0)
    raise ConfigError(f"energy table {where}: {key}={value!r} must be a number of at least 0")


def accelergy_yaml(events: EventCounts, config: ArrayConfig, design: str = "sysmt") -> str:
    """Write the counts as an Accelergy action-counts file (version 0.3), for its own energy tables.

    Parameters
    ----------
    events : EventCounts
    config : ArrayConfig
        Its PEs are named ``<design>.pe[0..R*C-1]``.
    design : str
        Name of the design in the user's architecture file.

    Returns
    -------
    str
        YAML. Memory accesses are bytes.
    """
    pes = f"pe[0..{config.rows * config.cols - 1}]"
    components: dict[str, dict[str, int]] = {
        f"{pes}.multiplier": {
            "multiply_8x8": events.products_8x8,
            "multiply_4x8": events.products_4x8,
            "multiply_4x4": events.products_4x4,
        },
        f"{pes}.accumulator": {"accumulate": events.accumulations, "shift": events.accumulator_hops},
        f"{pes}.operand_register": {"write": events.operand_hops},
        f"{pes}.idle": {"cycle": events.idle_pe_cycles},
    }
    for name in ("ifmap", "filter", "ofmap"):
        components[f"{name}_sram"] = {
            "read": getattr(events, f"sram_{name}_reads"),
            "write": getattr(events, f"sram_{name}_writes"),
        }
    components["dram"] = {"read": events.dram_reads, "write": events.dram_writes}
    lines = ["action_counts:", "  version: 0.3", "  local:"]
    for component, actions in components.items():
        lines += [f'    - name: "{design}.{component}"', "      action_counts:"]
        for action, count in actions.items():
            lines += [f"        - name: {action}", f"          counts: {count}"]
    return "\n".join(lines) + "\n"

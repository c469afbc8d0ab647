"""SCALE-Sim's configuration files (.cfg, v1 to v3): the array, its memory and the run's name.

The keys are those of SCALE-Sim's reader (``scalesim/scale_config.py``, version 3.0.0). What this machine
cannot do is an error at its place in the file, never ignored: other dataflows, compressed sparse weights,
banked layouts, Ramulator traces. What has no effect here (addresses, request buffers), and what is read in
another way than it is written (v1's key names, comments behind values, quotes), is named in `notes`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from sysmt.config import LARGEST_SIDE
from sysmt.cost.memory import Bandwidth, Memory, TileOrder
from sysmt.errors import nearest
from sysmt.scalesim.text_file import Field, integer, misplaced, read_lines

__all__ = ["ScaleSimConfig", "read_config"]

_GENERAL, _ARCHITECTURE, _RUN = "general", "architecture_presets", "run_presets"
_SIZES = {"ifmapsramszkb": "ifmap_kib", "filtersramszkb": "filter_kib", "ofmapsramszkb": "ofmap_kib"}
_V1_SIZES = {key.removesuffix("kb"): key for key in _SIZES}
_LARGEST_SRAM_KIB = 2**24
_WITHOUT_EFFECT = {
    _ARCHITECTURE: (
        "ifmapoffset",
        "filteroffset",
        "ofmapoffset",
        "memorybanks",
        "readrequestbuffer",
        "writerequestbuffer",
    ),
    "network_presets": ("topologycsvloc",),
}
_MUST_BE_OFF = {
    _RUN: {"useramulatortrace": "DRAM latencies from Ramulator traces are not modelled"},
    "layout": {
        "ifmapcustomlayout": "banked SRAM layouts are not modelled",
        "filtercustomlayout": "banked SRAM layouts are not modelled",
    },
    "sparsity": {
        "sparsitysupport": "K is never compressed: NB-SMT keeps zeros in their slots, where they prevent "
        "collisions; use the topology's Sparsity column for N:M zeros"
    },
}
_SPELLING = {
    "run_name": "run_name",
    "arrayheight": "ArrayHeight",
    "arraywidth": "ArrayWidth",
    "ifmapsramszkb": "IfmapSramSzkB",
    "filtersramszkb": "FilterSramSzkB",
    "ofmapsramszkb": "OfmapSramSzkB",
    "dataflow": "Dataflow",
    "bandwidth": "Bandwidth",
    "interfacebandwidth": "InterfaceBandwidth",
}
_DATAFLOWS = {"os": "output", "ws": "weight", "is": "input"}


@dataclasses.dataclass(frozen=True)
class ScaleSimConfig:
    """What a .cfg file says about the machine.

    Attributes
    ----------
    run_name : str
        Name of the directory that the reports go to.
    rows, cols : int
        ArrayHeight and ArrayWidth: PEs, at most 65,536.
    memory : Memory
        SRAM sizes, DRAM bandwidth (None where InterfaceBandwidth is CALC), SCALE-Sim's tile order.
    notes : tuple of str
        Keys of the file that have no effect here, are unknown or are read in another way than they are
        written, with their lines.
    """

    run_name: str
    rows: int
    cols: int
    memory: Memory
    notes: tuple[str, ...] = ()


class _Sections:
    """The file, as sections of keys; sections and keys are found whatever their case."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.titles: dict[str, int] = {}
        self.keys: dict[str, dict[str, Field]] = {}
        self.notes: list[str] = []
        section = None
        lines = read_lines(path)
        self.end = len(lines)
        for number, text in enumerate(lines, 1):
            start = len(text) - len(text.lstrip()) + 1
            stripped = text.strip()
            if not stripped or stripped[0] in "#;":
                continue
            if title := re.fullmatch(r"\[(.+)\]", stripped):
                section = title[1].strip().lower()
                if section in self.titles:
                    raise misplaced(path, number, start, f"section {stripped} is there twice")
                self.titles[section], self.keys[section] = number, {}
                continue
            parts = re.match(r"(\s*)([^:=]*?)(\s*[:=]\s*)(.*)", text)
            if parts is None or not parts[2]:
                raise misplaced(path, number, start, f"{stripped!r} is neither [section] nor key = value")
            if section is None:
                raise misplaced(path, number, start, f"{stripped!r} stands before the first [section]")
            key = parts[2].lower()
            if section == _ARCHITECTURE and key in _V1_SIZES:
                key = _V1_SIZES[key]
                self.notes.append(f"{parts[2]} (line {number}) is read as {_SPELLING[key]}, KiB")
            if key in self.keys[section]:
                raise misplaced(path, number, start, f"key {parts[2]!r} is there twice in [{section}]")
            value, column = self._value(parts[4], number), parts.start(4) + 1
            self.keys[section][key] = Field(value, self.path, number, column, parts[2])

    def _value(self, text: str, line: int) -> str:
        """Return a value without the comment behind it and without quotes around it."""
        value = text.strip()
        if comment := re.search(r"(^|\s)[#;].*", value):
            value = value[: comment.start()].strip()
            self.notes.append(f"{comment[0].strip()!r} (line {line}) is read as a comment")
        if quoted := re.fullmatch(r"([\"'])(.*)\1", value):
            value = quoted[2].strip()
            self.notes.append(f"the quotes around {value!r} (line {line}) are dropped")
        return value

    def needed(self, section: str, key: str) -> Field:
        """Return a value; raise where it would have to stand if it is missing or empty."""
        if section not in self.titles:
            hint = nearest(section, self.titles)
            raise misplaced(self.path, self.end, 1, f"section [{section}] is missing{hint}")
        field = self.keys[section].get(key)
        if field is None:
            hint = nearest(key, self.keys[section])
            raise misplaced(
                self.path, self.titles[section], 1, f"[{section}] lacks the key {_SPELLING[key]}{hint}"
            )
        if not field.text:
            raise field.error(f"{_SPELLING[key]} has no value")
        return field


def read_config(path: str | Path) -> ScaleSimConfig:
    """Read a SCALE-Sim configuration.

    Parameters
    ----------
    path : str or Path
        INI file in UTF-8: ``[general]``, ``[architecture_presets]`` and ``[run_presets]``.

    Returns
    -------
    ScaleSimConfig

    Raises
    ------
    ConfigError
        Naming file, line and column, if something is missing, twice there or out of range, if the dataflow is
        not ``os``, or if the file switches on what this machine does not model.
    """
    file = _Sections(path)
    run_name = file.needed(_GENERAL, "run_name")
    if not re.fullmatch(r"[^/\\]+", run_name.text) or run_name.text in (".", ".."):
        raise run_name.error(f"{run_name.text!r} cannot name a directory of results")
    rows, cols = (
        integer(file.needed(_ARCHITECTURE, key), 1, LARGEST_SIDE) for key in ("arrayheight", "arraywidth")
    )
    sizes = {
        name: integer(file.needed(_ARCHITECTURE, key), 1, _LARGEST_SRAM_KIB) for key, name in _SIZES.items()
    }
    _check_dataflow(file.needed(_ARCHITECTURE, "dataflow"))
    for section, keys in _MUST_BE_OFF.items():
        for key, reason in keys.items():
            field = file.keys.get(section, {}).get(key)
            if field is not None and _boolean(field):
                raise field.error(f"{field.text} is not possible: {reason}")
    memory = Memory(**sizes, bandwidth=_bandwidth(file), tile_order=TileOrder.COLUMNS_OUTER)
    return ScaleSimConfig(run_name.text, rows, cols, memory, tuple(_notes(file)))


def _check_dataflow(field: Field) -> None:
    if field.text.lower() == "os":
        return
    if (kind := _DATAFLOWS.get(field.text.lower())) is not None:
        raise field.error(
            f"{field.text} is {kind}-stationary; this array is output-stationary only, Dataflow = os"
        )
    raise field.error(f"{field.text!r} is no dataflow; os is needed (SCALE-Sim's others: ws, is)")


def _boolean(field: Field) -> bool:
    if field.text.lower() in ("true", "yes", "on", "1"):
        return True
    if field.text.lower() in ("false", "no", "off", "0"):
        return False
    raise field.error(f"{field.text!r} is neither true nor false")


def _bandwidth(file: _Sections) -> Bandwidth | None:
    """Read the DRAM bandwidth: one number for each of the three operands, or three numbers."""
    others = set(file.titles) - {_GENERAL, _ARCHITECTURE, "network_presets"}
    if _RUN not in file.titles and not nearest(_RUN, others):
        file.notes.append(
            f"[{_RUN}] is missing, as in files of v1: InterfaceBandwidth is CALC, and nothing stalls"
        )
        return None
    mode = file.needed(_RUN, "interfacebandwidth")
    if mode.text.upper() not in ("CALC", "USER"):
        raise mode.error(f"{mode.text!r} is unknown; CALC (as much as needed) or USER (Bandwidth) is needed")
    given = mode.text.upper() == "USER"
    field = file.keys.get(_ARCHITECTURE, {}).get("bandwidth")
    if field is None or not field.text:
        if given:
            file.needed(_ARCHITECTURE, "bandwidth")
        return None
    values, at = [], 0
    for part in field.text.split(","):
        blank = len(part) - len(part.lstrip())
        place = Field(part.strip(), field.path, field.line, field.column + at + blank, field.name)
        values.append(integer(place, 1))
        at += len(part) + 1
    if len(values) not in (1, 3):
        raise field.error(
            f"{len(values)} bandwidths; one for all operands is needed, or three: IFMAP, filter, OFMAP"
        )
    if not given:
        return None
    return Bandwidth(*(values if len(values) == 3 else values * 3))


def _notes(file: _Sections) -> list[str]:
    known: Mapping[str, set[str]] = {
        _GENERAL: {"run_name"},
        _ARCHITECTURE: {"arrayheight", "arraywidth", "dataflow", "bandwidth", *_SIZES},
        _RUN: {"interfacebandwidth", *_MUST_BE_OFF[_RUN]},
        "layout": set(_MUST_BE_OFF["layout"]),
        "sparsity": set(_MUST_BE_OFF["sparsity"]),
    }
    without_effect, unknown = [], []
    for section, keys in file.keys.items():
        for key, field in keys.items():
            if key in known.get(section, set()):
                continue
            if section == _ARCHITECTURE and key in _WITHOUT_EFFECT[_ARCHITECTURE]:
                integer(field, 0, 2**63 - 1)
            if section in ("layout", "sparsity") or key in _WITHOUT_EFFECT.get(section, ()):
                without_effect.append(f"{field.name} (line {field.line})")
            else:
                unknown.append(f"{field.name} (line {field.line})")
    notes = [f"{file.path}: {note}" for note in file.notes]
    if without_effect:
        notes.append(f"{file.path}: without effect here: {', '.join(without_effect)}")
    if unknown:
        notes.append(f"{file.path}: unknown, and so without effect: {', '.join(unknown)}")
    return notes

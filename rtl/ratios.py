"""What synthesis found: ratios to a conventional array, kept in ratios.toml for others to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w
from synthesis import COLS, ROWS, Design
from toolchain import HERE, tool_versions

from sysmt.files import read_toml

__all__ = ["RATIOS", "compare", "record", "write"]

RATIOS = HERE / "ratios.toml"
REFRESH = "make -C rtl refresh"
SAME_YOSYS_TOLERANCE = 0.02
OTHER_YOSYS_TOLERANCE = 0.10

HEADER = f"""\
# Areas, depths and energies of the RTL in verilog/, as gates: written by `{REFRESH}`.
# Ratios are to the first design, a conventional array of 8b x 8b MACs. README.md says what they are worth.

"""


def record(designs: list[Design], energies: list[float]) -> dict[str, Any]:
    """Flatten designs and their energies (the first is the baseline) into what ratios.toml holds."""
    base, base_energy = designs[0], energies[0]
    rows = []
    for design, energy in zip(designs, energies, strict=True):
        rows.append(
            {
                "threads": design.kind.threads,
                "policy": design.kind.policy.value,
                "pe_gates": sum(design.pe.counts.values()),
                "pe_registers": len(design.pe.registers),
                "mac_area_ge": round(design.mac.area_ge, 1),
                "pe_area_ge": round(design.pe.area_ge, 1),
                "array_area_ge": round(design.array_ge),
                "machine_area_ge": round(design.machine_ge),
                "pe_depth_gates": design.pe.depth,
                "mac_area_ratio": round(design.mac.area_ge / base.mac.area_ge, 3),
                "array_area_ratio": round(design.array_ge / base.array_ge, 3),
                "machine_area_ratio": round(design.machine_ge / base.machine_ge, 3),
                "pe_depth_ratio": round(design.pe.depth / base.pe.depth, 3),
                "energy_ratio": round(energy / base_energy, 3),
            }
        )
    return {
        "provenance": {
            "command": REFRESH,
            **tool_versions(),
            "array": f"{ROWS} x {COLS}, u8 activations",
            "area_unit": "two-input NANDs, weights in rtl/netlist.py",
            "depth_unit": "gates between registers, each counts one",
            "energy": "PE alone, same work, zero-delay wire changes, synthetic operands (rtl/activity.py)",
        },
        "design": rows,
    }


def write(fresh: dict[str, Any]) -> None:
    """Write ratios.toml."""
    RATIOS.write_text(HEADER + tomli_w.dumps(fresh))


def compare(fresh: dict[str, Any], path: Path = RATIOS) -> tuple[str, bool]:
    """Compare fresh ratios with the committed file: within 2 %, or 10 % if another Yosys wrote it.

    Not to the last digit: Yosys breaks ties by names and line numbers, so that an edited comment
    moves an area by a few tenths of a percent.

    Returns
    -------
    tuple of str, bool
        What was found, and whether the file stands.
    """
    if not path.exists():
        return f"{path.name} is missing; write it with `{REFRESH}`", False
    kept = read_toml(path)
    same = kept["provenance"]["yosys"] == fresh["provenance"]["yosys"]
    tolerance = SAME_YOSYS_TOLERANCE if same else OTHER_YOSYS_TOLERANCE
    if [names(row) for row in kept["design"]] != [names(row) for row in fresh["design"]]:
        return f"{path.name} holds other designs than those synthesised; refresh it with `{REFRESH}`", False
    worst, where = max(
        (abs(old.get(key, 0.0) / value - 1), f"{names(new)} {key}: {old.get(key)} kept, {value} now")
        for old, new in zip(kept["design"], fresh["design"], strict=True)
        for key, value in new.items()
        if key.endswith("_ratio")
    )
    if worst > tolerance:
        return f"{path.name} is out of date by {worst:.1%} ({where}); refresh it with `{REFRESH}`", False
    return f"{path.name} reproduced within {tolerance:.0%} (worst {worst:.1%})", True


def names(row: dict[str, Any]) -> str:
    """Which design a row is."""
    return f"{row['threads']}T {row['policy']}"

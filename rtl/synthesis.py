"""The RTL as generic gates: areas and depths of MAC, PE and array, beside the papers' ratios."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from netlist import Netlist, read_netlists
from toolchain import VERILOG, run
from twin import Kind

from sysmt.config import Policy

__all__ = ["COLS", "DESIGNS", "PAPER_AREA_RATIO", "ROWS", "Design", "synthesise"]

ROWS = COLS = 16

DESIGNS = (
    Kind(1, Policy.SA, signed=False),
    *(Kind(threads, policy, signed=False) for threads in (2, 4) for policy in (Policy.SA, Policy.SAW)),
)
"""What is synthesised; the first is the baseline of all ratios."""

PAPER_AREA_RATIO = {1: 1.0, 2: 1.4, 4: 2.5}
"""Array areas over a conventional array's, in the NB-SMT paper's abstract (arXiv 2004.09309)."""

SCRIPT = """
read_verilog {sources}
hierarchy -top {top} {parameters}
synth -flatten -top {top}
dfflegalize -cell $_DFF_P_ x
opt_clean
abc -g AND,NAND,OR,NOR,XOR,XNOR,MUX,AOI3,OAI3
opt_clean
check -assert
write_json {netlist}
"""
"""The PE keeps its border (keep_hierarchy), so that it is synthesised once for all places of the array."""


class Design(NamedTuple):
    """One array as gates.

    Attributes
    ----------
    kind : Kind
    mac, pe : Netlist
        A MAC alone, and a PE with its operand registers.
    array_ge : float
        Area of ROWS x COLS PEs, in gate equivalents.
    machine_ge : float
        The same with the skewing registers and the control.
    """

    kind: Kind
    mac: Netlist
    pe: Netlist
    array_ge: float
    machine_ge: float


def netlists(top: str, parameters: dict[str, int], folder: Path) -> dict[str, Netlist]:
    """Synthesise one top module."""
    target = folder / f"{top}.json"
    script = folder / f"{top}.ys"
    script.write_text(
        SCRIPT.format(
            sources=" ".join(path.name for path in sorted(VERILOG.glob("*.v"))),
            top=top,
            parameters=" ".join(f"-chparam {name} {value}" for name, value in parameters.items()),
            netlist=target,
        )
    )
    # Yosys puts the paths it reads into the names of wires, and those names decide its ties.
    run("yosys", "-q", "-s", script, folder=VERILOG)
    return read_netlists(target)


def area_ge(name: str, modules: dict[str, Netlist]) -> float:
    """Area of a module with everything below it."""
    module = modules[name]
    return module.area_ge + sum(area_ge(child, modules) * count for child, count in module.children.items())


def synthesise(kind: Kind, folder: Path) -> Design:
    """Synthesise MAC, PE and array of one kind."""
    folder.mkdir(parents=True, exist_ok=True)
    slot = {
        "THREADS": kind.threads,
        "POLICY": int(kind.policy.needs_both_wide),
        "SIGNED": int(kind.signed),
    }
    mac = netlists("mac", slot, folder)["mac"]
    modules = netlists("systolic_array", {**slot, "ROWS": ROWS, "COLS": COLS}, folder)
    pe_name = next(name for name in modules if name.endswith("\\pe"))
    array_name = next(name for name in modules if name.endswith("\\pe_array"))
    assert modules[array_name].children == {pe_name: ROWS * COLS}, "the array is its PEs and nothing else"
    return Design(
        kind, mac, modules[pe_name], area_ge(array_name, modules), area_ge("systolic_array", modules)
    )

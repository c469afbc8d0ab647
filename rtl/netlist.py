"""A netlist of generic gates, as Yosys writes it: its size, its depth, and what its wires do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

__all__ = ["GATE_EQUIVALENTS", "Netlist", "read_netlists"]

GATE_EQUIVALENTS = {
    "$_NOT_": 0.67,
    "$_NAND_": 1.0,
    "$_NOR_": 1.0,
    "$_AND_": 1.33,
    "$_OR_": 1.33,
    "$_AOI3_": 1.33,
    "$_OAI3_": 1.33,
    "$_XOR_": 2.0,
    "$_XNOR_": 2.0,
    "$_MUX_": 2.33,
    "$_DFF_P_": 5.67,
}
"""Area of each cell in two-input NANDs: the proportions of the smallest cells of an open 45 nm library
(NanGate FreePDK45: NAND2 0.798 um2, INV 0.532, AND2, OR2, AOI21 and OAI21 1.064, XOR2 and XNOR2 1.596, MUX2
1.862, DFF 4.522)."""

REGISTER = "$_DFF_P_"

GATES: dict[str, Callable[..., int]] = {
    "$_NOT_": lambda a: ~a,
    "$_AND_": lambda a, b: a & b,
    "$_NAND_": lambda a, b: ~(a & b),
    "$_OR_": lambda a, b: a | b,
    "$_NOR_": lambda a, b: ~(a | b),
    "$_XOR_": lambda a, b: a ^ b,
    "$_XNOR_": lambda a, b: ~(a ^ b),
    "$_MUX_": lambda a, b, s: (a & ~s) | (b & s),
    "$_AOI3_": lambda a, b, c: ~((a & b) | c),
    "$_OAI3_": lambda a, b, c: ~((a | b) & c),
}
"""What each gate computes, on integers whose bit t is the wire's value in cycle t."""


class Netlist:
    """One module as generic gates.

    Parameters
    ----------
    module : dict
        A module of the JSON that Yosys writes.
    """

    def __init__(self, module: Mapping[str, Any]) -> None:
        cells = module["cells"].values()
        self.ports: dict[str, list[Any]] = {name: port["bits"] for name, port in module["ports"].items()}
        self.children = Counter(cell["type"] for cell in cells if cell["type"] not in GATE_EQUIVALENTS)
        self.counts = Counter(cell["type"] for cell in cells if cell["type"] in GATE_EQUIVALENTS)
        self.cells: list[tuple[str, list[Any], Any]] = []
        self.registers: list[tuple[Any, Any]] = []
        for cell in cells:
            wires = {pin: bits[0] for pin, bits in cell["connections"].items()}
            if cell["type"] == REGISTER:
                self.registers.append((wires["D"], wires["Q"]))
            elif cell["type"] in GATES:
                self.cells.append((cell["type"], [wires[pin] for pin in "ABCS" if pin in wires], wires["Y"]))

    @property
    def area_ge(self) -> float:
        """Area of the module's own cells in gate equivalents, without its submodules."""
        return sum(GATE_EQUIVALENTS[kind] * count for kind, count in self.counts.items())

    @cached_property
    def ordered(self) -> list[tuple[str, list[Any], Any]]:
        """The gates, each after those that drive it: (type, inputs, output)."""
        driver = {output: (kind, inputs, output) for kind, inputs, output in self.cells}
        order: list[tuple[str, list[Any], Any]] = []
        done: set[Any] = set()
        for root in driver:
            stack = [root]
            while stack:
                wire = stack[-1]
                waiting = [i for i in driver[wire][1] if i in driver and i not in done]
                if wire in done or not waiting:
                    stack.pop()
                    if wire not in done:
                        done.add(wire)
                        order.append(driver[wire])
                else:
                    stack += waiting
        return order

    @cached_property
    def depth(self) -> int:
        """Gates on the longest path between registers and ports: every gate counts one."""
        levels: dict[Any, int] = {}
        for _, inputs, output in self.ordered:
            levels[output] = 1 + max(levels.get(wire, 0) for wire in inputs)
        return max(levels.values(), default=0)

    def evaluate(self, known: Mapping[Any, int], cycles: int) -> dict[Any, int]:
        """Values of all wires in all cycles at once, without delays.

        Parameters
        ----------
        known : mapping of wire to int
            Wires that no gate drives (ports and register outputs): bit t is the value in cycle t.
        cycles : int
            How many cycles.

        Returns
        -------
        dict of wire to int
        """
        mask = (1 << cycles) - 1
        values: dict[Any, int] = {"0": 0, "1": mask, "x": 0, **known}
        for kind, inputs, output in self.ordered:
            values[output] = GATES[kind](*(values[wire] for wire in inputs)) & mask
        return values


def read_netlists(path: Path) -> dict[str, Netlist]:
    """Read the modules of a Yosys JSON file, under the names that Yosys gave them."""
    return {name: Netlist(module) for name, module in json.loads(path.read_text())["modules"].items()}

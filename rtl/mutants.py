"""Faults put into the Verilog on purpose: each must be caught by the benches, or the benches prove little."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from toolchain import VERILOG, ToolError

__all__ = ["MUTANTS", "NO_FAULT", "Mutant", "plant"]


class Mutant(NamedTuple):
    """One fault: a file of verilog/, the text to replace, by what, and how often it must occur there."""

    name: str
    file: str
    old: str
    new: str
    times: int = 1


NO_FAULT = Mutant("no fault", "nibble", "", "", times=0)
"""The control: what catches the faults must let this one pass."""

MUTANTS = {
    "slots": (
        Mutant("rounding carry dropped", "nibble", "{4'b0, round_up}", "5'b0"),
        Mutant("ties rounded up", "nibble", "& (|value[2:0] | value[4])", ""),
        Mutant("ties rounded down", "nibble", "(|value[2:0] | value[4])", "(|value[2:0])"),
        Mutant("exact halves rounded too", "nibble", "whole & value[3] & (", "value[3] & ("),
        Mutant("256 held in 4 bits", "nibble", "high ? high_half",
               "high ? {(SIGNED != 0) & value[7], high_half[3:0]}"),
        Mutant("narrow operand loses its sign", "nibble", "& whole & value[3], v", "& 1'b0, v"),
        Mutant("halves swapped", "nibble", "high ? high_half : low_half", "high ? low_half : high_half"),
        Mutant("last row keeps its sign", "product", "i == YW - 1 ?", "i == YW ?"),
        Mutant("corner keeps its sign", "mixed_product", "{1'b1, {XW - 1{~x_signed}}}", "{XW{~x_signed}}"),
        Mutant("16 counts as narrow", "detect", ": |a[7:4];", ": |a[7:5];"),
        Mutant("8 counts as narrow", "detect", "(w[7:3] != 5'b00000)", "(w[7:4] != 4'b0000)"),
        Mutant("-8 counts as wide", "detect", "(w[7:3] != 5'b11111)", "(w[7:2] != 6'b111111)"),
        Mutant("zero weights not seen", "detect", "|a & |w", "|a"),
        Mutant("4T: shifts swapped", "multiplier_4", "a_high[u] ? {xy", "w_high[u] ? {xy"),
        Mutant("4T: a unit missing from the sum", "multiplier_4", "{{2{term[3][16]}}, term[3]}", "19'd0"),
        Mutant("4T: 2^17 does not fit", "multiplier_4", "assign out = ",
               "wire [18:0] sum; assign out = {sum[17], sum[17:0]}; assign sum = "),
        Mutant("4T: three taken for two", "slot_4", "(low_both & top_any) |", "(low_both & top_both) |"),
        Mutant("4T: two taken for one", "slot_4", "| (low_any & top_any));", ");"),
        Mutant("4T: last pair mistaken", "slot_4", "active[2] & ~active[3]", "active[2]"),
        Mutant("4T: first pair mistaken", "slot_4", "active[1] & ~active[0]", "active[1]"),
        Mutant("4T: nothing spared", "slot_4", "(POLICY != 0) & ~many", "1'b0 & ~many"),
        Mutant("4T: spared without the policy", "slot_4", "(POLICY != 0) & ~many", "~many"),
        Mutant("2T: shift lost", "multiplier_2", "a_high[u] & ~swap[u] ?", "1'b0 ?"),
        Mutant("2T: shift of a swapped pair", "multiplier_2", "a_high[u] & ~swap[u] ?", "a_high[u] ?"),
        Mutant("2T: low half twice", "slot_2", "a_wide[u] : u != 0", "a_wide[u] : 1'b0"),
        Mutant("2T: multiplier not lent", "slot_2", "assign lent = ~active[u];", "assign lent = 1'b0;"),
        Mutant("2T: nothing spared", "slot_2", "(POLICY != 0) & both", "1'b0 & both"),
    ),
    "gemms": (
        Mutant("drain a cycle early", "controller", "(work >= comp", "(work + 17'd1 >= comp"),
        Mutant("a cycle lost between tiles", "controller", "ROWS[16:0] - 17'd1", "ROWS[16:0]"),
        Mutant("reset does not drain", "controller", "drain = reset | out_valid", "drain = out_valid"),
        Mutant("one slot too few", "controller", "(feed < {1'b0, slots})", "(feed + 17'd1 < {1'b0, slots})"),
        Mutant("weights not skewed", "systolic_array", ".in(w_in & {B*COLS{take}}), .out(w_front)",
               ".in(w_in), .out()); assign w_front = (w_in & {B*COLS{take}}"),
        Mutant("ports read while idle", "systolic_array", "{take}", "{1'b1}", times=2),
        Mutant("weights do not move on", "pe", "w_out <= w_in;", "w_out <= w_out;"),
        Mutant("something enters at the top", "pe_array", "acc_wire[j] = 32'b0", "acc_wire[j] = 32'b1"),
        Mutant("accumulator of 24 bits", "mac", ": acc_out +", ": {{8{acc_out[23]}}, acc_out[23:0]} +"),
    ),
}  # fmt: skip
"""The faults, by the bench that must catch them."""


def plant(mutant: Mutant, folder: Path) -> Path:
    """Copy the Verilog into `folder`, with the fault in it.

    Raises
    ------
    ToolError
        If the text to replace does not occur as often as it should: the mutant no longer fits the source.
    """
    shutil.copytree(VERILOG, folder, dirs_exist_ok=True)
    if mutant is NO_FAULT:
        return folder
    target = folder / f"{mutant.file}.v"
    source = target.read_text()
    if source.count(mutant.old) != mutant.times:
        found = source.count(mutant.old)
        raise ToolError(
            f"mutant {mutant.name!r}: {mutant.old!r} occurs {found} times in {mutant.file}.v, "
            f"not {mutant.times}"
        )
    target.write_text(source.replace(mutant.old, mutant.new))
    return folder

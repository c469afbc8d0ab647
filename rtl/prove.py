"""Prove the model in hardware: lint, benches, GEMMs, faults, synthesis; status 1 if anything fails.

`make -C rtl`, or ``python rtl/prove.py --help``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from activity import PAPER_ENERGY_RATIO, Operands, energy_ge, load_operands, synthetic_operands, wrong_slots
from benches import (
    SEED,
    Check,
    check_gemms,
    check_lint,
    check_mutants,
    check_slots,
    check_twin,
    check_unknowns,
    timed,
)
from ratios import RATIOS, compare, record, write
from rich.console import Console
from rich.table import Table
from synthesis import COLS, DESIGNS, PAPER_AREA_RATIO, ROWS, Design, synthesise
from toolchain import ToolError, require_tools, tool_versions
from twin import exhaustive_slots

STAGES = ("lint", "slots", "gemms", "mutants", "synthesis")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Prove the sysmt model in hardware; one table, status 1 if anything fails."
    )
    parser.add_argument(
        "--only", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}"
    )
    parser.add_argument("--write", action="store_true", help="refresh ratios.toml instead of checking it")
    parser.add_argument(
        "--operands", type=Path, metavar="NPZ",
        help="estimate energy on a layer's own operands: a_mk (M, K) uint8, b_kn (K, N) int8",
    )  # fmt: skip
    return parser.parse_args()


def bench_checks(stages: tuple[str, ...], folder: Path) -> Iterator[Check]:
    """Run the stages that simulate."""
    if "lint" in stages:
        yield check_lint()
    if "slots" in stages:
        yield check_twin()
        yield check_slots(folder)
    if "gemms" in stages:
        yield check_unknowns(folder)
        yield from check_gemms(folder)
    if "mutants" in stages:
        yield from check_mutants(folder)


def synthesis_checks(designs: list[Design], folder: Path) -> Iterator[Check]:
    """Synthesise every design into `designs`, and prove its gates against the twin."""
    for kind in DESIGNS:

        def work(kind: Any = kind) -> tuple[str, bool]:
            design = synthesise(kind, folder / f"synthesis_{kind}".replace(" ", "_"))
            designs.append(design)
            slots, wrong = wrong_slots(design.pe, kind, exhaustive_slots(np.random.default_rng(SEED)))
            gates = sum(design.pe.counts.values())
            return f"{kind}: PE of {gates} gates = twin: {slots:,} slots, {wrong} differ", not wrong

        yield timed("gates", work)


def ratio_table(rows: list[dict[str, Any]], energy_of: str) -> Table:
    """Areas, depths and energies beside the papers'."""
    table = Table(title=f"{ROWS} x {COLS} array as generic gates; x = over 1T; energy: {energy_of}")
    for column in (
        "design", "MAC, GE", "PE, GE", "array, GE", "x", "paper", "with skew, control", "PE gates deep", "x",
        "energy", "paper",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "design" else "right")
    for row in rows:
        threads = row["threads"]
        table.add_row(
            f"{threads}T {row['policy']}" if threads > 1 else "1T",
            f"{row['mac_area_ge']:,.0f}", f"{row['pe_area_ge']:,.0f}", f"{row['array_area_ge']:,}",
            f"{row['array_area_ratio']:.2f}", f"{PAPER_AREA_RATIO[threads]:.1f}",
            f"{row['machine_area_ratio']:.2f}",
            str(row["pe_depth_gates"]), f"{row['pe_depth_ratio']:.2f}",
            f"{row['energy_ratio']:.2f}", f"{PAPER_ENERGY_RATIO[threads]:.2f}",
        )  # fmt: skip
    return table


def main() -> int:
    """Run the stages; 0 if everything passed."""
    arguments = parse_arguments()
    stages = tuple(arguments.only)
    console = Console(width=None if sys.stdout.isatty() else 150)
    start = time.perf_counter()
    try:
        require_tools()
        operands = load_operands(arguments.operands) if arguments.operands else synthetic_operands(SEED)
        with tempfile.TemporaryDirectory(prefix="sysmt_rtl_") as name:
            passed = report(stages, Path(name), operands, arguments, console)
    except (ToolError, OSError, ValueError, KeyError) as error:
        print(f"rtl: {error}", file=sys.stderr)
        return 2
    console.print(f"{'everything passed' if passed else 'FAILED'} in {time.perf_counter() - start:.0f} s")
    return 0 if passed else 1


def report(
    stages: tuple[str, ...], folder: Path, operands: Operands, arguments: argparse.Namespace, console: Console
) -> bool:
    """Run, print the tables, check or refresh ratios.toml; whether everything passed."""
    table = Table(title="RTL against the model: " + ", ".join(f"{k} {v}" for k, v in tool_versions().items()))
    table.add_column("check")
    table.add_column("what was done", overflow="fold")
    table.add_column("")
    table.add_column("s", justify="right")
    passed = True

    def add(check: Check) -> None:
        nonlocal passed
        passed &= check.passed
        table.add_row(check.name, check.detail, "ok" if check.passed else "FAILED", f"{check.seconds:.1f}")
        print(f"{check.name}: {check.detail}{'' if check.passed else ' FAILED'}", file=sys.stderr, flush=True)

    for check in bench_checks(stages, folder):
        add(check)
    fresh = None
    if "synthesis" in stages:
        designs: list[Design] = []
        for check in synthesis_checks(designs, folder):
            add(check)
        energies = [energy_ge(design.pe, design.kind, operands, SEED) for design in designs]
        fresh = record(designs, energies)
        if arguments.write:
            write(fresh)
            add(Check("ratios", f"{RATIOS.name} written", True, 0.0))
        elif arguments.operands is None:
            add(Check("ratios", *compare(fresh), 0.0))
    console.print(table)
    if fresh is not None:
        source = str(arguments.operands) if arguments.operands else "synthetic operands"
        console.print(ratio_table(fresh["design"], source))
    return passed


if __name__ == "__main__":
    sys.exit(main())

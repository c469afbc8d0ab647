"""Speed against the targets: kernels, counters, whole networks. Prints tables, writes CSV and plots.

Exits 0 whether the targets are met or missed; figures are medians, ratios within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from kernel_speed import counting_rows, gemm_rows, scaling_rows
from network_speed import NETWORKS, network_rows
from rich.console import Console
from rich.table import Table
from speed_plots import draw_roofline, draw_scaling
from threads_memory_cycles import cycle_rows, memory_rows, report_rows, thread_rows

from sysmt.hw.kernels import active_path

AT_MOST = ("counters", "memory", "report")
"""Parts whose ratio must not exceed the target; the others' must reach it."""

AVX2_TARGETS = {1: 1.0, 2: None, 4: 0.5}
"""On the AVX2 path against torch held to AVX2: T = 4 half as fast as T = 1 must be."""


def cpu_name() -> str:
    """Return the CPU's name as the system has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def avx2_rows() -> list[dict[str, Any]]:
    """Time ResNet-18 in a process of its own, torch and sysmt both held to AVX2."""
    environment = {
        **os.environ,
        "SYSMT_PATH": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
    command = [sys.executable, __file__, "--network", "ResNet-18", "--cpu-threads", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"the AVX2 run failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return []
    rows = json.loads(done.stdout.splitlines()[-1])
    return [{**row, "part": "avx2", "target": AVX2_TARGETS[row["threads"]]} for row in rows]


def show(console: Console, title: str, rows: pd.DataFrame) -> None:
    """Print one part's rows, targets met in green."""
    columns = [
        name for name in ("name", "threads", "policy", "zeros", "cpu_threads") if rows[name].notna().any()
    ]
    table = Table(*columns, "ms", "ratio", "target", title=title, title_justify="left")
    for _, row in rows.iterrows():
        met = "" if pd.isna(row["met"]) else "[green]" if row["met"] else "[red]"
        cells = [
            ""
            if pd.isna(row[name])
            else f"{row[name]:g}"
            if name != "name" and name != "policy"
            else row[name]
            for name in columns
        ]
        target = "" if pd.isna(row["target"]) else f"{row['target']:.2f}"
        milliseconds = "" if pd.isna(row["seconds"]) else f"{1e3 * row['seconds']:.2f}"
        table.add_row(*cells, milliseconds, f"{met}{row['ratio']:.2f}", target)
    console.print(table)


def run_all(out: Path) -> None:
    """Run every part, print its table as soon as it is there, and write the files."""
    console = Console()
    machine = f"{cpu_name()}, path {active_path()}, torch {torch.__version__}"
    console.print(machine)
    cores = min(2, os.cpu_count() or 1)
    parts = {
        "GEMM, operands packed: speed relative to torch._int_mm, one thread": lambda: list(gemm_rows()),
        "Counters: what they add to a layer's time": lambda: list(counting_rows()),
        f"Networks: speed relative to torch in float32, {cores} threads": lambda: [
            row for label in NETWORKS for row in network_rows(label, cores)
        ],
        "ResNet-18 on one thread": lambda: list(network_rows("ResNet-18", 1)),
        "AVX2: ResNet-18 relative to torch held to AVX2, one thread": avx2_rows,
        "Two CPU threads: speed relative to one": lambda: list(thread_rows()),
        "Memory beyond the float forward, relative to packed weights and the largest packed input": lambda: (
            list(memory_rows())
        ),
        "Cycle report of a whole network: seconds beyond the float forward": lambda: list(report_rows()),
        "Cycle engine, 16 x 16: GMAC/s": lambda: list(cycle_rows()),
    }
    frames = []
    for title, measure in parts.items():
        rows = pd.DataFrame(measure())
        if rows.empty:
            continue
        for name in ("policy", "zeros", "cpu_threads", "seconds", "target"):
            if name not in rows:
                rows[name] = None
        rows["met"] = [
            None
            if pd.isna(row.target)
            else row.ratio <= row.target
            if row.part in AT_MOST
            else row.ratio >= row.target
            for row in rows.itertuples()
        ]
        show(console, title, rows)
        frames.append(rows)
    scaling = pd.DataFrame(scaling_rows())
    table = pd.concat([*frames, scaling], ignore_index=True)
    out.mkdir(parents=True, exist_ok=True)
    table.assign(machine=machine).to_csv(out / "bench.csv", index=False)
    draw_roofline(table, machine, out / "roofline.png")
    draw_scaling(scaling, machine, out / "scaling.png")
    judged = table["met"].dropna()
    console.print(
        f"bench: {int(judged.sum())} of {len(judged)} targets met; {machine}; files in {out}", soft_wrap=True
    )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="directory for CSV and PNG")
    parser.add_argument(
        "--network", choices=NETWORKS, help="time this network only, and print its rows as JSON"
    )
    parser.add_argument("--cpu-threads", type=int, default=1, help="CPU threads, with --network")
    given = parser.parse_args()
    if given.network:
        print(json.dumps(list(network_rows(given.network, given.cpu_threads))))
    else:
        run_all(given.out)


if __name__ == "__main__":
    main()

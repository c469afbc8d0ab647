"""Benchmarks of what is limited rather than compared: threads, memory, reports, the cycle engine.

Run as a script it is the child process of `memory_rows`: one forward, then its peak memory in bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_clock import take_turns
from bench_kernels import draw_operands

import sysmt
from sysmt.nn.models import build_model

Row = dict[str, Any]

MEMORY_NETWORKS = {"ResNet-18": ("resnet18", 8, 224), "CIFAR ResNet-20": ("resnet20", 128, 32)}
"""Model, batch, pixels a side."""


def _attached(name: str, batch: int, size: int, config: sysmt.ArrayConfig) -> tuple[Any, ...]:
    """Build a network on the array, its ranges made up; return it, the simulation and images."""
    torch.manual_seed(0)
    model = build_model(name)
    simulation = sysmt.attach(model, config)
    simulation.set_ranges({layer.name: 0.02 for layer in simulation.simulated()})
    return model, simulation, torch.randn(batch, 3, size, size)


def is_quiet() -> bool:
    """Whether this process gets as much of a core as it asks for, over a tenth of a second."""
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() < wall + 0.1:
        pass
    return time.process_time() - cpu > 0.095


def thread_rows() -> Iterator[Row]:
    """ResNet-18 on two CPU threads against one; judged on a quiet machine alone."""
    if (os.cpu_count() or 1) < 2:
        return
    for threads in (1, 2, 4):
        model, simulation, images = _attached("resnet18", 8, 224, sysmt.ArrayConfig(threads=threads))
        model.to(memory_format=torch.channels_last)
        x = images.to(memory_format=torch.channels_last)

        def run(cpu_threads: int, net: Any = model, x: torch.Tensor = x) -> None:
            torch.set_num_threads(cpu_threads)
            net(x)

        quiet = is_quiet()
        with torch.inference_mode():
            seconds = take_turns({"1": lambda r=run: r(1), "2": lambda r=run: r(2)}, 7, one_thread=False)
        quiet = quiet and is_quiet()
        simulation.detach()
        yield {
            "part": "threads",
            "name": "ResNet-18" if quiet else "ResNet-18 (busy machine: not judged)",
            "threads": threads,
            "cpu_threads": 2,
            "seconds": seconds["2"],
            "ratio": seconds["1"] / seconds["2"],
            "target": 1.8 if quiet else None,
        }


def peak_bytes() -> int:
    """Return the most memory this process has had at once; not the parent's, as ru_maxrss may be."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


def measure_memory(label: str, threads: int) -> dict[str, int]:
    """Run two forwards, in float if `threads` is 0, and return the peak and what it may be made of."""
    torch.set_num_threads(1)
    name, batch, size = MEMORY_NETWORKS[label]
    model, simulation, x = _attached(name, batch, size, sysmt.ArrayConfig(threads=threads or 1))
    inputs: dict[str, int] = {}
    for layer in simulation.simulated():
        layer.module.register_forward_pre_hook(
            lambda _, args, key=layer.name: inputs.update({key: args[0].numel()})
        )
    if not threads:
        simulation.detach()
    with torch.inference_mode():
        for _ in range(2):
            model(x)
    packed = sum(conv.weight_bytes for layer in simulation.simulated() for conv in layer._packed.values())
    return {"peak": peak_bytes(), "packed": packed, "input": max(inputs.values())}


def memory_rows() -> Iterator[Row]:
    """Peak of a forward beyond that of the float forward, against packed weights + one packed input.

    The lesser of two processes each: heaps differ by megabytes from run to run.
    The largest layer's input counts one byte an activation, once: what a plane takes.
    """
    if not Path("/proc/self/status").exists():
        return
    for label in MEMORY_NETWORKS:
        of_threads = {}
        for threads in (0, 1, 2, 4):
            command = [sys.executable, __file__, label, str(threads)]
            runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)]
            measured = [json.loads(done.stdout.splitlines()[-1]) for done in runs]
            of_threads[threads] = min(measured, key=lambda one: one["peak"])
        for threads in (1, 2, 4):
            least = of_threads[threads]
            beyond = least["peak"] - of_threads[0]["peak"]
            yield {
                "part": "memory",
                "name": f"{label}: {beyond / 1e6:.1f} MB",
                "threads": threads,
                "ratio": beyond / (least["packed"] + least["input"]),
                "target": 1.0,
                "beyond_bytes": beyond,
                "packed_weights_bytes": least["packed"],
                "packed_input_bytes": least["input"],
            }


def report_rows() -> Iterator[Row]:
    """Seconds that a whole-network cycle report takes beyond torch's own forward; weights packed anew."""
    torch.set_num_threads(1)
    for threads in (1, 2, 4):
        model, simulation, x = _attached(
            "resnet18", 1, 224, sysmt.ArrayConfig(rows=32, cols=32, threads=threads)
        )

        def report(net: Any = model, sim: Any = simulation, x: torch.Tensor = x) -> None:
            for layer in sim.simulated():
                layer.forget_packed()
            net(x)
            assert sim.report()["cycles"].sum() == sim.cycles

        with torch.inference_mode():
            seconds = take_turns({"report": report}, rounds=3)
            simulation.detach()
            plain = take_turns({"float": lambda net=model, x=x: net(x)}, rounds=3)
        beyond = seconds["report"] - plain["float"]
        yield {
            "part": "report",
            "name": "ResNet-18 on 32 x 32, one image",
            "threads": threads,
            "seconds": beyond,
            "ratio": beyond,
            "target": 1.0,
        }


def cycle_rows() -> Iterator[Row]:
    """GMAC/s of the cycle engine, operands moving through 16 x 16 PEs, one CPU thread."""
    m, n, k = 256, 64, 1152
    a, b = draw_operands(m, n, k, 0.02)
    for threads in (1, 2, 4):
        config = sysmt.ArrayConfig(threads=threads)
        seconds = take_turns(
            {"cycle": lambda c=config: sysmt.simulate_gemm(a, b, c, engine="cycle")}, rounds=5
        )["cycle"]
        gmacs = m * n * k / 1e9 / seconds
        yield {
            "part": "cycle",
            "name": f"{m} x {n} x {k}",
            "threads": threads,
            "seconds": seconds,
            "ratio": gmacs,
            "target": 1.0 if threads == 1 else None,
            "gmacs_per_second": gmacs,
        }


if __name__ == "__main__":
    print(json.dumps(measure_memory(sys.argv[1], int(sys.argv[2]))))

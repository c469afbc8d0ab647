"""Benchmarks of what is limited rather than compared: threads, memory, reports, the cycle engine.

Run as a script it is a child process of `memory_rows`: forwards, then their peak memory in bytes as JSON.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from kernel_speed import draw_operands
from network_speed import settle_statistics
from turns import take_turns

import sysmt
from sysmt.nn.networks.models import build_model

Row = dict[str, Any]

MEMORY_NETWORKS = {"ResNet-18": ("resnet18", 8, 224), "CIFAR ResNet-20": ("resnet20", 128, 32)}
"""Model, batch, pixels a side."""


def _attached(name: str, batch: int, size: int, config: sysmt.ArrayConfig) -> tuple[Any, ...]:
    """Build a network on the array, calibrated with the images; return it, the simulation and them."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size)
    model = settle_statistics(build_model(name), images)
    simulation = sysmt.attach(model, config)
    simulation.calibrate([images], images=batch)
    return model, simulation, images


def _share_of_core(seconds: float = 0.1) -> float:
    """Return the CPU time that this thread gets while it asks for a whole core, per second."""
    wall, cpu, data = time.perf_counter(), time.thread_time(), bytes(1 << 20)
    while time.perf_counter() < wall + seconds:
        hashlib.sha256(data)  # outside the GIL
    return (time.thread_time() - cpu) / (time.perf_counter() - wall)


def is_quiet(cores: int) -> bool:
    """Whether so many threads at once get a core each, over a tenth of a second."""
    with ThreadPoolExecutor(cores) as pool:
        shares = [pool.submit(_share_of_core) for _ in range(cores)]
        return min(share.result() for share in shares) > 0.95


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

        quiet = is_quiet(2)
        with torch.inference_mode():
            seconds = take_turns({"1": lambda r=run: r(1), "2": lambda r=run: r(2)}, 7, one_thread=False)
        quiet = quiet and is_quiet(2)
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


RETURN_AT_ONCE = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
"""glibc's environment under which resident memory is live memory: whatever is freed goes back at once.
sysmt's own thresholds give way to it."""

PEAK_RESET = Path("/proc/self/clear_refs")
"""Linux: writing 5 to it forgets the peak so far."""


def peak_bytes() -> int:
    """Return the most memory this process has had at once, without what it maps from files, such as code."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * (int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0]))


def forward_peak_bytes(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Run two forwards, the first of which may pack weights, and return the process's peak meanwhile."""
    PEAK_RESET.write_text("5")
    with torch.inference_mode():
        for _ in range(2):
            model(x)
    return peak_bytes()


def print_memory(label: str) -> None:
    """Print forwards' peak, packed weights and largest packed input in bytes, as JSON: a line for each T.

    T = 0 is in float. Each is measured in a fork of this process, so that all begin with the same memory.
    """
    torch.set_num_threads(1)
    name, batch, size = MEMORY_NETWORKS[label]
    model, simulation, x = _attached(name, batch, size, sysmt.ArrayConfig())
    inputs: dict[str, int] = {}
    for layer in simulation.simulated():
        layer.module.register_forward_pre_hook(
            lambda _, args, key=layer.name: inputs.update({key: args[0].numel()})
        )

    def measure(threads: int) -> None:
        if threads:
            simulation.set_threads(threads)
        else:
            simulation.detach()
        peak = forward_peak_bytes(model, x)
        packed = sum(conv.weight_bytes for layer in simulation.simulated() for conv in layer._packed.values())
        print(json.dumps({"peak": peak, "packed": packed, "input": max(inputs.values())}), flush=True)

    for threads in (0, 1, 2, 4):
        child = multiprocessing.get_context("fork").Process(target=measure, args=[threads])
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(f"measuring {label} at T = {threads} ended with {child.exitcode}")


def measure_memory(label: str, environment: Mapping[str, str]) -> dict[int, dict[str, int]]:
    """Return what `print_memory` says of each T in a new process, `environment` telling the C library how."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("MALLOC_") and key != "GLIBC_TUNABLES"
    }
    done = subprocess.run(
        [sys.executable, __file__, label],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip((0, 1, 2, 4), map(json.loads, done.stdout.splitlines()[-4:]), strict=True))


def memory_rows() -> Iterator[Row]:
    """Peak of a forward beyond that of the float forward, against packed weights + one packed input.

    Judged is live memory: what the process has allocated and not freed, in buffers of 64 KB and more.
    For that the C library hands every such buffer back to the kernel as soon as it is freed, so that
    the resident peak of the forwards (packing included, calibration not) is the live one; repeated
    runs differ by some 0.3 MB. The largest layer's input counts one byte an activation, once: what a
    plane takes.

    The resident peak as users have it is shown beside it, and not judged: `attach` has glibc keep what
    is freed, and whether a freed activation's place fits the next one changes from run to run by tens
    of megabytes, for the float network as well.
    """
    if not os.access(PEAK_RESET, os.W_OK):
        return
    for label in MEMORY_NETWORKS:
        for kind, environment in (("", RETURN_AT_ONCE), (", resident", {})):
            measured = measure_memory(label, environment)
            for threads in (1, 2, 4):
                one = measured[threads]
                beyond = one["peak"] - measured[0]["peak"]
                yield {
                    "part": "memory",
                    "name": f"{label}{kind}: {beyond / 1e6:.1f} MB",
                    "threads": threads,
                    "ratio": beyond / (one["packed"] + one["input"]),
                    "target": None if kind else 1.0,
                    "beyond_bytes": beyond,
                    "packed_weights_bytes": one["packed"],
                    "packed_input_bytes": one["input"],
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
    print_memory(sys.argv[1])

"""The RTL against the model: lint, slots, GEMMs, unknown values, and faults that must be caught."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gemms import ARRAYS, MUTANT_ARRAYS, Array, jobs
from mutants import MUTANTS, NO_FAULT, Mutant, plant
from toolchain import HERE, VERILOG, ToolError, build_bench, run
from twin import EXHAUSTIVE_SLOTS, KINDS, exhaustive_slots, prove_twin, random_slots, slot_values

__all__ = [
    "SEED",
    "Check",
    "check_gemms",
    "check_lint",
    "check_mutants",
    "check_slots",
    "check_twin",
    "check_unknowns",
    "timed",
]

SEED = 2020
TWIN_SLOTS = 100_000
RANDOM_SLOTS = 1 << 21
CHUNK = 1 << 16


class Check(NamedTuple):
    """One line of the report."""

    name: str
    detail: str
    passed: bool
    seconds: float


def timed(name: str, work: Callable[[], tuple[str, bool]]) -> Check:
    """Run one check and time it."""
    start = time.perf_counter()
    detail, passed = work()
    return Check(name, detail, passed, time.perf_counter() - start)


def check_lint() -> Check:
    """Lint every module under every T, policy and sign: no warning may be left."""

    def work() -> tuple[str, bool]:
        complaints = []
        for kind in KINDS:
            parameters = Array(3, 4, kind).parameters
            options = [f"-G{name}={value}" for name, value in parameters.items()]
            try:
                run("verilator", "--lint-only", "-Wall", *options, "--top-module", "systolic_array",
                    *sorted(VERILOG.glob("*.v")))  # fmt: skip
            except ToolError as error:
                complaints.append(f"{kind}: {error}")
        return "; ".join(
            complaints
        ) or f"{len(list(VERILOG.glob('*.v')))} modules x {len(KINDS)} kinds, -Wall", not complaints

    return timed("lint", work)


def check_twin() -> Check:
    """Compare the numpy twin with `sysmt.hw.pe`, slot by slot."""

    def work() -> tuple[str, bool]:
        differences = prove_twin(TWIN_SLOTS, SEED)
        return (
            f"numpy twin = sysmt.hw.pe: {TWIN_SLOTS:,} slots x {len(differences)} kinds, "
            f"{sum(differences.values())} differ",
            not any(differences.values()),
        )

    return timed("twin", work)


def records(a: np.ndarray, w: np.ndarray) -> bytes:
    """Slots as bench/slot_bench.cpp reads them: operand bytes, then what each kind must give."""
    words = np.empty((len(a), 2 + len(KINDS)), "<u4")
    words[:, 0], words[:, 1] = a.view("<u4")[:, 0], w.view("<u4")[:, 0]
    for index, kind in enumerate(KINDS):
        words[:, 2 + index] = slot_values(a, w, kind).view(np.uint32)
    return words.tobytes()


def slot_chunks(rng: np.random.Generator) -> Iterator[bytes]:
    """All operand pairs through every mode, then random slots."""
    every = exhaustive_slots(rng)
    some = (random_slots(CHUNK, rng) for _ in range(RANDOM_SLOTS // CHUNK))
    yield from (records(a, w) for a, w in chain(every, some))


def check_slots(folder: Path) -> Check:
    """Work off all operand pairs in every mode, and random slots, in every kind of slot."""

    def work() -> tuple[str, bool]:
        program = build_bench("slot_bench", "slot_bench", folder / "slots")
        with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bench:
            assert bench.stdin is not None
            assert bench.stdout is not None
            for chunk in slot_chunks(np.random.default_rng(SEED)):
                bench.stdin.write(chunk)
            bench.stdin.close()
            slots, *wrong = (int(word) for word in bench.stdout.read().split())
        expected = EXHAUSTIVE_SLOTS + RANDOM_SLOTS
        return (
            f"33 modes x 65,536 operand pairs + {RANDOM_SLOTS:,} random slots, x {len(KINDS)} kinds: "
            f"{sum(wrong)} differ",
            slots == expected and len(wrong) == len(KINDS) and not any(wrong) and bench.returncode == 0,
        )

    return timed("slots", work)


def gemm_lines(program: Path, words: Iterable[bytes]) -> list[tuple[int, ...]]:
    """Run GEMMs; cycles, accumulators and wrong ones of each. Registers start with random bits."""
    out = run(
        program, "+verilator+rand+reset+2", f"+verilator+seed+{SEED}", stdin=b"".join(words), accept=(0, 1, 2)
    )
    return [tuple(int(word) for word in line.split()) for line in out.splitlines()]


def check_gemms(folder: Path) -> Iterator[Check]:
    """Run GEMMs on every array: outputs as `sysmt.hw.reference`, cycles as `sysmt.hw.timing`."""
    for array in ARRAYS:

        def work(array: Array = array) -> tuple[str, bool]:
            wanted = list(jobs(array, np.random.default_rng(SEED)))
            large = array.rows * array.cols > 100
            program = build_bench(
                "systolic_array",
                "gemm_bench",
                folder / f"gemms {array}".replace(" ", "_"),
                parameters=array.parameters,
                optimise="-O0" if large else "-O1",
            )
            lines = gemm_lines(program, (job.words for job in wanted))
            cycles, outputs, wrong = (sum(column) for column in zip(*lines, strict=True))
            expected = sum(job.cycles for job in wanted)
            return (
                f"{array}: {len(wanted)} GEMMs, {outputs:,} accumulators, {wrong} differ; "
                f"{cycles:,} cycles, closed form {expected:,}",
                lines == [(job.cycles, job.outputs, 0) for job in wanted],
            )

        yield timed("gemm", work)


def check_unknowns(folder: Path) -> Check:
    """Simulate with four states: after reset nothing may be unknown, though hardly anything is reset."""

    def work() -> tuple[str, bool]:
        program = folder / "unknown_bench.vvp"
        run("iverilog", "-g2005", "-o", program, "-y", VERILOG, HERE / "bench" / "unknown_bench.v")
        said = run("vvp", program).strip()
        return f"four-state simulation after rows + cols cycles of reset: everything {said}", said == "known"

    return timed("unknowns", work)


def mutant_vectors() -> bytes:
    """Fewer slots than the real Verilog meets: a sixteenth of each mode, all pairs in all threads alike."""
    rng = np.random.default_rng(SEED)
    *modes, alike = exhaustive_slots(rng)
    sampled = [(np.ascontiguousarray(a[::16]), np.ascontiguousarray(w[::16])) for a, w in modes]
    return b"".join(records(a, w) for a, w in [random_slots(CHUNK, rng), *sampled, alike])


def slot_mutant_caught(mutant: Mutant, folder: Path, vectors: bytes) -> bool:
    """Whether the bench of slots sees the fault."""
    program = build_bench("slot_bench", "slot_bench", folder, plant(mutant, folder / "verilog"))
    with subprocess.Popen(
        [program, "stop"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as bench:
        bench.communicate(vectors)
        return bench.returncode == 1


def gemm_mutant_caught(mutant: Mutant, folder: Path, _: bytes) -> bool:
    """Whether the bench of GEMMs sees the fault, in values, in cycles or in what is asked for."""
    plant(mutant, folder / "verilog")
    for array in MUTANT_ARRAYS:
        wanted = list(jobs(array, np.random.default_rng(SEED)))
        program = build_bench(
            "systolic_array",
            "gemm_bench",
            folder.with_name(f"{folder.name}_{array.rows}"),
            folder / "verilog",
            array.parameters,
        )
        if gemm_lines(program, (job.words for job in wanted)) != [
            (job.cycles, job.outputs, 0) for job in wanted
        ]:
            return True
    return False


def check_mutants(folder: Path) -> Iterator[Check]:
    """Put every fault of `mutants.MUTANTS` into the Verilog; a bench must see each of them, and no other."""
    vectors = mutant_vectors()
    benches = {"slots": slot_mutant_caught, "gemms": gemm_mutant_caught}
    for bench in benches:
        for index, mutant in enumerate((NO_FAULT, *MUTANTS[bench])):

            def work(index: int = index, mutant: Mutant = mutant, bench: str = bench) -> tuple[str, bool]:
                caught = benches[bench](mutant, folder / f"mutant_{bench}_{index}", vectors)
                verdict = f"{'caught' if caught else 'passed'} by the bench of {bench}"
                return f"{mutant.name}: {verdict}", caught == (mutant is not NO_FAULT)

            yield timed("mutant", work)

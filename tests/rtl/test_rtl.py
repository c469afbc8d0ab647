"""The hardware proof in rtl/: what can be held in seconds; `make rtl` does the rest.

Tests that simulate are skipped, with the reason, where Verilator or a C++ compiler is absent.
"""

import importlib
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from places import REPOSITORY

RTL = REPOSITORY / "rtl"
MISSING = [program for program in ("verilator", "g++") if shutil.which(program) is None]
needs_verilator = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def rtl():
    """Import modules of rtl/, which is a folder of scripts and no package."""
    sys.path.insert(0, str(RTL))
    yield importlib.import_module
    sys.path.remove(str(RTL))


def test_twin_equals_the_pe(rtl):
    differences = rtl("twin").prove_twin(2_000, seed=3)
    assert len(differences) == 10
    assert not any(differences.values())


def test_exhaustive_slots_hold_every_pair_in_every_mode(rtl):
    twin = rtl("twin")
    modes = set()
    slots = 0
    for a, w in twin.exhaustive_slots(np.random.default_rng(0)):
        active = (a != 0) & (w != 0)
        slots += len(a)
        full = [t for t in range(4) if np.unique(a[:, t].astype(int) << 8 | w[:, t]).size == 65_536]
        patterns = {int(p) for p in np.unique(active @ (1 << np.arange(4)))}
        modes |= {(t, pattern) for t in full for pattern in patterns}
    assert slots == twin.EXHAUSTIVE_SLOTS
    assert modes >= {(t, pattern) for t in range(4) for pattern in range(16) if pattern >> t & 1}


def test_every_mutant_fits_the_source(rtl, tmp_path):
    mutants = rtl("mutants")
    for bench, faults in mutants.MUTANTS.items():
        for index, mutant in enumerate(faults):
            planted = mutants.plant(mutant, tmp_path / f"{bench}{index}") / f"{mutant.file}.v"
            assert planted.read_text() != (RTL / "verilog" / f"{mutant.file}.v").read_text(), mutant.name


def test_kept_ratios_cover_the_designs(rtl):
    kept = tomllib.loads((RTL / "ratios.toml").read_text())
    wanted = [(kind.threads, kind.policy.value) for kind in rtl("synthesis").DESIGNS]
    assert [(row["threads"], row["policy"]) for row in kept["design"]] == wanted
    assert {value for key, value in kept["design"][0].items() if key.endswith("_ratio")} == {1.0}
    said, stands = rtl("ratios").compare(kept)
    assert stands
    assert "worst 0.0%" in said


def test_changed_ratios_are_noticed(rtl):
    kept = tomllib.loads((RTL / "ratios.toml").read_text())
    kept["design"][1]["array_area_ratio"] *= 1.03
    said, stands = rtl("ratios").compare(kept)
    assert not stands
    assert "2T S+A array_area_ratio" in said
    assert not rtl("ratios").compare({**kept, "design": kept["design"][1:]})[1]


def test_netlist_computes_gates_and_depth(rtl):
    def cell(kind, **wires):
        return {"type": kind, "connections": {pin: [wire] for pin, wire in wires.items()}}

    module = {
        "ports": {"y": {"bits": [9]}},
        "cells": {
            "late": cell("$_AOI3_", A=7, B=4, C="0", Y=8),
            "mux": cell("$_MUX_", A=2, B=3, S=4, Y=7),
            "keep": cell("$_DFF_P_", C=5, D=8, Q=9),
        },
    }
    netlist = rtl("netlist").Netlist(module)
    assert netlist.depth == 2
    assert netlist.area_ge == pytest.approx(1.33 + 2.33 + 5.67)
    wires = netlist.evaluate({2: 0b0011, 3: 0b0101, 4: 0b1100}, cycles=4)
    assert wires[7] == 0b0111
    assert wires[8] == 0b1011


def test_missing_tools_are_named(tmp_path):
    done = subprocess.run(
        [sys.executable, RTL / "prove.py"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "apt-get install verilator iverilog yosys g++" in done.stderr


@needs_verilator
@pytest.mark.slow
def test_gemms_on_a_small_array_equal_reference_and_closed_form(rtl, tmp_path):
    benches, gemms, toolchain = rtl("benches"), rtl("gemms"), rtl("toolchain")
    array = gemms.MUTANT_ARRAYS[0]
    program = toolchain.build_bench(
        "systolic_array", "gemm_bench", tmp_path / "array", parameters=array.parameters, optimise="-O0"
    )
    wanted = list(gemms.jobs(array, np.random.default_rng(1)))
    lines = benches.gemm_lines(program, [job.words for job in wanted])
    assert lines == [(job.cycles, job.outputs, 0) for job in wanted]

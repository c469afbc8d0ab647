"""Which paths this processor must offer, and that the code of the path that was asked for did the work."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sysmt
from sysmt.config import ArrayConfig, Policy
from sysmt.hw import _native
from sysmt.hw.kernels import PackedConv, PackedGemm, available_paths

PATHS = available_paths()
CPUINFO = Path("/proc/cpuinfo")
# What /proc/cpuinfo calls what a path needs; csrc asks the processor itself.
NEEDS = {
    "avx512vnni": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "popcnt"},
    "avx2": {"avx2", "fma", "popcnt"},
}


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not CPUINFO.exists(),
    reason="the system does not list an x86 processor's features in /proc/cpuinfo",
)
def test_every_path_that_this_processor_has_is_offered_and_no_other():
    (flags,) = {line for line in CPUINFO.read_text().splitlines() if line.startswith("flags\t")}
    features = set(flags.split(":")[1].split())
    able = [path for path, needed in NEEDS.items() if needed <= features]
    assert list(PATHS) == [*able, "scalar"]


def operands(threads, signed=False):
    rng = np.random.default_rng(threads)
    low, high, dtype = (-128, 128, np.int8) if signed else (0, 256, np.uint8)
    a = (rng.integers(low, high, (37, 150)) * (rng.random((37, 150)) < 0.6)).astype(dtype)
    b = (rng.integers(-128, 128, (150, 21)) * (rng.random((150, 21)) < 0.8)).astype(np.int8)
    return a, b


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("policy", [Policy.SA, Policy.SAW, Policy.SW, Policy.S])
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("cpu_threads", [1, 3])
def test_a_forced_path_multiplies_itself_and_gives_the_reference_values(
    path, signed, policy, threads, cpu_threads
):
    config = ArrayConfig(threads=threads, policy=policy)
    a, b = operands(threads, signed)
    gemm = PackedGemm(b, config, signed=signed, path=path)
    assert gemm._layer.ran_on is None  # nothing ran yet
    out, counters = gemm.run(a, cpu_threads=cpu_threads)
    assert gemm._layer.ran_on == path  # written by the code that multiplies
    expected = sysmt.simulate_gemm(a, b, config, engine="reference")
    np.testing.assert_array_equal(out, expected.out_mn)
    assert counters.active == expected.stats.active
    assert counters.reduced_activations == expected.stats.reduced_activations
    assert counters.reduced_weights == expected.stats.reduced_weights


@pytest.mark.parametrize("path", PATHS)
def test_a_forced_path_convolves_itself(path):
    rng = np.random.default_rng(5)
    weight = rng.integers(-127, 128, (5, 8, 3, 3)).astype(np.int8)
    conv = PackedConv(weight, ArrayConfig(threads=1), padding=((1, 1), (1, 1)), path=path)
    x = rng.integers(0, 256, (2, 8, 6, 7)).astype(np.float32)
    y = conv.forward(x, 1.0, np.ones(5, np.float32)).y
    assert conv._layer.ran_on == path
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    np.testing.assert_array_equal(y, np.einsum("bcyxij,ncij->bnyx", windows, weight))  # T = 1 is exact


def test_the_proof_is_of_the_last_run():
    gemm = PackedGemm(np.zeros((4, 3), np.int8), ArrayConfig())
    gemm.run(np.zeros((0, 4), np.uint8))
    assert gemm._layer.ran_on is None  # an empty product: no code multiplied
    gemm.run(np.zeros((2, 4), np.uint8))
    assert gemm._layer.ran_on == PATHS[0]


@pytest.mark.parametrize("path", PATHS)
def test_the_environment_forces_a_path(path):
    code = """
import numpy as np
from sysmt.config import ArrayConfig
from sysmt.hw.kernels import PackedGemm
gemm = PackedGemm(np.ones((4, 3), np.int8), ArrayConfig(threads=4))
assert gemm.run(np.ones((2, 4), np.uint8))[0].tolist() == [[4] * 3] * 2
print(gemm._layer.ran_on)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"SYSMT_PATH": path}, capture_output=True, text=True
    )
    assert run.stdout.split() == [path], run.stderr


def test_the_binding_knows_only_the_listed_paths():
    assert _native.path_names() == PATHS
    with pytest.raises(LookupError, match="neon"):
        _native.Layer("neon", (1,) * 13, {}, np.zeros((1, 1, 1, 1), np.int8), np.zeros((1, 1), np.int32))

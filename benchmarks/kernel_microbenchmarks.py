"""Micro-benchmarks of the kernels, for ``pytest benchmarks/kernel_microbenchmarks.py --benchmark-only``."""

import numpy as np
import pytest

from sysmt.config import ArrayConfig, Policy
from sysmt.hw.kernels import PackedConv, PackedGemm, available_paths

PATHS = [path for path in available_paths() if path != "scalar"] or ["scalar"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def weights(rng, shape, zeros=0.02):
    w = np.clip(np.rint(rng.normal(0, 36, shape)), -127, 127).astype(np.int8)
    w[rng.random(shape) < zeros] = 0
    return w


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("policy", [Policy.SA, Policy.SAW])
@pytest.mark.parametrize("zeros", [0.02, 0.4])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_gemm(benchmark, rng, path, policy, zeros, threads):
    gemm = PackedGemm(
        weights(rng, (1152, 128), zeros), ArrayConfig(threads=threads, policy=policy), path=path
    )
    a = np.clip(rng.normal(0, 60, (784, 1152)), 0, 255).astype(np.uint8)
    out, _ = benchmark(gemm.run, a, 1, False)
    assert out.any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [True, False])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_convolution(benchmark, rng, path, count, layout, threads):
    conv = PackedConv(
        weights(rng, (64, 64, 3, 3)), ArrayConfig(threads=threads), padding=((1, 1), (1, 1)), path=path
    )
    x = np.maximum(rng.normal(0, 60, (1, 64, 56, 56)), 0).astype(np.float32)
    if layout == "nhwc":
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    out = np.empty_like(x)
    result = benchmark(conv.forward, x, 1.0, np.ones(64, np.float32), out=out, count=count)
    assert result.y.any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("threads", [1, 4])
def test_packing_weights(benchmark, rng, path, threads):
    w = weights(rng, (256, 256, 3, 3))
    conv = benchmark(PackedConv, w, ArrayConfig(threads=threads), path=path)
    assert conv.weight_bytes > w.nbytes

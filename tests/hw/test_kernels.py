"""Packed convolutions on every path against im2col and the reference, and the forced paths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sysmt.config import ArrayConfig, Policy
from sysmt.errors import OperandError, PathError
from sysmt.hw import fast
from sysmt.hw.kernels import PackedConv, PackedGemm, active_path, available_paths, fingerprint
from sysmt.hw.stats import Counters

PATHS = available_paths()


@pytest.fixture
def rng():
    return np.random.default_rng(2)


def images(rng, shape, signed, layout="nchw"):
    """Half-normal activations, about half of them zero, some beyond the calibrated range."""
    x = rng.normal(0, 60, shape).astype(np.float32)
    x = x if signed else np.maximum(x, 0)
    x.flat[rng.integers(0, max(x.size, 1), x.size // 50)] = 260.0
    if layout == "nhwc":
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    if layout == "strided":
        return np.repeat(np.repeat(x, 2, 3), 2, 1)[:, ::2, :, ::2]
    if layout == "flipped":
        return x[:, :, ::-1].copy()[:, :, ::-1]
    return x


def by_im2col(conv, weight, x, scale_a, scale_w, bias, order):
    """Lower to one GEMM per group through numpy and the scalar path."""
    batch, n, height, width = conv.output_shape(x.shape)
    counters = Counters((0,) * (conv.config.threads + 1))
    outs = []
    for group, a in enumerate(conv.quantize(x, scale_a)):
        b = weight.reshape(conv.groups, n // conv.groups, -1)[group].T
        out, counted = fast.simulate(a, b, conv.config, order and order[group], path="scalar")
        counters += counted
        outs.append(out)
    sums = np.concatenate(outs, 1).reshape(batch, height, width, n).transpose(0, 3, 1, 2)
    y = sums.astype(np.float32) * (np.float32(scale_a) * scale_w)[:, None, None] + bias[:, None, None]
    return y, counters


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=150, deadline=None)
@given(
    threads=st.sampled_from([1, 2, 4]),
    policy=st.sampled_from(list(Policy)),
    signed=st.booleans(),
    batch=st.integers(1, 3),
    groups=st.sampled_from([1, 1, 2, 3]),
    channels=st.sampled_from([1, 2, 3, 4, 8, 12]),
    outputs=st.sampled_from([1, 3, 8, 9]),
    size=st.tuples(st.integers(1, 19), st.integers(1, 40)),
    kernel=st.sampled_from([(1, 1), (1, 1), (3, 3), (3, 3), (5, 2), (1, 3)]),
    stride=st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3), (2, 1)]),
    padding=st.sampled_from([((0, 0), (0, 0)), ((1, 1), (1, 1)), ((0, 2), (3, 1)), ((2, 2), (2, 2))]),
    dilation=st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)]),
    layout=st.sampled_from(["nchw", "nhwc", "strided", "flipped"]),
    reordered=st.booleans(),
    relu=st.booleans(),
    is_affine=st.booleans(),
    density=st.sampled_from([1.0, 0.98, 0.6, 0.2]),
    cpu_threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_convolution_equals_im2col(
    path, threads, policy, signed, batch, groups, channels, outputs, size, kernel, stride, padding, dilation,
    layout, reordered, relu, is_affine, density, cpu_threads, seed,
):  # fmt: skip
    rng = np.random.default_rng(seed)
    config = ArrayConfig(threads=threads, policy=policy)
    weight = np.clip(rng.normal(0, 45, (groups * outputs, channels, *kernel)), -127, 127).astype(np.int8)
    weight[rng.random(weight.shape) > density] = 0
    k = channels * kernel[0] * kernel[1]
    order = [rng.permutation(threads * -(-k // threads)) for _ in range(groups)] if reordered else None
    conv = PackedConv(
        weight, config, stride=stride, padding=padding, dilation=dilation, groups=groups, signed=signed,
        order=order, path=path,
    )  # fmt: skip
    x = images(rng, (batch, groups * channels, *size), signed, layout)
    scale_a, scale_w = np.float32(1.1), rng.random(groups * outputs, np.float32)
    bias = rng.normal(size=groups * outputs).astype(np.float32)
    y, counters = by_im2col(conv, weight, x, scale_a, scale_w, bias, order)
    affine = None
    if is_affine:
        gain, shift = affine = rng.normal(size=(2, groups * outputs)).astype(np.float32)
        exact = y.astype(np.longdouble) * gain[:, None, None] + shift[:, None, None]
        y = exact.astype(np.float32)
    if relu:
        y = np.maximum(y, 0)
    out = images(rng, y.shape, False, layout) if rng.random() < 0.5 else None
    result = conv.forward(
        x, scale_a, scale_w, bias, out=out, affine=affine, relu=relu, cpu_threads=cpu_threads
    )  # fmt: skip
    assert out is None or result.y is out
    np.testing.assert_array_equal(result.y, y)
    if y.size:
        assert result.counters == counters


@pytest.mark.parametrize("path", PATHS)
def test_result_does_not_depend_on_threads_or_batching(path, rng):
    weight = rng.integers(-127, 128, (20, 16, 3, 3)).astype(np.int8)
    conv = PackedConv(weight, ArrayConfig(threads=4), padding=((1, 1), (1, 1)), path=path)
    x = images(rng, (5, 16, 30, 30), False)
    scale_w = np.ones(20, np.float32)
    whole = conv.forward(x, 1.0, scale_w)
    for cpu_threads in (2, 3, 8):
        again = conv.forward(x, 1.0, scale_w, cpu_threads=cpu_threads)
        np.testing.assert_array_equal(again.y, whole.y)
        assert again.counters == whole.counters
    single = [conv.forward(x[i : i + 1], 1.0, scale_w, cpu_threads=2) for i in range(5)]
    np.testing.assert_array_equal(np.concatenate([one.y for one in single]), whole.y)
    assert sum((one.counters for one in single), Counters(())) == whole.counters


@pytest.mark.parametrize("path", [path for path in PATHS if path != "scalar"])
@pytest.mark.parametrize("policy", [Policy.SA, Policy.SAW, Policy.S])
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (7, 2, 3), (9, 1, 4)])
def test_images_of_several_jobs(path, policy, threads, kernel, stride, padding, rng):
    weight = np.clip(rng.normal(0, 30, (9, 4, kernel, kernel)), -127, 127).astype(np.int8)
    x = images(rng, (2, 4, 37, 70), False, "nhwc")
    pad, ones = ((padding, padding),) * 2, np.ones(9, np.float32)
    config = ArrayConfig(threads=threads, policy=policy)
    results = [
        PackedConv(weight, config, stride=(stride, stride), padding=pad, path=one).forward(
            x, 1.0, ones, cpu_threads=2
        )
        for one in (path, "scalar")
    ]
    np.testing.assert_array_equal(results[0].y, results[1].y)
    assert results[0].counters == results[1].counters


@pytest.mark.parametrize("path", [path for path in PATHS if path != "scalar"])
@pytest.mark.parametrize("policy", [Policy.SA, Policy.SAW, Policy.S])
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("zeros", [0.0, 0.02, 0.4, 0.95])
def test_any_remainder_of_positions_and_channels(path, policy, threads, zeros, rng):
    """Rows that vectors do not divide, more steps than a strip has, weights that reduce to +128."""
    config = ArrayConfig(threads=threads, policy=policy)
    a = np.maximum(rng.normal(0, 90, (150, 2100)), 0).clip(0, 255).astype(np.uint8)
    b = np.clip(np.rint(rng.normal(0, 60, (2100, 11))), -128, 127).astype(np.int8)
    b[rng.random(b.shape) < zeros] = 0
    want, _ = fast.simulate(a, b, config, path="scalar")
    gemm = PackedGemm(b, config, path=path)
    for rows in (1, 2, 3, 4, 5, 8, 16, 17, 18, 20, 21, 33, 36, 49, 127, 128, 129, 132, 150):
        np.testing.assert_array_equal(gemm.run(a[:rows])[0], want[:rows])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_nonfinite_and_negative_inputs_are_reported(path, layout):
    conv = PackedConv(np.ones((3, 4, 3, 3), np.int8), ArrayConfig(), padding=((1, 1), (1, 1)), path=path)
    ones = np.ones(3, np.float32)
    for value, expected in ((np.nan, True), (np.inf, True), (-np.inf, True), (1.0, False), (3e38, False)):
        x = images(np.random.default_rng(0), (2, 4, 9, 33), False, layout)
        x[1, 3, 8, 32] = value
        assert conv.forward(x, 1.0, ones).saw_nonfinite is expected
    x[0, 0, 0, 0] = -0.0
    assert not conv.forward(x, 1.0, ones).saw_negative
    x[1, 2, 8, 31] = -1e-9
    negative = conv.forward(x, 1.0, ones)
    assert negative.saw_negative
    assert not negative.saw_nonfinite
    np.testing.assert_array_equal(negative.y, conv.forward(np.maximum(x, 0), 1.0, ones).y)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "scalar"])
@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.sampled_from([(1, 1), (2, 2), (3, 3), (1, 3)]),
    stride=st.sampled_from([(1, 1), (2, 2), (3, 2), (4, 4)]),
    padding=st.sampled_from([((0, 0), (0, 0)), ((1, 1), (1, 1)), ((0, 3), (2, 0))]),
    dilation=st.sampled_from([(1, 1), (2, 3)]),
    channels=st.sampled_from([3, 4]),
    layout=st.sampled_from(["nchw", "nhwc"]),
    values=st.lists(st.sampled_from([np.nan, -1.0, -np.inf, np.inf]), min_size=1, max_size=2),
    seed=st.integers(0, 2**32 - 1),
)
def test_only_pixels_that_are_read_are_reported(
    path, size, kernel, stride, padding, dilation, channels, layout, values, seed
):
    rng = np.random.default_rng(seed)
    x = images(rng, (2, 2 * channels, *size), False, layout)
    for value in values:
        x[tuple(rng.integers(0, x.shape))] = value
    seen = []
    for one in (path, "scalar"):
        conv = PackedConv(
            np.ones((2, channels, *kernel), np.int8), ArrayConfig(threads=4), groups=2, path=one,
            stride=stride, padding=padding, dilation=dilation,
        )  # fmt: skip
        result = conv.forward(x, 1.0, np.ones(2, np.float32))
        seen.append((result.saw_nonfinite, result.saw_negative))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("path", PATHS)
def test_empty_shapes(path):
    ones = np.ones(2, np.float32)
    conv = PackedConv(np.ones((2, 3, 3, 3), np.int8), ArrayConfig(), path=path)
    assert conv.forward(np.zeros((0, 3, 5, 5), np.float32), 1.0, ones).y.shape == (0, 2, 3, 3)
    assert conv.forward(np.zeros((1, 3, 2, 5), np.float32), 1.0, ones).y.shape == (1, 2, 0, 3)
    hollow = PackedConv(np.ones((2, 0, 1, 1), np.int8), ArrayConfig(), path=path)
    result = hollow.forward(np.zeros((1, 0, 2, 2), np.float32), 1.0, ones, bias=ones)
    np.testing.assert_array_equal(result.y, np.ones((1, 2, 2, 2), np.float32))
    assert result.counters == Counters((0, 0, 0))


def test_not_counting_changes_no_value(rng):
    conv = PackedConv(rng.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8), ArrayConfig())
    x = images(rng, (2, 8, 12, 12), False)
    counted, plain = (conv.forward(x, 1.0, np.ones(8, np.float32), count=count) for count in (True, False))
    assert plain.counters is None
    np.testing.assert_array_equal(counted.y, plain.y)


@pytest.mark.parametrize("size", [1, 7, 8, 31, 32, 33, 4095, 8192, 8193, 70_001])
def test_fingerprints_see_every_change(size, rng):
    values = rng.normal(size=size).astype(np.float32)
    known = fingerprint(values)
    assert all(fingerprint(values, cpu_threads) == known for cpu_threads in (2, 3, 9))
    assert fingerprint(values.copy()) == known
    bits = values.view(np.uint32)
    for at in {0, size // 3, size - 1}:
        for bit in (0, 13, 31):
            bits[at] ^= 1 << bit
            assert fingerprint(values) != known
            bits[at] ^= 1 << bit
    for shift in {1, size // 2, 16} & set(range(1, size)):
        assert fingerprint(np.roll(values, shift)) != known
    assert fingerprint(np.append(values, np.float32(0))) != known
    assert fingerprint(np.zeros(size, np.float32)) != fingerprint(np.zeros(size + 1, np.float32))


def test_forced_and_unknown_paths(monkeypatch):
    monkeypatch.delenv("SYSMT_PATH", raising=False)
    assert active_path() == PATHS[0]
    for path in PATHS:
        monkeypatch.setenv("SYSMT_PATH", path)
        assert active_path() == path
        assert PackedConv(np.ones((1, 1, 1, 1), np.int8), ArrayConfig()).path == path
    monkeypatch.setenv("SYSMT_PATH", "scalr")
    with pytest.raises(PathError, match=r"SYSMT_PATH='scalr'.*did you mean 'scalar'.*available: .*scalar"):
        active_path()
    with pytest.raises(PathError, match="path='neon'"):
        PackedConv(np.ones((1, 1, 1, 1), np.int8), ArrayConfig(), path="neon")


def test_rejects_wrong_arguments():
    conv = PackedConv(np.ones((2, 3, 1, 1), np.int8), ArrayConfig())
    x, ones = np.zeros((1, 3, 4, 4), np.float32), np.ones(2, np.float32)
    with pytest.raises(OperandError, match="dtype float64"):
        conv.forward(x.astype(np.float64), 1.0, ones)
    with pytest.raises(OperandError, match=r"\(B, 3, H, W\)"):
        conv.forward(x[:, :2], 1.0, ones)
    with pytest.raises(OperandError, match="scale_w"):
        conv.forward(x, 1.0, ones[:1])
    with pytest.raises(OperandError, match="writeable"):
        conv.forward(x, 1.0, ones, out=np.zeros((1, 2, 4, 5), np.float32))
    for scale in (0.0, -1.0, float("nan"), float("inf"), 1e-45, 2.0**-127, 1e39):
        with pytest.raises(OperandError, match="scale_a"):
            conv.forward(x, scale, ones)
    with pytest.raises(OperandError, match="groups=3"):
        PackedConv(np.ones((2, 3, 1, 1), np.int8), ArrayConfig(), groups=3)
    with pytest.raises(OperandError, match="one per group"):
        PackedConv(np.ones((2, 3, 1, 1), np.int8), ArrayConfig(), groups=2, order=[np.arange(3)])
    with pytest.raises(OperandError, match="stride"):
        PackedConv(np.ones((2, 3, 1, 1), np.int8), ArrayConfig(), stride=(0, 1))

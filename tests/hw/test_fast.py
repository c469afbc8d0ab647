"""The fast engine on every path against the reference engine: values and counters, tolerance 0."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sysmt.config import ArrayConfig, Policy, Rounding
from sysmt.errors import OperandError
from sysmt.hw import fast, reference
from sysmt.hw.kernels import PackedGemm, available_paths
from sysmt.hw.operands import apply_order

PATHS = available_paths()
EXTREMES = {
    "any": (0, 256),
    "full": (255, 256),
    "overflowing": (248, 256),
    "narrow": (0, 16),
    "sparse": (0, 256),
}

configs = st.builds(
    ArrayConfig,
    threads=st.sampled_from([1, 2, 4]),
    policy=st.sampled_from(list(Policy)),
    saturate=st.booleans(),
    rounding=st.sampled_from(list(Rounding)),
)


def operands(rng, m, k, n, kind, signed):
    """Draw operands of one kind; int8 activations reuse the same bit patterns."""
    a = rng.integers(*EXTREMES[kind], (m, k)).astype(np.uint8)
    b = rng.integers(120 if kind == "overflowing" else -128, 128, (k, n)).astype(np.int8)
    if kind == "full":
        b = np.where(rng.random((k, n)) < 0.5, 127, -128).astype(np.int8)
    if kind in ("sparse", "overflowing"):
        a[rng.random(a.shape) < 0.5] = 0
        b[rng.random(b.shape) < rng.choice([0.02, 0.4, 0.9])] = 0
    if signed:
        a = np.clip(a, 0, 255).astype(np.uint8).view(np.int8)
        if kind == "overflowing":
            a[a < 0] = 127
    return a, b


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=150, deadline=None)
@given(
    config=configs,
    m=st.sampled_from([0, 1, 3, 15, 16, 17]),
    k=st.sampled_from([0, 1, 2, 3, 4, 7, 8, 15, 16, 17]),
    n=st.sampled_from([0, 1, 2, 7, 8, 9]),
    kind=st.sampled_from(sorted(EXTREMES)),
    signed=st.booleans(),
    order=st.sampled_from(["none", "k", "padded"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_reference(path, config, m, k, n, kind, signed, order, seed):
    rng = np.random.default_rng(seed)
    a, b = operands(rng, m, k, n, kind, signed)
    padded = config.threads * -(-k // config.threads)
    permutation = {"none": None, "k": rng.permutation(k), "padded": rng.permutation(padded)}[order]
    expected, counters = reference.simulate(*apply_order(a, b, permutation, config.threads), config)
    out, counted = fast.simulate(a, b, config, permutation, path=path)
    assert out.dtype == np.int32
    np.testing.assert_array_equal(out, expected)
    if k:  # the reference has no slots to count where K is 0, nor have we
        assert counted == counters


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [(63, 65, 64), (64, 63, 65), (65, 130, 17), (200, 31, 33)])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_larger_shapes_equal_the_scalar_path(path, signed, m, k, n, threads, rng):
    for policy in Policy:
        config = ArrayConfig(threads=threads, policy=policy)
        a, b = operands(rng, m, k, n, rng.choice(sorted(EXTREMES)), signed)
        expected, counters = fast.simulate(a, b, config, path="scalar")
        out, counted = fast.simulate(a, b, config, path=path, cpu_threads=2)
        np.testing.assert_array_equal(out, expected)
        assert counted == counters


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.mark.parametrize("path", PATHS)
def test_one_thread_is_the_integer_product(path, rng):
    a, b = operands(rng, 70, 300, 40, "any", False)
    out, counters = fast.simulate(a, b, ArrayConfig(threads=1), path=path)
    np.testing.assert_array_equal(out, a.astype(np.int32) @ b.astype(np.int32))
    assert counters.slots == 70 * 300 * 40
    assert counters.reduced_activations == counters.reduced_weights == 0


@pytest.mark.parametrize("path", PATHS)
def test_strided_and_transposed_operands(path, rng):
    a, b = operands(rng, 70, 36, 40, "any", False)
    config = ArrayConfig(threads=4)
    expected, counters = fast.simulate(a, b, config, path="scalar")
    views = [
        (np.asfortranarray(a), np.asfortranarray(b)),
        (np.repeat(a, 2, 1)[:, ::2], np.repeat(b, 3, 0)[::3]),
        (a[::-1][::-1], np.flip(np.flip(b).copy())),
    ]
    for a_view, b_view in views:
        out, counted = fast.simulate(a_view, b_view, config, path=path)
        np.testing.assert_array_equal(out, expected)
        assert counted == counters


@pytest.mark.parametrize("path", PATHS)
def test_largest_sums_fit(path):
    k = 65_535
    a, b = np.full((3, k), 255, np.uint8), np.full((k, 2), -128, np.int8)
    for threads in (1, 4):
        expected, counters = fast.simulate(a, b, ArrayConfig(threads=threads), path="scalar")
        out, counted = fast.simulate(a, b, ArrayConfig(threads=threads), path=path)
        np.testing.assert_array_equal(out, expected)
        assert counted == counters


def test_rejects_wrong_operands(rng):
    a, b = operands(rng, 3, 4, 5, "any", False)
    with pytest.raises(OperandError, match=r"\(M, 4\) of uint8"):
        PackedGemm(b, ArrayConfig()).run(a.view(np.int8))
    with pytest.raises(OperandError, match="int8 weights"):
        PackedGemm(b.view(np.uint8), ArrayConfig())
    with pytest.raises(OperandError, match="permutation"):
        fast.simulate(a, b, ArrayConfig(), np.array([0, 0, 1, 2]))
    with pytest.raises(OperandError, match="K=65536"):
        PackedGemm(np.zeros((65_536, 1), np.int8), ArrayConfig())

"""The public entry: three engines, one answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sysmt
from sysmt.hw.reorder import order_from_wide_counts

sizes = st.sampled_from([0, 1, 2, 3, 5, 15, 16, 17])


def operands(m, n, k, seed, signed=False, zeros=0.3):
    rng = np.random.default_rng(seed)
    low, high, dtype = (-128, 128, np.int8) if signed else (0, 256, np.uint8)
    a = rng.integers(low, high, (m, k)).astype(dtype)
    b = rng.integers(-128, 128, (k, n)).astype(np.int8)
    narrow = rng.random((m, k)) < 0.3
    a[narrow] = (a[narrow] % 8).astype(dtype)
    a[rng.random((m, k)) < zeros] = 0
    b[rng.random((k, n)) < zeros] = 0
    return a, b


@settings(deadline=None, max_examples=150)
@given(
    m=sizes,
    n=sizes,
    k=sizes,
    threads=st.sampled_from([1, 2, 4]),
    policy=st.sampled_from(list(sysmt.Policy)),
    drain=st.sampled_from(list(sysmt.Drain)),
    rounding=st.sampled_from(list(sysmt.Rounding)),
    saturate=st.booleans(),
    signed=st.booleans(),
    ordered=st.sampled_from(["none", "k", "padded"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_engines_agree(m, n, k, threads, policy, drain, rounding, saturate, signed, ordered, seed):
    a, b = operands(m, n, k, seed, signed)
    config = sysmt.ArrayConfig(3, 5, threads, policy, drain, saturate, rounding)
    rng = np.random.default_rng(seed)
    length = {"none": None, "k": k, "padded": threads * -(-k // threads)}[ordered]
    order = None if length is None else rng.permutation(length)
    results = [
        sysmt.simulate_gemm(a, b, config, engine=engine, order=order)
        for engine in ("reference", "fast", "cycle")
    ]
    for result in results[1:]:
        assert result.out_mn.dtype == np.int32
        assert np.array_equal(result.out_mn, results[0].out_mn)
        assert result.stats == results[0].stats
    if results[2].activity is not None:
        assert results[2].activity.cycles == results[0].stats.cycles
    assert sum(results[0].stats.active) == m * n * -(-k // threads)


@pytest.mark.parametrize("policy", list(sysmt.Policy))
def test_one_thread_is_exact(policy):
    a, b = operands(33, 18, 70, seed=1)
    result = sysmt.simulate_gemm(a, b, sysmt.ArrayConfig(threads=1, policy=policy))
    assert np.array_equal(result.out_mn, a.astype(np.int64) @ b.astype(np.int64))
    assert result.stats.reduced_activations == result.stats.reduced_weights == 0
    assert result.stats.collision_rate == 0.0


@pytest.mark.parametrize("layout", ["transposed", "strided", "reversed", "read-only", "fortran"])
def test_any_strides(layout):
    a, b = operands(20, 12, 40, seed=3)
    expected = sysmt.simulate_gemm(a, b, engine="reference")
    if layout == "transposed":
        a, b = np.ascontiguousarray(a.T).T, np.ascontiguousarray(b.T).T
    elif layout == "strided":
        a = np.repeat(np.repeat(a, 2, 0), 3, 1)[::2, ::3]
        b = np.repeat(b, 2, 1)[:, ::2]
    elif layout == "reversed":
        a, b = a[::-1, ::-1].copy()[::-1, ::-1], b[::-1].copy()[::-1]
    elif layout == "fortran":
        a, b = np.asfortranarray(a), np.asfortranarray(b)
    else:
        a.setflags(write=False)
        b.setflags(write=False)
    for engine in ("fast", "cycle"):
        result = sysmt.simulate_gemm(a, b, engine=engine)
        assert np.array_equal(result.out_mn, expected.out_mn)
        assert result.stats == expected.stats


def test_worst_case_sum_does_not_overflow():
    k = 65_535
    a = np.full((1, k), 255, np.uint8)
    b = np.full((k, 1), -128, np.int8)
    for threads, value in ((1, 255 * -128 * k), (4, 256 * -128 * (k // 4 * 4) + 3 * 256 * -128)):
        result = sysmt.simulate_gemm(a, b, sysmt.ArrayConfig(threads=threads))
        assert result.out_mn.item() == value


@pytest.mark.parametrize("engine", ["fast", "cycle", "reference"])
@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0)])
def test_empty(engine, shape):
    m, n, k = shape
    result = sysmt.simulate_gemm(np.zeros((m, k), np.uint8), np.zeros((k, n), np.int8), engine=engine)
    assert result.out_mn.shape == (m, n)
    assert not result.out_mn.any()
    assert result.stats.active == (0, 0, 0)
    assert result.stats.cycles == result.stats.macs == 0
    assert result.stats.collision_rate == result.stats.utilization == 0.0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((2, 3), np.int32), np.zeros((3, 2), np.int8), "int32"),
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.int8), "float32"),
        (np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), "uint8"),
        (np.zeros((2, 3), np.uint8), np.zeros((4, 2), np.int8), "3 against 4"),
        (np.zeros((2, 3, 1), np.uint8), np.zeros((3, 2), np.int8), r"\(2, 3, 1\)"),
        (np.zeros(3, np.uint8), np.zeros((3, 2), np.int8), "matrices"),
        (np.zeros((0, 65_536), np.uint8), np.zeros((65_536, 0), np.int8), "65535"),
        ([[1, 2]], np.zeros((2, 2), np.int8), "int64"),
    ],
)
def test_bad_operands(a, b, message):
    with pytest.raises(sysmt.OperandError, match=message):
        sysmt.simulate_gemm(a, b)


@pytest.mark.parametrize(
    "order", [[0, 1], [0, 1, 1], [1, 2, 3], [[0, 1, 2]], [0.0, 1.0, 2.0], [0, 1, 2, 3, 4], [-1, 0, 1]]
)
@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_bad_order(order, engine):
    with pytest.raises(sysmt.OperandError, match="order"):
        sysmt.simulate_gemm(np.ones((1, 3), np.uint8), np.ones((3, 1), np.int8), engine=engine, order=order)


def test_bad_engine_and_config():
    a, b = operands(2, 2, 2, seed=0)
    with pytest.raises(sysmt.ConfigError, match=r"did you mean 'fast'"):
        sysmt.simulate_gemm(a, b, engine="fst")
    with pytest.raises(sysmt.ConfigError, match="ArrayConfig"):
        sysmt.simulate_gemm(a, b, {"threads": 2})
    with pytest.raises(sysmt.ConfigError, match="cpu_threads"):
        sysmt.simulate_gemm(a, b, cpu_threads=0)


@pytest.mark.slow
def test_more_than_two_gib_of_operands():
    m, k, n = 33_000, 65_535, 2
    rng = np.random.default_rng(0)
    a = np.zeros((m, k), np.uint8)
    rows = [0, 1, m // 2, m - 1]
    a[rows] = rng.integers(0, 256, (len(rows), k))
    assert a.nbytes > 2**31
    b = rng.integers(-128, 128, (k, n)).astype(np.int8)
    config = sysmt.ArrayConfig(threads=4)
    whole = sysmt.simulate_gemm(a, b, config, cpu_threads=2)
    few = sysmt.simulate_gemm(a[rows], b, config)
    assert np.array_equal(whole.out_mn[rows], few.out_mn)
    assert not np.delete(whole.out_mn, rows, axis=0).any()
    idle = (m - len(rows)) * n * -(-k // 4)
    assert whole.stats.active == (few.stats.active[0] + idle, *few.stats.active[1:])


# -- reordering --------------------------------------------------------------------------------


def test_order_pairs_often_wide_with_rarely_wide():
    counts = [5, 0, 7, 3, 1, 9, 2, 8]  # ranks: 1 4 6 3 0 2 7 5
    assert order_from_wide_counts(counts, 1).tolist() == [1, 4, 6, 3, 0, 2, 7, 5]
    assert order_from_wide_counts(counts, 2).tolist() == [1, 4, 6, 3, 5, 7, 2, 0]
    assert order_from_wide_counts(counts, 4).tolist() == [1, 4, 3, 6, 0, 2, 5, 7]


def test_order_pads_with_positions_that_are_never_wide():
    # K = 5, T = 4: three padding positions (5, 6, 7) of count 0 rank after position 1 (stable)
    assert order_from_wide_counts([5, 0, 7, 3, 1], 4).tolist() == [1, 5, 7, 6, 4, 3, 2, 0]


@given(st.lists(st.integers(0, 5), max_size=30), st.sampled_from([1, 2, 4]))
def test_order_is_a_permutation_that_simulate_gemm_takes(counts, threads):
    order = order_from_wide_counts(counts, threads)
    assert sorted(order) == list(range(threads * -(-len(counts) // threads)))

"""The reference engine and the operands it is fed: exactness, conservation, reordering, checks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sysmt.config import ArrayConfig, Policy
from sysmt.errors import OperandError
from sysmt.hw import reference
from sysmt.hw.operands import MAX_K, apply_order, check_operands, check_order, split_threads
from sysmt.hw.timing import slot_count

dimension = st.integers(0, 6)


def random_operands(m, k, n, seed, signed=False, density=0.7):
    """Draw operands of all sizes, `density` of them non-zero at most."""
    rng = np.random.default_rng(seed)
    low, high, kind = (-128, 128, np.int8) if signed else (0, 256, np.uint8)
    a = rng.integers(low, high, (m, k)) * (rng.random((m, k)) < density)
    b = rng.integers(-128, 128, (k, n)) * (rng.random((k, n)) < density)
    return a.astype(kind), b.astype(np.int8)


@settings(max_examples=60, deadline=None)
@given(dimension, st.integers(0, 17), dimension, st.integers(0, 999), st.booleans(), st.sampled_from(Policy))
def test_one_thread_equals_the_integer_product(m, k, n, seed, signed, policy):
    a, b = random_operands(m, k, n, seed, signed)
    out_mn, counters = reference.simulate(a, b, ArrayConfig(threads=1, policy=policy))
    assert out_mn.dtype == np.int32
    np.testing.assert_array_equal(out_mn, a.astype(np.int64) @ b.astype(np.int64))
    busy = int(((a != 0).astype(np.int64) @ (b != 0)).sum())
    assert counters.active == (m * n * k - busy, busy)
    assert (counters.reduced_activations, counters.reduced_weights, counters.collisions) == (0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(
    dimension,
    st.integers(0, 17),
    dimension,
    st.integers(0, 999),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(Policy),
    st.booleans(),
)
def test_counters_conserve_slots(m, k, n, seed, threads, policy, signed):
    a, b = random_operands(m, k, n, seed, signed)
    _, counters = reference.simulate(a, b, ArrayConfig(threads=threads, policy=policy))
    assert len(counters.active) == threads + 1
    assert counters.slots == m * n * slot_count(k, threads)
    pairs = int(((a != 0).astype(np.int64) @ (b != 0)).sum())
    assert sum(c * slots for c, slots in enumerate(counters.active)) == pairs
    assert max(counters.reduced_activations, counters.reduced_weights) <= pairs


def test_slots_group_the_threads_of_contiguous_chunks():
    # K = 5 at T = 2 is padded to 6: thread 0 has k = 0, 1, 2, thread 1 has 3, 4 and a padding zero.
    a = np.array([[10, 20, 30, 40, 50]], np.uint8)
    b = np.array([[1], [2], [3], [4], [5]], np.int8)
    a_mtl, b_tln = split_threads(a, b, 2)
    assert a_mtl.tolist() == [[[10, 20, 30], [40, 50, 0]]]
    assert b_tln[:, :, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
    # 16 and above is wide: slot 0 has 10*1 + 40->32 * 4, slot 1 20->16 * 2 + 50->48 * 5, slot 2 30*3 alone.
    out_mn, counters = reference.simulate(a, b, ArrayConfig(threads=2, policy="S+A"))
    assert out_mn.item() == 10 + 128 + 32 + 240 + 90
    assert counters.active == (0, 1, 2)
    assert counters.reduced_activations == 3


# ------------------------------------------------------------------ reordering


def test_order_of_k_is_padded_at_its_end():
    a, b = np.array([[10, 20, 30]], np.uint8), np.array([[1], [2], [3]], np.int8)
    a_mtl, b_tln = split_threads(*apply_order(a, b, [2, 0, 1], threads=2), threads=2)
    assert a_mtl.tolist() == [[[30, 10], [20, 0]]]
    assert b_tln[:, :, 0].tolist() == [[3, 1], [2, 0]]


def test_order_of_the_padded_length_places_the_zeros():
    a, b = np.array([[10, 20, 30]], np.uint8), np.array([[1], [2], [3]], np.int8)
    a_mtl, b_tln = split_threads(*apply_order(a, b, [0, 3, 2, 1], threads=2), threads=2)
    assert a_mtl.tolist() == [[[10, 0], [30, 20]]]
    assert b_tln[:, :, 0].tolist() == [[1, 0], [3, 2]]


def test_no_order_changes_nothing():
    a, b = random_operands(2, 5, 3, seed=1)
    same_a, same_b = apply_order(a, b, None, threads=4)
    assert same_a is a
    assert same_b is b


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 11), st.sampled_from([1, 2, 4]))
def test_one_thread_does_not_notice_an_order(data, k, threads):
    a, b = random_operands(3, k, 2, seed=k)
    length = data.draw(st.sampled_from([k, threads * slot_count(k, threads)]))
    order = data.draw(st.permutations(range(length)))
    out_mn, _ = reference.simulate(*apply_order(a, b, order, threads), ArrayConfig(threads=1))
    np.testing.assert_array_equal(out_mn, a.astype(np.int64) @ b.astype(np.int64))


def test_orders_that_pair_other_operands_change_the_result():
    a, b = np.array([[100, 37, 0, 0]], np.uint8), np.array([[50], [20], [1], [1]], np.int8)
    config = ArrayConfig(threads=2, policy="S+A")
    # Chunks (100, 37) and (0, 0): no collision. Chunks (100, 0) and (37, 0): 96*50 + 32*20.
    assert reference.simulate(a, b, config)[0].item() == 5740
    assert reference.simulate(*apply_order(a, b, [0, 2, 1, 3], 2), config)[0].item() == 5440


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 2, 3], r"order has 4 elements; it must be a permutation of 0\.\.4 or of 0\.\.5"),
        ([0, 1, 2, 3, 4, 5, 6], r"order has 7 elements"),
        ([0, 1, 2, 3, 3], r"order is no permutation of 0\.\.4"),
        ([0, 1, 2, 3, 5], r"order is no permutation of 0\.\.4"),
        ([-1, 0, 1, 2, 3], r"order is no permutation of 0\.\.4"),
        ([0, 1, 2, 3, 4, 4], r"order is no permutation of 0\.\.5"),
        ([0.0, 1.0, 2.0, 3.0, 4.0], r"dtype float64; one axis of integers"),
        ([[0, 1, 2, 3, 4]], r"shape \(1, 5\)"),
        ([False, True, False, True, True], r"dtype bool"),
    ],
)
def test_bad_orders_raise(order, message):
    with pytest.raises(OperandError, match=message):
        check_order(order, k=5, threads=2)


def test_empty_order_of_nothing_is_fine():
    assert check_order([], k=0, threads=4).size == 0


# ------------------------------------------------------------------ checks


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            np.zeros(3, np.uint8),
            np.zeros((3, 2), np.int8),
            r"shape \(3,\) and b_kn \(3, 2\); both must be matr",
        ),
        (np.zeros((1, 2, 3), np.uint8), np.zeros((3, 2), np.int8), r"both must be matrices"),
        (
            np.zeros((2, 3), np.int16),
            np.zeros((3, 2), np.int8),
            r"a_mk has dtype int16; activations must be uint8",
        ),
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.int8), r"a_mk has dtype float32"),
        (
            np.zeros((2, 3), np.uint8),
            np.zeros((3, 2), np.uint8),
            r"b_kn has dtype uint8; weights must be int8",
        ),
        (np.zeros((2, 3), np.uint8), np.zeros((4, 2), np.int8), r"K differs, 3 against 4"),
        (
            np.zeros((0, MAX_K + 1), np.uint8),
            np.zeros((MAX_K + 1, 0), np.int8),
            r"K=65536 could overflow .* at most 65535",
        ),
    ],
)
def test_operands_that_do_not_fit_raise(a, b, message):
    with pytest.raises(OperandError, match=message):
        check_operands(a, b)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_operands_that_fit_pass_uncopied(kind):
    a, b = np.zeros((0, MAX_K), kind), np.zeros((MAX_K, 2), np.int8)
    same_a, same_b = check_operands(a, b)
    assert same_a is a
    assert same_b is b

"""The cycle engine against the reference, the closed forms of time, and what the skew predicts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sysmt.config import ArrayConfig, Drain, Policy, Rounding
from sysmt.hw import cycle, reference
from sysmt.hw.operands import MAX_K, apply_order, split_threads
from sysmt.hw.pe import work_slot
from sysmt.hw.timing import gemm_cycles, slot_count

configs = st.builds(
    ArrayConfig,
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    threads=st.sampled_from([1, 2, 4]),
    policy=st.sampled_from(Policy),
    drain=st.sampled_from(Drain),
    saturate=st.booleans(),
    rounding=st.sampled_from(Rounding),
)


@st.composite
def operands(draw):
    """Operands of any shape, zeros and layout: C, Fortran, every other element, backwards."""
    m, k, n = draw(st.integers(0, 13)), draw(st.integers(0, 11)), draw(st.integers(0, 13))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    density = draw(st.sampled_from([0.0, 0.4, 0.8, 1.0]))
    low, high, kind = draw(st.sampled_from([(0, 256, np.uint8), (-128, 128, np.int8), (0, 24, np.uint8)]))
    a = (rng.integers(low, high, (m, k)) * (rng.random((m, k)) < density)).astype(kind)
    b = (rng.integers(-128, 128, (k, n)) * (rng.random((k, n)) < density)).astype(np.int8)

    def laid_out(matrix):
        layout = draw(st.sampled_from(["C", "F", "strided", "backwards"]))
        if layout == "F":
            return np.asfortranarray(matrix)
        if layout == "strided":
            return np.repeat(np.repeat(matrix, 2, axis=0), 3, axis=1)[::2, ::3]
        return matrix[::-1, ::-1].copy()[::-1, ::-1] if layout == "backwards" else matrix

    return laid_out(a), laid_out(b)


def active_slots(a, b, threads):
    """Active threads of every slot (M, N, L), counted without an engine."""
    a_mtl, b_tln = split_threads(a, b, threads)
    return np.einsum("mtl,tln->mnl", (a_mtl != 0).astype(int), (b_tln != 0).astype(int))


def assert_equals_reference(a, b, config):
    out_mn, counters, activity = cycle.simulate(a, b, config)
    expected_mn, expected = reference.simulate(a, b, config)
    assert out_mn.dtype == np.int32
    np.testing.assert_array_equal(out_mn, expected_mn)
    assert counters == expected
    assert activity.cycles == gemm_cycles(a.shape[0], b.shape[1], a.shape[1], config)
    return out_mn, counters, activity


@settings(max_examples=300, deadline=None)
@given(operands(), configs)
def test_equals_the_reference_and_the_closed_form(pair, config):
    assert_equals_reference(*pair, config)


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(
    ("rounding", "saturate"), [("nearest-even", False), ("nearest-even", True), ("truncate", True)]
)
def test_every_policy_on_values_of_every_size(policy, threads, kind, rounding, saturate):
    rng = np.random.default_rng(5)
    a = (rng.integers(0, 256, (9, 23)) * (rng.random((9, 23)) < 0.7)).astype(np.uint8).view(kind)
    b = (rng.integers(-128, 128, (23, 7)) * (rng.random((23, 7)) < 0.7)).astype(np.int8)
    assert_equals_reference(a, b, ArrayConfig(4, 3, threads, policy, saturate=saturate, rounding=rounding))


@pytest.mark.slow
@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("partners", [[(37, 20)], [(9, 0), (37, 20), (0, 3)], [(9, 20), (37, -5), (0, 3)]])
def test_all_operand_pairs_in_each_case(policy, partners):
    # Thread 0 runs through all 256 x 256 pairs, against partners that make it c = 2, 2 and 3.
    a = np.column_stack([np.arange(256), *(np.full(256, x) for x, _ in partners)]).astype(np.uint8)
    b = np.vstack([np.arange(-128, 128), *(np.full(256, y) for _, y in partners)]).astype(np.int8)
    assert_equals_reference(a, b, ArrayConfig(threads=a.shape[1], policy=policy))


# ------------------------------------------------------------------ movement and time


def test_two_by_two_array_by_hand():
    # PE (0, 0) works in cycles 0..2, (0, 1) and (1, 0) in 1..3, (1, 1) in 2..4; then 2 rows shift out.
    a = np.array([[1, 0, 2], [3, 4, 0]], np.uint8)
    b = np.array([[1, 5], [-1, 6], [2, 7]], np.int8)
    out_mn, _, activity = cycle.simulate(a, b, ArrayConfig(2, 2, threads=1))
    assert out_mn.tolist() == [[1 + 4, 5 + 14], [3 - 4, 15 + 24]]
    assert activity.cycles == 7
    assert activity.busy_pes.tolist() == [1, 3, 4, 3, 1, 0, 0]
    # a[0, 1] = 0 idles row 0 on its slot 1: cycles 1 and 2; a[1, 2] = 0 row 1 on its slot 2: cycles 3 and 4.
    assert activity.active_pes.tolist() == [1, 2, 3, 2, 0, 0, 0]
    assert activity.busy_rc.tolist() == [[3, 3], [3, 3]]
    assert activity.active_rc.tolist() == [[2, 2], [2, 2]]


@settings(max_examples=150, deadline=None)
@given(operands(), configs)
def test_activity_is_what_the_skew_predicts(pair, config):
    a, b = pair
    slots = active_slots(a, b, config.threads)
    m, n, length = slots.shape
    rows, cols = config.rows, config.cols
    busy_pes, active_pes = (np.zeros(gemm_cycles(m, n, a.shape[1], config), np.int64) for _ in range(2))
    busy_rc, active_rc, collisions_rc = (np.zeros((rows, cols), np.int64) for _ in range(3))
    tile_cycles = length + rows + cols - 2 + (rows if config.drain is Drain.SERIAL else 0)
    for m_index, n_index, slot in np.ndindex(slots.shape):
        i, j = m_index % rows, n_index % cols
        tile = m_index // rows * -(-n // cols) + n_index // cols
        at, active = tile * tile_cycles + i + j + slot, slots[m_index, n_index, slot]
        busy_pes[at] += 1
        active_pes[at] += active > 0
        busy_rc[i, j] += 1
        active_rc[i, j] += active > 0
        collisions_rc[i, j] += active > 1
    _, counters, activity = cycle.simulate(a, b, config)
    np.testing.assert_array_equal(activity.busy_pes, busy_pes)
    np.testing.assert_array_equal(activity.active_pes, active_pes)
    np.testing.assert_array_equal(activity.busy_rc, busy_rc)
    np.testing.assert_array_equal(activity.active_rc, active_rc)
    np.testing.assert_array_equal(activity.collisions_rc, collisions_rc)
    assert activity.cycles == busy_pes.size
    assert activity.busy_rc.sum() == m * n * length == counters.slots
    assert activity.collisions_rc.sum() == counters.collisions


@pytest.mark.parametrize("drain", Drain)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 5), (5, 1), (7, 2), (2, 7)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_tiles_shorter_than_their_drain(rows, cols, drain, k):
    # K = 1 on one column: a tile takes just the R cycles that the one before needs to shift out.
    rng = np.random.default_rng(rows)
    a, b = (
        rng.integers(0, 256, (3 * rows + 1, k), np.uint8),
        rng.integers(-128, 128, (k, 2 * cols + 1), np.int8),
    )
    assert_equals_reference(a, b, ArrayConfig(rows, cols, threads=1, drain=drain))


@pytest.mark.parametrize(
    ("drain", "cycles"), [("serial", 6 * 30), ("overlapped", 6 * 22 + 8), ("none", 6 * 22)]
)
def test_edge_tiles_occupy_the_whole_array(drain, cycles):
    # 9 x 17 outputs on 8 x 8 PEs: 2 x 3 tiles of L + R + C - 2 = 8 + 8 + 8 - 2 = 22 cycles.
    a, b = np.ones((9, 16), np.uint8), np.ones((16, 17), np.int8)
    out_mn, _, activity = cycle.simulate(a, b, ArrayConfig(8, 8, threads=2, drain=drain))
    assert (out_mn == 16).all()
    assert activity.cycles == cycles
    # Rows beyond the first see one full row of tiles; column 0 lies in 3 tiles, the others in 2.
    assert activity.busy_rc[0].tolist() == [2 * 3 * 8] + 7 * [2 * 2 * 8]
    assert activity.busy_rc[1:, 0].tolist() == 7 * [3 * 8]
    assert activity.busy_rc[1:, 1:].tolist() == 7 * [7 * [2 * 8]]


@pytest.mark.parametrize(("m", "k", "n"), [(0, 3, 2), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("drain", Drain)
@pytest.mark.parametrize("threads", [1, 4])
def test_nothing_to_do_takes_no_cycle(m, k, n, drain, threads):
    config = ArrayConfig(3, 2, threads, drain=drain)
    out_mn, counters, activity = cycle.simulate(np.ones((m, k), np.uint8), np.ones((k, n), np.int8), config)
    assert out_mn.shape == (m, n)
    assert not out_mn.any()
    assert counters.active == (0,) * (threads + 1)
    assert activity.cycles == activity.busy_pes.size == activity.active_pes.size == 0
    assert activity.busy_rc.shape == activity.active_rc.shape == activity.collisions_rc.shape == (3, 2)
    assert not activity.busy_rc.any()


# ------------------------------------------------------------------ extremes


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("weight", [127, -128])
def test_longest_k_of_largest_operands(threads, weight):
    # Accumulators and per-tile counts reach the ends of their 32 and 16 bits. Slots of all threads reduce
    # 255 to 256 and, at T = 4, 127 to 128; with K odd, the last slot of T = 2 has one active thread.
    a, b = np.full((2, MAX_K), 255, np.uint8), np.full((MAX_K, 1), weight, np.int8)
    config = ArrayConfig(1, 1, threads, policy="S+A")
    out_mn, counters, activity = cycle.simulate(a, b, config)
    reduced_weight = 128 if weight == 127 else -128
    expected = {
        1: MAX_K * 255 * weight,
        2: (MAX_K - 1) * 256 * weight + 255 * weight,
        4: MAX_K * 256 * reduced_weight,
    }[threads]
    assert out_mn.tolist() == [[expected], [expected]]
    length = slot_count(MAX_K, threads)
    assert counters.slots == 2 * length
    assert counters.active[threads] == 2 * (length - (threads > 1))
    assert counters.reduced_activations == 2 * {1: 0, 2: MAX_K - 1, 4: MAX_K}[threads]
    assert counters.reduced_weights == 2 * {1: 0, 2: 0, 4: MAX_K}[threads]
    assert activity.busy_rc.tolist() == [[2 * length]]


def test_more_pes_than_16_bits_can_count():
    rng = np.random.default_rng(0)
    a = rng.integers(1, 3, (263, 530), np.uint8)
    b = rng.integers(-1, 2, (530, 257), np.int8)
    out_mn, counters, activity = cycle.simulate(a, b, ArrayConfig(263, 257, threads=1))
    np.testing.assert_array_equal(out_mn, a.astype(np.int32) @ b)
    pairs = 263 * int((b != 0).sum())
    assert counters.active == (263 * 530 * 257 - pairs, pairs)
    assert activity.busy_pes.max() == 263 * 257 > 2**16  # K > 263 + 257: for a while all PEs work at once
    assert activity.busy_pes.sum() == counters.slots
    assert activity.active_pes.sum() == pairs


def test_order_reaches_the_array():
    a, b = np.array([[100, 37, 0, 0]], np.uint8), np.array([[50], [20], [1], [1]], np.int8)
    config = ArrayConfig(threads=2, policy="S+A")
    assert cycle.simulate(a, b, config)[0].item() == 100 * 50 + 37 * 20
    reordered = apply_order(a, b, [0, 2, 1, 3], threads=2)
    assert cycle.simulate(*reordered, config)[0].item() == work_slot([100, 37], [50, 20], config).value


def test_inputs_stay_untouched():
    a, b = np.full((5, 6), 200, np.uint8), np.full((6, 5), -100, np.int8)
    a.setflags(write=False)
    b.setflags(write=False)
    assert_equals_reference(a, b, ArrayConfig(2, 3, threads=4))
    assert (a == 200).all()
    assert (b == -100).all()

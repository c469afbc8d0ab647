"""Traces of one tile: the replay against the reference and the cycle engine, and files that really open."""

import csv
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vcd.reader import TokenKind, tokenize

from sysmt.config import ArrayConfig, Drain, Policy, Rounding
from sysmt.errors import ConfigError, OperandError
from sysmt.hw import reference
from sysmt.hw.operands import apply_order, split_threads
from sysmt.hw.pe import work_slot
from sysmt.hw.trace import trace_tile

configs = st.builds(
    ArrayConfig,
    rows=st.integers(1, 5),
    cols=st.integers(1, 5),
    threads=st.sampled_from([1, 2, 4]),
    policy=st.sampled_from(Policy),
    drain=st.sampled_from(Drain),
    saturate=st.booleans(),
    rounding=st.sampled_from(Rounding),
)


def draw(m, k, n, seed=0, kind=np.uint8, density=0.6):
    rng = np.random.default_rng(seed)
    a = (rng.integers(0, 256, (m, k)) * (rng.random((m, k)) < density)).astype(np.uint8).view(kind)
    b = (rng.integers(-128, 128, (k, n)) * (rng.random((k, n)) < density)).astype(np.int8)
    return a, b


@settings(max_examples=120, deadline=None)
@given(st.data(), configs, st.sampled_from([np.uint8, np.int8]))
def test_replay_equals_the_reference_slot_by_slot(data, config, kind):
    m, k, n = (data.draw(st.integers(1, 11)) for _ in range(3))
    a, b = draw(m, k, n, data.draw(st.integers(0, 999)), kind)
    tile = tuple(
        data.draw(st.integers(0, -(-size // at_once) - 1))
        for size, at_once in ((m, config.rows), (n, config.cols))
    )
    trace = trace_tile(a, b, config, tile)
    a = a[tile[0] * config.rows :][: config.rows]
    b = b[:, tile[1] * config.cols :][:, : config.cols]
    a_mtl, b_tln = split_threads(a, b, config.threads)
    out_mn, counters = reference.simulate(a, b, config)
    slots = reduced_a = reduced_b = 0
    for seen in trace._checked_replay():
        for i, j in zip(*np.nonzero(seen.slot >= 0), strict=True):
            at = seen.slot[i, j]
            assert at == seen.cycle - i - j
            operands = a_mtl[i, :, at].tolist(), b_tln[:, at, j].tolist()
            packed = sum(
                (x & 255 | (y & 255) << 8) << 16 * t for t, (x, y) in enumerate(zip(*operands, strict=True))
            )
            assert seen.operands[i, j] == packed
            worked = work_slot(*operands, config, kind is np.int8)
            slots += 1
            assert int(seen.active[i, j]).bit_count() == worked.active
            assert int(seen.reduced_activations[i, j]).bit_count() == worked.reduced_activations
            assert int(seen.reduced_weights[i, j]).bit_count() == worked.reduced_weights
            reduced_a += worked.reduced_activations
            reduced_b += worked.reduced_weights
        if seen.cycle == a_mtl.shape[2] + config.rows + config.cols - 3:  # the last PE has just finished
            np.testing.assert_array_equal(seen.accumulator[: len(out_mn), : out_mn.shape[1]], out_mn)
    assert slots == counters.slots
    assert (reduced_a, reduced_b) == (counters.reduced_activations, counters.reduced_weights)
    assert seen.cycle == trace.cycles - 1
    if config.drain is not Drain.NONE:
        assert not seen.accumulator.any()  # all have left


def test_accumulators_leave_at_the_bottom():
    a, b = draw(3, 8, 2)
    trace = trace_tile(a, b, ArrayConfig(3, 2, 2, drain="serial"))
    frames = list(trace.replay())
    done = frames[-4]
    for rows_gone, frame in enumerate(frames[-3:], 1):
        assert frame.draining
        np.testing.assert_array_equal(frame.accumulator[rows_gone:], done.accumulator[: 3 - rows_gone])


def values_of(vcd):
    """Read a VCD into {signal: {time: value}}."""
    names, values, scope, time = {}, {}, [], 0
    for token in tokenize(io.BytesIO(vcd.encode())):
        if token.kind is TokenKind.SCOPE:
            scope.append(token.scope.ident)
        elif token.kind is TokenKind.UPSCOPE:
            scope.pop()
        elif token.kind is TokenKind.VAR:
            names[token.var.id_code] = ".".join([*scope, token.var.reference]), token.var.size
        elif token.kind is TokenKind.CHANGE_TIME:
            time = token.time_change
        elif token.kind in (TokenKind.CHANGE_VECTOR, TokenKind.CHANGE_SCALAR):
            change = token.data
            values.setdefault(names[change.id_code][0], {})[time] = change.value
    assert not scope
    return dict(names.values()), values


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_vcd_opens_and_says_what_the_replay_says(threads):
    a, b = draw(5, 22, 4, kind=np.int8)
    trace = trace_tile(a, b, ArrayConfig(4, 3, threads), (1, 1))
    file = io.StringIO()
    trace.write_vcd(file)
    sizes, values = values_of(file.getvalue())
    assert len(sizes) == 1 + 12 * 8
    assert sizes["array.row_0.pe_0_0.active"] == threads
    assert sizes["array.row_3.pe_3_2.operands"] == 16 * threads

    def at(name, time):
        """Value in force at a time."""
        return [value for when, value in values[name].items() if when <= time][-1]

    for seen in trace.replay():
        assert values["array.clock"][2 * seen.cycle] in (1, "1")
        for i, j in np.ndindex(4, 3):
            scope, time = f"array.row_{i}.pe_{i}_{j}", 2 * seen.cycle
            assert at(f"{scope}.slot", time) == ("z" if seen.slot[i, j] < 0 else seen.slot[i, j])
            operands = "z" if seen.slot[i, j] < 0 else int(seen.operands[i, j])
            assert at(f"{scope}.operands", time) == operands
            assert int(at(f"{scope}.active", time)) == seen.active[i, j]
            assert int(at(f"{scope}.collision", time)) == seen.collision[i, j]
            reduces = (seen.reduced_activations[i, j] | seen.reduced_weights[i, j]) > 0
            assert int(at(f"{scope}.reduce", time)) == reduces
            assert int(at(f"{scope}.accumulator", time)) == int(seen.accumulator[i, j]) % 2**32


def test_vcd_is_reproducible_and_can_be_cut():
    a, b = draw(4, 40, 4)
    trace = trace_tile(a, b, ArrayConfig(4, 4, 2))
    whole, again, part = io.StringIO(), io.StringIO(), io.StringIO()
    trace.write_vcd(whole)
    trace.write_vcd(again)
    assert whole.getvalue() == again.getvalue()
    trace.write_vcd(part, 5, 8)
    times = [line for line in part.getvalue().splitlines() if line.startswith("#")]
    assert {"#10", "#17"} <= set(times) <= {"#0", *(f"#{t}" for t in range(10, 18))}
    for first, last in ((3, 2), (0, trace.cycles), (-1, 3)):
        with pytest.raises(ConfigError):
            trace.write_vcd(io.StringIO(), first, last)


def test_csv_adds_up_to_the_counters():
    a, b = draw(4, 31, 4)
    config = ArrayConfig(4, 4, 4)
    trace = trace_tile(a, b, config)
    file = io.StringIO()
    trace.write_csv(file)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    _, counters = reference.simulate(a, b, config)
    total = {
        name: sum(int(row[name]) for row in rows) for name in rows[0] if name not in ("phase", "utilization")
    }
    assert len(rows) == trace.cycles
    assert total["busy_pes"] == counters.slots
    assert total["active_pes"] == counters.slots - counters.active[0]
    assert total["active_threads"] == sum(c * count for c, count in enumerate(counters.active))
    assert total["collisions"] == counters.collisions
    assert total["reduced_activations"] == counters.reduced_activations
    assert total["reduced_weights"] == counters.reduced_weights
    assert [row["phase"] for row in rows] == ["compute"] * (trace.cycles - 4) + ["drain"] * 4


def test_order_is_applied():
    a, b = draw(3, 10, 3)
    order = np.random.default_rng(1).permutation(12)
    config = ArrayConfig(3, 3, 4)
    trace = trace_tile(a, b, config, order=order)
    expected, _ = reference.simulate(*apply_order(a, b, order, 4), config)
    frames = list(trace.replay())
    np.testing.assert_array_equal(frames[-4].accumulator, expected)


def test_a_replay_that_differs_from_the_engine_is_loud():
    a, b = draw(4, 9, 4)
    trace = trace_tile(a, b, ArrayConfig(4, 4, 2))
    trace.activity.active_pes[3] += 1
    with pytest.raises(RuntimeError, match="cycle 3"):
        trace.write_csv(io.StringIO())


def test_wrong_requests():
    a, b = draw(5, 8, 5)
    config = ArrayConfig(4, 4, 2)
    with pytest.raises(ConfigError, match=r"tile 2,0 is not there: the GEMM has 2 x 2 tiles"):
        trace_tile(a, b, config, (2, 0))
    with pytest.raises(ConfigError, match="tile row"):
        trace_tile(a, b, config, (-1, 0))
    with pytest.raises(ConfigError, match="0 x 0 tiles"):
        trace_tile(a[:, :0], b[:0], config)
    with pytest.raises(OperandError):
        trace_tile(a.astype(float), b, config)

"""Fixed point: values worked by hand from the article, integer steps against exact arithmetic."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sysmt.quant.error
from sysmt.errors import ConfigError, OperandError
from sysmt.quant.fixedpoint import (
    QFormat,
    align_bias,
    floor_shift,
    fraction_bits,
    round_shift,
    saturate,
    sqnr_db,
)

# -- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "bits", "fraction"),
    [
        ([-0.9, 0.3], 8, 7),  # Q1.7, the article's weights
        ([1.5], 8, 6),  # Q2.6, its example: 2 integer bits, 6 after the point
        ([-3.9, 2.0], 8, 5),
        ([-123.68, 131.32], 8, -1),  # its input: ceil(log2 131.32) = 8; the article takes 0 by hand
        ([100.0, -127.0], 8, 0),  # Q8.0
        ([1000.0], 8, -3),  # its output: "need additional 3 bits"
        ([0.0, 0.0], 8, 7),  # an all-zero tensor
        ([], 8, 7),
        ([0.0], 16, 15),
        ([0.0], 4, 3),
        ([1.0], 8, 7),  # exact powers of two: log2 is 0, not a rounding error away from it
        ([-1.0], 8, 7),
        ([math.nextafter(1.0, 2.0)], 8, 6),
        ([2.0**-40], 8, 47),
        ([2.0**-1074], 8, 1081),  # far beyond what int8 could hold
        ([1.5], 16, 14),
        ([1.5], 2, 0),
    ],
)
def test_fraction_bits_of_a_dynamic_range(x, bits, fraction):
    found = fraction_bits(np.array(x), bits)
    assert found == fraction
    assert type(found) is int


def test_fraction_bits_takes_tensors_and_integers():
    assert fraction_bits(torch.tensor([[0.5, -1.5]])) == 6
    assert fraction_bits([100, -3]) == 0
    assert fraction_bits(np.float32(0.1)) == 7 + 3


@given(st.floats(-1e30, 1e30).filter(lambda x: abs(x) > 1e-30), st.integers(2, 16))
def test_the_range_fits_its_format_and_no_finer_one(x, bits):
    fraction = fraction_bits([x], bits)
    limit = 2.0 ** (bits - 1)
    assert abs(x) * 2.0**fraction <= limit
    assert abs(x) * 2.0 ** (fraction + 1) > limit


def test_formats_are_named_as_in_the_article():
    assert str(QFormat(6)) == "Q2.6"
    assert str(QFormat(0)) == "Q8.0"
    assert str(QFormat(7)) == "Q1.7"
    assert str(QFormat(-3)) == "Q11.-3"
    q = QFormat(-3)
    assert (q.low, q.high, q.step) == (-128, 127, 8.0)


def test_quantising_rounds_to_nearest_and_saturates():
    codes = QFormat(0).quantize([131.32, -123.68, 127.5, -128.5, 2.5, 3.5, -0.4])
    assert codes.dtype == np.int8
    assert codes.tolist() == [127, -124, 127, -128, 2, 4, 0]  # int8's own cast would make -125 of 131
    assert QFormat(7).quantize([1.0, -1.0]).tolist() == [127, -128]
    assert QFormat(7).quantize([0.5]).tolist() == [64]  # `2 << 7` would make 128 of it, and wrap
    assert QFormat(-3).quantize([20.0, -1e308]).tolist() == [2, -128]
    assert QFormat(1081).quantize([2.0**-1074, 1e300]).tolist() == [127, 127]
    assert QFormat(4, 16).quantize([100.0]).dtype == np.int16


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.integers(2, 24))
def test_within_the_range_the_error_is_half_a_step_at_most(x, bits):
    q = QFormat.of(x, bits)
    codes = q.quantize(x)
    assert q.low <= codes.min() <= codes.max() <= q.high
    inside = np.abs(x) <= q.high * q.step
    error = np.abs(q.dequantize(codes) - np.array(x))
    assert (error[inside] <= q.step / 2).all()
    assert (error <= q.step).all()
    assert (q.quantize(q.dequantize(codes)) == codes).all()


def test_the_elephant_has_30_db():
    """SQNR = 131.32² / 4.32² = 924.04: 29.66 dB."""
    q = QFormat(0)
    assert sqnr_db([131.32], q.dequantize(q.quantize([131.32]))) == pytest.approx(29.66, abs=0.005)
    assert sqnr_db is sysmt.quant.error.sqnr_db


@pytest.mark.parametrize("x", [[np.nan], [np.inf, 1.0], [1j], ["one"], [[1.0], [1.0, 2.0]], None])
def test_what_is_no_finite_number_is_refused(x):
    with pytest.raises(OperandError, match="x "):
        fraction_bits(x)
    with pytest.raises(OperandError, match="x "):
        QFormat(0).quantize(x)


def test_a_tensor_that_wants_gradients_is_refused():
    with pytest.raises(OperandError, match="requires grad"):
        fraction_bits(torch.ones(3, requires_grad=True))


@pytest.mark.parametrize("bits", [1, 0, -8, 33, 7.5, "8", True])
def test_impossible_bits_are_refused(bits):
    for call in (
        lambda: fraction_bits([1.0], bits),
        lambda: QFormat(0, bits),
        lambda: saturate(np.array([1]), bits),
    ):
        with pytest.raises(ConfigError, match="bits"):
            call()


def test_a_broken_fraction_is_refused():
    for broken in (1.5, 1106, -1024, 1 << 40):
        with pytest.raises(ConfigError, match="fraction_bits"):
            QFormat(broken)
    assert QFormat.of([1.7e308], 2).step == 2.0**1023
    assert QFormat.of([5e-324], 32).quantize([5e-324]).tolist() == [2**31 - 1]


# -- integers ----------------------------------------------------------------------------------


def test_shifts_round_down_and_go_both_ways():
    values = np.array([-5, -4, -1, 0, 1, 4, 5])
    assert floor_shift(values, 2).tolist() == [-2, -1, -1, 0, 0, 1, 1]
    assert floor_shift(values, -2).tolist() == [-20, -16, -4, 0, 4, 16, 20]
    assert floor_shift(values, 0).tolist() == values.tolist()
    assert floor_shift(values, 1000).tolist() == [-1, -1, -1, 0, 0, 0, 0]
    top, bottom = 2**63 - 1, -(2**63)
    assert floor_shift(values, -1000).tolist() == [bottom, bottom, bottom, 0, top, top, top]


@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.integers(-80, 80))
def test_shifts_are_those_of_exact_integers(values, right):
    expected = [v >> right if right >= 0 else v << -right for v in values]
    clipped = [min(max(v, -(2**63)), 2**63 - 1) for v in expected]
    assert floor_shift(np.array(values, np.int64), right).tolist() == clipped


@given(st.lists(st.integers(-(2**62), 2**62 - 1)), st.integers(-80, 80))
def test_rounding_shifts_go_to_nearest(values, right):
    if right > 0:  # floor((v + 2^(right-1)) / 2^right) in integers without a width
        expected = [(v + (1 << (right - 1))) >> right for v in values]
    else:
        expected = floor_shift(np.array(values, np.int64), right).tolist()
    assert round_shift(np.array(values, np.int64), right).tolist() == expected


def test_rounding_shifts_at_the_limits():
    top, bottom = 2**63 - 1, -(2**63)
    assert round_shift([top, bottom], 1).tolist() == [2**62, -(2**62)]
    assert round_shift([-3, -2, -1, 1, 2, 3], 1).tolist() == [-1, -1, 0, 1, 1, 2]


@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.integers(2, 32))
def test_saturation_is_a_clip_that_keeps_its_type_small(values, bits):
    out = saturate(np.array(values, np.int64), bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert out.tolist() == [min(max(v, low), high) for v in values]
    assert out.dtype == (np.int8 if bits <= 8 else np.int16 if bits <= 16 else np.int32)


def test_a_bias_moves_to_the_accumulators_point():
    # 0.5 with 7 fraction bits is 64; the accumulator has 4 + 7.
    assert align_bias(np.array([64, -3]), 7, 11).tolist() == [1024, -48]
    assert align_bias(np.array([64, -3]), 7, 4).tolist() == [8, -1]  # finer than the accumulator: floor
    assert align_bias(np.array([1, -1]), 0, 40).tolist() == [2**31 - 1, -(2**31)]


@pytest.mark.parametrize("values", [[1.0], [True], ["1"], np.array([1], np.uint64)])
def test_integer_steps_refuse_what_is_no_integer(values):
    for call in (lambda: floor_shift(values, 1), lambda: saturate(values), lambda: align_bias(values, 1, 2)):
        with pytest.raises(OperandError, match="dtype"):
            call()
    with pytest.raises(OperandError, match="dtype"):
        QFormat(0).dequantize(values)


def test_a_broken_shift_is_refused():
    with pytest.raises(ConfigError, match="right"):
        floor_shift([1], 1.5)

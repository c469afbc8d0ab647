"""Ternary weights: equations (1), (3), (7) to (10) of "Understanding BatchNorm in Ternary Training"."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sysmt.errors import ConfigError, OperandError
from sysmt.quant.error import sqnr_db
from sysmt.quant.ternary import nonzero_share, ternarize, twn_scale, twn_threshold, variance_threshold


def uniform(fan_in, count=200_000, seed=0):
    """Weights as He et al. draw them."""
    limit = math.sqrt(6 / fan_in)
    return np.random.default_rng(seed).uniform(-limit, limit, count)


def test_equation_1_both_ends_of_the_interval_are_zero():
    w = np.array([-0.6, -0.5, -0.1, -0.0, 0.0, 0.5, 0.50001, 3.0], np.float32)
    out = ternarize(w, 0.5)
    np.testing.assert_array_equal(out, [-1, 0, 0, 0, 0, 0, 1, 1])
    assert out.dtype == np.float32
    assert not np.signbit(out[1:6]).any()
    np.testing.assert_array_equal(ternarize([-2.0, 0.0, 1e-30], 0), [-1, 0, 1])
    np.testing.assert_array_equal(ternarize(np.array([-128, 3], np.int8), 3), [-1, 0])


@given(
    hnp.arrays(np.float64, hnp.array_shapes(max_dims=4, max_side=5), elements=st.floats(-10, 10)),
    st.floats(0, 10),
)
def test_ternary_values_follow_the_definition(w, threshold):
    out = ternarize(w, threshold)
    assert out.shape == w.shape
    for value, ternary in zip(w.flat, out.flat, strict=True):
        assert ternary == (1 if value > threshold else -1 if value < -threshold else 0)
    np.testing.assert_array_equal(ternarize(-w, threshold), -out)
    np.testing.assert_array_equal(ternarize(out, 0), out)


def test_thresholds_by_channel():
    w = np.array([[0.4, -0.4], [0.4, -0.4]])
    np.testing.assert_array_equal(ternarize(w, [[0.5], [0.3]]), [[0, 0], [1, -1]])


def test_twn_threshold_is_equation_10():
    # By hand: the mean of |w| is (1 + 2 + 3 + 4) / 4 = 2.5, and 0.7 of it 1.75.
    assert twn_threshold([1.0, -2.0, 3.0, -4.0]) == pytest.approx(1.75)
    k = 1152
    assert twn_threshold(uniform(k)) == pytest.approx(0.7 / 2 * math.sqrt(6 / k), rel=5e-3)
    assert nonzero_share(0.35 * math.sqrt(6 / k), k) == pytest.approx(0.65)


def test_twn_scale_is_the_mean_of_what_stays():
    assert twn_scale([1.0, -2.0, 3.0, -4.0], 1.75) == pytest.approx(3.0)
    assert twn_scale([0.1, -0.1], 0.5) == 1.0


def test_variance_threshold_is_equation_8():
    # The paper's example, a 3 x 3 kernel and 128 filters: K = 1152, p1 = 1/1152, about 8.7e-4 ("8 x 10^-4").
    k = 3 * 3 * 128
    threshold = variance_threshold(k)
    assert threshold == pytest.approx(2 * math.sqrt(6 / 1152) * (0.5 - 1 / 1152), rel=1e-12)
    assert threshold == pytest.approx(0.0720435, abs=1e-7)
    assert nonzero_share(threshold, k) / 2 == pytest.approx(8.68e-4, rel=1e-3)
    assert nonzero_share(threshold, k) == pytest.approx(2 / k)  # "more than 99 % of the weights are zero"
    # K = 2: all weights stay, K = 9 (a depthwise kernel): 2 of 9.
    assert variance_threshold(2) == 0
    assert nonzero_share(variance_threshold(9), 9) == pytest.approx(2 / 9)


@pytest.mark.parametrize("fan_in", [9, 144, 1152])
def test_drawn_weights_have_the_variance_that_equations_3_and_9_say(fan_in):
    w = uniform(fan_in)
    for threshold in (variance_threshold(fan_in), twn_threshold(w), 0.0):
        ternary = ternarize(w, threshold)
        share = nonzero_share(threshold, fan_in)
        error = 5 * math.sqrt(share * (1 - share) / w.size) + 5e-3 * (threshold == twn_threshold(w))
        assert ternary.var() == pytest.approx(share, abs=error + 1e-3 * share)
        assert abs(ternary.mean()) < 5 * math.sqrt(share / w.size)


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf, [0.1, -0.1], "wide", None])
def test_impossible_thresholds(threshold):
    with pytest.raises(ConfigError, match="threshold="):
        ternarize([1.0, 2.0], threshold)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ternarize([1.0, math.nan], 0.1), OperandError, "NaN or infinite"),
        (lambda: ternarize(np.ones(3), np.ones(2)), OperandError, r"shape \(2,\) do not fit"),
        (lambda: ternarize(np.ones(3), np.ones((2, 3))), OperandError, "do not fit"),
        (lambda: ternarize(["a"], 0.1), OperandError, "real numbers"),
        (lambda: twn_threshold([]), OperandError, "without weights"),
        (lambda: twn_threshold([math.inf]), OperandError, "infinite"),
        (lambda: twn_scale([1.0], -1), ConfigError, "at least 0"),
        (lambda: variance_threshold(1), ConfigError, "fan_in"),
        (lambda: variance_threshold(1.5), ConfigError, "fan_in"),
        (lambda: nonzero_share(-1, 9), ConfigError, "threshold"),
        (lambda: nonzero_share(1, 0), ConfigError, "fan_in"),
    ],
)
def test_bad_arguments_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_is_no_array_of_numbers_is_refused():
    for bad in ([[1.0], [1.0, 2.0]], "weights", torch.ones(3, requires_grad=True)):
        with pytest.raises(OperandError):
            ternarize(bad, 0.1)
        with pytest.raises(OperandError):
            sqnr_db(bad, bad)

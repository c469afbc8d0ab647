import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sysmt.errors import ConfigError, OperandError
from sysmt.quant.error import mse, sqnr_db
from sysmt.quant.uniform import (
    ActivationRange,
    activation_range,
    dequantize,
    inverse_scale,
    quantize_activations,
    quantize_weights,
    weight_scales,
)

finite = st.floats(-1e6, 1e6, width=32)


def test_unsigned_range_is_the_mean_of_image_maxima():
    # (2.55 + 7.65) / 2 = 5.1 = 255 * 0.02
    assert activation_range([2.55, 7.65], signed=False) == ActivationRange(np.float32(0.02))


def test_signed_range_uses_127():
    assert activation_range([1.27, 2.54], signed=True) == ActivationRange(np.float32(0.015), signed=True)


def test_only_zeros_give_scale_one():
    assert activation_range([0.0, 0.0], signed=False).scale == 1.0
    assert activation_range([], signed=False).scale == 1.0


def test_vanishing_maximum_gives_scale_one():
    # 1e-40 / 255 has no finite float32 inverse
    assert activation_range([1e-40], signed=False).scale == 1.0


LEAST = float(np.finfo(np.float32).tiny)  # 2**-126
NO_SCALES = [0.0, -0.0, -1.0, float("nan"), float("inf"), 1e-45, 1e-42, LEAST / 2, LEAST * (1 - 2**-23), 1e39]


@pytest.mark.parametrize("scale", NO_SCALES)
def test_bad_scale(scale):
    with pytest.raises(
        ConfigError, match="activation scale=.* is not possible; a positive, finite, normal float32"
    ):
        ActivationRange(scale)


@pytest.mark.parametrize("scale", NO_SCALES)
def test_weights_are_not_quantised_by_what_is_no_scale(scale):
    with np.errstate(over="ignore"):
        scales = np.array([1.0, scale], np.float32)
    with pytest.raises(ConfigError, match="output channel 1 is no scale"):
        quantize_weights(np.zeros((2, 1), np.float32), scales)


@pytest.mark.parametrize("scale", [LEAST, 1.0, float(np.finfo(np.float32).max)])
def test_every_normal_scale_quantises_zero_to_zero_and_itself_to_one(scale):
    values = np.array([[0.0, scale, -scale]], np.float32)
    assert quantize_weights(values, np.array([scale], np.float32)).tolist() == [[0, 1, -1]]
    assert quantize_activations(values, ActivationRange(scale, signed=True)).tolist() == [[0, 1, -1]]


def test_a_weight_far_beyond_the_scale_is_clamped():
    codes = quantize_weights(np.array([[3e38, -3e38, 0]], np.float32), np.array([LEAST], np.float32))
    assert codes.tolist() == [[127, -127, 0]]


@pytest.mark.parametrize("scale", [True, np.True_, "0.5", None, [0.5], 1e39, 10**400])
def test_what_is_no_float32_number_is_no_scale(scale):
    with pytest.raises(ConfigError, match="activation scale=.*a positive, finite, normal float32"):
        ActivationRange(scale)


@pytest.mark.parametrize("scale", [np.float32(0.1), np.float64(0.1), np.array(0.1), 0.1])
def test_scales_of_every_kind_become_float32_values(scale):
    assert ActivationRange(scale).scale == float(np.float32(0.1))


@pytest.mark.parametrize("signed", ["false", 0, None])
def test_signed_is_a_truth_value(signed):
    with pytest.raises(ConfigError, match="signed=.* must be True or False"):
        ActivationRange(1.0, signed)


def test_numbers_that_vanish_or_overflow_are_no_errors_however_numpy_is_set():
    tiny = np.array([[1e-40, 2e-30, -1.0], [1e38, -1e-44, 3e-45]], np.float32)

    def results():
        range_ = activation_range([1e-45, 1e-300], signed=False)
        scales = weight_scales(tiny)
        return [
            np.float32(range_.scale),
            np.float32(activation_range([3e38], signed=True).scale),
            scales,
            quantize_weights(tiny, scales),
            quantize_weights(tiny, np.array([1.2e-38, 1.2e-38], np.float32)),
            quantize_activations(tiny, ActivationRange(1e30)),
            quantize_activations(tiny, ActivationRange(1e-30)),
            dequantize(np.array([[1, 2]], np.int32), 1e-30, np.array([1e-30, 1e38], np.float32)),
        ]

    usual = results()
    with np.errstate(all="raise"):
        strict = results()
    assert usual[0] == 1.0
    assert usual[4].tolist() == [[0, 127, -127], [127, 0, 0]]
    for left, right in zip(usual, strict, strict=True):
        np.testing.assert_array_equal(left, right)


def test_halves_round_to_even_and_clamp():
    x = np.array([0.5, 1.5, 2.5, 254.6, 400.0, -3.0], np.float32)
    codes = quantize_activations(x, ActivationRange(1.0))
    assert codes.dtype == np.uint8
    assert codes.tolist() == [0, 2, 2, 255, 255, 0]
    signed = quantize_activations(
        np.array([-200, -127.4, 126.5, 127.5], np.float32), ActivationRange(1.0, True)
    )
    assert signed.dtype == np.int8
    assert signed.tolist() == [-127, -127, 126, 127]


def test_quantisation_multiplies_by_the_float32_inverse():
    # 0.1f is 0.100000001490116; its inverse 9.99999985... rounds to 10.0f, so 0.25 becomes 2.5 -> 2
    assert inverse_scale(np.float32(0.1)) == np.float32(10.0)
    assert quantize_activations(np.array([0.25], np.float32), ActivationRange(0.1)).tolist() == [2]


@given(arrays(np.float32, (3, 2, 3, 3), elements=finite))
def test_weights_reach_127_and_zeros_stay(weight):
    weight[0] = 0
    scales = weight_scales(weight)
    codes = quantize_weights(weight, scales)
    assert scales[0] == 1.0
    assert not codes[weight == 0].any()
    assert abs(codes.astype(int)).max() <= 127
    for n in range(3):
        if np.abs(weight[n]).max() > 1e-30:
            assert np.abs(codes[n].astype(int)).max() == 127


def test_per_layer_scale_is_the_largest():
    weight = np.array([[1.0, -2.0], [0.5, 0.25]], np.float32)
    assert weight_scales(weight, per_channel=False).tolist() == [np.float32(2 / 127)] * 2
    assert weight_scales(weight).tolist() == [np.float32(2 / 127), np.float32(0.5 / 127)]


def test_dequantize_rounds_in_float32_steps():
    acc = np.array([[16_777_217, -3]], np.int32)  # 2**24 + 1 is no float32
    y = dequantize(acc, 0.1, np.array([0.3, 0.7], np.float32), np.array([1.0, 2.0], np.float32))
    expected = [
        np.float32(np.float32(16_777_216.0) * np.float32(np.float32(0.1) * np.float32(0.3))) + np.float32(1),
        np.float32(np.float32(-3.0) * np.float32(np.float32(0.1) * np.float32(0.7))) + np.float32(2),
    ]
    assert y.dtype == np.float32
    assert y.tolist() == [expected]


def test_dequantize_along_another_axis():
    acc = np.arange(6, dtype=np.int32).reshape(1, 2, 3)
    y = dequantize(acc, 1.0, np.array([1.0, 10.0], np.float32), channel_axis=1)
    assert y.tolist() == [[[0, 1, 2], [30, 40, 50]]]


def test_sqnr():
    # energy 100 against error 1: 20 dB
    assert sqnr_db([6.0, 8.0], [6.0, 7.0]) == pytest.approx(20.0)
    assert sqnr_db([1.0], [1.0]) == float("inf")
    assert sqnr_db([0.0], [1.0]) == float("-inf")
    assert mse([1.0, 2.0], [2.0, 4.0]) == 2.5
    assert mse([], []) == 0.0
    with pytest.raises(OperandError, match="shape"):
        sqnr_db([1.0], [1.0, 2.0])

"""Q-format layers against plain integer arithmetic with tolerance 0, and networks stage by stage."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import batches, same, state, two_layers
from torch import nn
from torch.nn import functional as F

import sysmt
from sysmt.config import ArrayConfig
from sysmt.errors import CalibrationError, ConfigError, OperandError, UnsupportedLayerError
from sysmt.hw.reference import simulate
from sysmt.nn.array.lowering import LayerGeometry, im2col
from sysmt.nn.batchnorm.recalibration import recalibrate_batchnorm
from sysmt.nn.low_bit.integer_layers import conv2d, scale_and_shift
from sysmt.nn.low_bit.integer_network import QNetwork
from sysmt.nn.low_bit.integer_stages import StageError
from sysmt.nn.networks.models import build_model
from sysmt.quant.fixedpoint import QFormat

# -- convolution -------------------------------------------------------------------------------


def plain(x, w, geometry):
    """Convolve integers, tap by tap, in int64."""
    (top, bottom), (left, right) = geometry.padding
    padded = np.pad(x.astype(np.int64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    rows, cols = geometry.output_size(*x.shape[2:])
    out = np.zeros((x.shape[0], w.shape[0], rows, cols), np.int64)
    per_in, per_out = w.shape[1], w.shape[0] // geometry.groups
    for n in range(w.shape[0]):
        first = n // per_out * per_in
        for c in range(per_in):
            for i in range(w.shape[2]):
                for j in range(w.shape[3]):
                    top, left = i * geometry.dilation[0], j * geometry.dilation[1]
                    window = padded[
                        :,
                        first + c,
                        top : top + (rows - 1) * geometry.stride[0] + 1 : geometry.stride[0],
                        left : left + (cols - 1) * geometry.stride[1] + 1 : geometry.stride[1],
                    ]
                    out[:, n] += window * int(w[n, c, i, j])
    return out


def floor_to_8_bits(sums, right):
    """Shift and saturate Python integers, which have no width."""
    shifted = [int(v) >> right if right >= 0 else int(v) << -right for v in sums.ravel()]
    return np.array([min(max(v, -128), 127) for v in shifted], np.int8).reshape(sums.shape)


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    geometry = LayerGeometry(
        in_channels=groups * draw(st.integers(1, 3)),
        out_channels=groups * draw(st.integers(1, 3)),
        kernel=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        stride=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        dilation=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        groups=groups,
        padding=((draw(st.integers(0, 2)), 1), (0, draw(st.integers(0, 2)))),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    limits = draw(st.sampled_from([(-128, 128), (-3, 4), (-128, -120)]))
    x = rng.integers(*limits, (draw(st.integers(0, 3)), geometry.in_channels, 6, 5), dtype=np.int8)
    shape = (geometry.out_channels, geometry.in_channels // groups, *geometry.kernel)
    w = rng.integers(-128, 128, shape, dtype=np.int8)
    bias = rng.integers(-128, 128, geometry.out_channels) if draw(st.booleans()) else None
    return x, w, bias, geometry


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.tuples(*[st.integers(-4, 12)] * 4))
def test_one_thread_is_the_plain_integer_convolution(case, fractions):
    x, w, bias, geometry = case
    *three, bias_fraction = fractions
    formats = tuple(QFormat(fraction) for fraction in three)
    y, stats = conv2d(x, w, bias, formats=formats, bias_fraction=bias_fraction, geometry=geometry)
    sums = plain(x, w, geometry)
    fraction = three[0] + three[1]
    if bias is not None:
        move = fraction - bias_fraction
        aligned = [int(b) << move if move >= 0 else int(b) >> -move for b in bias]
        sums = sums + np.array(aligned)[:, None, None]
    np.testing.assert_array_equal(y, floor_to_8_bits(sums, fraction - three[2]))
    assert y.dtype == np.int8
    assert stats.macs == sums.size * w[0].size
    assert stats.collisions == 0


@pytest.mark.parametrize("threads", [2, 4])
@settings(max_examples=15, deadline=None)
@given(case=convolutions())
def test_threads_give_what_the_reference_pe_gives(threads, case):
    x, w, _, geometry = case
    config = ArrayConfig(threads=threads)
    y, stats = conv2d(x, w, formats=(QFormat(0), QFormat(0), QFormat(-7)), config=config, geometry=geometry)
    per_group = w.reshape(geometry.groups, geometry.gemm_n, geometry.gemm_k)
    expected, active = [], np.zeros(threads + 1, int)
    for images, weights in zip(im2col(x, geometry), per_group, strict=True):
        outs = []
        for image in images:
            out, counters = simulate(image, weights.T, config)
            outs.append(out.T)
            active += counters.active
        expected.append(np.array(outs, np.int64).reshape(len(x), geometry.gemm_n, *y.shape[2:]))
    np.testing.assert_array_equal(y, floor_to_8_bits(np.concatenate(expected, axis=1), 7))
    if len(x):
        assert stats.active == tuple(active)


def test_a_layer_by_hand():
    """Input Q8.0, weights Q1.7, output Q11.-3, the article's formats: shift by 0 + 7 + 3 = 10."""
    formats = (QFormat(0), QFormat(7), QFormat(-3))
    x = np.array([[[[127, -124], [100, 3]]]], np.int8)
    w = np.array([[[[127, -64], [32, 1]]]], np.int8)
    # 127*127 + 124*64 + 100*32 + 3*1 = 27268; the bias 0.5 is 64 in Q1.7, and the sum has 7 fraction bits.
    y, _ = conv2d(x, w, np.array([64]), formats=formats)
    assert y.tolist() == [[[[(27268 + 64) >> 10]]]] == [[[[26]]]]
    y, _ = conv2d(-x, w, np.array([-64]), formats=formats)
    assert y.tolist() == [[[[-27]]]]  # floor(-26.69): down, not towards zero
    y, _ = conv2d(x, w, formats=(QFormat(0), QFormat(7), QFormat(0)))
    assert y.tolist() == [[[[127]]]]  # 27268 >> 7 = 213 saturates, where a cast would wrap


def test_a_huge_bias_saturates_in_the_accumulator():
    x, w = np.full((1, 1, 1, 1), -128, np.int8), np.full((2, 1, 1, 1), 127, np.int8)
    formats = (QFormat(30), QFormat(7), QFormat(15))
    y, _ = conv2d(x, w, np.array([127, -128]), formats=formats, bias_fraction=0)
    sums = [2**31 - 1 - 128 * 127, -(2**31)]
    assert y.ravel().tolist() == [max(-128, min(127, s >> 22)) for s in sums]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": np.zeros((1, 2, 4, 4), np.uint8)}, "x has shape .* uint8"),
        ({"x": np.zeros((2, 4, 4), np.int8)}, "four axes"),
        ({"x": [[1]]}, "dtype list"),
        ({"x": np.zeros((1, 3, 4, 4), np.int8)}, r"\(3, 3, 3, 3\) are needed"),
        ({"weights": np.zeros((3, 2, 3, 3), np.int16)}, "weights has shape .* int16"),
        ({"bias": np.zeros(2, np.int8)}, r"\(3,\) is needed"),
        ({"bias": np.zeros(3)}, "float64"),
        ({"x": np.zeros((1, 2, 2, 4), np.int8)}, "too small"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, words):
    given_ = {
        "x": np.zeros((1, 2, 4, 4), np.int8),
        "weights": np.zeros((3, 2, 3, 3), np.int8),
        "bias": np.zeros(3, np.int8),
    } | change
    with pytest.raises(OperandError, match=words):
        conv2d(**given_, formats=(QFormat(0), QFormat(0), QFormat(0)))


# -- BatchNorm ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(0, 2**32),
    st.tuples(*[st.integers(-3, 10)] * 4),
    st.sampled_from([(2, 3), (0, 3), (2, 3, 4, 5)]),
)
def test_batchnorm_is_one_multiply_and_one_add(seed, fractions, shape):
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, shape, dtype=np.int8)
    scale, bias = rng.integers(-128, 128, (2, 3), dtype=np.int8)
    *three, bias_fraction = fractions
    y = scale_and_shift(x, scale, bias, formats=tuple(map(QFormat, three)), bias_fraction=bias_fraction)
    fraction = three[0] + three[1]
    move = fraction - bias_fraction
    aligned = np.array([int(b) << move if move >= 0 else int(b) >> -move for b in bias])
    channels = (-1, *[1] * (len(shape) - 2))
    sums = x.astype(int) * scale.astype(int).reshape(channels) + aligned.reshape(channels)
    np.testing.assert_array_equal(y, floor_to_8_bits(sums, fraction - three[2]))


def test_a_batchnorm_by_hand():
    """gamma 1.5, variance 4, mean 3, beta 0.25: y = 0.75 x - 2; of x = 2.5 that is -0.125."""
    x, scale, bias = QFormat(4), QFormat(7), QFormat(6)
    y = scale_and_shift(
        x.quantize([[2.5]]), scale.quantize([0.75]), bias.quantize([-2.0]),
        formats=(x, scale, QFormat(6)), bias_fraction=6,
    )  # fmt: skip
    assert y.tolist() == [[-8]]  # -0.125 in Q2.6
    # 130 in Q8.0 saturates at 127, where the article's cast makes -126 of it.
    y = scale_and_shift(
        np.array([[65]], np.int8), np.array([2], np.int8), np.array([0]),
        formats=(QFormat(0), QFormat(0), QFormat(0)), bias_fraction=0,
    )  # fmt: skip
    assert y.tolist() == [[127]]


def test_a_batchnorm_of_other_channels_is_refused():
    formats = (QFormat(0), QFormat(0), QFormat(0))
    with pytest.raises(OperandError, match="one scale and one bias for each channel"):
        scale_and_shift(np.zeros((1, 2), np.int8), np.zeros(3), np.zeros(2), formats=formats, bias_fraction=0)


# -- networks ----------------------------------------------------------------------------------


def test_a_network_computes_just_its_integers():
    """The whole chain of two layers, worked out with the plain convolution above."""
    model = two_layers()
    with torch.no_grad():
        model[0].bias.uniform_(-1, 1)
        model[1].running_mean.uniform_(-1, 1)
        model[1].running_var.uniform_(0.5, 2)
        model[4].weight.uniform_(-2, 2)
    data = batches(4)[0]
    with QNetwork(model) as network, torch.no_grad():
        network.calibrate([data], 4)
        y = model(data)
        formats = {name: layer.formats for name, layer in network.layers.items()}
    x = formats["0"][0].quantize(data.numpy())
    for conv, bn in ((0, 1), (3, 4)):
        weight, bias = model[conv].weight.detach().numpy(), model[conv].bias.detach().numpy()
        of_weight, of_bias = QFormat.of(weight), QFormat.of(bias)
        sums = plain(x, of_weight.quantize(weight), LayerGeometry.of(model[conv]))
        fraction = formats[str(conv)][0].fraction_bits + of_weight.fraction_bits
        move = fraction - of_bias.fraction_bits
        sums = sums + (of_bias.quantize(bias).astype(int) << move)[:, None, None]
        x = floor_to_8_bits(sums, fraction - formats[str(conv)][1].fraction_bits)
        layer = model[bn]
        std = np.sqrt(layer.running_var.numpy().astype(float) + layer.eps)
        scale = layer.weight.detach().numpy() / std
        shift = layer.bias.detach().numpy() - layer.running_mean.numpy() * scale
        assert formats[str(bn)][0] == formats[str(conv)][1]
        of_scale, of_shift = QFormat.of(scale), QFormat.of(shift)
        fraction = formats[str(bn)][0].fraction_bits + of_scale.fraction_bits
        move = fraction - of_shift.fraction_bits
        aligned = [int(b) << move if move >= 0 else int(b) >> -move for b in of_shift.quantize(shift)]
        sums = x.astype(int) * of_scale.quantize(scale).astype(int)[:, None, None]
        sums = sums + np.array(aligned)[:, None, None]
        x = floor_to_8_bits(sums, fraction - formats[str(bn)][1].fraction_bits)
    np.testing.assert_array_equal(y.numpy(), formats["4"][1].dequantize(x).astype(np.float32))


def test_stages_are_compared_with_the_float_network():
    model = two_layers()
    loader = batches(3, 2)
    before = state(model)
    with QNetwork(model) as network:
        network.calibrate(loader, 5)
        with pytest.raises(ConfigError, match=r"nothing has been compared at '4' 'bn' yet; call compare"):
            network.channels("4", "bn")
        table = network.compare(loader)
        with torch.no_grad():
            y = torch.cat([model(x) for x in loader])
        isolated = network.compare(loader, isolated=True)
        channels = network.channels("4", "bn")
    assert same(before, state(model))
    with torch.no_grad():
        reference = torch.cat([model(x) for x in loader])  # detached: float again
    assert table["stage"].tolist() == ["input", "conv", "bn", "bn, exact"] * 2
    assert table.loc[table["stage"] == "bn", "follows"].tolist() == ["0", "3"]
    last = table[table["stage"] == "bn"].iloc[1]
    assert last["sqnr_db"] == pytest.approx(sysmt.quant.error.sqnr_db(reference, y), abs=1e-9)
    assert last["mean_error"] == pytest.approx(float((y - reference).mean()), abs=1e-7)
    np.testing.assert_allclose(channels["float"], reference.mean((0, 2, 3)), atol=1e-6)
    # The float network's own input is rounded once; what came through a layer brings its noise along.
    inputs = [one[one["stage"] == "input"]["sqnr_db"].iloc[1] for one in (isolated, table)]
    assert inputs[0] > inputs[1] + 3
    assert (isolated["sqnr_db"].iloc[:4] == table["sqnr_db"].iloc[:4]).all()


def test_an_exact_batchnorm_changes_no_channel_around_its_mean():
    model = build_model("digits")
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.uniform_(module.bias, -5, 5)
            nn.init.uniform_(module.running_var, 0.1, 4)
    data = [torch.rand(8, 1, 16, 16)]
    with QNetwork(model, ArrayConfig(threads=4)) as network:
        network.calibrate(data, 8)
        table = network.compare(data, isolated=True)
    by_stage = table.set_index(["layer", "stage"])["channel_sqnr_db"]
    total = table.set_index(["layer", "stage"])["sqnr_db"]
    for layer, conv in table.loc[table["stage"] == "bn", ["layer", "follows"]].itertuples(index=False):
        assert by_stage[(layer, "bn, exact")] == pytest.approx(by_stage[(conv, "conv")], abs=1e-3)
        assert by_stage[(layer, "bn")] < by_stage[(layer, "bn, exact")] + 0.5
    # An offset without noise does raise the ratio of energies.
    assert abs(total[("bn1", "bn, exact")] - total[("conv1", "conv")]) > 1
    rates = table.loc[table["stage"] == "conv", "collision_rate"]
    assert ((rates > 0) & (rates <= 1)).all()


def test_4_bit_codes_never_lose_anything_to_threads():
    """They are narrow, all of them: [-8, 7]."""
    model = two_layers()
    loader = batches(4)
    outputs = []
    with QNetwork(model, bits=4) as network, torch.no_grad():
        network.calibrate(loader, 4)
        for threads in (1, 2, 4):
            network.set_threads(threads)
            outputs.append(model(loader[0]))
            stats = network.layers["3"].stats
            assert (stats.collisions > 0) == (threads > 1)
            assert stats.reduced_activations == stats.reduced_weights == 0
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_threads_add_noise_and_weights_are_followed():
    model = two_layers()
    loader = batches(4)
    with QNetwork(model) as network, torch.no_grad():
        network.calibrate(loader, 4)
        noise = []
        for threads in (1, 2, 4):
            network.set_threads(threads)
            noise.append(network.compare(loader).set_index(["layer", "stage"]).loc[("0", "conv"), "sqnr_db"])
        assert noise[0] > noise[1] > noise[2]
        before = model(loader[0])
        model[0].weight.data.neg_()
        assert not torch.equal(before, model(loader[0]))


def test_recalibration_wins_back_the_mean_that_floor_costs():
    """A shift rounds down: half a step on average, which new statistics take out again."""
    model = two_layers()
    loader = batches(32)
    recalibrate_batchnorm(model, loader, "cumulative", images=32)
    with QNetwork(model, bits=4) as network:
        network.calibrate(loader, 32)
        plain_ = network.compare(loader).set_index(["layer", "stage"])
        report = recalibrate_batchnorm(model, loader, "cumulative", images=32)
        again = network.compare(loader).set_index(["layer", "stage"])
    assert all(layer.mean_shift > 0.05 for layer in report.layers)
    conv, bn = ("0", "conv"), ("1", "bn, exact")
    assert plain_.loc[conv, "mean_error"] == pytest.approx(-plain_.loc[conv, "step"] / 2, rel=0.3)
    assert again.loc[conv, "mean_error"] == plain_.loc[conv, "mean_error"]
    assert plain_.loc[bn, "mean_error"] < -0.05
    assert abs(again.loc[bn, "mean_error"]) < 1e-3
    assert again.loc[bn, "sqnr_db"] > plain_.loc[bn, "sqnr_db"]


def test_rounding_to_nearest_costs_no_mean():
    model = two_layers()
    loader = batches(32)
    means = {}
    for rounding in ("floor", "nearest"):
        with QNetwork(model, bits=6, rounding=rounding) as network:
            network.calibrate(loader, 32)
            table = network.compare(loader, isolated=True)
        conv = table[table["stage"] == "conv"]
        means[rounding] = (conv["mean_error"] / conv["step"]).to_numpy()
    assert means["floor"] == pytest.approx(-0.5, abs=0.15)
    assert means["nearest"] == pytest.approx(0.0, abs=0.15)
    x, w = np.array([[[[3]]]], np.int8), np.array([[[[1]]]], np.int8)
    formats = (QFormat(1), QFormat(0), QFormat(0))
    outs = [conv2d(x, w, formats=formats, rounding=rounding)[0].item() for rounding in means]
    assert outs == [1, 2]  # 1.5
    one = np.ones(1, np.int8)
    y = scale_and_shift(x, one, one, formats=formats, bias_fraction=1, rounding="nearest")
    assert y.item() == 2  # (3 + 1) / 2
    with pytest.raises(ConfigError, match="rounding='up' is unknown; allowed: floor, nearest"):
        QNetwork(model, rounding="up")


def test_other_layers_and_shapes_work():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, 2, padding="valid", dilation=2, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect", bias=False),
        nn.BatchNorm2d(8, affine=False),
        nn.Flatten(),
        nn.LazyLinear(3),
    ).eval()
    x = torch.randn(2, 4, 12, 12).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        reference = model(x)
        with QNetwork(model) as network:
            network.calibrate([(x, 0)], 2)
            assert sysmt.quant.error.sqnr_db(reference, model(x)) > 20
            assert model(x[:0]).shape == (0, 3)
        assert torch.equal(model(x), reference)
        assert "forward" not in vars(model[0])


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("layers", "error", "words"),
    [
        ([nn.Linear(3, 3)], ConfigError, "no Conv2d"),
        ([nn.ConvTranspose2d(1, 1, 3)], UnsupportedLayerError, "'0' is a ConvTranspose2d"),
        ([nn.Conv1d(1, 1, 3)], UnsupportedLayerError, "'0' is a Conv1d"),
        ([OwnConv(1, 1, 3)], UnsupportedLayerError, "'0' is a OwnConv"),
        ([nn.Conv2d(1, 1, 3), OwnNorm(1)], UnsupportedLayerError, "forward of its own"),
        ([nn.Conv2d(65536, 1, 1)], UnsupportedLayerError, "K=65536"),
        (
            [nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1, track_running_stats=False)],
            ConfigError,
            "'1' keeps no running statistics",
        ),
    ],
)
def test_networks_that_cannot_be_had_in_q_format(layers, error, words):
    with pytest.raises(error, match=words):
        QNetwork(nn.Sequential(*layers))


def test_wrong_uses_are_refused():
    model = two_layers()
    x = batches(4)[0]
    with pytest.raises(ConfigError, match="an ArrayConfig is needed"):
        QNetwork(model, 2)
    with pytest.raises(ConfigError, match="Module is needed"):
        QNetwork("model")
    for bits in (1, 9, 7.5):
        with pytest.raises(ConfigError, match="bits"):
            QNetwork(model, bits=bits)
    with sysmt.attach(model), pytest.raises(ConfigError, match="detach first"):
        QNetwork(model)
    with QNetwork(model) as network:
        with pytest.raises(ConfigError, match="detach first"):
            QNetwork(model)
        with pytest.raises(ConfigError, match="attached to a simulation or a Q-format network already"):
            sysmt.attach(model)
        with pytest.raises(CalibrationError, match=r"'0' has no formats"):
            model(x)
        with pytest.raises(CalibrationError, match="not calibrated"):
            network.compare([x])
        with pytest.raises(CalibrationError, match="'0' met NaN"):
            network.calibrate([x, x * math.nan], 8)
        with pytest.raises(CalibrationError, match=r"'0' has no formats"):
            model(x)
        network.calibrate([x], 4)
        with pytest.raises(UnsupportedLayerError, match="'0': x holds NaN"):
            model(x * math.nan)
        with pytest.raises(UnsupportedLayerError, match="float64"):
            model(x.double())
        with pytest.raises(ConfigError, match="threads=3"):
            network.set_threads(3)
        with pytest.raises(ConfigError, match="no stage 'conv9' 'conv'"):
            network.channels("conv9", "conv")
        model[3].weight.data[0, 0, 0, 0] = math.nan
        with pytest.raises(UnsupportedLayerError, match="'3', weight: x holds NaN"):
            model(x)
        model.train()
        with pytest.raises(UnsupportedLayerError, match="no gradients"):
            model(x)
        model.eval()
        network.detach()
        network.detach()
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_stage_without_noise_or_signal():
    error = StageError()
    zeros, ones = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    error.add(ones, ones)
    assert error.sqnr_db == math.inf
    assert math.isnan(error.channel_sqnr_db)  # a constant has no signal around its mean
    error.add(zeros, ones)
    assert error.sqnr_db == pytest.approx(0.0)
    assert error.mean_error == 0.5


def test_scale_and_shift_takes_16_bit_integers_alone():
    formats = (QFormat(5), QFormat(5), QFormat(5))
    x, scale, bias = np.ones((1, 2, 3), np.int64), np.ones(2, np.int64), np.zeros(2, np.int64)
    for bad in ((x * 1.9, scale), (x, scale * 1.9), (x << 40, scale), (x, scale << 30)):
        with pytest.raises(OperandError, match="16 bits"):
            scale_and_shift(*bad, bias, formats=formats, bias_fraction=5)

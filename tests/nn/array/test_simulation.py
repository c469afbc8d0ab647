"""The attached network against a plain restatement of what each layer should compute."""

import copy
import math
import os
import platform
import resource
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import sysmt
import sysmt.hw.timing
from sysmt.hw.reference import simulate as reference_simulate
from sysmt.nn.array.layer import ArrayLayer
from sysmt.nn.array.lowering import LayerGeometry, im2col
from sysmt.nn.networks.models import build_model
from sysmt.quant.uniform import (
    ActivationRange,
    dequantize,
    quantize_activations,
    quantize_weights,
    weight_scales,
)


def small_net(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return net.eval()


def images(count=4, seed=1):
    return torch.rand(count, 1, 9, 8, generator=torch.Generator().manual_seed(seed))


def expected_layer(module, x, range_, config):
    """Quantise, lower, run every slot through pe.py, dequantise: all in the open."""
    geometry = LayerGeometry.of(module)
    weight = module.weight.detach().numpy()
    scales = weight_scales(weight)
    b = quantize_weights(weight, scales).reshape(geometry.groups, geometry.gemm_n, geometry.gemm_k)
    images = x.detach() if x.ndim == 4 else x.detach()[:, :, None, None]
    a = im2col(quantize_activations(geometry.pad_float(images).numpy(), range_), geometry)
    out_size = geometry.output_size(*images.shape[2:])
    acc = np.zeros((images.shape[0], geometry.out_channels, math.prod(out_size)), np.int32)
    counters = None
    for g in range(geometry.groups):
        for image in range(images.shape[0]):
            out, counted = reference_simulate(a[g, image], b[g].T, config)
            acc[image, g * geometry.gemm_n : (g + 1) * geometry.gemm_n] = out.T
            counters = counted if counters is None else counters + counted
    bias = None if module.bias is None else module.bias.detach().numpy()
    y = dequantize(acc, range_.scale, scales, bias, channel_axis=1).reshape(*acc.shape[:2], *out_size)
    return (y if x.ndim == 4 else y[:, :, 0, 0]), counters


def run_one_layer(module, x, threads=4, scale=None, **options):
    """Attach a network of just one simulated layer, with given ranges."""
    config = sysmt.ArrayConfig(threads=threads, rows=4, cols=4)
    model = nn.Sequential(module)
    with sysmt.attach(model, config, first=True, linear=True, depthwise=True, **options) as sim:
        signed = bool((x < 0).any())
        range_ = ActivationRange(scale or float(x.abs().max()) / (127 if signed else 255), signed)
        sim.set_ranges({"0": range_})
        y = model(x)
        return y, sim.report().iloc[0], range_, config


@st.composite
def layers(draw):
    groups = draw(st.sampled_from([1, 1, 2]))
    channels = groups * draw(st.integers(1, 5))
    padding = draw(st.sampled_from([0, 1, "same", (2, 0)]))
    conv = nn.Conv2d(
        channels,
        groups * draw(st.integers(1, 4)),
        draw(st.sampled_from([1, 3, (3, 2)])),
        stride=1 if padding == "same" else draw(st.sampled_from([1, 2, (1, 2)])),
        padding=padding,
        dilation=draw(st.sampled_from([1, 2])),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"])),
    )
    x = torch.randn(draw(st.integers(1, 3)), channels, draw(st.integers(5, 8)), draw(st.integers(5, 8)))
    if not draw(st.booleans()):
        x = x.relu()
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    return conv, x


@settings(deadline=None, max_examples=60)
@given(layers(), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1))
@pytest.mark.filterwarnings("ignore:Using padding")
def test_convolution_equals_the_open_computation(case, threads, seed):
    conv, x = case
    torch.manual_seed(seed)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape))
        if conv.weight.numel() > 4:
            conv.weight.view(-1)[::3] = 0
    y, row, range_, config = run_one_layer(conv, x, threads)
    expected, counters = expected_layer(conv, x, range_, config)
    assert y.detach().numpy().tobytes() == np.ascontiguousarray(expected).tobytes()
    assert [row[f"active_{c}"] for c in range(threads + 1)] == list(counters.active)
    assert row["reduced_activations"] == counters.reduced_activations
    assert row["reduced_weights"] == counters.reduced_weights
    geometry = LayerGeometry.of(conv)
    m = math.prod(geometry.output_size(*x.shape[2:]))
    per_gemm = sysmt.hw.timing.gemm_cycles(m, geometry.gemm_n, geometry.gemm_k, config)
    assert row["cycles"] == per_gemm * x.shape[0] * geometry.groups
    assert row["macs"] == m * geometry.gemm_n * geometry.gemm_k * x.shape[0] * geometry.groups


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_linear_rows_of_one_image_are_one_gemm(threads):
    linear = nn.Linear(10, 5)
    x = torch.rand(3, 7, 10)
    y, row, range_, config = run_one_layer(linear, x, threads)
    assert (row["M"], row["N"], row["K"], row["images"]) == (7, 5, 10, 3)
    flat, counters = expected_layer(linear, x.reshape(21, 10), range_, config)
    assert np.array_equal(y.detach().numpy().reshape(21, 5), flat)
    assert row["active_0"] == counters.active[0]
    assert row["cycles"] == 3 * sysmt.hw.timing.gemm_cycles(7, 5, 10, config)


@pytest.mark.parametrize("shape", [(10,), (4, 10), (2, 3, 4, 10)])
def test_linear_takes_any_leading_shape(shape):
    linear = nn.Linear(10, 5)
    y, _, _, _ = run_one_layer(linear, torch.rand(shape))
    assert y.shape == (*shape[:-1], 5)


def test_unbatched_image():
    conv = nn.Conv2d(2, 3, 3)
    x = torch.rand(2, 6, 6)
    y, row, _, _ = run_one_layer(conv, x)
    batched, _, _, _ = run_one_layer(conv, x[None])
    assert y.shape == (3, 4, 4)
    assert torch.equal(y, batched[0])
    assert row["images"] == 1


def test_batch_size_does_not_matter():
    conv = nn.Conv2d(4, 5, 3)
    x = torch.rand(6, 4, 7, 7)
    whole, row, _, _ = run_one_layer(conv, x, scale=1 / 255)
    parts = [run_one_layer(conv, part, scale=1 / 255) for part in x.split(2)]
    assert torch.equal(whole, torch.cat([part[0] for part in parts]))
    for column in ("cycles", "macs", "active_0", "active_4", "reduced_activations"):
        assert row[column] == sum(part[1][column] for part in parts)


def test_empty_batch():
    y, row, _, _ = run_one_layer(nn.Conv2d(2, 3, 3), torch.zeros(0, 2, 6, 6), scale=1.0)
    assert y.shape == (0, 3, 4, 4)
    assert row["cycles"] == 0


# -- which layers ------------------------------------------------------------------------------


def test_papers_defaults_leave_first_linear_and_depthwise_in_float():
    net = small_net()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        net(images())
        report = sim.report().set_index("name")
    assert report["threads"].to_dict() == {"0": 0, "3": 2, "6": 0, "8": 2, "11": 0}
    assert "first convolution" in report.loc["0", "reason"]
    assert "depthwise" in report.loc["6", "reason"]
    assert "fully connected" in report.loc["11", "reason"]
    assert (report.loc[["3", "8"], "reason"] == "").all()
    # Layers in float count their work at T = 1: it is what network_speedup is about.
    assert report.loc["0", "macs"] == 4 * 9 * 8 * 4 * 9


def test_each_default_can_be_switched_on():
    net = small_net()
    with sysmt.attach(net, first=True, linear=True, depthwise=True) as sim:
        sim.calibrate([images()], images=4)
        net(images())
        assert (sim.report()["threads"] == 2).all()
        assert sim.speedup == sim.network_speedup == 2.0


def test_first_is_the_first_executed_not_the_first_defined():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.later = nn.Conv2d(3, 2, 1)
            self.sooner = nn.Conv2d(1, 3, 1)

        def forward(self, x):
            return self.later(self.sooner(x))

    net = Backwards()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        net(images())
        assert sim.report().set_index("name")["threads"].to_dict() == {"later": 2, "sooner": 0}


def test_network_speedup_counts_float_layers_at_one_thread():
    net = small_net()
    with sysmt.attach(net, sysmt.ArrayConfig(threads=4)) as sim:
        sim.calibrate([images()], images=4)
        sim.set_threads({"8": 2})
        net(images())
        macs = sim.report().set_index("name")["macs"]
        simulated = macs["3"] + macs["8"]
        assert sim.speedup == simulated / (macs["3"] / 4 + macs["8"] / 2)
        rest = macs.sum() - simulated
        assert sim.network_speedup == pytest.approx(
            macs.sum() / (rest + macs["3"] / 4 + macs["8"] / 2), abs=0
        )
        assert sim.network_speedup_cycles > 1
        sim.reset()
        assert sim.speedup == sim.network_speedup == sim.speedup_cycles == 1.0


def test_module_used_twice_counts_both_uses_and_calibrates_over_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)

        def forward(self, x):
            return self.conv(3 * self.conv(x).relu())

    net = Twice()
    with torch.no_grad():
        net.conv.weight.fill_(1.0)
    x = torch.full((2, 1, 4, 4), 0.5)
    with sysmt.attach(net, first=True) as sim:
        sim.calibrate([x], images=2)
        assert sim.ranges()["conv"].scale == np.float32(13.5 / 255)  # 3 * 9 * 0.5 in the second use
        net(x)
        row = sim.report().iloc[0]
    assert row["macs"] == 2 * 2 * 16 * 9


def test_inner_dimension_too_large_names_the_layer():
    net = nn.Sequential(nn.Linear(70_000, 1, bias=False))
    with pytest.raises(sysmt.UnsupportedLayerError, match="'0'.*70000"):
        sysmt.attach(net, linear=True)


# -- modes of use ------------------------------------------------------------------------------


def test_works_under_inference_mode_and_in_train_mode():
    net = small_net()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        plain = net(images())
        with torch.inference_mode():
            assert torch.equal(net(images()), plain)
        net.train()
        before = net[4].running_mean.clone()
        with torch.no_grad():
            net(images())
        assert not torch.equal(net[4].running_mean, before)
        assert net.training


def test_calibration_restores_training_flags_and_statistics():
    net = small_net().train()
    net[5].eval()
    state = copy.deepcopy(net.state_dict())
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
    assert net.training
    assert net[0].training
    assert not net[5].training
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_channels_last_in_channels_last_out():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3)
    x = torch.rand(2, 8, 6, 6)
    y, _, _, _ = run_one_layer(conv, x)
    y_last, _, _, _ = run_one_layer(conv, x.to(memory_format=torch.channels_last))
    assert torch.equal(y, y_last)
    assert y_last.is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous()


def test_no_layer_is_computed_twice(monkeypatch):
    calls = []
    run = ArrayLayer._run
    monkeypatch.setattr(
        ArrayLayer, "_run", lambda self, *a, **k: calls.append(self.name) or run(self, *a, **k)
    )
    net = small_net()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        net(images())
    assert calls == ["3", "8"]


def test_user_hooks_still_run():
    net = small_net()
    seen = []
    net[3].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        net(images())
    assert len(seen) == 2


def test_gradients_say_that_they_stop():
    net = small_net()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        with pytest.raises(sysmt.UnsupportedLayerError, match="'8'.*gradient"):
            net(images()).sum().backward()


def test_cpu_threads_do_not_change_bits():
    net = small_net()
    previous = torch.get_num_threads()
    try:
        outputs, reports = [], []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with sysmt.attach(net, sysmt.ArrayConfig(threads=4)) as sim:
                sim.set_ranges({"3": 0.01, "8": 0.01})
                outputs.append(net(images(5)))
                reports.append(sim.report().to_dict())
        assert all(torch.equal(outputs[0], other) for other in outputs)
        assert reports[0] == reports[1] == reports[2]
    finally:
        torch.set_num_threads(previous)


# -- attach and detach -------------------------------------------------------------------------


def test_detach_leaves_no_trace():
    net = small_net()
    keys = list(net.state_dict())
    before = net(images())
    dicts = {name: dict(module.__dict__) for name, module in net.named_modules()}
    sim = sysmt.attach(net)
    assert list(net.state_dict()) == keys
    sim.calibrate([images()], images=4)
    net(images())
    sim.detach()
    sim.detach()
    assert torch.equal(net(images()), before)
    for name, module in net.named_modules():
        assert module.__dict__.keys() == dicts[name].keys()
        assert "forward" not in module.__dict__


def test_exception_inside_detaches():
    net = small_net()
    with pytest.raises(KeyError), sysmt.attach(net):
        raise KeyError
    assert not any("forward" in module.__dict__ for module in net.modules())


def test_failing_forward_leaves_the_model_usable():
    net = small_net()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        good = net(images())
        with pytest.raises(sysmt.UnsupportedLayerError):
            net(torch.full((1, 1, 9, 8), float("nan")))
        assert torch.equal(net(images()), good)


def test_instance_forward_of_a_float_layer_comes_back():
    net = small_net()
    net[11].forward = lambda x: x[:, :2]
    mine = net[11].forward
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        assert net(images()).shape == (4, 2)
    assert net[11].forward is mine


def test_nested_attach_is_refused():
    net = small_net()
    with sysmt.attach(net), pytest.raises(sysmt.ConfigError, match="attached"):
        sysmt.attach(net)
    with sysmt.attach(net[3:]), pytest.raises(sysmt.ConfigError, match="attached"):
        sysmt.attach(net)
    sysmt.attach(net).detach()


def test_state_dict_loads_while_attached_and_repacks():
    net, other = small_net(0), small_net(5)
    with sysmt.attach(net) as sim, sysmt.attach(other) as other_sim:
        sim.calibrate([images()], images=4)
        net(images())
        net.load_state_dict(other.state_dict())
        sim.calibrate([images()], images=4)
        other_sim.calibrate([images()], images=4)
        assert torch.equal(net(images()), other(images()))


@pytest.mark.parametrize("how", ["no_grad", "data", "replace", "prune", "optimizer"])
def test_changed_weights_are_seen(how):
    net = small_net()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        ranges = sim.ranges()
        before = net(images())
        conv = net[3]
        if how == "no_grad":
            with torch.no_grad():
                conv.weight.mul_(-1)
        elif how == "data":
            conv.weight.data.mul_(-1)
        elif how == "replace":
            conv.weight = nn.Parameter(-conv.weight.detach())
        elif how == "prune":
            prune.random_unstructured(conv, "weight", 0.9)
        else:
            conv.weight.grad = torch.ones_like(conv.weight)
            torch.optim.SGD([conv.weight], lr=1.0).step()
        after = net(images())
        assert not torch.equal(before, after)
    with sysmt.attach(net) as fresh:
        fresh.set_ranges(ranges)
        assert torch.equal(net(images()), after)


# -- calibration -------------------------------------------------------------------------------


def test_range_is_the_mean_of_image_maxima_over_exactly_the_images_asked_for():
    net = nn.Sequential(nn.Identity(), nn.Conv2d(1, 1, 1))
    data = torch.tensor([1.0, 2.0, 6.0, 100.0]).reshape(4, 1, 1, 1)
    loader = [(data[:2], torch.zeros(2)), (data[2:], torch.zeros(2))]
    with sysmt.attach(net, first=True) as sim:
        sim.calibrate(loader, images=3)
        assert sim.ranges() == {"1": ActivationRange(np.float32(3.0 / 255))}
        with pytest.warns(UserWarning, match="4 images; 5"):
            sim.calibrate(loader, images=5)
        assert sim.ranges()["1"].scale == np.float32(27.25 / 255)


def test_negative_activations_make_a_layer_signed():
    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    data = torch.tensor([[1.0, 2.0], [-4.0, 1.0]]).reshape(2, 1, 1, 2)
    with sysmt.attach(net, first=True) as sim:
        sim.calibrate([data], images=2)
        assert sim.ranges() == {"0": ActivationRange(np.float32(3.0 / 127), signed=True)}


def test_percentile():
    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    data = torch.arange(101.0).reshape(1, 1, 1, 101)
    with sysmt.attach(net, first=True) as sim:
        sim.calibrate([data], images=1, percentile=90)
        assert sim.ranges()["0"].scale == np.float32(90 / 255)
        with pytest.raises(sysmt.ConfigError, match="percentile"):
            sim.calibrate([data], images=1, percentile=0)


def test_unsigned_layer_meeting_negatives_clamps_and_warns_once():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    with sysmt.attach(net, first=True) as sim:
        sim.set_ranges({"0": 0.5})
        with pytest.warns(UserWarning, match="'0'"):
            y = net(torch.full((1, 1, 1, 1), -3.0))
        assert y.item() == 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            net(torch.full((1, 1, 1, 1), -3.0))


def test_negative_zero_does_not_warn():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    with sysmt.attach(net, first=True) as sim, warnings.catch_warnings():
        warnings.simplefilter("error")
        sim.set_ranges({"0": 0.5})
        net(torch.full((1, 1, 1, 1), -0.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_not_finite_are_named(value):
    net = small_net()
    x = images()
    x[2, 0, 3, 3] = value
    with sysmt.attach(net) as sim:
        with pytest.raises(sysmt.CalibrationError, match=r"'3'.*image 2"):
            sim.calibrate([x], images=4)
        sim.calibrate([images()], images=4)
        with pytest.raises(sysmt.UnsupportedLayerError, match="'3'.*NaN"):
            net(x)


def test_uncalibrated_layer_is_named():
    net = small_net()
    with sysmt.attach(net), pytest.raises(sysmt.CalibrationError, match="'3'"):
        net(images())


@pytest.mark.parametrize(
    "loader", [[], torch.rand(4, 1, 9, 8), [None], ["text"], [{"x": 1}], [np.zeros((1, 1, 9, 8))]]
)
def test_bad_loader(loader):
    with sysmt.attach(small_net()) as sim, pytest.raises(sysmt.CalibrationError):
        sim.calibrate(loader, images=4)


def test_calibrate_and_set_threads_reset_the_counters():
    net = small_net()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        assert sim.report()["macs"].sum() == 0
        net(images())
        assert sim.report()["macs"].sum() > 0
        sim.set_threads(4)
        assert sim.report()["macs"].sum() == 0
        net(images())
        net(images())
        assert sim.images == 8
        assert sim.report().set_index("name").loc["3", "images"] == 8


# -- reordering --------------------------------------------------------------------------------


def wide_counts_by_hand(module, x, range_):
    geometry = LayerGeometry.of(module)
    a = im2col(quantize_activations(geometry.pad_float(x).numpy(), range_), geometry)
    wide = (a < -8) | (a.astype(int) > 7) if range_.signed else a > 15
    return wide.sum((1, 2))


@pytest.mark.parametrize("signed", [False, True])
def test_wide_counts_include_im2col_zeros(signed):
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2)
    x = torch.randn(3, 4, 9, 8)
    x = x if signed else x.relu()
    net = nn.Sequential(conv)
    with sysmt.attach(net, first=True) as sim:
        sim.calibrate([x], images=3, reorder=True)
        counted = np.array(sim.layers["0"].wide_counts)
        assert np.array_equal(counted, wide_counts_by_hand(conv, x, sim.ranges()["0"]))


def test_reordering_changes_results_and_can_be_switched():
    net = small_net()
    with sysmt.attach(net, sysmt.ArrayConfig(threads=4)) as sim:
        sim.calibrate([images()], images=4)
        plain = net(images())
        with pytest.raises(sysmt.CalibrationError, match="statistics"):
            sim.reorder = True
        sim.calibrate([images()], images=4, reorder=True)
        reordered = net(images())
        assert not torch.equal(plain, reordered)
        sim.reorder = False
        assert torch.equal(net(images()), plain)


def test_reordering_needs_two_passes():
    with sysmt.attach(small_net()) as sim, pytest.raises(sysmt.CalibrationError, match="once"):
        sim.calibrate(iter([images()]), images=4, reorder=True)


# -- capture, ranges, errors -------------------------------------------------------------------


@pytest.mark.parametrize("reorder", [False, True])
def test_captured_operands_reproduce_the_layer(reorder):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False))
    x = torch.rand(3, 4, 6, 6)
    with sysmt.attach(net, sysmt.ArrayConfig(threads=4), first=True) as sim:
        sim.calibrate([x], images=3, reorder=reorder)
        captured = sim.capture("0", image=2, group=1)
        assert captured.a_mk is None
        y = net(x)
        result = sysmt.simulate_gemm(captured.a_mk, captured.b_kn, captured.config, order=captured.order)
        scales = weight_scales(net[0].weight.detach().numpy())[3:]
        expected = dequantize(result.out_mn, sim.ranges()["0"].scale, scales).T.reshape(3, 4, 4)
        assert np.array_equal(y[2, 3:].detach().numpy(), expected)
        assert (captured.order is not None) == reorder
        kept = captured.a_mk
        net(x * 0.5)
        assert captured.a_mk is kept
        with pytest.raises(sysmt.ConfigError, match="group"):
            sim.capture("0", group=2)


def test_errors_compare_with_one_thread():
    net = small_net()
    with sysmt.attach(net, sysmt.ArrayConfig(threads=4), errors=True) as sim:
        sim.calibrate([images()], images=4)
        taken = {}
        net[3].register_forward_hook(lambda module, args, output: taken.update(x=args[0], y=output))
        net(images())
        report = sim.report().set_index("name")
        one, _ = expected_layer(net[3], taken["x"], sim.ranges()["3"], sim.config.replace(threads=1))
        noise = (taken["y"].detach().numpy().astype(np.float64) - one) ** 2
        assert report.loc["3", "mse"] == pytest.approx(noise.mean(), rel=1e-12)
        signal = (one.astype(np.float64) ** 2).sum()
        assert report.loc["3", "sqnr_db"] == pytest.approx(10 * math.log10(signal / noise.sum()))
        assert math.isnan(report.loc["0", "mse"])
        sim.set_threads(1)
        net(images())
        assert sim.report().set_index("name").loc["3", "mse"] == 0.0
        assert sim.report().set_index("name").loc["3", "sqnr_db"] == math.inf


def test_ranges_travel():
    net = small_net()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        ranges, y = sim.ranges(), net(images())
    assert set(ranges) == {"3", "8"}
    with sysmt.attach(net) as sim:
        sim.set_ranges({name: range_.scale for name, range_ in ranges.items()})
        assert torch.equal(net(images()), y)


def test_reconfigure_keeps_ranges():
    net = small_net()
    with sysmt.attach(net, sysmt.ArrayConfig(threads=4)) as sim:
        sim.calibrate([images()], images=4)
        y = net(images())
        sim.reconfigure(policy="S+W", rows=8)
        changed = net(images())
        assert not torch.equal(y, changed)
        with pytest.raises(sysmt.ConfigError, match="set_threads"):
            sim.reconfigure(threads=2)
    with sysmt.attach(net, sysmt.ArrayConfig(threads=4, policy="S+W")) as fresh:
        fresh.calibrate([images()], images=4)
        assert torch.equal(net(images()), changed)


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose2d(1, 1, 1), nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.LazyConv2d(1, 1)]
)
def test_convolutions_that_the_array_does_not_do(layer):
    net = nn.ModuleDict({"fine": nn.Conv2d(1, 1, 1), "odd": layer, "too": nn.Conv2d(1, 1, 1)})
    with pytest.raises(sysmt.UnsupportedLayerError, match="'odd'"):
        sysmt.attach(net, strict=True)
    assert not any("forward" in module.__dict__ for module in net.modules())
    sysmt.attach(net, exclude=["odd"], strict=True).detach()
    sysmt.attach(net).detach()  # it stays in float


def test_a_subclass_with_its_own_forward_runs_as_it_says():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(nn.Conv2d(1, 1, 1), Doubled(1, 1, 1), nn.Conv2d(1, 1, 1))
    plain = nn.Sequential(net[0], nn.Conv2d(1, 1, 1))
    plain[1].load_state_dict(net[1].state_dict())
    with sysmt.attach(plain) as sim:
        sim.calibrate([images()], images=4)
        once, row = plain(images()), sim.report().iloc[1]
    with sysmt.attach(net[:2]) as sim:
        sim.calibrate([images()], images=4)
        assert torch.equal(net[:2](images()), 2 * once)
        assert sim.report().iloc[1].drop("name").equals(row.drop("name"))
    with sysmt.attach(net, exclude=["1"]) as sim:
        sim.calibrate([images()], images=4)
        net(images())
        assert sim.report().set_index("name").loc["1", "reason"] == "excluded by name"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(), "no Conv2d"),
        (nn.Sequential(nn.Linear(2, 2)), "fully connected"),
        (nn.Sequential(nn.Conv2d(1, 1, 1)), "first convolution"),
    ],
)
def test_nothing_to_simulate(model, message):
    with pytest.raises(sysmt.ConfigError, match=message):
        sysmt.attach(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_other_dtypes_are_refused_by_name(dtype):
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1))
    with sysmt.attach(net, first=True) as sim:
        sim.set_ranges({"0": 1.0, "1": 1.0})
        with pytest.raises(sysmt.UnsupportedLayerError, match=r"'0'.*float32"):
            net(torch.ones(1, 1, 2, 2, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (1, 4), (3, 1, 1)])
def test_wrong_shapes_are_refused_by_name(shape):
    net = nn.Sequential(nn.Conv2d(3, 1, 3))
    with sysmt.attach(net, first=True) as sim:
        sim.set_ranges({"0": 1.0})
        with pytest.raises(sysmt.OperandError, match="'0'"):
            net(torch.ones(shape))


def test_weights_that_are_not_finite():
    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    with torch.no_grad():
        net[0].weight.fill_(float("inf"))
    with sysmt.attach(net, first=True) as sim:
        sim.set_ranges({"0": 1.0})
        with pytest.raises(sysmt.UnsupportedLayerError, match=r"'0'.*weights"):
            net(torch.ones(1, 1, 1, 1))


def test_set_threads_errors():
    net = small_net()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        with pytest.raises(sysmt.ConfigError, match=r"1, 2 or 4"):
            sim.set_threads(3)
        with pytest.raises(sysmt.ConfigError, match=r"'88'.*did you mean '8'"):
            sim.set_threads({"3": 4, "88": 2})
        assert sim.threads() == {"3": 2, "8": 2}
        with pytest.raises(sysmt.ConfigError, match="first convolution"):
            sim.set_threads({"0": 2})
        with pytest.raises(sysmt.ConfigError, match="True"):
            sim.set_threads(True)


def test_naming_the_first_convolution_before_it_is_known():
    net = small_net()
    with sysmt.attach(net) as sim:
        sim.set_threads({"0": 4})
        with pytest.raises(sysmt.ConfigError, match="'0'.*first"):
            sim.calibrate([images()], images=4)


def test_exclude_must_exist():
    with pytest.raises(sysmt.ConfigError, match="'conv'"):
        sysmt.attach(small_net(), exclude=["conv"])
    with pytest.raises(sysmt.ConfigError, match="exclude=3 has type int; names of layers"):
        sysmt.attach(small_net(), exclude=3)
    with pytest.raises(sysmt.ConfigError, match="exclude has 3 of type int in it"):
        sysmt.attach(small_net(), exclude=["0", 3])


def test_attach_arguments():
    with pytest.raises(sysmt.ConfigError, match="ArrayConfig"):
        sysmt.attach(small_net(), {"threads": 2})
    with pytest.raises(sysmt.ConfigError, match="Module"):
        sysmt.attach("resnet18")


# -- found by review, and kept from coming back --------------------------------------------------


def test_an_inplace_operation_may_follow_with_gradients_on():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(True), nn.Conv2d(2, 2, 3), nn.ReLU(inplace=True)).eval()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        y = net(images())
        with torch.no_grad():
            assert torch.equal(y, net(images()))
        with pytest.raises(sysmt.UnsupportedLayerError, match="gradient"):
            y.sum().backward()


def test_a_single_weight_changed_through_data_is_seen():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, bias=False))
    x = torch.rand(1, 3, 8, 8)
    with sysmt.attach(net) as sim, torch.no_grad():
        sim.calibrate([x], images=1)
        before = net(x)
        net[1].weight.data[5, 7, 1, 2] = 0.7
        after = net(x)
        assert not torch.equal(before, after)
        net[1].weight.data.copy_(net[1].weight.data.flip(0))  # the same values, elsewhere
        assert torch.equal(net(x).flip(1), after)


def test_images_count_once_however_often_a_layer_runs():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(1, 4, 3, padding=1)
            self.shared = nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            x = self.shared(self.shared(self.first(x)))
            return self.head(x.permute(0, 2, 3, 1).reshape(-1, 4))

    net = Tokens()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        net(images())
        net(images(3))
        assert sim.images == 7
        sim.reset()
        assert sim.images == 0


def test_attention_layers_run_on_the_array_or_are_named():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(1, 8, 4, 4)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            return self.encoder(self.patch(x).flatten(2).transpose(1, 2))

    net = Encoder().eval()
    before = torch.backends.mha.get_fastpath_enabled()
    with sysmt.attach(net, linear=True) as sim, torch.no_grad():
        sim.calibrate([torch.rand(2, 1, 8, 8)], images=2)
        net(torch.rand(2, 1, 8, 8))
        macs = sim.report().set_index("name")["macs"]
        assert macs["encoder.linear1"] == macs["encoder.linear2"] == 2 * 4 * 8 * 16
        assert macs["encoder.self_attn.in_proj"] == 3 * macs["encoder.self_attn.out_proj"] == 2 * 4 * 8 * 24
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_the_first_convolution_stays_in_float_after_the_error_that_names_it():
    net = small_net()
    with sysmt.attach(net) as sim:
        sim.set_ranges({"0": 0.1, "3": 0.1, "8": 0.1})
        sim.set_threads({"0": 2})
        for _ in range(2):
            with pytest.raises(sysmt.ConfigError, match="'0'"):
                net(images())
        sim.set_threads(2)
        net(images())
        assert sim.report().set_index("name").loc["0", "threads"] == 0


def test_a_capture_that_cannot_be_filled_fails_once():
    net = small_net()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        sim.capture("3", image=9)
        with pytest.raises(sysmt.OperandError, match="image 9"):
            net(images())
        sim.reset()
        net(images())
        assert sim.report().set_index("name").loc["3", "images"] == 4


def test_a_failed_calibration_changes_nothing():
    class Failing:
        passes = 0

        def __iter__(self):
            Failing.passes += 1
            yield images() * 2
            if Failing.passes == 2:
                raise KeyboardInterrupt

    net = small_net()
    with sysmt.attach(net, sysmt.ArrayConfig(threads=4)) as sim:
        sim.calibrate([images()], images=4, reorder=True)
        ranges, before = sim.ranges(), net(images())
        with pytest.raises(KeyboardInterrupt):
            sim.calibrate(Failing(), images=8, reorder=True)
        assert sim.ranges() == ranges
        assert sim.report()["macs"].sum() == 0
        assert torch.equal(net(images()), before)


def test_an_attached_network_can_be_copied():
    net = small_net()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        net(images())
        twin = copy.deepcopy(net)
        y = twin(images())
        assert sim.images == 4  # the copy is nobody's business but its own
    assert torch.equal(y, net(images()))  # a plain float network


def test_a_trainable_bias_does_not_lose_its_gradient_silently():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    net[1].bias.requires_grad_(True)
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        with pytest.raises(sysmt.UnsupportedLayerError, match="gradient"):
            net(images()).sum().backward()


def test_linear_without_rows_or_features():
    for shape in ((2, 0, 5), (0, 4, 5)):
        y, row, _, _ = run_one_layer(nn.Linear(5, 3), torch.rand(shape), scale=1.0)
        assert y.shape == (*shape[:-1], 3)
        assert row["cycles"] == 0


def test_a_default_dtype_does_not_matter():
    net = nn.Sequential(nn.Conv2d(1, 2, 3))
    x = torch.rand(1, 1, 5, 5)
    with sysmt.attach(net, first=True) as sim:
        sim.calibrate([x], images=1)
        y = net(x)
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(net(x), y)
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_changed_stride_is_followed():
    net = small_net()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4)
        net(images())
        net[8].stride = (2, 2)
        shapes = []
        net[8].register_forward_hook(lambda module, args, y: shapes.append(tuple(y.shape)))
        net(images())
        assert shapes == [(4, 8, 2, 2)]


def test_large_finite_activations_calibrate():
    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    with sysmt.attach(net, first=True) as sim:
        sim.calibrate([torch.tensor([2e38, 3e38]).reshape(1, 1, 1, 2)], images=1)
        assert sim.ranges()["0"].scale == np.float32(np.float64(np.float32(3e38)) / 255)


@pytest.mark.parametrize("bad", [{"3": "x"}, [1], {"3": None}])
def test_ranges_that_are_none(bad):
    with sysmt.attach(small_net()) as sim, pytest.raises(sysmt.ConfigError):
        sim.set_ranges(bad)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_a_forward_takes_its_memory_from_the_one_before():
    net = build_model("resnet20")
    x = torch.rand(32, 3, 32, 32)
    with sysmt.attach(net) as sim, torch.inference_mode():
        sim.calibrate([x], images=32)
        fresh_pages = []
        for _ in range(10):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            net(x)
            fresh_pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(fresh_pages[5:]) * resource.getpagesize() < 32 * 16 * 32 * 32 * 4  # one layer's output


LIVE_BESIDE_PACKED = """
from pathlib import Path
import torch, sysmt

def allocated_bytes():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["RssAnon"].split()[0])

conv, x = torch.nn.Conv2d(256, 256, 3, padding=1), torch.rand(1, 256, 64, 64)
sim = sysmt.attach(torch.nn.Sequential(conv), sysmt.ArrayConfig(threads=4), first=True)
sim.calibrate([x], images=1)
before = allocated_bytes()
conv(x)
(packed,) = sim.layers["0"].weights._packed.values()
print(allocated_bytes() - before - packed.weight_bytes)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_a_layer_leaves_nothing_but_its_packed_weights():
    """In a process whose heap hands back at once what is freed: planes and sums took three megabytes."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIVE_BESIDE_PACKED]
    done = subprocess.run(command, env=os.environ | at_once, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1e6


def test_own_weight_scales_decide_what_is_narrow():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, bias=False)
    with torch.no_grad():
        conv.weight.copy_(0.3 * torch.sign(conv.weight) * (conv.weight.abs() > 0.05))
    x = torch.rand(2, 4, 8, 8)
    with sysmt.attach(nn.Sequential(conv), sysmt.ArrayConfig(threads=2, policy="S+Aw"), first=True) as sim:
        sim.calibrate([x], images=2)
        wide = conv(x)
        assert sim.report()["reduced_activations"][0] > 0
        assert set(np.unique(sim.layers["0"].weight_codes())) == {-127, 0, 127}
        sim.set_weight_scales({"0": 0.3})
        narrow = conv(x)
        assert sim.report()["reduced_activations"][0] == 0  # S+Aw spares pairs whose weight is narrow
        assert set(np.unique(sim.layers["0"].weight_codes())) == {-1, 0, 1}
        sim.set_threads(1)
        assert torch.equal(conv(x), narrow)
        sim.set_threads(2)
        sim.set_weight_scales({"0": np.full(6, 0.1, np.float32)})
        assert set(np.unique(sim.layers["0"].weight_codes())) == {-3, 0, 3}
        with torch.no_grad():
            conv.weight.mul_(1000)
        conv(x)
        assert set(np.unique(sim.layers["0"].weight_codes())) == {-127, 0, 127}  # clamped
        with torch.no_grad():
            conv.weight.div_(1000)
        sim.set_weight_scales({"0": None})
        assert torch.allclose(conv(x), wide)


@pytest.mark.parametrize(
    "scales",
    [0, -1.0, float("nan"), [1.0, 2.0], "large", [float("inf")] * 6, 1e-45, 1e39, [1.0] * 5 + [1e-38]],
)
def test_impossible_weight_scales_are_refused(scales):
    with sysmt.attach(nn.Sequential(nn.Conv2d(4, 6, 3)), first=True) as sim:
        with pytest.raises(sysmt.errors.ConfigError, match="weight scales of layer '0'"):
            sim.set_weight_scales({"0": scales})
        with pytest.raises(sysmt.errors.ConfigError, match="set_weight_scales"):
            sim.set_weight_scales({"none": 1.0})
        with pytest.raises(sysmt.errors.ConfigError, match="a mapping"):
            sim.set_weight_scales(1.0)


def test_an_impossible_setting_is_refused_each_time():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    x = torch.rand(1, 3, 6, 6)
    with sysmt.attach(nn.Sequential(conv), first=True) as sim:
        sim.calibrate([x], images=1)
        conv(x)
        conv.padding = (2, 2, 2)
        for _ in range(2):
            with pytest.raises(Exception, match="padding|unpack|2"):
                conv(x)


def test_weights_of_the_same_bytes_and_another_shape_are_packed_anew():
    conv = nn.Conv2d(1, 1, (1, 3), bias=False)
    x = torch.rand(1, 1, 5, 5)
    with sysmt.attach(nn.Sequential(conv), first=True) as sim:
        sim.calibrate([x], images=1)
        conv(x)
        conv.weight = nn.Parameter(conv.weight.detach().transpose(2, 3).contiguous())
        with pytest.raises(sysmt.errors.SysmtError):  # the layer still says 1 x 3
            conv(x)


def test_a_forward_that_is_interrupted_leaves_nothing_half_done(monkeypatch):
    conv = nn.Conv2d(3, 4, 3)
    x = torch.rand(1, 3, 6, 6)
    with sysmt.attach(nn.Sequential(conv), first=True) as sim:
        sim.calibrate([x], images=1)
        expected = conv(x)

        def interrupted(*args):
            raise KeyboardInterrupt

        with torch.no_grad():
            conv.weight.mul_(4)
        with monkeypatch.context() as patch:
            patch.setattr("sysmt.nn.array.layer_weights.quantize_weights", interrupted)
            with pytest.raises(KeyboardInterrupt):
                conv(x)
        with torch.no_grad():
            conv.weight.div_(4)
        assert torch.equal(conv(x), expected)


def test_calibration_is_the_same_however_numpy_treats_errors():
    net = small_net()
    tiny = images() * torch.tensor([1.0, 1e-30, 1e-44, 0.0]).reshape(4, 1, 1, 1)
    results = []
    for how in ("warn", "raise"):
        with np.errstate(all=how), sysmt.attach(net, sysmt.ArrayConfig(threads=4)) as sim:
            sim.calibrate([tiny], images=4, reorder=True)
            results.append((net(tiny), sim.ranges(), sim.report()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][2].equals(results[1][2])


@pytest.mark.parametrize("percentile", [True, "99", 0, -1.0, 100.5, float("nan"), [99]])
def test_percentiles_that_are_none(percentile):
    with sysmt.attach(small_net()) as sim, pytest.raises(sysmt.ConfigError, match="percentile="):
        sim.calibrate([images()], images=4, percentile=percentile)


@pytest.mark.parametrize("percentile", [np.float32(99), np.int64(99), 99, 99.0])
def test_numbers_of_every_kind_are_percentiles(percentile):
    net = small_net()
    with sysmt.attach(net) as sim:
        sim.calibrate([images()], images=4, percentile=percentile)
        assert sim.ranges() != {}
        given = sim.ranges()
        sim.calibrate([images()], images=4, percentile=99.0)
        assert sim.ranges() == given

"""Low-precision BatchNorm: the paper's equations, what is kept in memory, whole networks, the array."""

import contextlib
import copy
import pickle
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sysmt
from sysmt.errors import ConfigError, OperandError
from sysmt.nn import LowPrecisionBatchNorm1d, LowPrecisionBatchNorm2d
from sysmt.nn.data.labelled_images import open_data
from sysmt.nn.low_bit.low_precision_batchnorm import convert_batchnorm, quantize_gradients, restore_batchnorm
from sysmt.nn.low_bit.packed_activations import (
    in_memory_order,
    pack_values,
    recomputed_activations,
    saved_bytes,
)
from sysmt.nn.low_bit.packed_pooling import packed_max_pool2d
from sysmt.nn.networks.models import build_model
from sysmt.nn.networks.training import train
from sysmt.quant.logscale import FORMATS, GRADIENT_FORMAT, approximate, packed_bytes


def layer(channels=3, fmt="L4", dtype=torch.float64, **options):
    """A layer with scales and shifts that matter."""
    torch.manual_seed(0)
    bn = LowPrecisionBatchNorm2d(channels, fmt, dtype=dtype, **options)
    if bn.affine:
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias)
    return bn


def batch(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def by_channel(values):
    return values[None, :, None, None]


def small_network(inplace=False, gap=None):
    """Cromulent, as the paper has it: only BatchNorm, ReLU and convolutions (or pooling) in a row."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        LowPrecisionBatchNorm2d(8),
        nn.ReLU(inplace),
        nn.Conv2d(8, 8, 3, padding=1),
        LowPrecisionBatchNorm2d(8),
        gap or nn.Identity(),
        nn.ReLU(inplace),
        nn.Conv2d(8, 4, 3),
    )


def gradients(model, x, recompute):
    model.zero_grad()
    if recompute:
        with recomputed_activations():
            loss = model(x).square().sum()
    else:
        loss = model(x).square().sum()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


# -- the layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_normalised_value_is_approximated_in_the_middle(fmt):
    bn, x = layer(fmt=fmt), batch(5, 3, 4, 6)
    values = x.numpy()
    mean, variance = values.mean((0, 2, 3), keepdims=True), values.var((0, 2, 3), keepdims=True)
    normalised = (values - mean) / np.sqrt(variance + bn.eps)  # equation (1)
    weight, bias = by_channel(bn.weight.detach().numpy()), by_channel(bn.bias.detach().numpy())
    expected = weight * approximate(normalised, fmt) + bias
    assert bn(x).detach().numpy() == pytest.approx(expected, rel=1e-12)
    with torch.no_grad():
        assert torch.equal(bn(x), layer(fmt=fmt)(x))
    bn.eval()
    by_running = (values - by_channel(bn.running_mean.numpy())) / np.sqrt(
        by_channel(bn.running_var.numpy()) + bn.eps
    )
    expected = weight * approximate(by_running, fmt) + bias
    assert bn(x).detach().numpy() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}])
def test_the_gradient_is_equation_2(training, options):
    bn = layer(**options).train(training)
    x = batch(5, 3, 4, 6).requires_grad_()
    upstream = batch(5, 3, 4, 6, seed=2)
    axes = (0, 2, 3)
    values = x.detach().numpy()
    if training:
        mean, variance = values.mean(axes, keepdims=True), values.var(axes, keepdims=True)
    else:
        mean, variance = np.zeros((1, 3, 1, 1)), np.ones((1, 3, 1, 1))
    deviation = np.sqrt(variance + bn.eps)
    n = approximate((values - mean) / deviation, "L4")
    g = upstream.numpy()
    weight = 1.0 if bn.weight is None else by_channel(bn.weight.detach().numpy())
    g_n = weight * g
    expected = g_n / deviation
    if training:
        centred = g_n - g_n.mean(axes, keepdims=True) - n * (n * g_n).mean(axes, keepdims=True)
        expected = centred / deviation
    bn(x).backward(upstream)
    assert x.grad.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if bn.affine:
        assert bn.weight.grad.numpy() == pytest.approx((n * g).sum(axes))
        assert bn.bias.grad.numpy() == pytest.approx(g.sum(axes))


def test_where_nothing_is_lost_it_is_torch_s_layer():
    """±1/2 four times as often as ±2: mean 0, variance 1, and all of them levels of L4."""
    x = torch.tensor([0.5, -0.5] * 4 + [2.0, -2.0], dtype=torch.float64).view(10, 1, 1, 1).requires_grad_()
    upstream = batch(10, 1, 1, 1)
    ours, torchs = layer(1, eps=1e-30), nn.BatchNorm2d(1, eps=1e-30, dtype=torch.float64)
    torchs.load_state_dict(ours.state_dict())
    found = []
    for bn in (ours, torchs):
        x.grad = None
        y = bn(x)
        y.backward(upstream)
        found.append([y, x.grad, bn.weight.grad, bn.bias.grad])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_scale_and_shift_pass_gradcheck():
    """The layer is differentiable in both; in x it is a staircase, for which equation (2) stands in."""
    bn, x = layer(), batch(4, 3, 2, 2)

    def with_parameters(weight, bias):
        return torch.func.functional_call(bn, {"weight": weight, "bias": bias}, (x,))

    inputs = (bn.weight.detach().clone().requires_grad_(), bn.bias.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(with_parameters, inputs)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_are_torch_s_to_the_bit(momentum):
    ours = LowPrecisionBatchNorm2d(3, momentum=momentum)
    torchs = nn.BatchNorm2d(3, momentum=momentum)
    for seed in range(3):
        x = batch(4, 3, 5, 5, dtype=torch.float32, seed=seed)
        ours(x), torchs(x)
    for key, value in torchs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    ours.eval()(x)
    assert torch.equal(ours.running_mean, torchs.running_mean)


def test_statistics_of_the_batch_where_none_are_tracked():
    bn = layer(track_running_stats=False)
    x = batch(6, 3, 4, 4)
    assert bn.running_mean is None
    assert torch.equal(bn(x), bn.eval()(x))


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 4)])
def test_one_dimension(shape):
    torch.manual_seed(0)
    bn = LowPrecisionBatchNorm1d(3, "U5", dtype=torch.float64)
    x = batch(*shape).requires_grad_()
    flat = x.detach().numpy().reshape(7, 3, -1)
    normalised = (flat - flat.mean((0, 2), keepdims=True)) / np.sqrt(flat.var((0, 2), keepdims=True) + bn.eps)
    y = bn(x)
    assert y.detach().numpy().reshape(7, 3, -1) == pytest.approx(approximate(normalised, "U5"), rel=1e-12)
    y.square().sum().backward()
    assert x.grad.isfinite().all()


def test_no_gradient_where_none_is_wanted():
    bn, x = layer(), batch(4, 3, 2, 2)
    bn.weight.requires_grad_(False)
    bn(x).sum().backward()
    assert bn.weight.grad is None
    assert bn.bias.grad is not None
    bn.bias.requires_grad_(False)
    assert not bn(x).requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_finite_stays_visible(training):
    """Codes are always finite: without care, a network that diverges would seem to go on."""
    bn = layer().train(training)
    x = batch(4, 3, 2, 2)
    x[1, 1, 0, 0] = torch.nan
    y = bn(x)
    assert y[:, 1].isnan().any()
    assert y[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats(dtype):
    bn = layer(dtype=torch.float32)
    x = batch(4, 3, 2, 2, dtype=torch.float32).to(dtype).requires_grad_()
    y = bn(x)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert bn.weight.grad.dtype == torch.float32


def test_channels_last_stays_so_and_changes_nothing():
    found = []
    for memory in (torch.contiguous_format, torch.channels_last):
        bn = layer(4, dtype=torch.float32)
        x = batch(5, 4, 3, 6, dtype=torch.float32).to(memory_format=memory).requires_grad_()
        y = bn(x)
        y.square().sum().backward()
        with torch.no_grad():
            inference = bn.eval()(x)
        for tensor in (y, inference):
            assert tensor.is_contiguous(memory_format=memory)
        found.append([y, x.grad, bn.weight.grad, inference])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# -- what is kept ------------------------------------------------------------------------------


class AfterSomething(nn.Module):
    """The layer, on an activation that autograd has no other reason to keep."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + 1)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_layer_keeps_packed_codes_and_one_number_per_channel(fmt):
    x = batch(6, 5, 7, 3, dtype=torch.float32)
    found = saved_bytes(AfterSomething(LowPrecisionBatchNorm2d(5, fmt)), x)
    assert found == packed_bytes(x.numel(), FORMATS[fmt].bits) + 4 * 5
    assert saved_bytes(AfterSomething(nn.BatchNorm2d(5)), x) == 4 * x.numel() + 2 * 4 * 5


@pytest.mark.parametrize("inplace", [False, True])
def test_recomputed_activations_change_no_gradient_and_keep_codes_alone(inplace):
    model, x = small_network(inplace), batch(6, 2, 9, 9, dtype=torch.float32)
    for one, other in zip(gradients(model, x, False), gradients(model, x, True), strict=True):
        assert torch.equal(one, other)
    codes = packed_bytes(6 * 8 * 9 * 9, 4)
    small = 3 * 4 * 8  # per layer: 1 / deviation, scale and shift, of 8 channels each
    assert saved_bytes(model, x) == 2 * (codes + small)
    assert saved_bytes(model, x, recompute=False) == 2 * (codes + 4 * 8 + 4 * 6 * 8 * 9 * 9)


def test_the_float_activations_are_really_gone():
    model, x = small_network(), batch(6, 2, 9, 9, dtype=torch.float32)
    alive = []

    def watch(module, args, output):
        alive.append(weakref.ref(output))

    for module in model[1:-1]:
        module.register_forward_hook(watch)
    y = model(x)
    assert sum(reference() is not None for reference in alive) > 0
    del y
    alive.clear()
    with recomputed_activations():
        y = model(x)
    assert len(alive) == 6
    assert all(reference() is None for reference in alive)
    y.sum().backward()


class Changed(nn.Module):
    def forward(self, x):
        return x.mul_(0.5).add_(1)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class View(nn.Module):
    def forward(self, x):
        return x.transpose(2, 3)


@pytest.mark.parametrize("gap", [Changed(), Doubled(), View(), nn.MaxPool2d(2), nn.SiLU()])
@pytest.mark.parametrize("inplace", [False, True])
def test_whatever_comes_between_gradients_are_the_same(gap, inplace):
    model, x = small_network(inplace, gap), batch(3, 2, 8, 8, dtype=torch.float32)
    for one, other in zip(gradients(model, x, False), gradients(model, x, True), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "ceil_mode": True},
        {"kernel_size": 3, "stride": 1, "dilation": (1, 2)},
        {"kernel_size": 17, "stride": 1, "padding": 8},  # 289 places: left to torch
        {"kernel_size": 2, "return_indices": True},
    ],
)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_max_pooling_keeps_places_alone(options, memory):
    x = batch(3, 4, 11, 9, dtype=torch.float32).to(memory_format=memory).requires_grad_()
    found = []
    for context in (contextlib.nullcontext(), recomputed_activations()):
        x.grad = None
        with context:
            result = F.max_pool2d(2 * x, **options)
        y = result[0] if isinstance(result, tuple) else result
        y.square().sum().backward()
        found += [(y, x.grad)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    if options["kernel_size"] == 3:
        assert saved_bytes(Pooled(**options), x.detach()) == packed_bytes(y.numel(), 4)


class Pooled(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.options = options

    def forward(self, x):
        return F.max_pool2d(x + self.scale, **self.options)


def test_what_was_saved_must_not_be_modified_in_place():
    model, x = small_network(inplace=True, gap=nn.Sigmoid()), batch(3, 2, 8, 8, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # torch's own
        gradients(model, x, False)
    with pytest.raises(OperandError, match="modified by an in-place operation"):
        gradients(model, x, True)


def test_training_in_the_one_loop_is_the_same():
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build_model("digits")
        convert_batchnorm(model, "O4")
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 1, 16, 16))
        with recomputed_activations() if recompute else contextlib.nullcontext():
            train(model, open_data("digits"), 1, images=200, lr=0.1, device="cpu", progress=False)
        found.append(model.state_dict())
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key
    assert found[0]["bn1.num_batches_tracked"] == 2


def test_the_optimiser_may_step_between_forward_and_backward():
    model, x = small_network(), batch(3, 2, 8, 8, dtype=torch.float32)
    expected = gradients(model, x, True)
    model.zero_grad()
    with recomputed_activations():
        loss = model(x).square().sum()
    with torch.no_grad():
        for bn in (model[1], model[4]):
            bn.bias.data += 1
    loss.backward()
    for one, other in zip(expected, model.parameters(), strict=True):
        assert torch.equal(one, other.grad)


def test_functional_relu_and_residual_sums():
    torch.manual_seed(0)
    model = build_model("digits").train()
    x = batch(8, 1, 8, 8, dtype=torch.float32)
    plain = saved_bytes(model, x, recompute=False)
    assert saved_bytes(model, x) == plain  # torch's BatchNorm has no recipe
    convert_batchnorm(model, "L4")
    for one, other in zip(gradients(model, x, False), gradients(model, x, True), strict=True):
        assert torch.equal(one, other)
    alone, with_relus = saved_bytes(model, x, recompute=False), saved_bytes(model, x)
    assert with_relus < 0.35 * plain
    assert with_relus < 0.6 * alone < 0.4 * plain


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=st.integers(0, 999))
def test_any_layout_is_packed_in_the_order_of_memory(shape, seed):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal(shape)).permute(*rng.permutation(len(shape)).tolist())
    dense, axes = in_memory_order(x)
    assert dense.data_ptr() == x.data_ptr()
    assert torch.equal(dense.permute(axes), x)
    packed, packing = pack_values(x, "L3")
    assert torch.equal(packing.values(packed), approximate(x, "L3"))
    gaps = torch.from_numpy(rng.standard_normal([*shape, 2]))[..., 0]
    packed, packing = pack_values(gaps, "L3")
    assert torch.equal(packing.values(packed), approximate(gaps, "L3"))


# -- whole networks ----------------------------------------------------------------------------


def low_precision(model):
    return [name for name, module in model.named_modules() if isinstance(module, LowPrecisionBatchNorm2d)]


def test_converting_in_one_call_keeps_modules_and_keys():
    model = build_model("digits")
    before = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    names = convert_batchnorm(model, "L5")
    assert list(names) == low_precision(model)
    assert len(names) == 7
    assert dict(model.named_modules()) == before
    assert {model.get_submodule(name).fmt for name in names} == {"L5"}
    assert "fmt='L5'" in repr(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    model.load_state_dict(build_model("digits").state_dict())
    build_model("digits").load_state_dict(model.state_dict())
    assert convert_batchnorm(model, "L4") == names
    assert {model.get_submodule(name).fmt for name in names} == {"L4"}
    assert restore_batchnorm(model) == names
    assert {type(model.get_submodule(name)) for name in names} == {nn.BatchNorm2d}
    assert restore_batchnorm(model) == ()


def test_where_to_convert():
    def converted(where):
        model = build_model("digits")
        names = convert_batchnorm(model, "L4", where)
        assert list(names) == low_precision(model)
        return list(names)

    every = converted("all")
    assert converted("all but the first") == every[1:]
    assert converted("from block 1") == every[1:]
    assert converted("from block 2") == every[3:]
    assert converted("from block 3") == ["layer3.0.bn1", "layer3.0.bn2"]
    assert converted(["layer3.0.bn1", "bn1"]) == ["bn1", "layer3.0.bn1"]


def test_three_of_four_dense_blocks_are_all_but_the_first_14():
    """Section 2.4: "all but the first 14 BN-operations"; it has 121 of them."""
    with torch.device("meta"):
        model = build_model("densenet121")
    assert len(convert_batchnorm(model, "L4")) == 121
    restore_batchnorm(model)
    assert len(convert_batchnorm(model, "L4", "from block 2")) == 121 - 14


def test_what_cannot_be_converted_is_named():
    model = build_model("digits")
    for where, words in (
        ("some", "allowed: 'all'"),
        ("from block 0", "N from 1"),
        ("from block 4", "layer1, layer2, layer3"),
        (["bn2"], "did you mean 'bn1'"),
        ([], "nothing to convert of the 7"),
        (3, "where=3 has type int"),
    ):
        with pytest.raises(ConfigError, match=words):
            convert_batchnorm(model, "L4", where)
    with pytest.raises(ConfigError, match="did you mean"):
        convert_batchnorm(model, "L44")
    with pytest.raises(ConfigError, match="nothing to convert of the 0"):
        convert_batchnorm(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match="nothing to convert of the 1"):
        convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), where="all but the first")
    with pytest.raises(ConfigError, match="no blocks of several"):
        convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), where="from block 1")
    for odd in (nn.BatchNorm3d(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm2d()):
        mixed = nn.Sequential(nn.BatchNorm2d(3), odd)
        with pytest.raises(ConfigError, match=f"'1' is a {type(odd).__name__}"):
            convert_batchnorm(mixed)
        assert type(mixed[0]) is nn.BatchNorm2d
    assert not low_precision(model)


def test_a_lone_layer_is_a_network_too():
    bn = nn.BatchNorm1d(3)
    assert convert_batchnorm(bn) == ("",)
    assert isinstance(bn, LowPrecisionBatchNorm1d)


def test_copies_and_files():
    model = small_network()
    x = batch(3, 2, 8, 8, dtype=torch.float32)
    expected = model.eval()(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), expected)


def test_wrong_arguments_and_inputs_are_named():
    with pytest.raises(ConfigError, match="allowed: L2"):
        LowPrecisionBatchNorm2d(3, "L6")
    with pytest.raises(ConfigError, match="num_features"):
        LowPrecisionBatchNorm2d(0)
    bn = LowPrecisionBatchNorm2d(3)
    with pytest.raises(ConfigError, match="U9"):
        bn.fmt = "U9"
    assert bn.fmt == "L4"
    for wrong, words in (
        (torch.zeros(2, 3), "needs 4 axes"),
        (torch.zeros(2, 4, 5, 5), "of 3 channels"),
        (torch.zeros(2, 3, 5, 5, dtype=torch.int64), "int64"),
        (torch.zeros(1, 3, 1, 1), "1 value"),
        (torch.zeros(0, 3, 5, 5), "0 value"),
    ):
        with pytest.raises(OperandError, match=words):
            bn(wrong)
    assert bn.num_batches_tracked == 0
    assert bn(torch.zeros(1, 3, 5, 5)).shape == (1, 3, 5, 5)  # one image has a variance, over its pixels
    bn.eval()
    assert bn(torch.zeros(1, 3, 1, 1)).shape == (1, 3, 1, 1)
    assert bn(torch.zeros(0, 3, 5, 5)).shape == (0, 3, 5, 5)
    with pytest.raises(OperandError, match="1 value"):
        LowPrecisionBatchNorm1d(3)(torch.zeros(1, 3))
    with pytest.raises(OperandError, match="2 or 3 axes"):
        LowPrecisionBatchNorm1d(3)(torch.zeros(1, 3, 2, 2))


# -- gradients of convolutions -----------------------------------------------------------------


def test_convolutions_meet_quantised_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1)).double()
    x, upstream = batch(2, 2, 5, 5), batch(2, 2, 3, 3, seed=3)
    hidden = F.relu(model[0](x))
    second = approximate(upstream, GRADIENT_FORMAT)
    weight = model[2].weight
    expected_2 = torch.autograd.grad(F.conv2d(hidden.detach(), weight), weight, second)[0]
    back = F.conv_transpose2d(second, weight) * (hidden > 0)
    first = approximate(back, GRADIENT_FORMAT)
    weight = model[0].weight
    expected_1 = torch.autograd.grad(F.conv2d(x, weight), weight, first)[0]
    with quantize_gradients(model):
        model(x).backward(upstream)
    torch.testing.assert_close(model[2].weight.grad, expected_2)
    torch.testing.assert_close(model[0].weight.grad, expected_1)
    quantised = model[0].weight.grad.clone()
    model.zero_grad()
    model(x).backward(upstream)
    assert not torch.allclose(model[0].weight.grad, quantised)
    assert torch.allclose(model[0].weight.grad, quantised, rtol=0.5, atol=quantised.abs().max())
    with torch.no_grad(), quantize_gradients(model):
        model(x)
    with pytest.raises(ConfigError, match="no convolution"):
        quantize_gradients(nn.Linear(2, 2))


def test_the_gradients_set_is_the_paper_s():
    levels = GRADIENT_FORMAT.levels
    assert len(levels) == 256
    assert levels[128:] == pytest.approx([2 ** (k / 2) for k in range(-127, 1)])


# -- on the array ------------------------------------------------------------------------------


def test_on_the_array_recalibrated_and_not_folded():
    torch.manual_seed(0)
    model = build_model("digits")
    x = torch.rand(32, 1, 8, 8)
    convert_batchnorm(model, "L4")
    model.train()(x)
    model.eval()
    with torch.no_grad():
        exact = model(x)
        with sysmt.attach(model, sysmt.ArrayConfig(threads=4)) as sim:
            sim.calibrate([x], images=32)
            logits = model(x)
            assert sim.report()["collisions"].sum() > 0
            assert not torch.equal(logits, exact)
            before = model.bn1.running_mean.clone(), model.layer3[0].bn2.running_mean.clone()
            report = sysmt.recalibrate_batchnorm(model, [x], mode="final", images=32)
            assert len(report.layers) == 7
        assert not torch.equal(model.layer3[0].bn2.running_mean, before[1])
        assert torch.equal(model(x), model(x))
    plain = copy.deepcopy(model)
    folded = sysmt.fold_batchnorm(model)
    assert not folded.folded
    assert set(folded.kept.values()) == {
        "it is a LowPrecisionBatchNorm2d, which does more than scale and shift"
    }
    assert torch.equal(model(x), plain(x))
    restore_batchnorm(model)
    assert len(sysmt.fold_batchnorm(model).folded) == 7


def test_recalibration_gathers_what_it_does_with_torch_s_layers():
    """The statistics of the first layer, whose input does not depend on the format."""
    model = build_model("digits")
    x = torch.rand(64, 1, 8, 8)
    plain = copy.deepcopy(model)
    convert_batchnorm(model, "L2")
    for one in (model, plain):
        sysmt.recalibrate_batchnorm(one, [x], mode="ema", images=64)
    assert torch.equal(model.bn1.running_var, plain.bn1.running_var)
    assert not torch.equal(model.layer1[0].bn1.running_var, plain.layer1[0].bn1.running_var)


def test_the_package_alone_does_not_load_torch():
    code = (
        "import sys, sysmt.nn; assert 'torch' not in sys.modules; "
        "assert sysmt.nn.LowPrecisionBatchNorm2d(3).fmt == 'L4'"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="BatchNorm9d"):
        _ = sysmt.nn.BatchNorm9d


def test_half_precision_survives_large_sums():
    layer = LowPrecisionBatchNorm2d(2).half().eval()
    layer.running_mean.fill_(-0.2)
    assert layer(torch.randn(128, 2, 56, 56).half()).isfinite().all()
    mixed = LowPrecisionBatchNorm2d(2)
    x = torch.randn(32, 2, 64, 64).half().requires_grad_()
    mixed(x).backward(torch.ones_like(x))
    assert mixed.bias.grad.tolist() == [131072.0] * 2
    assert mixed.weight.grad.isfinite().all()
    assert x.grad.isfinite().all()
    assert x.grad.dtype == torch.float16


def test_a_format_beyond_table_1_is_refused_at_once():
    with pytest.raises(ConfigError, match="is unknown"):
        LowPrecisionBatchNorm2d(3, GRADIENT_FORMAT)


@pytest.mark.parametrize("window", [([2],), (2, [2]), ((3,), [1], [1]), (2,)])
def test_max_pooling_takes_what_torch_takes_and_keeps_the_layout(window):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 8, 8).contiguous(memory_format=layout)
        ours, theirs = (x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
        y = packed_max_pool2d(ours, *window)
        assert torch.equal(y, F.max_pool2d(theirs, *window))
        for value in (ours, theirs):
            pool = packed_max_pool2d if value is ours else F.max_pool2d
            (gradient,) = torch.autograd.grad(pool(value, *window).square().sum(), value)
            assert gradient.stride() == x.stride()

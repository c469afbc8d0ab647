"""Straight-through training: exact values, gradients, conversion, and quantised networks on the array."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sysmt
from sysmt.errors import ConfigError, DataError, UnsupportedLayerError, WeightsError
from sysmt.nn.low_bit.straight_through import (
    ActivationQuantizer,
    BinaryWeight,
    TernaryWeight,
    bake_weights,
    initialise_uniform,
    per_image_standardization,
    quantize_network,
    quantized_layers,
    remove_batchnorm,
)
from sysmt.nn.networks.checkpoints import load_weights, save_weights, weights_hash
from sysmt.nn.networks.models import build_model
from sysmt.quant.ternary import ternarize, twn_scale, twn_threshold, variance_threshold

QUANTIZED = ("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1",
             "layer3.0.conv2")  # fmt: skip


def digits(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("digits")


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


# -- the quantisers ----------------------------------------------------------------------------


def test_binary_weights_by_hand() -> None:
    w = torch.tensor([[[[0.5, -1.5]]], [[[0.0, -4.0]]]])
    channel = BinaryWeight("channel")(w)
    assert channel.flatten().tolist() == [1.0, -1.0, 2.0, -2.0]  # mean |w| of (0.5, 1.5) and (0, 4)
    layer = BinaryWeight("layer")(w)
    assert layer.flatten().tolist() == [1.5, -1.5, 1.5, -1.5]  # 6 / 4; sign(0) = +1


@pytest.mark.parametrize("threshold", ["twn", "variance", 0.07, 0])
def test_ternary_weights_are_those_of_the_plain_definition(threshold: str | float) -> None:
    w = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.1
    limits = {"twn": twn_threshold(w.numpy()), "variance": variance_threshold(27)}
    limit = limits.get(threshold, threshold)
    expected = ternarize(w.numpy(), limit)
    np.testing.assert_array_equal(TernaryWeight(threshold)(w).numpy(), expected)
    scaled = TernaryWeight(threshold, scaled=True)(w).numpy()
    np.testing.assert_allclose(scaled, expected * twn_scale(w.numpy(), limit), rtol=1e-6)


def test_a_layer_whose_weights_are_all_below_the_threshold() -> None:
    out = TernaryWeight(9.0, scaled=True)(torch.randn(2, 3))
    assert torch.equal(out, torch.zeros(2, 3))


def test_activations_by_hand() -> None:
    quantizer = ActivationQuantizer()  # levels 0, 2/3, 4/3, 2
    x = torch.tensor([-1.0, 0.2, 0.4, 0.9, 1.1, 1.9, 5.0])
    expected = torch.tensor([0, 0, 2, 2, 4, 6, 6]) / 3
    torch.testing.assert_close(quantizer.quantize(x), expected)
    assert len(ActivationQuantizer(4, 1.0).quantize(torch.linspace(-1, 2, 1000)).unique()) == 16
    assert ActivationQuantizer(1, 1.0).quantize(torch.tensor([0.4, 0.6])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "quantizer", [BinaryWeight(), BinaryWeight("layer"), TernaryWeight(), TernaryWeight(0.5, scaled=True)]
)
def test_weight_gradients_pass_straight_through(quantizer: nn.Module) -> None:
    # "The gradient is evaluated for the ternarized weight but accumulated in full-precision."
    w = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 6, dtype=torch.float64)
    quantized = quantizer(w)
    (torch.tanh(x @ quantized.T)).sum().backward()
    plain = quantized.detach().requires_grad_()
    (torch.tanh(x @ plain.T)).sum().backward()
    assert torch.equal(w.grad, plain.grad)
    assert torch.autograd.gradcheck(
        lambda value: torch.tanh(x @ value.T).sum(), [quantized.detach().requires_grad_()]
    )


def test_activation_gradients_stop_at_the_ends() -> None:
    x = torch.tensor([-0.5, 0.1, 1.0, 1.9, 2.5], requires_grad=True)
    (ActivationQuantizer().quantize(x) * torch.arange(1.0, 6.0)).sum().backward()
    assert x.grad.tolist() == [0, 2, 3, 4, 0]


# -- conversion --------------------------------------------------------------------------------


def test_one_call_converts_all_but_first_and_last() -> None:
    model = digits()
    latent = {name: model.get_submodule(name).weight.detach().clone() for name in QUANTIZED}
    outer = (model.conv1.weight.detach().clone(), model.linear.weight.detach().clone())
    names = quantize_network(model, TernaryWeight(), ActivationQuantizer())
    assert names == QUANTIZED == tuple(quantized_layers(model))
    for name in names:
        weight = model.get_submodule(name).weight
        np.testing.assert_array_equal(
            weight.detach().numpy(), ternarize(latent[name].numpy(), twn_threshold(latent[name].numpy()))
        )
    assert torch.equal(model.conv1.weight, outer[0])
    assert torch.equal(model.linear.weight, outer[1])


def test_first_last_and_excluded_layers() -> None:
    assert quantize_network(digits(), BinaryWeight(), first=True, last=True) == (
        "conv1",
        *QUANTIZED,
        "linear",
    )
    assert quantize_network(digits(), BinaryWeight(), exclude="layer1.0.conv1") == QUANTIZED[1:]


def test_layers_read_quantised_activations_after_a_functional_relu() -> None:
    model = digits()
    names = quantize_network(model, activations=ActivationQuantizer(2, 2.0))
    seen: dict[str, torch.Tensor] = {}
    for name in (*names, "conv1", "linear"):
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
    model(images())
    for name in names:
        assert set((seen[name] * 3).round(decimals=4).unique().tolist()) <= {0.0, 2.0, 4.0, 6.0}
    assert len(seen["conv1"].unique()) > 100
    assert len(seen["linear"].unique()) > 100
    assert quantized_layers(model) == {}  # weights are as they were


def test_training_moves_latent_weights_and_keeps_the_rest_exact() -> None:
    model = digits()
    quantize_network(model, TernaryWeight(), ActivationQuantizer())
    layer = model.layer2[0].conv1
    latent = layer.parametrizations.weight.original
    before = latent.detach().clone()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(images()), torch.arange(4)).backward()
    optimizer.step()
    assert not torch.equal(latent, before)
    assert set(layer.weight.unique().tolist()) == {-1.0, 0.0, 1.0}


def test_baking_keeps_outputs_and_restores_the_keys(tmp_path: Path) -> None:
    model = digits()
    keys = list(model.state_dict())
    quantize_network(model, TernaryWeight(), ActivationQuantizer())
    assert list(model.state_dict()) != keys
    expected = model(images())
    assert bake_weights(model) == QUANTIZED
    assert bake_weights(model) == ()
    assert sorted(model.state_dict()) == sorted(keys)
    assert torch.equal(model(images()), expected)
    assert isinstance(model.layer1[0].conv1.weight, nn.Parameter)
    save_weights(model, tmp_path / "baked.pt")
    fresh = digits(5)
    load_weights(fresh, tmp_path / "baked.pt")
    assert weights_hash(fresh) == weights_hash(model)
    assert set(fresh.layer3[0].conv2.weight.unique().tolist()) == {-1.0, 0.0, 1.0}


def test_latent_weights_can_be_saved_and_gone_on_with(tmp_path: Path) -> None:
    model, again = digits(), digits(3)
    for one in (model, again):
        quantize_network(one, BinaryWeight())
    save_weights(model, tmp_path / "latent.pt")
    load_weights(again, tmp_path / "latent.pt")
    assert weights_hash(model) == weights_hash(again)
    with pytest.raises(WeightsError, match=r"parametrizations\.weight\.original"):
        load_weights(digits(), tmp_path / "latent.pt")
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))


@pytest.mark.parametrize("baked", [False, True])
@pytest.mark.parametrize("quantizer", [TernaryWeight(), TernaryWeight(scaled=True), BinaryWeight("layer")])
def test_on_the_array_weights_and_activations_are_exactly_those(quantizer: nn.Module, baked: bool) -> None:
    model = digits()
    quantize_network(model, quantizer, ActivationQuantizer())
    if baked:
        bake_weights(model)
    x = images(8).abs()
    expected = model(x)
    weight = model.layer1[0].conv2.weight.detach()
    with sysmt.attach(model, sysmt.ArrayConfig(threads=1)) as sim:
        sim.set_ranges(dict.fromkeys(QUANTIZED, 2 / 255))
        capture = sim.capture("layer1.0.conv2")
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)  # 2-bit inputs are exact codes
        # By the rule of post-training quantisation the largest weight has code 127, so +-1 are +-127.
        size = weight.abs().max()
        codes = weight.flatten(1).T / size * 127
        np.testing.assert_array_equal(capture.b_kn, codes.numpy())
        assert set(np.unique(capture.a_mk)) <= {0, 85, 170, 255}
        report = sim.report().set_index("name")
        assert (report.loc[list(QUANTIZED), "threads"] == 1).all()
    # The same at four threads runs, collides, and is undone at the end.
    with sysmt.attach(model, sysmt.ArrayConfig(threads=4)) as sim:
        sim.calibrate([x], images=8)
        assert not torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


def test_quantising_twice_or_a_masked_layer_is_refused_and_changes_nothing() -> None:
    model = digits()
    quantize_network(model, BinaryWeight())
    with pytest.raises(UnsupportedLayerError, match=r"'layer1.0.conv1' is quantised already"):
        quantize_network(model, TernaryWeight())
    masked = digits()
    prune.l1_unstructured(masked.layer3[0].conv2, "weight", amount=0.5)
    with pytest.raises(UnsupportedLayerError, match=r"'layer3.0.conv2' is masked"):
        quantize_network(masked, BinaryWeight())
    assert quantized_layers(masked) == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BinaryWeight("chanel"), "did you mean 'channel'"),
        (lambda: TernaryWeight("twm"), "did you mean 'twn'"),
        (lambda: TernaryWeight(-0.1), "threshold=-0.1"),
        (lambda: TernaryWeight(math.nan), "threshold=nan"),
        (lambda: TernaryWeight(math.inf), "threshold=inf"),
        (lambda: TernaryWeight(True), "threshold=True"),
        (lambda: TernaryWeight(None), "threshold=None"),
        (lambda: ActivationQuantizer(0), "bits=0"),
        (lambda: ActivationQuantizer(9), "bits=9"),
        (lambda: ActivationQuantizer(2, 0), "limit=0"),
        (lambda: ActivationQuantizer(2, math.inf), "limit=inf"),
        (lambda: quantize_network(digits()), "nothing to quantise"),
        (lambda: quantize_network(nn.Conv2d(1, 1, 1), BinaryWeight()), "nothing to quantise"),
        (lambda: quantize_network(digits(), "binary"), "weights='binary' must be"),
        (lambda: quantize_network(digits(), BinaryWeight(), 2), "activations=2 must be"),
        (lambda: quantize_network(digits(), BinaryWeight(), exclude=["layer1"]), "exclude names 'layer1'"),
        (lambda: quantize_network(digits(), BinaryWeight(), exclude=3), "exclude=3 has type int"),
        (lambda: initialise_uniform(digits(), -1), "seed=-1"),
    ],
)
def test_bad_arguments_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


# -- what goes with it -------------------------------------------------------------------------


def test_uniform_weights_fill_the_interval_of_their_fan_in() -> None:
    model, again = digits(), digits(1)
    initialise_uniform(model, 3)
    initialise_uniform(again, 3)
    assert weights_hash(model) == weights_hash(again)
    weight = model.layer3[0].conv2.weight  # K = 32 * 9
    limit = math.sqrt(6 / 288)
    assert 0.99 * limit < weight.abs().max() <= limit
    assert weight.var().item() == pytest.approx(2 / 288, rel=0.05)
    assert not model.linear.bias.any()
    quantize_network(model, TernaryWeight("variance"))
    ternary = model.layer3[0].conv2.weight
    assert ternary.abs().sum().item() == pytest.approx(2 * 32, abs=5 * math.sqrt(64))  # 2 of K in each output
    with pytest.raises(UnsupportedLayerError, match="quantised already"):
        initialise_uniform(model)


def test_batchnorm_can_be_taken_out() -> None:
    model = digits()
    names = remove_batchnorm(model)
    assert names[:2] == ("bn1", "layer1.0.bn1")
    assert len(names) == 7
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert model(images()).shape == (4, 10)
    assert remove_batchnorm(model) == ()


def test_images_are_standardised_one_by_one() -> None:
    seen: list[torch.Tensor] = []
    model = nn.Sequential(nn.Identity())
    model[0].register_forward_hook(lambda _, args, out: seen.append(args[0]))
    off = per_image_standardization(model)
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([4, 0.01, 0]).view(
        3, 1, 1, 1
    )
    y = model(x)
    assert seen[0] is y
    torch.testing.assert_close(y[0].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(y[0].var(correction=0), torch.tensor(1.0))
    torch.testing.assert_close(y[1], (x[1] - x[1].mean()) * 4)  # the bound 1 / sqrt(16) holds here
    assert not y[2].any()
    off()
    assert torch.equal(model(x), x)
    per_image_standardization(model)
    with pytest.raises(DataError, match=r"shape \(2, 3\)"):
        model(torch.zeros(2, 3))


@pytest.mark.parametrize("baked", ["copy", "original"])
def test_a_copy_and_its_original_are_baked_apart(baked):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    quantize_network(model, TernaryWeight())
    twin = copy.deepcopy(model)
    x = torch.randn(1, 3, 9, 9)
    expected = model(x)
    first, second = (twin, model) if baked == "copy" else (model, twin)
    for network in (first, second):
        assert bake_weights(network) == ("1",)
        assert torch.equal(first(x), expected)
        assert torch.equal(second(x), expected)
        assert isinstance(network[1], nn.Conv2d)
    assert set(first.state_dict()) == set(second.state_dict()) == {
        f"{i}.{name}" for i in range(3) for name in ("weight", "bias")
    }  # fmt: skip


def test_batchnorm_of_two_names_goes_under_both():
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.Conv2d(4, 4, 3), shared)
    assert remove_batchnorm(model) == ("1", "3")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_inputs_are_not_quantised_twice():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    quantize_network(model, None, ActivationQuantizer(2))
    with pytest.raises(UnsupportedLayerError, match="input of layer '1' is quantised already"):
        quantize_network(model, None, ActivationQuantizer(4))


def test_the_layer_and_the_function_agree_on_ties():
    w = torch.full((2, 3), 0.1)
    assert torch.equal(TernaryWeight(0.1)(w), torch.from_numpy(ternarize(w.numpy(), 0.1)))

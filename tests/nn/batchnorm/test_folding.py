"""Folding BatchNorm: against the unfolded network."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import batches, same, state, two_layers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from sysmt.errors import ConfigError
from sysmt.nn.batchnorm import folding
from sysmt.nn.batchnorm.folding import fold_batchnorm
from sysmt.nn.networks.models import MobileNetV1, build_model
from sysmt.nn.networks.pruning import prune_model
from sysmt.nn.torchvision_import import torchvision


def randomise(model: nn.Module) -> nn.Module:
    """Give BatchNorm layers statistics and weights that a wrong fold cannot survive."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 2, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def assert_equal(left: Tensor | tuple, right: Tensor | tuple) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def relative_error(model: nn.Module, x: Tensor, expected: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - expected).abs().max() / expected.abs().max())


def test_fold_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0)).eval()
    model[0].weight.data.fill_(3.0)
    model[1].running_mean.fill_(5.0)
    model[1].running_var.fill_(4.0)
    model[1].weight.data.fill_(6.0)
    model[1].bias.data.fill_(1.0)
    report = fold_batchnorm(model)
    assert model[0].weight.item() == 9.0  # 3 · 6 / √4
    assert model[0].bias.item() == -14.0  # 1 - 5 · 6 / √4
    assert isinstance(model[1], nn.Identity)
    assert (report.folded, report.kept) == ({"1": "0"}, {})


@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize(
    ("name", "folded", "kept"),
    [("resnet18", 20, 0), ("googlenet", 57, 2), ("densenet121", 59, 62), ("mobilenet_v1", 27, 0)],
)
def test_folded_networks_compute_the_same(name: str, folded: int, kept: int, observe: bool) -> None:
    torch.manual_seed(0)
    if name == "mobilenet_v1":
        model = MobileNetV1()
    else:
        options = {"init_weights": False} if name == "googlenet" else {}
        model = torchvision.models.get_model(name, weights=None, **options)
    model = randomise(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    report = fold_batchnorm(model, x if observe else None)
    assert (len(report.folded), len(report.kept)) == (folded, kept)
    assert relative_error(model, x, expected) < 1e-5
    left = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert left == kept
    assert len(report.to_frame()) == folded + kept
    if name == "densenet121":
        assert report.kept["features.denseblock1.denselayer1.norm1"].startswith("it follows cat")
        assert report.folded["features.denseblock1.denselayer1.norm2"].endswith("denselayer1.conv1")
    if name == "googlenet":
        assert set(report.kept.values()) == {"the forward pass never runs it"}


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "densenet121", "mobilenet_v1"])
def test_folding_itself_loses_nothing(name: str) -> None:
    """In float64 with statistics of real activations; in float32 such a net is some 1e-5 off itself."""
    torch.manual_seed(0)
    model = build_model(name).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64, dtype=torch.float64))
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        expected = model.eval()(x)
    fold_batchnorm(model)
    assert relative_error(model, x, expected) < 1e-12


@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False), (2, 4, 9, 9)),
        (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 4, 4, 4)),
        (nn.ConvTranspose1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (nn.ConvTranspose3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 4, 4, 4)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
    ],
)
def test_every_kind_of_layer_folds(
    layer: nn.Module, norm: nn.Module, shape: tuple[int, ...], observe: bool
) -> None:
    model = randomise(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm), nn.ReLU()))
    x = torch.randn(shape)
    with torch.no_grad():
        expected = model(x)
    assert fold_batchnorm(model, x if observe else None).folded == {"1": "0"}
    assert relative_error(model, x, expected) < 1e-6


class Wiring(nn.Module):
    """A convolution and a BatchNorm that the subclasses wire so that folding would be wrong."""

    reason = ""
    traceable = True

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.other = nn.Conv2d(3, 3, 1)


class OutputGoesElsewhere(Wiring):
    reason = "the output of Conv2d 'conv' also goes elsewhere"

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class OutputIsReturned(Wiring):
    reason = "the output of Conv2d 'conv' also goes elsewhere"

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.conv(x)
        return self.norm(y), {"features": y}


class ChangedInPlace(Wiring):
    reason = "the output of Conv2d 'conv' also goes elsewhere"

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.relu_()
        return self.norm(y)


class ConvolutionRunsTwice(Wiring):
    reason = "the forward pass runs Conv2d 'conv' before it 2 times"

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x)))


class NormRunsTwice(Wiring):
    reason = "the forward pass runs it 2 times"

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.other(x))


class NormFirst(Wiring):
    reason = "it follows the network's input, not a convolution"

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class AfterActivation(Wiring):
    reason = "it follows relu, not a convolution"

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.conv(x)))


class WeightReadElsewhere(Wiring):
    reason = "the parameters of Conv2d 'conv' are used elsewhere"

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.conv.weight.sum()


class SharedWeight(Wiring):
    reason = "the parameters of Conv2d 'conv' are used elsewhere"

    def __init__(self) -> None:
        super().__init__()
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.norm(self.conv(x)))


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class OwnForward(Wiring):
    reason = "it follows StandardisedConv 'conv', not a plain convolution"

    def __init__(self) -> None:
        super().__init__()
        self.conv = StandardisedConv(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Untracked(Wiring):
    reason = "it keeps no running statistics"

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class ChangedByAssignment(Wiring):
    reason = "the output of Conv2d 'conv' also goes elsewhere"
    traceable = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, 0] = 1.0
        return self.norm(y)


class ReadAsNumbers(Wiring):
    reason = "the output of Conv2d 'conv' also goes elsewhere"
    traceable = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) * float(np.abs(y.detach().numpy()).max())


class WatchedContainer(Wiring):
    reason = "the output of Conv2d 'inner.0' also goes elsewhere"

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1))
        self.seen: list[Tensor] = []
        self.inner.register_forward_hook(lambda module, args, output: self.seen.append(output))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))


class WatchedBefore(Wiring):
    reason = "the output of Conv2d 'conv' also goes elsewhere"

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(self.norm)
        self.seen: list[Tensor] = []
        self.outer.register_forward_pre_hook(lambda module, args: self.seen.append(args[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.conv(x))


class MemoryShared(Wiring):
    reason = "the parameters of Conv2d 'conv' are used elsewhere"

    def __init__(self) -> None:
        super().__init__()
        self.other.weight = nn.Parameter(self.conv.weight.data)  # two parameters, one memory

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.norm(self.conv(x)))


class KeptAsAttribute(Wiring):
    reason = "the parameters of Conv2d 'conv' are used elsewhere"

    def __init__(self) -> None:
        super().__init__()
        self.first_filter = self.conv.weight.detach()[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.first_filter.sum()


class HeldInAList(Wiring):
    reason = "the network holds it besides its submodules"

    def __init__(self) -> None:
        super().__init__()
        self.steps = [self.conv, self.norm]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class PrunedWeightReadElsewhere(Wiring):
    reason = (
        "the"  # pruned weight ... may be read elsewhere (trace), parameters ... are used elsewhere (example)
    )

    def __init__(self) -> None:
        super().__init__()
        prune.l1_unstructured(self.conv, "weight", 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.conv.weight.sum()


WRONG_TO_FOLD = Wiring.__subclasses__()


@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize("wiring", WRONG_TO_FOLD)
def test_what_must_not_fold_stays(wiring: type[Wiring], observe: bool) -> None:
    torch.manual_seed(0)
    model = randomise(wiring())
    before, attributes, x = state(model), set(vars(model)), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = model(x)
    if not observe and not wiring.traceable:
        with pytest.raises(ConfigError, match="give example="):
            fold_batchnorm(model)
    else:
        report = fold_batchnorm(model, x if observe else None)
        assert report.folded == {}
        assert report.kept["norm"].startswith(wiring.reason)
    assert same(before, state(model))
    assert set(vars(model)) == attributes  # a trace leaves no constants behind
    with torch.no_grad():
        assert_equal(model(x), expected)


class ValueDependent(Wiring):
    """Cannot be traced: the path depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.other(y) if y.shape[0] > 1 and float(y.abs().max()) > 0 else y


def test_networks_that_cannot_be_traced_need_an_example() -> None:
    model = randomise(ValueDependent())
    with pytest.raises(ConfigError, match=r"ValueDependent cannot be traced.*give example="):
        fold_batchnorm(model)
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = model(x)
    assert fold_batchnorm(model, x).folded == {"norm": "conv"}
    assert relative_error(model, x, expected) < 1e-6


def test_an_example_shows_which_axis_a_linear_layer_fills() -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))  # (batch, 6 rows, features)
    report = fold_batchnorm(model, torch.randn(2, 6, 4))
    assert report.kept["1"] == "it does not normalise the output channels of Linear '0'"


def test_one_layer_under_two_names_is_replaced_under_both() -> None:
    class Aliased(Wiring):
        def __init__(self) -> None:
            super().__init__()
            self.alias = nn.ModuleList([self.norm])

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    model = Aliased().eval()
    assert fold_batchnorm(model).folded == {"norm": "conv"}
    assert isinstance(model.norm, nn.Identity)
    assert model.alias[0] is model.norm


def test_pruned_weights_keep_their_zeros_through_a_fold() -> None:
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5)))
    prune_model(model, 0.5)
    zeros = model[1].weight == 0
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
    stale = model[1].weight
    fold_batchnorm(model)
    assert not torch.equal(model[1].weight, stale)  # it does not wait for the next forward pass
    assert relative_error(model, x, expected) < 1e-6
    assert torch.equal(model[1].weight == 0, zeros)


def test_folding_refuses_training_mode_and_replaced_forwards() -> None:
    model = two_layers()
    model[4].train()
    before = state(model)
    with pytest.raises(ConfigError, match=r"'4' is in training mode; call model.eval\(\)"):
        fold_batchnorm(model)
    model[4].eval()
    model[3].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"layer '3' has its forward replaced.*detach"):
        fold_batchnorm(model)
    assert same(before, state(model))


def test_folding_again_finds_nothing() -> None:
    model = two_layers()
    fold_batchnorm(model)
    before = state(model)
    report = fold_batchnorm(model)
    assert (report.folded, report.kept) == ({}, {})
    assert same(before, state(model))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Squaring(prune.BasePruningMethod):
    """A pruning method that does more than to multiply by its mask."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        return default_mask

    def apply_mask(self, module: nn.Module) -> Tensor:
        return module.get_buffer("weight_mask") * module.get_parameter("weight_orig") ** 2


class OwnCall(nn.BatchNorm2d):
    def eval(self) -> "OwnCall":
        return self  # it was built in training mode


class Frozen(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


def replaced(model: nn.Sequential, index: int, layer: nn.Module) -> None:
    model[index] = layer


CHANGES = {
    "spectral norm by hooks": (
        lambda m: nn.utils.spectral_norm(m[0]),
        "the weight of Conv2d '0' is computed",
    ),
    "weight norm by hooks": (lambda m: nn.utils.weight_norm(m[0]), "the weight of Conv2d '0' is computed"),
    "spectral norm": (lambda m: parametrizations.spectral_norm(m[0]), "it follows ParametrizedConv2d '0'"),
    "weight norm": (lambda m: parametrizations.weight_norm(m[0]), "it follows ParametrizedConv2d '0'"),
    "orthogonal": (lambda m: parametrizations.orthogonal(m[0]), "it follows ParametrizedConv2d '0'"),
    "parametrised bias": (
        lambda m: parametrize.register_parametrization(m[0], "bias", Doubled()),
        "it follows ParametrizedConv2d '0'",
    ),
    "parametrised scale of the norm": (
        lambda m: parametrize.register_parametrization(m[1], "weight", Doubled()),
        "the weight of it is computed",
    ),
    "pruned bias": (lambda m: prune.l1_unstructured(m[0], "bias", 0.5), "the bias of Conv2d '0' is computed"),
    "pruned scale of the norm": (
        lambda m: prune.l1_unstructured(m[1], "weight", 0.5),
        "the weight of it is computed",
    ),
    "pruning of an own kind": (lambda m: Squaring.apply(m[0], "weight"), "Conv2d '0' has hooks"),
    "a layer's input hook": (
        lambda m: m[0].register_forward_pre_hook(lambda module, args: (args[0].abs(),)),
        "Conv2d '0' has hooks",
    ),
    "a layer's output hook": (
        lambda m: m[0].register_forward_hook(lambda module, args, output: output.clamp(min=0)),
        "Conv2d '0' has hooks",
    ),
    "a layer's gradient hook": (
        lambda m: m[0].register_full_backward_hook(lambda module, into, out: None),
        "Conv2d '0' has hooks",
    ),
    "the norm's input hook": (
        lambda m: m[1].register_forward_pre_hook(lambda module, args: (args[0].abs(),)),
        "it has hooks",
    ),
    "the norm's output hook": (
        lambda m: m[1].register_forward_hook(lambda module, args, output: output * 2),
        "it has hooks",
    ),
    "the norm's state hook": (
        lambda m: m[1].register_state_dict_post_hook(lambda module, state, prefix, metadata: None),
        "it has hooks",
    ),
    "a replaced norm": (
        lambda m: setattr(m[1], "forward", lambda x: x.abs()),
        "it has its forward replaced",
    ),
    "a replaced step of the layer": (
        lambda m: setattr(m[0], "_conv_forward", lambda x, weight, bias: F.conv2d(x, weight.abs(), bias)),
        "Conv2d '0' has its _conv_forward replaced",
    ),
    "a norm that stays in training mode": (
        lambda m: replaced(m, 1, OwnCall(8)),
        "it stays in training mode",
    ),
    "weights in inference mode": (
        lambda m: replaced(m, 0, in_inference_mode()),
        "the values of Conv2d '0' are no plain tensors",
    ),
    "variance that is negative": (lambda m: m[1].running_var.fill_(-1.0), "its scale or shift is not finite"),
}


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Conv2d(3, 8, 3).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_proved_stays_and_the_rest_folds(change: str, observe: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    randomise(model)
    apply, reason = CHANGES[change]
    apply(model)
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = model(x)
    before = state(model[:2])
    report = fold_batchnorm(model, x if observe else None)
    assert report.folded == {"3": "2"}
    other = (
        "|the parameters of Conv2d '0' are used|the output of Conv2d '0' also goes|it follows abs"
        if observe
        else ""
    )
    assert re.match(f"{re.escape(reason)}{other}", report.kept["1"])
    assert same(before, state(model[:2]))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_lazy_norm_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d()).eval()
    assert fold_batchnorm(model).kept == {"1": "it is lazy and not initialised yet"}


def test_a_hook_on_all_modules_of_torch_keeps_every_norm() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        report = fold_batchnorm(two_layers())
    finally:
        handle.remove()
    assert report.folded == {}
    assert set(report.kept.values()) == {"a hook on all modules of torch may change what layers compute"}


def test_a_norm_that_is_always_in_evaluation_mode_folds() -> None:
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), Frozen(8)))
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = model(x)
    assert fold_batchnorm(model).folded == {"1": "0"}
    assert relative_error(model, x, expected) < 1e-6


def test_weights_that_would_overflow_their_type_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).half().eval()
    model[1].weight.data.fill_(60000)
    model[0].weight.data.fill_(2)
    report = fold_batchnorm(model)
    assert report.kept == {"1": "the folded weights would not be finite in float16"}
    assert bool((model[0].weight == 2).all())


@pytest.mark.parametrize("observe", [False, True])
def test_an_error_half_way_leaves_everything_unfolded(monkeypatch: pytest.MonkeyPatch, observe: bool) -> None:
    model = two_layers()
    modules, before = dict(model.named_modules()), state(model)
    absorb, done = folding._absorb, []

    def fail_at_the_second(fold, undo) -> None:
        absorb(fold, undo)
        done.append(fold)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(folding, "_absorb", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        fold_batchnorm(model, batches(2)[0] if observe else None)
    assert len(done) == 2
    assert same(before, state(model))
    assert dict(model.named_modules()) == modules


def test_a_norm_under_two_names_of_one_parent_is_replaced_under_both() -> None:
    class Twice(Wiring):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.norm

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.conv(x))

    model = randomise(Twice())
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = model(x)
    assert fold_batchnorm(model).folded == {"norm": "conv"}
    assert isinstance(model.norm, nn.Identity)
    assert model.again is model.norm
    assert relative_error(model, x, expected) < 1e-6


def test_parameters_side_by_side_in_one_buffer_fold() -> None:
    model = two_layers()
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat, model.parameters())  # views of one memory that do not overlap
    x = batches(2)[0]
    with torch.no_grad():
        expected = model(x)
    assert len(fold_batchnorm(model).folded) == 2
    assert relative_error(model, x, expected) < 1e-5

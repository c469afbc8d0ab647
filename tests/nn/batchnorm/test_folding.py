"""Folding BatchNorm: against the unfolded network."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_networks import same, state, two_layers
from torch import Tensor, nn

from sysmt.errors import ConfigError
from sysmt.nn.batchnorm.folding import fold_batchnorm
from sysmt.nn.networks.models import MobileNetV1, build_model
from sysmt.nn.networks.pruning import prune_model
from sysmt.nn.torchvision_import import torchvision


def randomise(model: nn.Module) -> nn.Module:
    """Give BatchNorm layers statistics and weights that a wrong fold cannot survive."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.3, 2, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(0, 0.3, generator=generator)
    return model.eval()


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


WRONG_TO_FOLD = Wiring.__subclasses__()


@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize("wiring", WRONG_TO_FOLD)
def test_what_must_not_fold_stays(wiring: type[Wiring], observe: bool) -> None:
    torch.manual_seed(0)
    model = wiring().eval()
    before = state(model)
    report = fold_batchnorm(model, torch.randn(2, 3, 4, 4) if observe else None)
    assert report.folded == {}
    assert report.kept["norm"].startswith(wiring.reason)
    assert same(before, state(model))


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

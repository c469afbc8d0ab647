"""BatchNorm: recalibrated statistics against hand-worked ones, and folding against the unfolded network."""

import copy
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sysmt
from sysmt.errors import CalibrationError, ConfigError, WeightsError
from sysmt.nn.batchnorm import fold_batchnorm, load_statistics, recalibrate_batchnorm, save_statistics
from sysmt.nn.models import MobileNetV1
from sysmt.nn.pruning import prune_model
from sysmt.nn.vision import torchvision

MODES = ["ema", "cumulative", "final"]


def two_layers() -> nn.Sequential:
    """A network whose second BatchNorm sees what the first one normalised; with dropout in between."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    ).eval()


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=generator) * 2 + 1 for size in sizes]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# Recalibration


def test_ema_by_hand() -> None:
    layer = nn.BatchNorm1d(1).eval()
    layer.running_mean.fill_(10.0)
    layer.running_var.fill_(4.0)
    # Mean 2, unbiased variance 2; then mean 6, unbiased variance 8.
    loader = [torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [8.0]])]
    report = recalibrate_batchnorm(layer, loader, mode="ema", momentum=0.25, images=4)
    assert layer.running_mean.item() == 0.75 * (0.75 * 10 + 0.25 * 2) + 0.25 * 6  # 7.5
    assert layer.running_var.item() == 0.75 * (0.75 * 4 + 0.25 * 2) + 0.25 * 8  # 4.625
    (row,) = report.to_frame().to_dict("records")
    spread = 4 + layer.eps
    assert row["mean_shift"] == pytest.approx(2.5 / math.sqrt(spread))
    assert row["max_mean_shift"] == pytest.approx(2.5 / math.sqrt(spread))
    assert row["log_variance_ratio"] == pytest.approx(math.log((4.625 + layer.eps) / spread))
    assert (row["channels"], row["values"], report.images, report.batches) == (1, 4, 4, 2)


def test_cumulative_by_hand() -> None:
    layer = nn.BatchNorm1d(1).eval()
    loader = [torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [8.0]])]
    recalibrate_batchnorm(layer, loader, mode="cumulative", images=4)
    assert layer.running_mean.item() == 4.0
    # Deviations -3, -1, 0, 4 from the pooled mean; averaging the batches' variances would give 5.
    assert layer.running_var.item() == pytest.approx(26 / 3)


def test_final_keeps_the_last_full_batch() -> None:
    x = [
        torch.tensor([[1.0], [3.0], [5.0]]),
        torch.tensor([[2.0], [4.0], [9.0]]),
        torch.tensor([[70.0], [90.0], [50.0]]),
    ]
    layer = nn.BatchNorm1d(1).eval()
    recalibrate_batchnorm(layer, x, mode="final", images=8)  # the third batch is cut to two
    assert layer.running_mean.item() == 5.0
    assert layer.running_var.item() == 13.0  # (9 + 1 + 16) / 2
    recalibrate_batchnorm(layer, x, mode="final", images=9)
    assert layer.running_mean.item() == 70.0
    recalibrate_batchnorm(layer, x, mode="final", images=2)  # the only batch there is
    assert layer.running_mean.item() == 2.0


def test_ema_is_torchs_own_update() -> None:
    model = two_layers()
    expected = copy.deepcopy(model)
    for layer in (expected[1], expected[4]):
        layer.train()
        layer.momentum = 0.3
    loader = batches(4, 4, 4)
    with torch.no_grad():
        for x in (loader[0], loader[1], loader[2][:2]):
            expected(x)
    recalibrate_batchnorm(model, loader, mode="ema", momentum=0.3, images=10)
    for index in (1, 4):
        assert torch.equal(model[index].running_mean, expected[index].running_mean)
        assert torch.equal(model[index].running_var, expected[index].running_var)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    offset=st.sampled_from([0.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_cumulative_equals_all_images_at_once(sizes: list[int], offset: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 3, 2, 2, generator=generator) + offset
    layer = nn.BatchNorm2d(3).eval()
    recalibrate_batchnorm(layer, x.split(sizes), mode="cumulative", images=len(x))
    variance, mean = torch.var_mean(x.double(), (0, 2, 3))
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-6, atol=0)


def test_cumulative_splits_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysmt.nn.batchnorm._Pool.CHUNK", 3 * 8 * 8 * 3)  # three images at a time
    (x,) = batches(7)
    layer = nn.BatchNorm2d(3).eval()
    recalibrate_batchnorm(layer, [x], mode="cumulative", images=7)
    torch.testing.assert_close(layer.running_var, x.var((0, 2, 3)))


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_used_twice_counts_both_uses(mode: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x)
            return self.norm(x + 10)

    model = Twice().eval()
    x = torch.tensor([[0.0], [2.0]])
    report = recalibrate_batchnorm(model, [x], mode=mode, momentum=0.5, images=2)
    mean = {"ema": 0.5 * (0.5 * 1) + 0.5 * 11}.get(mode, 6.0)
    assert model.norm.running_mean.item() == mean
    assert report.layers[0].values == 4
    if mode != "ema":
        assert model.norm.running_var.item() == pytest.approx((36 + 16 + 16 + 36) / 3)


@pytest.mark.parametrize("mode", MODES)
def test_everything_else_stays(mode: str) -> None:
    model = two_layers()
    model.train()
    model[2].eval()
    model[4].eval()
    model[1].momentum = None
    model[1].num_batches_tracked.fill_(7)
    model[3].weight.requires_grad_(False)
    before, flags = state(model), [module.training for module in model.modules()]
    recalibrate_batchnorm(model, batches(4, 4), mode=mode, images=8)
    after = state(model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"1.running_mean", "1.running_var", "4.running_mean", "4.running_var"}
    assert [module.training for module in model.modules()] == flags
    assert model[1].momentum is None
    assert model[4].momentum == 0.1
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, True, False, True, True, True]
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("mode", MODES)
def test_same_images_same_statistics(mode: str) -> None:
    results = []
    for seed in (0, 1):
        model = two_layers()
        torch.manual_seed(seed)  # dropout would make the second BatchNorm differ
        recalibrate_batchnorm(model, batches(4, 4), mode=mode, images=7)
        results.append(state(model))
    assert same(*results)


@pytest.mark.parametrize("mode", MODES)
def test_exactly_so_many_images_run(mode: str) -> None:
    model = two_layers()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    drawn: list[int] = []

    def loader() -> Iterator[tuple[Tensor, str]]:
        for x in batches(4, 4, 4, 4):
            drawn.append(len(x))
            yield x, "label"

    report = recalibrate_batchnorm(model, loader(), mode=mode, images=10)
    assert seen == [4, 4, 2]
    assert drawn == [4, 4, 4]
    assert (report.images, report.batches) == (10, 3)


def test_fewer_images_than_asked_warn() -> None:
    with pytest.warns(UserWarning, match="8 images; 9 were asked for"):
        report = recalibrate_batchnorm(two_layers(), batches(4, 4), images=9)
    assert report.images == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recalibrate_batchnorm(two_layers(), batches(4, 4), images=8)


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [Interrupted, RuntimeError])
def test_an_exception_leaves_no_trace(mode: str, error: type[BaseException]) -> None:
    model = two_layers().train()
    before = state(model)

    def loader() -> Iterator[Tensor]:
        yield from batches(4, 4)
        raise error

    with pytest.raises(error):
        recalibrate_batchnorm(model, loader(), mode=mode, images=12)
    assert same(before, state(model))
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert model[1].momentum == 0.1


@pytest.mark.parametrize("mode", MODES)
def test_one_value_per_channel_is_refused(mode: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = state(model)
    with pytest.raises(CalibrationError, match=r"'1' met an input of shape \(1, 2\): 1 value"):
        recalibrate_batchnorm(model, [torch.randn(4, 2), torch.randn(4, 2)], mode=mode, images=5)
    assert same(before, state(model))


@pytest.mark.parametrize("mode", MODES)
def test_statistics_that_are_no_numbers_are_refused(mode: str) -> None:
    model = two_layers()
    before = state(model)
    (x,) = batches(4)
    x[2, 1, 3, 3] = math.nan
    with pytest.raises(CalibrationError, match=r"'1'.*not finite"):
        recalibrate_batchnorm(model, [x], mode=mode, images=4)
    assert same(before, state(model))


def test_a_layer_that_never_runs_keeps_its_statistics() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.BatchNorm2d(3)
            self.unused = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    for mode in MODES:
        model = Unused()
        report = recalibrate_batchnorm(model, batches(4), mode=mode, images=4)
        assert [layer.values for layer in report.layers] == [256, 0]
        assert torch.equal(model.unused.running_var, torch.ones(3))


def test_every_kind_of_batchnorm_is_found() -> None:
    for layer, shape in [
        (nn.BatchNorm1d(3), (4, 3)),
        (nn.BatchNorm2d(3), (4, 3, 2, 2)),
        (nn.BatchNorm3d(3), (4, 3, 2, 2, 2)),
        (nn.SyncBatchNorm(3), (4, 3, 2)),
    ]:
        x = torch.randn(shape)
        recalibrate_batchnorm(layer, [x], mode="final", images=4)
        torch.testing.assert_close(layer.running_mean, x.transpose(0, 1).flatten(1).mean(1))


def test_impossible_requests_are_named() -> None:
    model = two_layers()
    cases = [
        ({"mode": "cumulativ"}, "did you mean 'cumulative'"),
        ({"momentum": 0.0}, "momentum=0.0"),
        ({"momentum": 1.5}, "momentum=1.5"),
        ({"momentum": math.nan}, "momentum=nan"),
        ({"momentum": None}, "momentum=None"),
        ({"images": 0}, "images=0"),
        ({"images": 2.5}, "images=2.5"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            recalibrate_batchnorm(model, batches(4), **{"images": 4, **options})
    with pytest.raises(ConfigError, match="Linear has no BatchNorm"):
        recalibrate_batchnorm(nn.Linear(2, 2), batches(4))
    untracked = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ConfigError, match="'1' has track_running_stats=False"):
        recalibrate_batchnorm(untracked, batches(4))
    with pytest.raises(ConfigError, match="lazy"):
        recalibrate_batchnorm(nn.LazyBatchNorm2d(), batches(4))
    with pytest.raises(CalibrationError, match="gave no images"):
        recalibrate_batchnorm(model, [])
    with pytest.raises(CalibrationError, match="gave str"):
        recalibrate_batchnorm(model, ["image.png"])


def test_the_noise_of_the_array_is_what_is_gathered() -> None:
    model = two_layers()
    (x,) = batches(16)
    outputs: list[Tensor] = []
    model[3].register_forward_hook(lambda module, args, output: outputs.append(output))
    statistics = {}
    for threads in (1, 4):
        with sysmt.attach(model, sysmt.ArrayConfig(threads=threads)) as sim:
            sim.calibrate([x], images=16)
            recalibrate_batchnorm(model, [x], mode="cumulative", images=16)
            with pytest.raises(ConfigError, match="detach before folding"):
                fold_batchnorm(model)
        noisy = outputs[-1].double()
        torch.testing.assert_close(model[4].running_mean.double(), noisy.mean((0, 2, 3)))
        torch.testing.assert_close(model[4].running_var.double(), noisy.var((0, 2, 3)))
        statistics[threads] = save_statistics(model)
    assert torch.equal(statistics[1]["1.running_var"], statistics[4]["1.running_var"])  # the float layer's
    assert not torch.equal(statistics[1]["4.running_var"], statistics[4]["4.running_var"])


# Statistics


def test_statistics_travel() -> None:
    model, other = two_layers(), two_layers()
    recalibrate_batchnorm(model, batches(4), images=4)
    saved = save_statistics(model)
    assert sorted(saved) == ["1.running_mean", "1.running_var", "4.running_mean", "4.running_var"]
    kept = saved["1.running_mean"].clone()
    model[1].running_mean.zero_()
    assert torch.equal(saved["1.running_mean"], kept)  # copies
    load_statistics(other, {key: value.numpy() for key, value in saved.items()})
    assert same(saved, save_statistics(other))


def test_statistics_that_do_not_fit_change_nothing() -> None:
    model = two_layers()
    before = state(model)
    good = {key: value + 1 for key, value in save_statistics(model).items()}
    bad = [
        ({k: v for k, v in good.items() if k != "4.running_var"}, "lack '4.running_var'"),
        ({**good, "4.runing_var": good["4.running_var"]}, "did you mean '4.running_var'"),
        ({**good, "4.running_var": torch.ones(6)}, r"shape \(6,\); the layer has 5 channels"),
        ({**good, "4.running_var": -good["4.running_var"]}, "negative variance"),
        ({**good, "4.running_mean": torch.full((5,), math.inf)}, "not finite"),
    ]
    for statistics, message in bad:
        with pytest.raises(WeightsError, match=message):
            load_statistics(model, statistics)
        assert same(before, state(model))


# Folding


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

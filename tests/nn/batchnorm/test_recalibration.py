"""BatchNorm: recalibrated statistics against hand-worked ones."""

import copy
import math
import re
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import batches, same, state, two_layers
from torch import Tensor, nn

import sysmt
from sysmt.errors import CalibrationError, ConfigError, WeightsError
from sysmt.nn.batchnorm.folding import fold_batchnorm
from sysmt.nn.batchnorm.recalibration import load_statistics, recalibrate_batchnorm, save_statistics
from sysmt.nn.low_bit.low_precision_batchnorm import LowPrecisionBatchNorm2d

MODES = ["ema", "cumulative", "final"]


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
    # Three images at a time.
    monkeypatch.setattr("sysmt.nn.batchnorm.recalibration._Pool.CHUNK", 3 * 8 * 8 * 3)
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


class FrozenForward(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class FrozenTrain(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> "FrozenTrain":
        for value in self.parameters():
            value.requires_grad_(False)
        return super().train(False)


class AlwaysTraining(nn.BatchNorm2d):
    def eval(self) -> "AlwaysTraining":
        return self


class WithActivation(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class NormConstants(nn.Module):
    """As torchvision's FrozenBatchNorm2d: no BatchNorm of torch, but with statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x


SKIPPED = {
    "without": (lambda: nn.BatchNorm2d(3, track_running_stats=False), "has track_running_stats=False"),
    "frozen by its forward": (lambda: FrozenForward(3), "is frozen: the forward pass of FrozenForward"),
    "frozen by its train": (lambda: FrozenTrain(3), "is frozen: its train() leaves it in evaluation mode"),
    "constants": (NormConstants, "is a NormConstants, whose statistics are no BatchNorm's"),
    "instance norm": (lambda: nn.InstanceNorm2d(3, track_running_stats=True), "is a InstanceNorm2d, whose"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SKIPPED)
def test_what_cannot_gather_is_skipped_with_a_line_in_every_mode(kind: str, mode: str) -> None:
    build, reason = SKIPPED[kind]
    model = nn.Sequential(nn.BatchNorm2d(3), build(), nn.BatchNorm2d(3)).eval()
    before = state(model)
    gradients = [value.requires_grad for value in model.parameters()]
    with pytest.warns(UserWarning, match=re.escape(f"layer '1' {reason}")):
        report = recalibrate_batchnorm(model, batches(4, 4), mode=mode, images=8)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert list(report.skipped) == ["1"]
    assert report.skipped["1"].startswith(reason)
    changed = {key for key, value in state(model).items() if not torch.equal(value, before[key])}
    assert changed == {"0.running_mean", "0.running_var", "2.running_mean", "2.running_var"}
    assert [value.requires_grad for value in model.parameters()] == gradients
    assert not any(module.training for module in model.modules())
    alone = nn.Sequential(build())
    with pytest.raises(ConfigError, match=re.escape(f"'0' {reason}")):
        recalibrate_batchnorm(alone, batches(4), mode=mode, images=4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", [AlwaysTraining(3), WithActivation(3), LowPrecisionBatchNorm2d(3, "L4")])
def test_subclasses_that_move_their_statistics_gather(layer: nn.BatchNorm2d, mode: str) -> None:
    layer.reset_running_stats()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = recalibrate_batchnorm(layer, batches(4), mode=mode, momentum=1.0, images=4)
    assert [row.values for row in report.layers] == [256]
    x = batches(4)[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean, x.mean(1))
    torch.testing.assert_close(layer.running_var, x.var(1))


def test_networks_that_normalise_every_input_need_no_recalibration() -> None:
    model = nn.Sequential(nn.GroupNorm(1, 3), nn.Flatten(), nn.LayerNorm(192))
    message = "no BatchNorm layer.*GroupNorm and LayerNorm layers take mean and variance of every input anew"
    with pytest.raises(ConfigError, match=message):
        recalibrate_batchnorm(model, batches(4), images=4)


def test_impossible_requests_are_named() -> None:
    model = two_layers()
    cases = [
        ({"mode": "cumulativ"}, "did you mean 'cumulative'"),
        ({"momentum": 0.0}, "momentum=0.0"),
        ({"momentum": 1.5}, "momentum=1.5"),
        ({"momentum": math.nan}, "momentum=nan"),
        ({"momentum": None}, "momentum=None"),
        ({"momentum": True}, "momentum=True has type bool"),
        ({"momentum": "0.1"}, "momentum='0.1' has type str"),
        ({"images": 0}, "images=0"),
        ({"images": 2.5}, "images=2.5"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            recalibrate_batchnorm(model, batches(4), **{"images": 4, **options})
    with pytest.raises(ConfigError, match="Linear has no BatchNorm"):
        recalibrate_batchnorm(nn.Linear(2, 2), batches(4))
    untracked = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, track_running_stats=False))
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

"""Where BatchNorm's statistics come from in training: by hand, by torch's convention, and frozen."""

import pytest
import torch
from torch import nn

from sysmt.errors import ConfigError
from sysmt.nn.batchnorm.training_statistics import BatchStatistics, batch_statistics
from sysmt.nn.networks.training import train


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 2)
    )  # fmt: skip


def batches(count: int = 5, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator) + index, torch.arange(size) % 2)
        for index in range(count)
    ]


def watched(model: nn.Module) -> list[torch.Tensor]:
    """Collect what the BatchNorm layer reads."""
    seen: list[torch.Tensor] = []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    return seen


OPTIONS = {"epochs": 1, "lr": 0.01, "progress": False, "device": "cpu"}


def test_final_statistics_are_those_of_the_last_batch() -> None:
    model = network()
    seen = watched(model)
    train(model, batches(), statistics="final", **OPTIONS)
    layer, last = model[1], seen[-1]
    torch.testing.assert_close(layer.running_mean, last.mean(dim=(0, 2, 3)))
    # torch keeps the unbiased variance: n / (n - 1) times the one that the batch was normalised by.
    torch.testing.assert_close(layer.running_var, last.var(dim=(0, 2, 3), correction=1))
    # So evaluation repeats what training gave the final batch, up to that factor.
    layer.train()
    trained = layer(last)
    n = last.numel() / 3
    layer.eval()
    with torch.no_grad():
        layer.running_var *= (n - 1) / n
    torch.testing.assert_close(layer(last), trained, rtol=1e-4, atol=1e-5)


def test_population_statistics_decay_by_0_99() -> None:
    model = network()
    seen = watched(model)
    train(model, batches(), statistics="population", **OPTIONS)
    mean, variance = torch.zeros(3), torch.ones(3)
    for x in seen:
        mean = 0.99 * mean + 0.01 * x.mean(dim=(0, 2, 3))
        variance = 0.99 * variance + 0.01 * x.var(dim=(0, 2, 3), correction=1)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)


def test_frozen_statistics_stay_and_normalise() -> None:
    model = network()
    seen = watched(model)
    out: list[torch.Tensor] = []
    model[1].register_forward_hook(lambda _, args, y: out.append(y.detach().clone()))
    kept: list[torch.Tensor] = []
    train(
        model,
        batches(),
        statistics="frozen",
        freeze_after=7,
        after_step=lambda _: kept.append(model[1].running_mean.clone()),
        **OPTIONS | {"epochs": 2, "lr": 1e-6},
    )
    assert all(not torch.equal(kept[step], kept[step - 1]) for step in range(1, 7))
    assert all(torch.equal(mean, kept[6]) for mean in kept[7:])
    by_batch = nn.functional.batch_norm(seen[-1], None, None, training=True)
    assert (out[-1] - by_batch).abs().max() > 0.1  # normalised by the frozen statistics, not the batch's
    torch.testing.assert_close(out[-1], model.eval()[1](seen[-1]), rtol=1e-3, atol=1e-3)


def test_final_and_population_learn_the_same_weights() -> None:
    models = [network(), network()]
    for model, kind in zip(models, ("final", "population"), strict=True):
        train(model, batches(), statistics=kind, **OPTIONS)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(models[0][1].running_mean, models[1][1].running_mean)


def test_momenta_are_restored_and_none_leaves_them() -> None:
    model = network()
    model[1].momentum = None
    with batch_statistics(model, BatchStatistics.FINAL) as layers:
        assert [layer.momentum for layer in layers] == [1.0]
    assert model[1].momentum is None
    with batch_statistics(model, BatchStatistics.POPULATION):
        assert model[1].momentum == pytest.approx(0.01)
    model[1].momentum = 0.3
    with batch_statistics(model, None):
        assert model[1].momentum == 0.3


@pytest.mark.parametrize("kind", list(BatchStatistics))
def test_layers_without_affine_work_and_without_statistics_are_named(kind: BatchStatistics) -> None:
    options = OPTIONS | {"freeze_after": 3} if kind is BatchStatistics.FROZEN else OPTIONS
    plain = network()
    plain[1] = nn.BatchNorm2d(3, affine=False)
    train(plain, batches(), statistics=kind, **options)
    assert plain[1].running_mean.abs().min() > 0
    blind = network()
    blind[1] = nn.BatchNorm2d(3, track_running_stats=False)
    with pytest.raises(ConfigError, match="'1' has track_running_stats=False"):
        train(blind, batches(), statistics=kind, **options)
    train(blind, batches(), **OPTIONS)  # where nobody asks for statistics it may


def test_a_batch_of_one_works_on_maps_and_is_refused_on_single_values() -> None:
    model = network()
    train(model, batches(3, size=1), statistics="final", **OPTIONS)
    assert model[1].running_var.isfinite().all()
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match="a batch of 1 gives a BatchNorm layer one value per channel"):
        train(flat, batches(3, size=1), statistics="final", **OPTIONS)

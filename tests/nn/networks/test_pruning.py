"""Pruning: hand-worked masks, exact counts, and zeros that survive training, saving and quantisation."""

import copy
import itertools
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sysmt.errors import ConfigError, UnsupportedLayerError, WeightsError
from sysmt.nn.networks.checkpoints import load_weights, save_weights, weights_hash
from sysmt.nn.networks.models import build_model
from sysmt.nn.networks.pruning import make_permanent, prune_and_retrain, prune_model, sparsity_report
from sysmt.quant.uniform import quantize_weights, weight_scales


def network() -> nn.Sequential:
    """Magnitudes 1..8 in layer 1 and 11..14 in layer 2; layer 0 is the first convolution."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False),
        nn.Conv2d(2, 2, (1, 2), bias=False),
        nn.Conv2d(2, 2, 1, bias=False),
        nn.Flatten(),
        nn.Linear(2, 2, bias=False),
    )
    with torch.no_grad():
        model[0].weight.fill_(0.01)
        model[1].weight.copy_(torch.tensor([4.0, -2, 8, 1, 6, 3, -7, 5]).view(2, 2, 1, 2))
        model[2].weight.copy_(torch.tensor([11.0, -12, 13, 14]).view(2, 2, 1, 1))
        model[4].weight.fill_(0.01)
    return model


def zeros(layer: nn.Module) -> list[int]:
    return (layer.weight == 0).flatten().nonzero().flatten().tolist()


def test_global_scope_by_hand() -> None:
    model = network()
    report = prune_model(model, 0.5)  # 6 of the 12 weights of layers 1 and 2: 1..6 of layer 1
    assert zeros(model[1]) == [0, 1, 3, 4, 5, 7]
    assert zeros(model[2]) == []
    assert report.set_index("name")["zeros"].to_dict() == {"0": 0, "1": 6, "2": 0, "4": 0}
    assert report.set_index("name").loc["1", "sparsity"] == 0.75


def test_layer_scope_by_hand() -> None:
    model = network()
    prune_model(model, 0.5, scope="layer")
    assert zeros(model[1]) == [0, 1, 3, 5]
    assert zeros(model[2]) == [0, 1]
    assert torch.equal(model[1].weight.flatten(), torch.tensor([0.0, 0, 8, 0, 6, 0, -7, 5]))


def test_pattern_by_hand() -> None:
    model = network()
    prune_model(model, pattern="2:4")
    assert zeros(model[1]) == [1, 3, 5, 7]  # K = (in_channel, kernel_row, kernel_col): |4 2 8 1|, |6 3 7 5|
    assert zeros(model[2]) == []  # K = 2: a ragged group, filled up with zeros
    prune_model(model, 0.5, pattern="1:2")
    assert zeros(model[1]) == [1, 3, 5, 7]
    assert zeros(model[2]) == [0, 2]


def test_first_linear_and_exclude() -> None:
    model = network()
    prune_model(model, 0.9, scope="layer", first=True, linear=True, exclude=["2"])
    assert sparsity_report(model)["zeros"].tolist() == [2, 7, 0, 4]
    assert sparsity_report(model)["kind"].tolist() == ["Conv2d", "Conv2d", "Conv2d", "Linear"]


def test_equal_magnitudes_go_in_order() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, (1, 7), bias=False))
    model[1].weight.data.copy_(torch.tensor([1.0, -1, 1, 0.5, -1, 1, 2]).view(1, 1, 1, 7))
    prune_model(model, 3 / 7)
    assert zeros(model[1]) == [0, 1, 3]


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=3
    ),
    sparsity=st.floats(0, 0.999),
    seed=st.integers(0, 99),
)
def test_the_nearest_number_of_the_smallest_weights_goes(
    shapes: list[tuple[int, int, int]], sparsity: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(cin, cout, kernel) for cin, cout, kernel in shapes]
    model = nn.ModuleList(copy.deepcopy(layers))
    report = prune_model(model, sparsity, first=True)
    before = torch.cat([layer.weight.detach().flatten() for layer in layers]).abs()
    after = torch.cat([layer.weight.detach().flatten() for layer in model]).abs()
    assert report["zeros"].sum() == report["masked"].sum() == round(sparsity * len(before))
    gone, kept = before[after == 0], before[after > 0]
    assert not len(gone) or not len(kept) or gone.max() <= kept.min()
    assert torch.equal(after[after > 0], kept)


@settings(max_examples=40, deadline=None)
@given(
    cin=st.integers(1, 9),
    kernel=st.integers(1, 3),
    keep=st.integers(1, 7),
    extra=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_group_of_k_keeps_its_largest(cin: int, kernel: int, keep: int, extra: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer, group = nn.Conv2d(cin, 3, kernel), keep + extra
    before = layer.weight.detach().clone().flatten(1)
    prune_model(layer, pattern=f"{keep}:{group}", first=True)
    for row, dense in zip(layer.weight.detach().flatten(1), before, strict=True):
        for values, originals in zip(row.split(group), dense.split(group), strict=True):
            largest = originals.abs().sort(descending=True).values[:keep]
            assert torch.equal(values[values != 0].abs().sort(descending=True).values, largest)


def test_pruning_on_never_revives() -> None:
    model = network()
    prune_model(model, 0.25)
    parameter = model[1].weight_orig
    assert zeros(model[1]) == [1, 3, 5]
    prune_model(model, 0.5)
    assert zeros(model[1]) == [0, 1, 3, 4, 5, 7]
    prune_model(model, 0.25)
    assert zeros(model[1]) == [0, 1, 3, 4, 5, 7]
    assert torch.equal(parameter == 0, model[1].weight_mask == 0)
    assert model[1].weight_orig is parameter  # an optimiser that holds it goes on working
    copy.deepcopy(model)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_zeros_survive_training(optimizer: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    if optimizer == "sgd":
        steps = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    else:
        steps = torch.optim.Adam(model.parameters(), 0.01, weight_decay=0.1)

    def train() -> None:
        for _ in range(3):
            steps.zero_grad()
            model(torch.randn(8, 1, 8, 8)).square().mean().backward()
            steps.step()

    train()  # momentum for weights that are pruned afterwards
    prune_model(model, 0.5)
    gone = model[2].weight == 0
    moved = model[2].weight.detach().clone()
    train()
    model(torch.randn(1, 1, 8, 8))
    assert torch.equal(model[2].weight == 0, gone)
    assert int(gone.sum()) == 72
    assert not torch.equal(model[2].weight, moved)
    make_permanent(model)
    assert torch.equal(model[2].weight == 0, gone)


def labelled_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(16, 1, 8, 8, generator=generator), torch.randint(10, (16,), generator=generator))
        for _ in range(3)
    ]


def test_prune_and_retrain_reaches_each_sparsity_and_keeps_every_zero() -> None:
    torch.manual_seed(0)
    model = build_model("digits")
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    layer = model.get_submodule("layer1.0.conv1")
    gone_at_step: list[torch.Tensor] = []

    def watch(step: int) -> None:
        gone_at_step.append(layer.weight_orig == 0)
        assert torch.equal(layer.weight_orig == 0, layer.weight_mask == 0)

    batches = labelled_batches()
    report = prune_and_retrain(
        model, batches, (0.25, 0.5), 2, test=batches, weight_decay=0.1, after_step=watch, progress=False
    )
    assert len(gone_at_step) == 2 * 2 * 3
    assert all((later | ~earlier).all() for earlier, later in itertools.pairwise(gone_at_step))
    weights = sparsity_report(model).query("name not in ('conv1', 'linear')")["weights"].sum()
    assert report["sparsity"].tolist() == [round(0.25 * weights) / weights, round(0.5 * weights) / weights]
    assert report["step"].tolist() == [1, 2]
    assert report[["loss", "top1", "pruned_top1", "test_top1"]].notna().all(axis=None)
    assert int((sparsity_report(model)["masked"]).sum()) == round(0.5 * weights)
    assert not torch.equal(model.conv1.weight, start["conv1.weight"])  # the entire network is retrained
    kept = layer.weight != 0
    assert not torch.equal(layer.weight[kept], start["layer1.0.conv1.weight"][kept])
    assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)  # not one step behind
    copy.deepcopy(model)
    make_permanent(model)
    assert int(sparsity_report(model)["zeros"].sum()) == round(0.5 * weights)


def test_a_killed_retraining_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return build_model("digits")

    data = labelled_batches()
    options = {"schedule": (0.2, 0.5), "epochs": 3, "progress": False}
    whole = fresh()
    expected = prune_and_retrain(whole, data, **options)
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from sysmt.nn.networks.models import build_model
from sysmt.nn.networks.pruning import prune_and_retrain
from test_pruning import labelled_batches
torch.set_num_threads({torch.get_num_threads()})
torch.manual_seed(0)
steps = 0
def kill(step):
    global steps
    steps += 1
    if steps == {3 * len(data) + 2 * len(data) + 1}:  # in the last epoch of the second step
        os.kill(os.getpid(), 9)
prune_and_retrain(build_model("digits"), labelled_batches(), schedule=(0.2, 0.5), epochs=3, progress=False,
                  checkpoint={str(tmp_path / "run.pt")!r}, after_step=kill)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-1.pt", "run-2.pt"]
    resumed, steps = fresh(), []
    again = prune_and_retrain(
        resumed, data, checkpoint=tmp_path / "run.pt", after_step=steps.append, **options
    )  # fmt: skip
    assert len(steps) == len(data)  # one epoch was left
    pd.testing.assert_frame_equal(again, expected)
    assert weights_hash(resumed) == weights_hash(whole)
    for (name, one), two in zip(resumed.named_modules(), whole.modules(), strict=True):
        if isinstance(one, nn.Conv2d) and name != "conv1":
            assert torch.equal(one.weight, two.weight)  # what follows from mask and latent weight, too
    copy.deepcopy(resumed)


def test_weights_load_into_a_network_that_is_masked_if_its_masks_agree(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("digits")
    prune_model(model, 0.4)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "masks.pt")  # as trainings keep it
    save_weights(model, tmp_path / "plain.pt")
    for name in ("masks.pt", "plain.pt"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.layer1[0].conv1.weight_orig.zero_()
        load_weights(other, tmp_path / name)
        assert weights_hash(other) == weights_hash(model)
        assert torch.equal(other.layer1[0].conv1.weight, model.layer1[0].conv1.weight)
        assert sparsity_report(other).equals(sparsity_report(model))
    save_weights(build_model("digits"), tmp_path / "dense.pt")
    before = weights_hash(model)
    with pytest.raises(WeightsError, match=r"layer1\.0\.conv1\.weight that the network's mask prunes"):
        load_weights(model, tmp_path / "dense.pt")
    assert weights_hash(model) == before


def test_retraining_refuses_what_it_cannot_do() -> None:
    model = build_model("digits")
    for options, message in [
        ({"schedule": ()}, "schedule=()"),
        ({"schedule": (0.4, 0.2)}, r"schedule=\(0.4, 0.2\) must ascend"),
        ({"schedule": (0.5, 1.0)}, "sparsity=1.0"),
        ({"schedule": 0.4}, "schedule=0.4 must be a sequence"),
        ({"epochs": -1}, "epochs=-1"),
        ({"weight_deacy": 0.1}, "did you mean 'weight_decay'"),
        ({"test_every": 3, "after_step": None, "freeze_aftr": 2}, "did you mean 'freeze_after'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            prune_and_retrain(model, labelled_batches(), **options)
        assert sparsity_report(model)["zeros"].sum() == 0


def test_make_permanent_leaves_plain_weights() -> None:
    model = network()
    keys = list(model.state_dict())
    prune_model(model, 0.5, scope="layer", linear=True)
    expected = model[1].weight.detach().clone()
    assert make_permanent(model) == ("1.weight", "2.weight", "4.weight")
    assert make_permanent(model) == ()
    assert list(model.state_dict()) == keys
    assert isinstance(model[1].weight, nn.Parameter)
    assert torch.equal(model[1].weight, expected)
    assert sparsity_report(model)["masked"].tolist() == [0, 0, 0, 0]
    assert sparsity_report(model)["zeros"].tolist() == [0, 4, 2, 2]


@pytest.mark.parametrize("permanent", [False, True])
def test_zeros_survive_saving_and_quantise_to_zero(permanent: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("digits")
    prune_model(model, 0.4, scope="layer")
    layer = model.get_submodule("layer2.0.conv1")
    expected = layer.weight.detach().clone()
    if permanent:
        make_permanent(model)
    save_weights(model, tmp_path / "pruned.pt")
    fresh = build_model("digits")
    load_weights(fresh, tmp_path / "pruned.pt")
    loaded = fresh.get_submodule("layer2.0.conv1").weight.detach()
    assert torch.equal(loaded, expected)
    assert int((loaded == 0).sum()) == round(0.4 * loaded.numel())
    assert not loaded[loaded == 0].signbit().any()
    codes = quantize_weights(loaded.numpy(), weight_scales(loaded.numpy()))
    assert not codes[loaded.numpy() == 0].any()
    assert np.count_nonzero(codes) > 0.5 * codes.size


def test_impossible_requests_are_named_and_prune_nothing() -> None:
    model = network()
    cases = [
        ({"sparsity": 1.0}, r"sparsity=1.0 must be a number in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"sparsity": "half"}, "sparsity='half'"),
        ({"sparsity": None}, "sparsity is missing"),
        ({"method": "magnitud"}, "did you mean 'magnitude'"),
        ({"scope": "globl"}, "did you mean 'global'"),
        ({"pattern": "4:2"}, "pattern='4:2'"),
        ({"pattern": "2-4"}, "pattern='2-4'"),
        ({"pattern": "0:4"}, "pattern='0:4'"),
        ({"sparsity": 0.4, "pattern": "2:4"}, "sparsity=0.4 contradicts the pattern, which implies 0.5"),
        ({"exclude": ["layer"]}, "exclude names 'layer'"),
        ({"exclude": ["3"]}, "exclude names '3', but the network has no such Conv2d or Linear"),
        ({"exclude": ["1", "2"]}, "nothing to prune: of its 4 Conv2d and Linear layers"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            prune_model(model, **{"sparsity": 0.5, **options})
        assert zeros(model[1]) == []
    with pytest.raises(ConfigError, match=r"did you mean 'layer1\.0\.conv1'"):
        prune_model(build_model("digits"), 0.5, exclude=["layer1.0.con1"])


def test_weights_that_one_mask_cannot_hold_are_refused() -> None:
    tied = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    tied[2].weight = tied[1].weight
    with pytest.raises(UnsupportedLayerError, match="'1' and '2' share their weight"):
        prune_model(tied, 0.5)
    normed = nn.Sequential(nn.Conv2d(2, 2, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)))
    with pytest.raises(UnsupportedLayerError, match="'1' is parametrised"):
        prune_model(normed, 0.5)
    with pytest.raises(UnsupportedLayerError, match="not initialised"):
        prune_model(nn.LazyConv2d(2, 1), 0.5, first=True)


def test_weights_loaded_under_masks_are_pruned_as_if_they_had_been_there() -> None:
    networks = [build_model("digits") for _ in range(2)]
    for model in networks:
        prune_model(model, 0.25)
    networks[0].load_state_dict(networks[1].state_dict())
    assert sparsity_report(networks[0]).equals(sparsity_report(networks[1]))
    reports = [prune_model(model, 0.5) for model in networks]
    assert reports[0].equals(reports[1])
    assert round(reports[0]["zeros"].sum() / reports[0]["weights"].iloc[1:-1].sum(), 3) == 0.5
    assert weights_hash(networks[0]) == weights_hash(networks[1])


def test_sparsity_counts_the_masked_weights_after_a_step_of_an_optimiser() -> None:
    model = network()
    prune_model(model, 0.5)
    with torch.no_grad():
        model[1].weight_orig.fill_(1.0)
        model[1].weight_mask[0] = 0
    assert sparsity_report(model).set_index("name").loc["1", "zeros"] == int(
        (model[1].weight_mask == 0).sum()
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("derive", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_weights_that_hooks_compute_are_refused_before_anything_is_pruned(derive: object) -> None:
    model = network()
    derive(model[2])
    before = weights_hash(model)
    with pytest.raises(UnsupportedLayerError, match="'2' is parametrised"):
        prune_model(model, 0.5)
    assert weights_hash(model) == before

"""The experiment on low-precision BatchNorm, small: what it writes, resuming, and the paper's direction."""

import functools
import sys
import tomllib

import low_precision_bn as module
import low_precision_bn_networks
import numpy as np
import pandas as pd
import pytest
import small_experiments
import torch
from common.command import main
from small_experiments import save_digits
from torch import nn

from sysmt.errors import OutputError
from sysmt.nn.low_bit.low_precision_batchnorm import convert_batchnorm
from sysmt.nn.low_bit.packed_activations import saved_bytes
from sysmt.nn.networks.models import build_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_digits(tmp_path_factory.mktemp("weights"), epochs=5)


run = functools.partial(small_experiments.run, module)


def quick(weights, out, *more):
    return [
        "--quick",
        "--model",
        "digits",
        "--weights",
        weights,
        "--data",
        "digits",
        "--images",
        200,
        "--out",
        out,
        *more,
    ]


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    """The whole quick experiment, once."""
    out = tmp_path_factory.mktemp("results") / "whole"
    return out, run(*quick(weights, out))


def test_quick_writes_tables_figures_and_configuration(finished):
    out, said = finished
    for part in module.PARTS:
        assert (out / f"{part}.csv").stat().st_size > 100
        assert (out / f"{part}.png").stat().st_size > 5000
    text = (out / "low_precision_bn.md").read_text()
    assert text.strip() in said
    for words in ("Figure 2.", "Table 3 in small.", "Tables 5 and 6.", "Bytes kept"):
        assert words in text
    config = tomllib.loads((out / "config.toml").read_text())
    assert config["outcome"]["status"] == "complete"
    assert config["subjects"]["digits"]["facts"]["figure2_epochs"] == 3


def test_comparisons_are_with_the_right_network(finished):
    out, _ = finished
    points = pd.read_csv(out / "points.csv")
    for part in ("figure2", "table3", "retrofit"):
        table = pd.read_csv(out / f"{part}.csv")
        for _, row in table.iterrows():
            here = points[points["part"] == part]
            if part == "retrofit":
                reference = here[(here["where"] == "nowhere") & (here["state"] == "raw")]
            else:
                same = (here["network"] == row["network"]) & (here["width"] == row["width"])
                reference = here[same & (here["format"] == "float")]
            assert len(reference) == 1
            assert row["difference"] == pytest.approx(row["top1"] - reference["top1"].iloc[0])
            if part == "figure2":
                expected = row["train_top1"] - reference["train_top1"].iloc[0]
                assert row["train_difference"] == pytest.approx(expected)
    retrofit = pd.read_csv(out / "retrofit.csv")
    assert set(retrofit["where"]) == {"nowhere", "all", "all but the first", "from block 2"}
    assert set(retrofit["state"]) == {"raw", "recalibrated", "fine-tuned"}
    raw = retrofit[retrofit["state"] == "raw"].set_index(["format", "where"])["top1"]
    assert raw[("L5", "all")] > raw[("L4", "all")] - 0.02  # Tables 5 and 6: L5 costs less


def test_fewer_bits_keep_fewer_bytes(finished):
    out, _ = finished
    table = pd.read_csv(out / "memory.csv").set_index(["network", "format"])
    bits = {"L2": 2, "L3": 3, "L4": 4, "L5": 5, "U4": 4, "U5": 5, "U8": 8, "O4": 4}
    for fmt, count in bits.items():
        layer = table.loc[("one BatchNorm layer", fmt), "share_layers_alone"]
        assert layer == pytest.approx(count / 32, rel=0.01)
        # Cromulent: instead of the layer's input and the ReLU's result, 32 bits each, one code.
        network = table.loc[("ResNet-20, pre-activated", fmt), "share_recomputed"]
        assert network == pytest.approx(count / 64, abs=0.002)
        # Pooling in between keeps its maxima's places besides, 4 bits each.
        assert table.loc[("VGG(32)", fmt), "share_recomputed"] < (count + 4) / 64
        alone = table.loc[("ResNet-20", fmt), "share_layers_alone"]
        assert table.loc[("ResNet-20", fmt), "share_recomputed"] < 0.6 * alone < 0.4


def test_a_stopped_run_goes_on_and_ends_like_one_that_was_not(weights, finished, tmp_path, monkeypatch):
    trained = []
    honest = module.train

    def stop_at_the_third(*args, **kwargs):
        trained.append(args)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return honest(*args, **kwargs)

    monkeypatch.setattr(module, "train", stop_at_the_third)
    options = quick(weights, tmp_path / "parts", "--parts", "table3")
    run(*options, code=130)
    assert len(pd.read_csv(tmp_path / "parts" / "points.csv")) == 2
    run(*options)
    assert len(trained) == 3 + 6
    whole = pd.read_csv(finished[0] / "table3.csv")
    parts = pd.read_csv(tmp_path / "parts" / "table3.csv")
    pd.testing.assert_frame_equal(whole, parts)  # the same seed, the same images: the same networks


def test_another_configuration_and_unknown_parts_are_refused(
    weights, finished, tmp_path, monkeypatch, capsys
):
    with pytest.raises(OutputError, match="training_images"):
        run(*quick(weights, finished[0], "--training-images", 100))
    args = quick(weights, tmp_path / "none", "--parts", "figure2,table4")
    monkeypatch.setattr(sys, "argv", ["low_precision_bn", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main(module.low_precision_bn)
    assert ended.value.code == 2
    assert (
        "'table4' is unknown (did you mean 'table3'?); allowed: figure2"
        in capsys.readouterr().err.replace("\n", " ")
    )
    assert not (tmp_path / "none").exists()


def test_a_training_that_diverges_is_a_result(weights, tmp_path, monkeypatch):
    honest = module.train
    monkeypatch.setattr(module, "train", lambda *args, **recipe: honest(*args, **recipe | {"lr": 1e30}))
    monkeypatch.setattr(module, "QUICK", module.dataclasses.replace(module.QUICK, formats=("float", "L4")))
    said = run(*quick(weights, tmp_path, "--parts", "table3"))
    points = pd.read_csv(tmp_path / "points.csv")
    assert points["diverged"].all()
    assert "diverged" in said


# -- the networks ------------------------------------------------------------------------------


def test_vgg_is_the_paper_s():
    model = low_precision_bn_networks.vgg(32, 10, 3, 32)
    convolutions = [module for module in model if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convolutions] == [32, 32, 64, 64, 128, 128, 10]
    assert convolutions[-1].kernel_size == (4, 4)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert low_precision_bn_networks.vgg(8, 10, 1, 16)(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


def test_pre_activated_resnet_20_has_as_many_weights_as_resnet_20():
    def weights_of(model):
        return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Conv2d))

    model = low_precision_bn_networks.pre_activated_resnet(3)
    assert weights_of(model) == weights_of(build_model("resnet20"))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_fully_connected_network_keeps_fewer_bytes_as_well():
    model = low_precision_bn_networks.fully_connected(192, 64, 10)
    x = torch.from_numpy(np.random.default_rng(0).random((50, 3, 8, 8), np.float32))
    plain = saved_bytes(model, x)
    convert_batchnorm(model, "L4")
    assert saved_bytes(model, x) < 0.12 * plain

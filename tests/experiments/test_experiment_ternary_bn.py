"""The ternary experiment in small: Table 1's directions, gradients by depth, and its resumption."""

import functools
import math
import sys

import pandas as pd
import pytest
import small_experiments
import ternary_bn
from common import trainings
from common.command import main

TINY = ("--images", 100, "--epochs", 1)


run = functools.partial(small_experiments.run, ternary_bn)


def test_quick_run_finds_the_explosion_and_who_learns(tmp_path):
    said = run("--quick", "--out", tmp_path)
    summary = pd.read_csv(tmp_path / "ternary_bn.csv").set_index("column")
    assert list(summary.index) == ["BN", "No BN", "Sparse BN", "Sparse No BN"]
    assert summary.loc["BN", "converged"] == 1
    assert summary.loc["BN", "top1"] > 0.3
    assert not summary.loc[["No BN", "Sparse No BN"], "converged"].any()
    # Equation (6): five ternary layers without BatchNorm multiply variances by about 10 million.
    grown = summary.loc["No BN", "growth_measured"]
    assert grown > 1e6
    assert grown == pytest.approx(summary.loc["No BN", "growth_predicted"], rel=0.5)
    assert summary.loc[["BN", "Sparse BN", "Sparse No BN"], "growth_measured"].max() < 100
    # TWN's threshold leaves 35 % zeros of uniform weights, equation (8) all but 2 of K.
    assert summary.loc["BN", "zero_weights"] == pytest.approx(0.35, abs=0.05)
    assert summary.loc["Sparse BN", "zero_weights"] > 0.8
    assert "vgg7, published (CIFAR-10)" in said
    gradients = pd.read_csv(tmp_path / "gradients.csv")
    assert set(gradients["depth"]) == set(range(1, 9))
    for name in ("gradients.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_resnet_without_batchnorm_overflows_and_is_a_result(tmp_path):
    run(*TINY, "--networks", "resnet56", "--batch-size", 100, "--out", tmp_path)
    summary = pd.read_csv(tmp_path / "ternary_bn.csv").set_index("column")
    assert summary.loc["No BN", ["converged", "diverged"]].tolist() == [0, 1]
    assert math.isnan(summary.loc["No BN", "top1"])
    assert "- (no number)" in (tmp_path / "ternary_bn.md").read_text()
    # In double precision its gradients are numbers still.
    gradients = pd.read_csv(tmp_path / "gradients.csv")
    measured = gradients[gradients["column"] == "No BN"].set_index("name")["variance"]
    assert measured["layer1.0.conv1"] > 1e30 * measured["layer3.8.conv2"]


def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    options = ("--networks", "vgg7", "--images", 100, "--epochs", 2, "--scaled", "--all-layers")
    run(*options, "--out", tmp_path / "whole")
    train, steps = trainings.train, []

    def stopped(*args, **kwargs):
        def after_step(step):
            steps.append(step)
            if len(steps) == 4 + 3:
                raise KeyboardInterrupt

        return train(*args, **kwargs, after_step=after_step)

    with monkeypatch.context() as patch:
        patch.setattr(trainings, "train", stopped)
        run(*options, "--out", tmp_path / "parts", code=130)
    assert len(list((tmp_path / "parts").glob("training-*.pt"))) == 1
    run(*options, "--out", tmp_path / "parts")
    for name in ("tests.csv", "gradients.csv", "ternary_bn.csv", "ternary_bn.md"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert not list((tmp_path / "parts").glob("training-*"))
    with pytest.raises(Exception, match="holds points with scaled = True"):
        run(*TINY, "--networks", "vgg7", "--epochs", 2, "--all-layers", "--out", tmp_path / "parts")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--networks", "vgg8"), "did you mean 'vgg7'"),
        (("--preset", "cifar"), "preset='cifar' is unknown"),
        (("--lr", "-1"), "lr=-1.0"),
    ],
)
def test_wrong_choices_are_one_line_and_exit_code_2(options, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["ternary_bn.py", *map(str, TINY), *options, "--out", str(tmp_path / "o")]
    )
    with pytest.raises(SystemExit) as stop:
        main(ternary_bn.ternary_bn)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o" / "points.csv").exists()

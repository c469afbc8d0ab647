"""The final-sample experiment in small: its directions, its resumption, and its refusals."""

import functools
import sys

import final_sample_bn
import numpy as np
import pandas as pd
import pytest
import small_experiments
from common import trainings
from common.command import main

TINY = ("--images", 160, "--batch-size", 40, "--epochs", 3, "--width", 4, "--runs", 2)


run = functools.partial(small_experiments.run, final_sample_bn)


def test_quick_run_finds_what_few_steps_must_give(tmp_path):
    """After 48 steps population statistics still remember where they started; the final batch does not."""
    said = run("--quick", "--runs", 1, "--out", tmp_path)
    summary = pd.read_csv(tmp_path / "final_sample_bn.csv").set_index(["variant", "statistics"])
    for variant in ("float", "channelwise"):
        assert summary.loc[(variant, "final"), "top1"] > summary.loc[(variant, "population"), "top1"] + 0.2
        gain = summary.loc[(variant, "final"), "gain"]
        difference = summary.loc[(variant, "final"), "top1"] - summary.loc[(variant, "population"), "top1"]
        assert gain == pytest.approx(difference)
    assert "BN-final gains" in said
    # Both kinds learn the same weights: the loss over the training images is one and the same.
    points = pd.read_csv(tmp_path / "points.csv").set_index(["variant", "statistics"])
    assert points.loc[("float", "final"), "loss"] == points.loc[("float", "population"), "loss"]
    for name in ("final_sample_bn.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert not list(tmp_path.glob("training-*"))


def test_each_run_counts_with_its_last_three_tests(tmp_path):
    options = ("--variants", "channelwise", "--schedules", "step", "--statistics", "population,final")
    run(*TINY, *options, "--epochs", 4, "--out", tmp_path)
    tests = pd.read_csv(tmp_path / "tests.csv")
    assert len(tests) == 2 * 2 * 4
    assert sorted(tests["step"].unique()) == [4, 8, 12, 16]  # 160 images in batches of 40, tested each epoch
    six = tests[(tests["statistics"] == "final") & (tests["epochs"] > 1)]["test_top1"]
    row = pd.read_csv(tmp_path / "final_sample_bn.csv").set_index("statistics").loc["final"]
    assert row["tests"] == len(six) == 6
    assert row["top1"] == pytest.approx(six.mean())
    assert row["top1_sd"] == pytest.approx(np.std(six, ddof=1))


def test_a_stopped_run_goes_on_within_a_training_and_ends_the_same(tmp_path, monkeypatch):
    options = (*TINY, "--variants", "divide255", "--schedules", "constant", "--statistics", "frozen")
    run(*options, "--out", tmp_path / "whole")
    train, steps = trainings.train, []

    def stopped(*args, **kwargs):
        def after_step(step):
            steps.append(step)
            if len(steps) == 12 + 6:
                raise KeyboardInterrupt

        return train(*args, **kwargs, after_step=after_step)

    with monkeypatch.context() as patch:
        patch.setattr(trainings, "train", stopped)
        run(*options, "--out", tmp_path / "parts", code=130)
    assert len(pd.read_csv(tmp_path / "parts" / "points.csv")) == 1
    assert len(list((tmp_path / "parts").glob("training-*.pt"))) == 1
    steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(trainings, "train", lambda *a, **k: train(*a, **k, after_step=steps.append))
        run(*options, "--out", tmp_path / "parts")
    assert steps[0] == 5  # the first epoch of four steps was done
    for name in ("tests.csv", "final_sample_bn.csv", "final_sample_bn.md"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    run(*options, "--out", tmp_path / "parts")  # nothing left to do


def test_a_network_that_diverges_is_a_result(tmp_path):
    run(*TINY, "--variants", "float", "--schedules", "constant", "--statistics", "population,final",
        "--lr", 1e30, "--out", tmp_path)  # fmt: skip
    points = pd.read_csv(tmp_path / "points.csv")
    assert not points["converged"].any()
    assert "did not converge" in (tmp_path / "final_sample_bn.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--variants", "chanelwise"), "did you mean 'channelwise'"),
        (("--statistics", "final,last"), "'last' is unknown"),
        (("--schedules", "cosine"), "allowed: step, constant"),
        (("--preset", "own"), "preset='own' is unknown"),
        (("--preset", "shared", "--data", "digits"), "leave out --data"),
        (("--images", 20, "--batch-size", 40), "batch_size=40 is more than"),
        (("--data", "digts"), "did you mean 'digits'"),
    ],
)
def test_wrong_choices_are_one_line_and_exit_code_2(options, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["final_sample_bn.py", *map(str, options), "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as stop:
        main(final_sample_bn.final_sample_bn)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o" / "points.csv").exists()

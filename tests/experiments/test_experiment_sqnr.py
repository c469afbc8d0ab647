"""The experiment on SQNR through Q-format stages, at a small size: what must hold whatever the network."""

import sys
import tomllib

import numpy as np
import pandas as pd
import pytest
import small_experiments
import sqnr
from common.command import main
from small_experiments import save_digits

from sysmt.nn.low_bit.integer_network import QNetwork


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_digits(tmp_path_factory.mktemp("weights"), epochs=2)


def run(weights, out, *args, code=0):
    options = [
        "--model",
        "digits",
        "--weights",
        weights,
        "--data",
        "digits",
        "--out",
        out,
        "--images",
        30,
        "--quick",
    ]
    options += ["--calibration-images", 64, "--recalibration-images", 256, "--cpu-threads", 1]
    return small_experiments.run(sqnr, *options, *args, code=code)


def test_stages_are_told_apart_and_a_stopped_run_goes_on(weights, tmp_path, monkeypatch):
    said = run(weights, tmp_path / "whole", "--bits", "4,8")
    pairs = pd.read_csv(tmp_path / "whole" / "sqnr.csv")
    assert len(pairs) == 2 * 3 * 4 * 7 * 3  # bits, threads, runs, pairs, ratios
    assert "8 bits, 4T" in said
    total = pairs[pairs["ratio"] == "all values"].set_index(["bits", "threads", "run", "layer"])
    around = pairs[pairs["ratio"] == "around channel means"].set_index(["bits", "threads", "run", "layer"])
    # An exact BatchNorm wins nothing around the channels' means, whatever the total says.
    isolated = around.xs("isolated", level="run")
    assert np.abs(isolated["won_exact"]).max() < 1e-3
    # Fewer bits and more threads cost; 4-bit codes are narrow, and threads cost them nothing.
    first = total.xs(("as calibrated", "bn1"), level=("run", "layer"))["conv"]
    assert first[(8, 1)] > first[(8, 2)] > first[(8, 4)]
    assert first[(8, 1)] > first[(4, 1)] + 12
    assert first[(4, 1)] == first[(4, 2)] == first[(4, 4)]
    # Rounding down costs half a step in the mean; recalibrated statistics take it out again. (At 8 bits this
    # is less than what the statistics of so short a training are off.)
    one = total.xs(1, level="threads")
    assert one.loc[(8, "isolated"), "mean_error_conv"].mean() == pytest.approx(-0.5, abs=0.1)
    assert (
        one.loc[(4, "recalibrated"), "bn, exact"].mean() > one.loc[(4, "as calibrated"), "bn, exact"].mean()
    )
    assert one.loc[(8, "rounded"), "mean_error_conv"].iloc[0] == pytest.approx(0, abs=0.1)
    assert (tmp_path / "whole" / "sqnr.png").stat().st_size > 1000

    calls = []
    honest = QNetwork.compare

    def compare(self, loader, *, isolated=False):
        calls.append(isolated)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return honest(self, loader, isolated=isolated)

    monkeypatch.setattr(QNetwork, "compare", compare)
    run(weights, tmp_path / "parts", "--bits", "4,8", code=130)
    status = tomllib.loads((tmp_path / "parts" / "config.toml").read_text())["outcome"]["status"]
    assert status == "interrupted"
    run(weights, tmp_path / "parts", "--bits", "4,8")
    assert len(calls) == 5 + 24 - 4
    for name in ("sqnr.csv", "sqnr.md"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_other_bits_add_to_what_is_there(weights, tmp_path):
    run(weights, tmp_path, "--bits", "8")
    before = pd.read_csv(tmp_path / "points.csv")
    run(weights, tmp_path, "--bits", "5")
    points = pd.read_csv(tmp_path / "points.csv")
    pd.testing.assert_frame_equal(points[: len(before)], before)
    assert set(pd.read_csv(tmp_path / "sqnr.csv")["bits"]) == {5}


@pytest.mark.parametrize("bits", ["9", "1,8", "eight"])
def test_impossible_bits_are_one_line(bits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sqnr", "--bits", bits, "--out", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        main(sqnr.sqnr)
    assert ended.value.code == 2
    assert "bits=" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()

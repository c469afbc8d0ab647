"""Low precision on the array, at a small size: what follows from widths and policies must hold exactly."""

import math
import sys
import tomllib

import low_bits_on_the_array as on_array
import numpy as np
import pandas as pd
import pytest
import small_experiments
import torch
from common.command import main
from small_experiments import save_digits
from torch import nn

import sysmt
from sysmt.nn.low_bit.straight_through import ActivationQuantizer
from sysmt.study.workload import OpenWorkload

IMAGES = 30


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
        IMAGES,
        "--epochs",
        1,
    ]
    options += ["--calibration-images", 64, "--recalibration-images", 128, "--cpu-threads", 1]
    return small_experiments.run(on_array, *options, *args, code=code)


def test_what_is_narrow_costs_nothing(weights, tmp_path):
    said = run(weights, tmp_path)
    table = pd.read_csv(tmp_path / "low_bits_on_the_array.csv").set_index(list(on_array.KEYS[1:]))
    assert len(table) == 16 + 5 * 20
    squeezed = table[table.index.get_level_values("threads") > 1]
    by_run = squeezed.xs("population", level="statistics")

    def exact(scheme, codes, policy, threads):
        return by_run.loc[(scheme, codes, policy, threads), "mse"] == 0

    for policy in on_array.POLICIES:
        for threads in (2, 4):
            assert not exact("8-bit", on_array.MIN_MAX, policy, threads)
            # Narrow activations, or multiples of 16: nothing to lose where activations alone are reduced.
            for scheme in ("4-bit", "log"):
                assert exact(scheme, on_array.GRID, policy, threads) == (threads == 2)
            # Narrow weights besides: nothing to lose at all.
            for scheme in ("ternary+4-bit", "ternary+log"):
                assert exact(scheme, on_array.GRID, policy, threads)
            # Narrow weights alone spare the activation only under S+Aw, and in two-way collisions.
            assert exact("ternary", on_array.GRID, policy, threads) == (policy == "S+Aw" and threads == 2)
            for scheme in list(on_array.SCHEMES)[1:]:
                assert not exact(scheme, on_array.MIN_MAX, policy, threads)
    assert (by_run.xs("ternary+4-bit").xs(on_array.GRID)["reduced_per_mac"] == 0).all()
    assert (by_run.xs("ternary+log").xs(on_array.GRID)["reduced_per_mac"] > 0).any()  # reduced, unchanged
    # Ternary weights have zeros, and collide less; exact runs classify as one thread does.
    zeros = by_run["zero_weights"].groupby("scheme").first()
    assert 0.2 < zeros["ternary"] < 0.7
    assert zeros["8-bit"] < 0.05
    rates = by_run["collision_rate"].groupby(["scheme", "threads"]).first()
    assert rates[("ternary", 2)] < 0.6 * rates[("8-bit", 2)]
    assert rates[("ternary", 4)] < rates[("8-bit", 4)]
    same = squeezed[
        (squeezed["mse"] == 0) & (squeezed.index.get_level_values("statistics") != "recalibrated")
    ]
    assert len(same) > 20
    assert (same["drop"] == 0).all()
    recalibrated = table.xs("recalibrated", level="statistics")
    before = table.xs("population", level="statistics")["top1"].reindex(recalibrated.index)
    np.testing.assert_allclose(recalibrated["won_back"], recalibrated["top1"] - before, atol=1e-12)
    assert "ternary+log, grid, S+Aw, 4T" in said
    assert (tmp_path / "low_bits_on_the_array.png").stat().st_size > 1000


def test_a_stopped_run_goes_on_with_the_network_it_trained(weights, tmp_path, monkeypatch):
    run(weights, tmp_path / "whole", "--schemes", "ternary+4-bit")
    calls, trainings = [], []
    honest, learn = OpenWorkload.evaluate, on_array.train

    def evaluate(self, what):
        calls.append(what)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return honest(self, what)

    monkeypatch.setattr(OpenWorkload, "evaluate", evaluate)
    monkeypatch.setattr(on_array, "train", lambda *args, **more: trainings.append(1) or learn(*args, **more))
    run(weights, tmp_path / "parts", "--schemes", "ternary+4-bit", code=130)
    status = tomllib.loads((tmp_path / "parts" / "config.toml").read_text())["outcome"]["status"]
    assert status == "interrupted"
    run(weights, tmp_path / "parts", "--schemes", "ternary+4-bit")
    assert len(trainings) == 1
    assert len(calls) == 4 + 20 - 3
    assert (tmp_path / "parts" / "low_bits_on_the_array.md").read_text() == (
        tmp_path / "whole" / "low_bits_on_the_array.md"
    ).read_text()
    kept = sorted(path.name for path in (tmp_path / "parts").glob("*.pt"))
    assert kept == ["digits-ternary-4-bit.pt"]
    run(weights, tmp_path / "parts", "--schemes", "8-bit")  # other schemes join
    assert set(pd.read_csv(tmp_path / "parts" / "points.csv")["scheme"]) == {"8-bit", "ternary+4-bit"}
    assert set(pd.read_csv(tmp_path / "parts" / "low_bits_on_the_array.csv")["scheme"]) == {"8-bit"}


def test_grids_reach_the_array_as_the_codes_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 3)).eval()
    x = torch.randn(4, 2, 6, 6)
    limit = 0.7
    levels = {"uniform": set(range(16)), "log": {0, *(2**k for k in range(8))}}
    for kind, allowed in levels.items():
        quantizer = on_array._quantizer(kind, limit)
        handle = model[2].register_forward_pre_hook(quantizer)
        with sysmt.attach(model) as sim, torch.no_grad():
            sim.calibrate([x], 4)
            seen = {}
            for codes in (on_array.GRID, on_array.MIN_MAX):
                sim.set_ranges({"2": on_array._range(quantizer, codes)})
                operand = sim.capture("2")
                model(x)
                seen[codes] = set(operand.a_mk.ravel().tolist())
        handle.remove()
        assert seen[on_array.GRID] <= allowed
        assert {0, max(allowed)} <= seen[on_array.GRID]
        assert max(seen[on_array.MIN_MAX]) == 255


def test_log_levels_by_hand():
    quantizer = on_array.LogQuantizer(limit=32 / 1.36)
    assert quantizer.unit == pytest.approx(1.0)
    assert quantizer.largest == pytest.approx(16.0)
    # sign · 2^clamp[-3,4] floor(log2 1.36|x|), but for zero.
    x = torch.tensor([0.0, 1e-9, 0.18, 0.19, 0.73, 0.74, 1.0, 1.47, 1.48, 11.7, 11.8, 23.0, 500.0])
    (y,) = quantizer(nn.Identity(), (x,))
    expected = [0, 0.125, 0.125, 0.25, 0.5, 1, 1, 1, 2, 8, 16, 16, 16]
    assert y.tolist() == pytest.approx(expected)
    x.requires_grad_()
    (y,) = quantizer(nn.Identity(), (x,))
    y.sum().backward()
    assert (x.grad == 1).all()
    assert y.tolist() == pytest.approx(expected)


def test_narrow_ternary_weights_compute_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False)).eval()
    with torch.no_grad():
        model[2].weight.copy_(
            torch.randint(-1, 2, (4, 3, 3, 3)) * torch.tensor([0.3, 1.7, 0.01, 0.0])[:, None, None, None]
        )
    x = torch.rand(4, 2, 6, 6)
    with sysmt.attach(model, sysmt.ArrayConfig(threads=1)) as sim, torch.no_grad():
        sim.calibrate([x], 4)
        wide, operand = model(x), sim.capture("2")
        model(x)
        assert set(operand.b_kn.ravel().tolist()) == {-127, 0, 127}
        on_array._make_weights_narrow(sim)
        operand = sim.capture("2")
        narrow = model(x)
        assert set(operand.b_kn.ravel().tolist()) == {-1, 0, 1}
        torch.testing.assert_close(wide, narrow, rtol=1e-6, atol=1e-6)
        model[2].weight.data[0, 0, 0, 0] = 0.2
        with pytest.raises(ValueError, match="'2' are not ternary"):
            on_array._make_weights_narrow(sim)


def test_the_largest_value_stands_for_the_end_of_the_range():
    for codes, largest in ((on_array.GRID, 15), (on_array.MIN_MAX, 255)):
        assert on_array._range(ActivationQuantizer(4, 3.0), codes).scale == pytest.approx(3.0 / largest)
    assert on_array._decibels(math.inf) == "exact"


def test_an_unknown_scheme_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["low_bits_on_the_array", "--schemes", "ternery", "--out", str(tmp_path / "none")]
    )
    with pytest.raises(SystemExit) as ended:
        main(on_array.low_bits_on_the_array)
    assert ended.value.code == 2
    assert "did you mean 'ternary'" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "none").exists()

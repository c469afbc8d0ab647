"""Small versions of the experiments that are studies: search against baselines, accuracy against speedup."""

from types import SimpleNamespace

import accuracy_against_speedup
import pandas as pd
import pytest
import search_vs_baselines
import small_experiments
from small_experiments import save_digits

from sysmt.study.pareto import Reference, hypervolume
from sysmt.study.thread_maps import read_threads_map

METHODS = ["search", "uniform", "random", "greedy"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_digits(tmp_path_factory.mktemp("weights"), epochs=0)


def run(module, weights, out, *args):
    line = [
        "--quick",
        "--model",
        "digits",
        "--weights",
        weights,
        "--data",
        "digits",
        "--out",
        out,
        "--images",
        40,
        *args,
    ]
    line += ["--calibration-images", 64, "--recalibration-images", 128]
    return small_experiments.run(module, *line)


def test_every_method_is_judged_by_images_that_it_did_not_see(weights, tmp_path):
    out = tmp_path / "out"
    text = run(search_vs_baselines, weights, out)
    curves = pd.read_csv(out / "hypervolume.csv")
    points = pd.read_csv(out / "points-digits-0.csv")
    assert list(dict.fromkeys(curves["method"])) == METHODS
    assert curves.groupby("method")["evaluations"].max().to_dict() == {
        "search": 12, "uniform": 3, "random": 12, "greedy": 12,
    }  # fmt: skip
    for method, group in points.groupby("of"):
        last = curves[curves["method"] == method].iloc[-1]
        best = group["float_top1"].iloc[0]
        seen = hypervolume(group["speedup"], group["top1"], Reference(1, best - 0.02, 4, best))
        assert last["seen_hypervolume"] == pytest.approx(seen)
        assert last["hypervolume"] >= 0
        assert method in text
    assert not points["held_out_top1"].equals(points["top1"])
    targets = pd.read_csv(out / "targets.csv")
    searched = targets[targets["setting"] == "searched, 3x"]
    assert (searched["speedup"] >= 3 - 1e-9).all()
    assert set(read_threads_map(out / "threads-digits-3x-0.toml").values()) <= {1, 2, 4}
    for name in ("hypervolume", "front", "threads", "sensitivities"):
        assert (out / f"{name}-digits.png").is_file()
    assert run(search_vs_baselines, weights, out) == text  # nothing is measured again
    assert pd.read_csv(out / "points-digits-0.csv")["seconds"].equals(points["seconds"])


def test_without_held_out_images_both_hypervolumes_are_the_same():
    bench = SimpleNamespace(held_out=0.0, float_top1=0.9)
    points = pd.DataFrame({"speedup": [1.0, 3.0], "top1": [0.9, 0.89]})
    volumes = search_vs_baselines.volumes(bench, points, below=0.02)
    assert volumes["hypervolume"] == volumes["seen_hypervolume"] > 0


def test_figure_1_has_each_map_with_and_without_recalibration(weights, tmp_path):
    out = tmp_path / "out"
    run(accuracy_against_speedup, weights, out, "--retrain", 0)
    points = pd.read_csv(out / "points.csv")
    assert points["network"].nunique() == 2  # as it is, and pruned
    assert set(points.groupby(["network", "recalibrate"]).size()) == {8}
    assert {1.0, 2.0, 4.0} <= set(points["speedup"].round(6))
    assert (out / "accuracy_against_speedup_a.png").is_file()
    assert (out / "accuracy_against_speedup_b.png").is_file()
    collisions = points[points["speedup"] == 4].groupby("network")["collision_rate"].mean()
    assert collisions["digits, 40 % pruned"] < collisions["digits"]


def test_networks_of_different_layers_stand_in_one_table():
    common = {"speedup": [4.0, 4.0], "recalibrate": ["none", "ema"], "float_top1": 0.9}
    small = pd.DataFrame({**common, "network": "small", "threads of a": 4, "top1": [0.80, 0.85]})
    large = pd.DataFrame(
        {**common, "network": "large", "threads of a": 4, "threads of b": 4, "top1": [0.70, 0.71]}
    )
    text = accuracy_against_speedup.layout_of(pd.concat([small, large]))
    assert "+5.00" in text
    assert "+1.00" in text

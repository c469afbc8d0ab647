"""The integer program against brute force, the baselines by hand, and `sysmt search` end to end."""

import itertools
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import assert_one_error_line, invoke, workload, write_images

from sysmt.errors import ConfigError
from sysmt.study.knapsack import harms_of, knapsack, knapsack_maps
from sysmt.study.pareto import pareto_front
from sysmt.study.search import choose, front_table
from sysmt.study.store import Store
from sysmt.study.thread_maps import greedy_maps, map_speedup, random_maps, read_threads_map

COUNTS = (1, 2, 4)


def total(costs, threads):
    return sum(costs[layer][count] for layer, count in threads.items())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1e-2), st.floats(0, 1e-1)), min_size=1, max_size=5),
    st.floats(1, 4),
)
@example([(1, 0.0, 0.0)], 4.0)
def test_the_knapsack_is_solved_exactly(layers, speedup):
    macs = {f"l{i}": size for i, (size, _, _) in enumerate(layers)}
    costs = {f"l{i}": {1: 0.0, 2: two, 4: four} for i, (_, two, four) in enumerate(layers)}
    chosen = knapsack(costs, macs, speedup)
    assert map_speedup(chosen, macs) >= speedup * (1 - 1e-6)
    every = [dict(zip(macs, counts, strict=True)) for counts in itertools.product(COUNTS, repeat=len(macs))]
    best = min(total(costs, one) for one in every if map_speedup(one, macs) >= speedup * (1 - 1e-12))
    assert total(costs, chosen) <= best + 1e-6 * max(1e-300, max(max(c.values()) for c in costs.values()))


def test_a_speedup_out_of_reach_is_refused():
    with pytest.raises(ConfigError, match="speedup=4.1 cannot be reached"):
        knapsack({"a": {1: 0, 2: 1, 4: 2}}, {"a": 10}, 4.1)


def test_the_knapsack_spares_the_sensitive_layer():
    costs = {"a": {1: 0, 2: 5, 4: 9}, "b": {1: 0, 2: 1, 4: 2}, "c": {1: 0, 2: 1, 4: 2}}
    assert knapsack(costs, dict.fromkeys("abc", 100), 2.0) == {"a": 1, "b": 4, "c": 4}


def test_maps_for_a_range_of_speedups():
    rng = np.random.default_rng(0)
    macs = {f"l{i}": 100 + i for i in range(8)}
    harms = [
        {layer: {1: 0.0, 2: float(x), 4: float(3 * x)} for layer, x in zip(macs, rng.random(8), strict=True)}
        for _ in range(2)
    ]
    maps = knapsack_maps(harms, macs, 10)
    assert len(maps) == len({tuple(one.values()) for one in maps}) == 10
    speedups = [map_speedup(one, macs) for one in maps]
    assert speedups == sorted(speedups, reverse=True)
    assert speedups[0] == 4
    assert speedups[-1] >= 2


def test_greedy_lowers_the_layers_of_the_highest_error_first():
    maps = greedy_maps({"a": 0.1, "b": 0.3, "c": 0.2}, 100)
    assert ["".join(map(str, one.values())) for one in maps] == [
        "444", "424", "422", "222", "414", "411", "111", "212", "211",
    ]  # fmt: skip
    assert len(greedy_maps({"a": 0.1, "b": 0.3, "c": 0.2}, 4)) == 4


def test_random_maps_spread_over_the_speedups():
    macs = dict.fromkeys("abcdefghijklmnopqr", 1)
    maps = random_maps(list(macs), 300, seed=1)
    assert maps == random_maps(list(macs), 300, seed=1) != random_maps(list(macs), 300, seed=2)
    speedups = np.array([map_speedup(one, macs) for one in maps])
    assert (np.histogram(speedups, bins=[1, 1.5, 2, 3, 4])[0] > 15).all()


def test_harms_are_comparable_and_zero_at_one_thread():
    table = pd.DataFrame(
        {
            "layer": ["a", "a", "b", "b"],
            "threads": [2, 4, 2, 4],
            "kl": [0.1, 0.3, 0.0, 0.1],
            "mse": [1.0, 10.0, 5.0, 30.0],
            "macs": [7, 7, 9, 9],
        }
    )
    harms, macs = harms_of(table)
    assert macs == {"a": 7, "b": 9}
    for harm, scale in zip(harms, (1, 1, 2), strict=True):
        assert harm["a"][1] == harm["b"][1] == 0
        assert harm["a"][4] + harm["b"][4] == pytest.approx(scale)
    assert harms[0]["a"][2] == pytest.approx(0.25)
    assert harms[1]["b"][4] == pytest.approx(0.75)


POINTS = pd.DataFrame(
    {
        "speedup": [1.0, 2.0, 3.0, 3.5, 4.0],
        "top1": [0.92, 0.918, 0.91, 0.912, 0.90],
        "top1_difference": [0.0, -0.002, -0.01, -0.008, -0.02],
        "threads of a": [1, 2, 4, 4, 4],
    }
)


def test_choosing_a_point():
    assert choose(POINTS, target_speedup=3)["speedup"] == 3.5  # faster, and better
    assert choose(POINTS, target_speedup=4)["top1"] == 0.90
    assert choose(POINTS, max_drop=0.9)["speedup"] == 3.5
    assert choose(POINTS, max_drop=0.2)["speedup"] == 2.0
    with pytest.raises(ConfigError, match="fastest has 4x"):
        choose(POINTS, target_speedup=4.5)
    with pytest.raises(ConfigError, match="the least is 0.80"):
        choose(POINTS.iloc[2:4], max_drop=0.5)
    with pytest.raises(ConfigError, match="one of them"):
        choose(POINTS)


def test_front_table():
    assert list(front_table(POINTS)["speedup"]) == [4.0, 3.5, 2.0, 1.0]


# -- the command -------------------------------------------------------------------------------


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_images(tmp_path / "tiny.npz")


def test_a_search_from_nothing_to_a_thread_map_that_run_takes(in_tmp):
    line = ("search", *workload(in_tmp), "--evaluations", "8", "--seeds", "6", "--sensitivity-images", "16")
    line = (*line, "--held-out", "0")
    result = invoke(*line, "--target-speedup", "2.5", "--out", "out", "--baselines")
    assert result.exit_code == 0, result.output
    points = pd.read_csv("out/points.csv")
    found = Store("out").table("search")
    assert len(found) == 8
    assert set(found["recalibrate"]) == {"ema"}
    assert {"search", "random", "greedy"} <= set(points["method"])
    front = pd.read_csv("out/front.csv")
    assert pareto_front(front["speedup"], front["top1"]).all()
    assert len(list(Path("out/maps").glob("*.toml"))) == len(front)
    sensitivities = pd.read_csv("out/sensitivities.csv")
    assert len(sensitivities) == 2 * 6
    curves = pd.read_csv("out/hypervolume.csv")
    assert set(curves["method"]) == {"search", "uniform", "random", "greedy"}
    for name in ("accuracy_speedup", "threads", "sensitivities", "hypervolume"):
        assert Path(f"out/{name}.png").is_file()
    assert "picked:" in result.stdout
    assert "uniform 4T:" in result.stdout
    chosen = choose(found, target_speedup=2.5)
    assert read_threads_map("out/chosen.toml") == {
        name.removeprefix("threads of "): count for name, count in chosen.items() if "threads of" in name
    }
    run = invoke(
        "run",
        *workload(in_tmp),
        "--threads-map",
        "out/chosen.toml",
        "--recalibrate",
        "ema",
        "--out",
        "run",
        "--no-plots",
    )
    assert run.exit_code == 0, run.output
    row = pd.read_csv("run/summary.csv").set_index("setting").loc["map recalibrated"]
    assert row["top1"] == chosen["top1"]
    assert row["speedup"] == chosen["speedup"]
    assert row["cycles"] == chosen["cycles"]
    again = invoke(*line, "--max-drop", "100", "--out", "out")
    assert again.exit_code == 0, again.output
    assert len(Store("out").table("search")) == 8  # nothing was measured again
    assert pd.read_csv("out/points.csv")["seconds"].equals(points["seconds"])
    assert tomllib.loads(Path("out/config.toml").read_text())["study"]["kind"] == "search"


def test_the_picked_map_is_judged_by_images_that_did_not_pick_it(in_tmp):
    line = ("search", *workload(in_tmp), "--evaluations", "4", "--seeds", "4", "--sensitivity-images", "16")
    result = invoke(*line, "--target-speedup", "2", "--out", "out", "--no-plots")
    assert result.exit_code == 0, result.output
    points = pd.read_csv("out/points.csv")
    chosen = choose(Store("out").table("search"), target_speedup=2)
    assert f"top-1 {100 * chosen['held_out_top1']:.2f} %" in result.stdout
    assert "on the images held out" in result.stdout
    assert not points["held_out_top1"].equals(points["top1"])
    assert Store("out").facts["held_out"] == 0.5
    joined = invoke("sweep", "--join", "out")
    assert joined.exit_code == 0, joined.output
    assert_one_error_line(invoke(*line, "--out", "out", "--held-out", "0.25"), "held_out=0.5, not 0.25")


def test_wrong_options_end_in_one_line(in_tmp):
    line = ("search", *workload(in_tmp))
    both = invoke(*line, "--target-speedup", "3", "--max-drop", "1")
    assert_one_error_line(both, "not by both")
    assert_one_error_line(invoke(*line, "--recalibrate", "emma"), "recalibrate='emma'")
    assert_one_error_line(invoke(*line, "--evaluations", "0"), "evaluations=0")
    assert_one_error_line(invoke(*line, "--held-out", "1"), "held_out=1.0")
    assert_one_error_line(invoke(*line, "--sensitivity-images", "-1"), "sensitivity_images=-1")
    for option, value in itertools.product(("--target-speedup", "--max-drop"), ("nan", "-1", "inf", "101")):
        assert_one_error_line(invoke(*line, option, value), f"{option[2:].replace('-', '_')}=")
    assert_one_error_line(invoke(*line, "--target-speedup", "99"), "target_speedup=99.0", "[1, 4]")
    assert_one_error_line(invoke(*line, "--storage", "sqlite://", "--out", "out"), "in memory")
    assert not Path("out").exists()
    assert not Path("results").exists()


def test_sweep_and_search_do_not_take_each_others_directories(in_tmp):
    assert invoke("sweep", *workload(in_tmp), "--threads", "1", "--out", "out", "--no-plots").exit_code == 0
    assert_one_error_line(invoke("search", *workload(in_tmp), "--out", "out"), "not empty")

"""Lists of points, the bench that measures them, and `sysmt sweep` from the command line."""

import contextlib
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from tiny import TEST_IMAGES, assert_one_error_line, invoke, workload, write_images

from sysmt.errors import ConfigError
from sysmt.study.run_config import RunConfig
from sysmt.study.run_directory import RunDirectory
from sysmt.study.storage import quiet
from sysmt.study.store import Point, Store
from sysmt.study.sweep import Bench, Sweep
from sysmt.study.thread_maps import one_at_a_time, prefixes, read_threads_maps, suffixes, uniform
from sysmt.study.worker import Worker

LAYERS = ["a", "b", "c"]
SIMULATED = 6  # of the digits network


def maps(kind, counts=(1, 2, 4)):
    return ["".join(str(one[layer]) for layer in LAYERS) for one in kind(LAYERS, counts)]


def test_families_of_thread_maps():
    assert maps(uniform) == ["111", "222", "444"]
    assert maps(one_at_a_time) == ["144", "414", "441", "244", "424", "442"]
    assert maps(one_at_a_time, [2]) == []
    assert maps(prefixes, (2, 4)) == ["244", "224"]
    assert maps(suffixes, (2, 4)) == ["422", "442"]
    assert len(set(maps(prefixes) + maps(suffixes))) == 12


def test_a_sweep_is_a_product_of_distinct_points():
    sweep = Sweep(
        kinds=("uniform", "prefix", "uniform"),
        counts=(2, 4),
        policies=("S+A", "S+W"),
        sparsities=(0.0, 0.5),
        recalibrate=("ema",),
    )
    points = sweep.points(LAYERS)
    assert len(points) == len({point.key for point in points}) == 4 * 2 * 2 * 2
    assert [point.sparsity for point in points] == sorted(point.sparsity for point in points)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kinds": ("unifrom",)}, "did you mean 'uniform'"),
        ({"counts": (3,)}, "1, 2 or 4"),
        ({"policies": ("S+Q",)}, "policy='S\\+Q'"),
        ({"sparsities": (1.0,)}, "sparsity=1.0"),
        ({"recalibrate": ("emma",)}, "recalibrate='emma'"),
        ({"kinds": ()}, "kinds of thread maps"),
    ],
)
def test_wrong_sweeps_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        Sweep(**change)


def test_maps_from_files(tmp_path):
    (tmp_path / "maps.csv").write_text("a,b,c\n1,2,4\n4,4,4\n")
    assert read_threads_maps(tmp_path / "maps.csv", LAYERS) == [
        {"a": 1, "b": 2, "c": 4},
        dict.fromkeys(LAYERS, 4),
    ]
    (tmp_path / "maps.toml").write_text('[[points]]\na = 1\ndefault = 4\n[[points]]\n"b" = 2\ndefault = 1\n')
    assert read_threads_maps(tmp_path / "maps.toml", LAYERS) == [
        {"a": 1, "b": 4, "c": 4},
        {"a": 1, "b": 2, "c": 1},
    ]
    (tmp_path / "export.csv").write_text("point,top1,threads of a,threads of b,threads of c\nx,0.5,1,1,2\n")
    assert read_threads_maps(tmp_path / "export.csv", LAYERS) == [{"a": 1, "b": 1, "c": 2}]
    (tmp_path / "sheet.csv").write_text("a,b,c\r\n1.0, 2,4\r\n,,\r\n")
    assert read_threads_maps(tmp_path / "sheet.csv", LAYERS) == [{"a": 1, "b": 2, "c": 4}]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.csv", "a,b\n1,2\n", "leaves out layer 'c'"),
        ("x.csv", "a,b,c,d\n1,2,4,4\n", "names 'd'"),
        ("x.csv", "a,b,c\n1,2,3\n", "threads of layer 'c'"),
        ("x.csv", "a,b,c\n1,2,\n", "threads of layer 'c'"),
        ("x.csv", "a,b,c\n", "no points"),
        ("x.csv", "a,b,c\n4,4,4,2,1\n", "line 2, column 7: .* '2' belongs to none"),
        ("x.csv", "a,b,c\n4,4,4\n4,4\n", "line 3, column 3: .* cells are missing"),
        ("x.csv", "a,b,c\n4,4,nan\n", "line 2, column 5: threads of layer 'c'='nan'"),
        ("x.csv", "a,b,c\n4,1.5,1\n", "line 2, column 3: threads of layer 'b'='1.5'"),
        ("x.toml", "points = 3", "must be tables"),
        ("x.toml", "a = ", "no TOML"),
        ("missing.csv", None, "missing.csv"),
    ],
)
def test_wrong_files_are_refused(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_threads_maps(tmp_path / name, LAYERS)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "tiny.npz")


@pytest.fixture
def in_tmp(tmp_path, monkeypatch, images):
    monkeypatch.chdir(tmp_path)
    return images


def config(file, **more):
    return RunConfig(model="digits", weights="random", data=f"npz:{file}", batch_size=8, **more)


def test_the_bench_measures_what_a_run_measures(in_tmp):
    result = invoke("run", *workload(in_tmp), "--recalibrate", "ema", "--no-plots", "--out", "run")
    assert result.exit_code == 0, result.output
    summary = pd.read_csv("run/summary.csv").set_index("setting")
    bench = Bench(config(in_tmp))
    for threads, mode in ((4, "none"), (4, "ema"), (2, "none"), (4, "none")):
        measured = bench.measure(Point(dict.fromkeys(bench.layers, threads), recalibrate=mode))
        row = summary.loc[f"{threads}T" + (" recalibrated" if mode == "ema" else "")]
        for key in ("top1", "top5", "loss", "top1_difference", "speedup", "cycles", "collision_rate"):
            assert measured[key] == row[key], key


def test_held_out_images_and_the_others_are_all_images(in_tmp):
    whole, part = Bench(config(in_tmp)), Bench(config(in_tmp), held_out=0.4)
    point = Point(dict.fromkeys(whole.layers, 4))
    all_images, measured = whole.measure(point), part.measure(point)
    for name in ("top1", "float_top1", "top1_difference"):
        assert f"held_out_{name}" not in all_images
    hits = 12 * measured["top1"] + 8 * measured["held_out_top1"]
    assert hits == pytest.approx(20 * all_images["top1"])
    moved = 12 * measured["top1_difference"] + 8 * measured["held_out_difference"]
    assert moved == pytest.approx(20 * all_images["top1_difference"])
    assert 12 * part.float_top1 + 8 * part.float_held_out_top1 == pytest.approx(20 * whole.float_top1)
    assert math.isnan(whole.float_held_out_top1)
    assert part.measure(point) | {"seconds": 0} == measured | {"seconds": 0}  # the same images each time
    assert part.facts() != whole.facts()


@pytest.mark.parametrize("held_out", [1.0, -0.1, math.nan, 0.99])
def test_an_impossible_share_of_held_out_images_is_refused(in_tmp, held_out):
    with pytest.raises(ConfigError, match="held_out="):
        Bench(config(in_tmp), held_out=held_out)


def test_points_do_not_influence_each_other(in_tmp):
    bench = Bench(config(in_tmp))
    points = [
        Point(dict.fromkeys(bench.layers, 4), "S+W"),
        Point(dict.fromkeys(bench.layers, 2), sparsity=0.5, recalibrate="final"),
        Point(dict.fromkeys(bench.layers, 4)),
    ]
    times = ("seconds",)
    one_way = [bench.measure(point) for point in points]
    other_way = [bench.measure(point) for point in points[::-1]][::-1]
    for a, b in zip(one_way, other_way, strict=True):
        assert {k: v for k, v in a.items() if k not in times} == {
            k: v for k, v in b.items() if k not in times
        }
    assert len({measured["collision_rate"] for measured in one_way}) == 3


def test_facts_name_what_makes_points_comparable(in_tmp, tmp_path):
    facts = Bench(config(in_tmp, images=10)).facts()
    assert facts == Bench(config(in_tmp, images=10, cpu_threads=1, threads=(2,))).facts()
    other = write_images(tmp_path / "other.npz", seed=1)
    for changed in (config(in_tmp), config(in_tmp, images=10, rows=8), config(other, images=10)):
        assert Bench(changed).facts() != facts


def test_a_sweep_leaves_points_plots_and_goes_on(in_tmp):
    line = ("sweep", *workload(in_tmp), "--out", "out", "--threads", "1,4", "--policies", "S+A,S+W")
    result = invoke(*line, "--export", "copy.csv")
    assert result.exit_code == 0, result.output
    points = pd.read_csv("out/points.csv")
    assert len(points) == 4
    assert points.equals(pd.read_csv("copy.csv"))
    assert (points["images"] == TEST_IMAGES).all()
    assert sum(name.startswith("threads of ") for name in points.columns) == SIMULATED
    assert {"accuracy_speedup.png", "threads.png", "config.toml", "study.db"} <= set(os.listdir("out"))
    again = invoke(*line, "--kinds", "uniform,one-at-a-time")
    assert again.exit_code == 0, again.output
    assert "going on with 4 finished points" in again.stderr
    more = pd.read_csv("out/points.csv")
    assert len(more) == 4 + 2 * SIMULATED
    assert more.head(4)["seconds"].equals(points["seconds"])  # none of them was measured again
    plotted = invoke("plot", "out")
    assert plotted.exit_code == 0, plotted.output
    assert "accuracy_speedup.png" in plotted.stderr


def test_a_sweep_over_sparsities_shows_collisions(in_tmp):
    result = invoke("sweep", *workload(in_tmp), "--out", "out", "--threads", "4", "--sparsities", "0,0.6")
    assert result.exit_code == 0, result.output
    points = pd.read_csv("out/points.csv")
    rates = points.set_index("sparsity")["collision_rate"]
    assert rates[0.6] < rates[0.0]
    assert Path("out/collisions_sparsity.png").is_file()


def test_another_network_or_data_set_is_refused(in_tmp, tmp_path):
    line = ("--threads", "1", "--out", "out", "--no-plots")
    assert invoke("sweep", *workload(in_tmp), *line).exit_code == 0
    assert_one_error_line(invoke("sweep", *workload(in_tmp), *line, "--seed", "1"), "cannot be compared")
    other = write_images(tmp_path / "other.npz", seed=5)
    assert_one_error_line(invoke("sweep", *workload(other), *line), "data_sha256")
    assert_one_error_line(invoke("sweep", "--join", "out", "--data", f"npz:{other}"), "data_sha256")
    assert invoke("sweep", *workload(other), *line, "--overwrite").exit_code == 0


def test_wrong_options_end_in_one_line(in_tmp):
    assert_one_error_line(invoke("sweep", *workload(in_tmp), "--kinds", "unifrom"), "uniform")
    assert_one_error_line(invoke("sweep", *workload(in_tmp), "--sparsities", "a"), "sparsities='a'")
    assert_one_error_line(invoke("sweep", *workload(in_tmp), "--workers", "0"), "workers=0")
    assert_one_error_line(invoke("sweep", "--join", "nowhere.db"), "missing")
    assert_one_error_line(invoke("sweep", *workload(in_tmp), "--maps", "none.csv"), "none.csv")
    assert not Path("results").exists() or not any(Path("results").iterdir())


def test_workers_on_one_machine_share_the_points(in_tmp):
    command = [
        sys.executable,
        "-m",
        "sysmt",
        "sweep",
        *map(str, workload(in_tmp)),
        "--out",
        "out",
        "--no-plots",
    ]
    command += ["--kinds", "prefix", "--threads", "1,2,4", "--workers", "2", "--cpu-threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    points = pd.read_csv("out/points.csv")
    assert len(points) == 3 * (SIMULATED - 1)
    workers = {trial.user_attrs["worker"] for trial in Store("out").trials()}
    assert len(workers) in (1, 2)  # the second may come too late for so short a sweep
    assert "Traceback" not in Path("out/worker-1.log").read_text()


def test_kill_9_and_the_same_command_again(in_tmp):
    command = [
        sys.executable,
        "-m",
        "sysmt",
        "sweep",
        *map(str, workload(in_tmp)),
        "--out",
        "out",
        "--no-plots",
    ]
    command += ["--kinds", "uniform,prefix,suffix", "--cpu-threads", "1"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while time.monotonic() < end and killed.poll() is None:
        time.sleep(0.1)
        with contextlib.suppress(ConfigError):  # the study is still being made
            if len(Store("out").table()) >= 3:
                break
    assert killed.poll() is None, "it was over before it could be killed"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    finished = Store("out").table().set_index("point")["evaluation_seconds"]
    assert 3 <= len(finished) < 33
    lost = Store("out").counts()["running"]
    assert lost <= 1
    store = Store("out", grace_s=1, heartbeat_s=1)  # as the command does, but without the long wait
    bench = Bench(RunConfig.from_record(store.notes["config"]))
    Worker(store, bench.measure).work()
    table = store.table().set_index("point")
    assert len(table) == 3 + 15 + 15
    assert np.array_equal(table.loc[finished.index, "evaluation_seconds"], finished)


# -- several processes, and their ends ---------------------------------------------------------


def command(images, *more):
    """Return the command line of a small sweep in a process of its own."""
    line = [sys.executable, "-m", "sysmt", "sweep", *map(str, workload(images)), "--no-plots"]
    return [*line, "--out", "out", "--cpu-threads", "1", *more]


def wait_until(condition, what, seconds=100):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} takes too long"
        time.sleep(0.05)


def workers_of_finished_points():
    try:
        trials = Store("out").trials()
    except ConfigError:  # the study is still being made
        return []
    return [trial.user_attrs["worker"] for trial in trials if "measured" in trial.user_attrs]


def is_alive(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


MANY = ("--kinds", "uniform,prefix,suffix", "--sparsities", ",".join(f"0.{i:02}" for i in range(40)))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_helpers_end_with_the_process_that_started_them(in_tmp, number):
    parent = subprocess.Popen(
        command(in_tmp, *MANY, "--workers", "2"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Under nohup SIGHUP is ignored, by the children of the tests as well, and the command keeps to that.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    own = f":{parent.pid}"
    wait_until(
        lambda: any(not worker.endswith(own) for worker in workers_of_finished_points()), "the helper's start"
    )
    helper = next(worker for worker in workers_of_finished_points() if not worker.endswith(own))
    helper_pid = int(helper.rpartition(":")[2])
    parent.send_signal(number)
    said = parent.communicate(timeout=60)[1]
    wait_until(lambda: not is_alive(helper_pid), "the helper's end", 30)
    running = [trial.user_attrs["worker"] for trial in Store("out").trials() if trial.state.name == "RUNNING"]
    assert helper not in running  # it finished its point, or gave it back
    if number == signal.SIGKILL:
        assert parent.returncode == -number
        return
    assert parent.returncode == 128 + number
    assert f"interrupted by {number.name}" in said
    assert not running
    assert len(pd.read_csv("out/points.csv")) == len(Store("out").table()) < 33 * 40
    assert not Path("out/.sysmt-lock").exists()


def test_nothing_in_the_current_directory_is_run(in_tmp):
    Path("optuna.py").write_text("open('ran-from-here', 'w').close(); raise ImportError('hijacked')")
    safe, *line = command(in_tmp, "--workers", "2")
    done = subprocess.run(
        [safe, "-P", *line],
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ended early" not in done.stderr
    assert not Path("ran-from-here").exists()
    assert Path("out/worker-1.log").is_file()


def test_the_same_sweep_started_twice_at_once_is_one_sweep(in_tmp):
    line = command(in_tmp, "--kinds", "uniform,prefix")
    started = [
        subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [one.communicate(timeout=200)[1] for one in started]
    assert [one.returncode for one in started] == [0, 0], said
    store = Store("out")
    assert len(pd.read_csv("out/points.csv")) == len(store.table("sweep")) == 3 + 15
    assert sum("measured" in trial.user_attrs for trial in store.trials()) == 3 + 15
    assert store.counts()["waiting"] == store.counts()["running"] == 0


def test_a_directory_that_another_process_has_is_refused(in_tmp):
    with RunDirectory("out"):
        for name in ("run", "search", "sweep"):
            result = invoke(name, *workload(in_tmp), "--out", "out", "--no-plots")
            assert_one_error_line(result, "out is being written by another process", str(os.getpid()))


@pytest.mark.parametrize("left", [("config.toml",), ("config.toml", "study.db"), ()])
def test_a_sweep_that_was_killed_while_it_was_made_goes_on(in_tmp, left):
    line = ("sweep", *workload(in_tmp), "--threads", "4", "--out", "out", "--no-plots")
    assert invoke(*line).exit_code == 0
    config = Path("out/config.toml").read_text()
    shutil.rmtree("out")
    Path("out").mkdir()
    Path("out/.sysmt-lock").write_text("1234 on there")
    if "config.toml" in left:
        Path("out/config.toml").write_text(config)
    if "study.db" in left:  # with tables, and nothing in them
        optuna.storages.RDBStorage(f"sqlite:///{Path('out').absolute()}/study.db")
    result = invoke(*line)
    assert result.exit_code == 0, result.output
    assert len(pd.read_csv("out/points.csv")) == 1


def test_a_wrong_beginning_leaves_nothing(in_tmp):
    assert_one_error_line(invoke("sweep", *workload("missing.npz"), "--out", "out"), "missing.npz")
    assert not Path("out").exists()


def test_the_same_command_without_a_directory_goes_on_where_it_was_stopped(in_tmp):
    line = ("sweep", *workload(in_tmp), "--threads", "1,4", "--no-plots")
    assert invoke(*line).exit_code == 0
    config = Path("results/sweep-digits-1/config.toml")
    assert 'status = "complete"' in config.read_text()
    assert invoke(*line).exit_code == 0  # the first is complete: another one
    assert sorted(os.listdir("results")) == ["sweep-digits-1", "sweep-digits-2"]
    config.write_text(config.read_text().replace('"complete"', '"running"'))  # as kill -9 leaves it
    for other in (("--seed", "1"), ("--policies", "S+W"), ("--new",)):
        assert "sweep-digits-1" not in invoke(*line, *other).stderr
    assert len(os.listdir("results")) == 5
    with RunDirectory("results/sweep-digits-1", overwrite=True):  # somebody is at it
        assert "sweep-digits-6" in invoke(*line).stderr
    result = invoke(*line)
    assert result.exit_code == 0, result.output
    assert "going on with 2 finished points in results/sweep-digits-1" in result.stderr
    assert len(os.listdir("results")) == 6
    assert 'status = "complete"' in config.read_text()


def give_up(store):
    """Let the next point in the queue end three workers, as when it needs too much memory."""
    for _ in range(3):
        with quiet():
            store.study.tell(store.study.ask(), state=optuna.trial.TrialState.FAIL)
            Worker(store, lambda point: {}).reclaim()


@pytest.mark.parametrize("kind", ["sweep", "search"])
def test_an_incomplete_result_says_so_until_it_is_retried(in_tmp, kind):
    line = (kind, *workload(in_tmp), "--out", "out")
    line += (
        ("--threads", "1,4")
        if kind == "sweep"
        else ("--evaluations", "6", "--seeds", "6", "--sensitivity-images", "16", "--held-out", "0")
    )
    assert invoke(*line, "--no-plots").exit_code == 0
    store, table = Store("out"), Store("out").table()
    lost = Point(dict.fromkeys(store.layers, 1), recalibrate=str(table["recalibrate"][0]))
    assert lost.key in set(table["point"])
    with contextlib.closing(sqlite3.connect("out/study.db")) as database:  # it was never measured
        database.execute("update trials set state='WAITING' where number = ?", [_number(table, lost)])
        database.commit()
    give_up(Store("out"))
    for _ in range(2):
        result = invoke(*line)
        assert result.exit_code == 3, result.output
        assert "incomplete: 1 point is left out (it ended 3 workers)" in result.stderr
        assert "--retry-failed" in result.stderr
        assert "left out" in result.stdout
        points = pd.read_csv("out/points.csv").set_index("point")
        assert (
            points.loc[lost.key, list(points.columns[points.columns.str.startswith("threads of")])]
            .eq(1)
            .all()
        )
        assert points["top1"].isna().tolist() == [key == lost.key for key in points.index]
    assert invoke("plot", "out").exit_code == 0
    assert invoke("sweep", "--join", "out").exit_code == 3
    again = invoke(*line, "--retry-failed", "--no-plots")
    assert again.exit_code == 0, again.output
    points = pd.read_csv("out/points.csv")
    assert lost.key in set(points["point"])
    assert points["top1"].notna().all()
    assert points["images"].dtype == "int64"


def _number(table, point):
    return int(table.set_index("point").loc[point.key, "trial"])

"""`sysmt run` as a user meets it: results, repeatability, wrong inputs, and what an early end keeps."""

import importlib.resources
import re
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import (
    CLASSES,
    TEST_IMAGES,
    TRAIN_IMAGES,
    assert_one_error_line,
    invoke,
    workload,
    write_images,
)

import sysmt
from sysmt.errors import CalibrationError
from sysmt.nn.data.labelled_images import open_data
from sysmt.nn.networks.checkpoints import save_weights, weights_hash
from sysmt.nn.networks.models import build_model, load_model
from sysmt.study import evaluate as evaluate_module
from sysmt.study import workload as workload_module

TIMES = ["images_per_second", "seconds"]
LAYERS = 8  # 7 convolutions and the classifier
SIMULATED = 6


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Work in a directory of the test's own, with the tiny images in tiny.npz."""
    monkeypatch.chdir(tmp_path)
    return write_images(tmp_path / "tiny.npz")


def summary_of(directory):
    return pd.read_csv(Path(directory) / "summary.csv").set_index("setting")


def test_a_run_leaves_tables_plots_and_its_configuration(in_tmp):
    result = invoke("run", *workload(in_tmp))
    assert result.exit_code == 0, result.output
    directory = Path("results/run-digits-1")
    assert sorted(path.name for path in directory.iterdir()) == [
        "accuracy.png",
        "collisions.png",
        "config.toml",
        "energy.png",
        "layers.csv",
        "summary.csv",
    ]
    summary = summary_of(directory)
    assert list(summary.index) == ["float", "1T", "2T", "4T"]
    assert (summary["images"] == TEST_IMAGES).all()
    ratios = summary[["top1", "top5", "collision_rate", "utilization"]].stack().dropna()
    assert ratios.between(0, 1).all()
    assert summary.loc["1T", "collision_rate"] == 0 < summary.loc["2T", "collision_rate"]
    assert list(summary["speedup"].dropna()) == [1, 2, 4]
    layers = pd.read_csv(directory / "layers.csv")
    assert len(layers) == 3 * LAYERS
    assert (layers["threads"] > 0).sum() == 3 * SIMULATED
    config = tomllib.loads((directory / "config.toml").read_text())
    assert config["outcome"]["status"] == "complete"
    assert config["made_by"]["kernel_path"] == sysmt.active_path()
    assert len(config["made_by"]["weights_sha256"]) == 64
    assert f"{TRAIN_IMAGES} training images, all there are" in result.stderr
    assert str(directory) in result.stderr
    for name in summary.index:
        assert name in result.stdout


def test_the_numbers_are_those_of_the_python_interface(in_tmp):
    assert invoke("run", *workload(in_tmp), "--threads", 4, "--policy", "S+W", "--out", "r").exit_code == 0
    torch.manual_seed(0)
    data = open_data(f"npz:{in_tmp}")
    model = build_model("digits", CLASSES, 1)
    with sysmt.attach(model, sysmt.ArrayConfig(threads=4, policy="S+W")) as sim:
        sim.calibrate(data.loader("train", batch_size=8, augment=True), TRAIN_IMAGES)
        with torch.no_grad():
            hits = torch.cat([model(x).argmax(1) == y for x, y in data.loader("test", batch_size=5)])
        report = sim.report()
    row = summary_of("r").loc["4T"]
    assert row["top1"] == hits.double().mean().item()
    assert row["cycles"] == report["cycles"].sum()
    simulated = report[report["threads"] > 0]
    slots = simulated[[f"active_{c}" for c in range(5)]].to_numpy().sum()
    assert row["collision_rate"] == simulated["collisions"].sum() / slots
    layers = pd.read_csv("r/layers.csv")
    for column in ("cycles", "active_0", "active_4", "reduced_weights"):
        assert list(layers[column]) == list(report[column])


def test_config_toml_repeats_the_run(in_tmp, tmp_path, monkeypatch):
    options = [
        "--threads",
        "2,4",
        "--recalibrate",
        "cumulative",
        "--policy",
        "S+Aw",
        "--rows",
        8,
        "--reorder",
    ]
    options += ["--threads-map", "map.toml", "--seed", 3, "--clock-mhz", 500, "--no-plots", "--errors"]
    Path("map.toml").write_text('layer1.0.conv1 = 1\n"layer2.0.conv1" = 2\ndefault = 4\n')
    assert invoke("run", *workload("tiny.npz"), *options, "--out", "first").exit_code == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # relative paths of the first run must still be found
    result = invoke("run", "--config", tmp_path / "first/config.toml", "--out", "second", "--no-plots")
    assert result.exit_code == 0, result.output
    first, second = summary_of(tmp_path / "first"), summary_of("second")
    assert list(first.index) == [
        "float", "2T", "4T", "map", "2T recalibrated", "4T recalibrated", "map recalibrated",
    ]  # fmt: skip
    pd.testing.assert_frame_equal(first.drop(columns=TIMES), second.drop(columns=TIMES), check_exact=True)
    tables = [pd.read_csv(directory / "layers.csv") for directory in (tmp_path / "first", Path("second"))]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    layers = tables[0].set_index(["setting", "name"])["threads"]
    assert [layers["map", f"layer{i}.0.conv1"] for i in (1, 2, 3)] == [1, 2, 4]


def test_options_take_precedence_over_config_toml(in_tmp):
    Path("c.toml").write_text(
        f'[run]\ndata = "npz:{in_tmp}"\nweights = "random"\nsaturate = true\nthreads = [4]\n'
    )
    assert invoke("run", "--config", "c.toml", "--threads", 1, "--no-saturate", "--out", "r").exit_code == 0
    run = tomllib.loads(Path("r/config.toml").read_text())["run"]
    assert (run["threads"], run["saturate"]) == ([1], False)
    assert list(summary_of("r").index) == ["float", "1T"]


def test_a_repeated_run_warns_of_other_images(in_tmp):
    assert invoke("run", *workload(in_tmp), "--threads", 1, "--no-plots", "--out", "a").exit_code == 0
    write_images(in_tmp, seed=1)
    result = invoke("run", "--config", "a/config.toml", "--no-plots", "--out", "b")
    assert "warning: the images are not those" in result.stderr
    assert "weights are not" not in result.stderr


def test_recalibrated_statistics_do_not_leak_into_the_next_setting(in_tmp):
    options = [*workload(in_tmp), "--no-plots", "--recalibrate"]
    assert invoke("run", *options, "--threads", "1,4", "--out", "both").exit_code == 0
    assert invoke("run", *options, "--threads", "4", "--out", "alone").exit_code == 0
    both, alone = summary_of("both").drop(columns=TIMES), summary_of("alone").drop(columns=TIMES)
    assert both.loc["4T recalibrated"].equals(alone.loc["4T recalibrated"])
    assert bool(both.loc["4T recalibrated", "recalibrated"])
    assert both.loc["4T recalibrated", "loss"] != both.loc["4T", "loss"]


def test_throttling_lowers_the_layers_with_the_highest_error(in_tmp):
    options = ["--threads", "4", "--throttle", 2, "--throttle-to", 2, "--errors", "--no-plots", "--out", "r"]
    result = invoke("run", *workload(in_tmp), *options)
    assert result.exit_code == 0, result.output
    layers = pd.read_csv("r/layers.csv").set_index("name")
    lowered = layers[(layers["setting"] == "4T throttled 2") & (layers["threads"] == 2)].index
    assert len(lowered) == 2
    assert f"4T throttled 2: {', '.join(lowered)} at 2T" in result.stderr.replace("\n", " ") or (
        f"4T throttled 2: {', '.join(reversed(lowered))} at 2T" in result.stderr.replace("\n", " ")
    )
    assert 2 < summary_of("r").loc["4T throttled 2", "speedup"] < 4


def test_a_run_prices_its_events_by_the_table_that_is_named(in_tmp):
    line = ("run", *workload(in_tmp), "--threads", "2", "--no-plots")
    assert invoke(*line, "--energy", "sysmt-rtl", "--out", "named").exit_code == 0
    assert invoke(*line, "--out", "default").exit_code == 0
    named, default = (pd.read_csv(f"{name}/summary.csv").iloc[1] for name in ("named", "default"))
    assert "energy_relative_per_image" in named
    assert "energy_pj_per_image" in default
    assert "energy_relative" in pd.read_csv("named/layers.csv")
    table = Path("mine.toml")
    own = importlib.resources.files("sysmt.cost").joinpath("energy_45nm.toml").read_text()
    table.write_text(re.sub(r"(?m)^(dram_byte = )([\d.]+)", r"\g<1>0", own))
    assert invoke(*line, "--energy", table, "--out", "mine").exit_code == 0
    assert pd.read_csv("mine/summary.csv").iloc[1]["energy_pj_per_image"] < default["energy_pj_per_image"]
    again = invoke("run", "--config", "mine/config.toml", "--out", "again")  # from anywhere
    assert again.exit_code == 0, again.output
    assert Path(tomllib.loads(Path("mine/config.toml").read_text())["run"]["energy"]).is_absolute()
    assert_one_error_line(invoke(*line, "--energy", "45mm"), "did you mean '45nm'")


def test_latency_follows_from_cycles_and_clock(in_tmp):
    result = invoke(
        "run", *workload(in_tmp), "--threads", "2", "--clock-mhz", 800, "--no-plots", "--out", "r"
    )
    row = summary_of("r").loc["2T"]
    assert row["cycles_per_image"] == row["cycles"] / TEST_IMAGES
    assert row["latency_ms"] == pytest.approx(row["cycles_per_image"] / 800e6 * 1e3, rel=1e-12)
    assert row["array_images_per_second"] == pytest.approx(800e6 / row["cycles_per_image"], rel=1e-12)
    assert "latency" in result.stdout


def test_pruned_weights_collide_less(in_tmp):
    options = [*workload(in_tmp), "--threads", "2", "--no-plots"]
    assert invoke("run", *options, "--out", "dense").exit_code == 0
    assert invoke("run", *options, "--prune", 0.6, "--out", "sparse").exit_code == 0
    dense, sparse = summary_of("dense").loc["2T"], summary_of("sparse").loc["2T"]
    assert sparse["collision_rate"] < 0.5 * dense["collision_rate"]


def test_all_layers_on_the_array(in_tmp):
    options = ["--first", "--linear", "--depthwise", "--per-tensor", "--percentile", 99, "--threads", 2]
    assert invoke("run", *workload(in_tmp), *options, "--no-plots", "--out", "r").exit_code == 0
    assert (pd.read_csv("r/layers.csv")["threads"] == 2).all()
    row = summary_of("r").loc["2T"]
    assert row["speedup"] == row["network_speedup"] == 2


def test_default_directories_never_meet(in_tmp):
    for _ in range(2):
        assert invoke("run", *workload(in_tmp), "--threads", 1, "--no-plots").exit_code == 0
    assert sorted(path.name for path in Path("results").iterdir()) == ["run-digits-1", "run-digits-2"]


# -- wrong inputs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--threads", "3"], ["threads=3", "1, 2 or 4"]),
        (["--threads", "1,x"], ["threads='1,x'", "1,2,4"]),
        (["--threads", "2,2"], ["2,2", "twice"]),
        (["--threads", ""], ["threads=''"]),
        (["--policy", "S+B"], ["--policy", "S+B", "S+A"]),
        (["--rounding", "up"], ["--rounding", "nearest-even"]),
        (["--rows", "0"], ["rows=0", "at least 1"]),
        (["--batch-size", "0"], ["batch_size=0"]),
        (["--images", "0"], ["images=0"]),
        (["--images", "many"], ["--images", "integer"]),
        (["--seed", "-1"], ["seed=-1"]),
        (["--percentile", "0"], ["percentile=0", "(0, 100]"]),
        (["--prune", "1"], ["prune=1", "[0, 1)"]),
        (["--clock-mhz", "nan"], ["clock_mhz=nan"]),
        (["--recalibrate=emma"], ["recalibrate='emma'", "did you mean 'ema'"]),
        (["--throttle", "1", "--threads", "1"], ["throttle=1", "1T"]),
        (["--throttle-to", "4"], ["throttle_to=4"]),
        (["--thread", "2"], ["--thread", "--threads"]),
        (["--model", "resnet21"], ["'resnet21'", "did you mean 'resnet"]),
        (["--model", "resnet20", "--weights", "missing.pt"], ["missing.pt"]),
        (["--data", "npz:missing.npz"], ["missing.npz"]),
        (["--data", "nzp:tiny.npz"], ["'nzp:tiny.npz'", "did you mean 'npz'"]),
        (["--preprocessing", "cfar"], ["'cfar'", "cifar"]),
        (["--config", "missing.toml"], ["missing.toml"]),
        (["--calibration", "missing.npz"], ["missing.npz"]),
        (["--calibration", "tiny.npz"], ["tiny.npz", "no calibration file"]),
        (["--calibration", "tiny.npz", "--reorder"], ["reorder"]),
        (["--threads-map", "missing.toml"], ["missing.toml"]),
        (["superfluous"], ["superfluous"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_wrong_input_is_one_line_and_leaves_nothing(in_tmp, options, parts):
    assert_one_error_line(invoke("run", *workload(in_tmp), *options), *parts)
    assert [path.name for path in Path().iterdir()] == ["tiny.npz"]


def test_networks_other_than_digits_need_data_and_weights(in_tmp):
    assert_one_error_line(invoke("run", "--model", "resnet20"), "resnet20", "needs data")
    assert_one_error_line(invoke("run", "--model", "resnet20", "--data", f"npz:{in_tmp}"), "needs weights")


def test_images_without_a_training_split_cannot_calibrate(in_tmp):
    write_images(in_tmp, train=False)
    assert_one_error_line(invoke("run", *workload(in_tmp)), "training images")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('"layer1.0.conv9" = 2', ["layer1.0.conv9", "did you mean 'layer1.0.conv"]),
        ('"layer1.0.conv1" = 3', ["layer1.0.conv1", "1, 2 or 4"]),
        ('"linear" = 2', ["linear", "stays in float"]),
        ('"layer1.0.conv1" = two', ["map.toml", "no TOML"]),
        ("", ["map.toml", "no layers"]),
    ],
)
def test_a_wrong_threads_map_is_found_before_anything_runs(in_tmp, monkeypatch, text, parts):
    monkeypatch.setattr(workload_module, "evaluate", lambda *_, **__: pytest.fail("something ran"))
    Path("map.toml").write_text(text)
    assert_one_error_line(invoke("run", *workload(in_tmp), "--threads-map", "map.toml"), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[run]\nthreds = [1]", ["threds", "did you mean 'threads'"]),
        ("[run]\nthreads = 2", ["threads=2"]),
        ("[run]\nsaturate = 1", ["saturate=1"]),
        ("[run]\nmodel = 5", ["model=5"]),
        ("threads = [1]", ["no table [run]"]),
    ],
)
def test_a_wrong_configuration_file_is_named(in_tmp, text, parts):
    Path("c.toml").write_text(text)
    assert_one_error_line(invoke("run", "--config", "c.toml"), "c.toml", *parts)


@pytest.mark.parametrize("out", ["full", "file", "file/below"])
def test_a_directory_that_cannot_be_used_is_found_before_anything_runs(in_tmp, monkeypatch, out):
    monkeypatch.setattr(evaluate_module, "Job", lambda *_: pytest.fail("something ran"))
    Path("full").mkdir()
    Path("full/theirs.txt").write_text("kept")
    Path("file").write_text("kept")
    assert_one_error_line(invoke("run", *workload(in_tmp), "--out", out), out)
    assert Path("full/theirs.txt").read_text() == Path("file").read_text() == "kept"


def test_overwrite_replaces_results_and_nothing_else(in_tmp):
    Path("r").mkdir()
    for name in ("notes.txt", "collisions.png", "layers.csv"):
        Path("r", name).write_text("old")
    options = ["--threads", 1, "--no-plots", "--out", "r", "--overwrite"]
    assert invoke("run", *workload(in_tmp), *options).exit_code == 0
    assert Path("r/notes.txt").read_text() == "old"
    assert not Path("r/collisions.png").exists()
    assert Path("r/layers.csv").read_text() != "old"


def test_debug_shows_where_an_error_came_from(in_tmp):
    result = invoke("run", "--model", "resnet20", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error:")


# -- early ends --------------------------------------------------------------------------------


def fail_at(monkeypatch, setting, error):
    """Let the evaluation of one setting end in an exception."""
    original = workload_module.evaluate

    def evaluate(*args, what, **kwargs):
        if what == setting:
            raise error
        return original(*args, what=what, **kwargs)

    monkeypatch.setattr(workload_module, "evaluate", evaluate)


def test_ctrl_c_keeps_what_was_measured(in_tmp, monkeypatch):
    fail_at(monkeypatch, "2T", KeyboardInterrupt())
    result = invoke("run", *workload(in_tmp), "--out", "r")
    assert result.exit_code == 130
    assert list(summary_of("r").index) == ["float", "1T"]
    assert set(pd.read_csv("r/layers.csv")["setting"]) == {"1T"}
    assert tomllib.loads(Path("r/config.toml").read_text())["outcome"]["status"] == "interrupted"
    assert "1T" in result.stdout
    assert "interrupted" in result.stderr
    assert Path("r/accuracy.png").exists()


def test_ctrl_c_while_plotting_still_shows_the_table(in_tmp, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sysmt.study.run.draw_run", interrupt)
    result = invoke("run", *workload(in_tmp), "--threads", 2, "--out", "r")
    assert result.exit_code == 130
    assert "2T" in result.stdout
    assert list(summary_of("r").index) == ["float", "2T"]


def test_an_error_in_a_later_setting_keeps_what_was_measured(in_tmp, monkeypatch):
    fail_at(monkeypatch, "4T", CalibrationError("layer 'x' broke"))
    result = invoke("run", *workload(in_tmp), "--out", "r")
    assert_one_error_line(result, "layer 'x' broke")
    assert list(summary_of("r").index) == ["float", "1T", "2T"]
    assert "layer 'x' broke" in tomllib.loads(Path("r/config.toml").read_text())["outcome"]["status"]


def test_a_bug_keeps_what_was_measured_and_is_not_hidden(in_tmp, monkeypatch):
    fail_at(monkeypatch, "1T", ZeroDivisionError("a bug"))
    result = invoke("run", *workload(in_tmp), "--out", "r")
    assert isinstance(result.exception, ZeroDivisionError)
    assert list(summary_of("r").index) == ["float"]


def test_ctrl_c_before_the_first_result_leaves_no_directory(in_tmp, monkeypatch):
    fail_at(monkeypatch, "float", KeyboardInterrupt())
    assert invoke("run", *workload(in_tmp), "--out", "deep/er").exit_code == 130
    assert not Path("deep").exists()


# -- calibration files -------------------------------------------------------------------------


def test_a_calibration_file_gives_the_run_that_calibrates_itself(in_tmp):
    options = [*workload(in_tmp), "--no-plots"]
    assert invoke("calibrate", *workload(in_tmp), "--reorder", "--out", "c.npz").exit_code == 0
    assert invoke("run", *options, "--reorder", "--out", "a").exit_code == 0
    result = invoke("run", *options, "--calibration", "c.npz", "--out", "b")
    assert result.exit_code == 0, result.output
    a, b = summary_of("a").drop(columns=TIMES), summary_of("b").drop(columns=TIMES)
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_recalibrated_statistics_travel_in_a_calibration_file(in_tmp):
    options = [*workload(in_tmp), "--no-plots"]
    assert invoke("run", *options, "--threads", 4, "--recalibrate", "--out", "a").exit_code == 0
    assert (
        invoke("calibrate", *workload(in_tmp), "--recalibrate", "--threads", 4, "--out", "c.npz").exit_code
        == 0
    )
    assert invoke("run", *options, "--threads", 4, "--calibration", "c.npz", "--out", "b").exit_code == 0
    a, b = summary_of("a").drop(columns=TIMES), summary_of("b").drop(columns=TIMES)
    assert list(b.index) == ["float", "4T recalibrated"]
    pd.testing.assert_frame_equal(a.loc[b.index], b, check_exact=True)
    again = invoke("run", *options, "--recalibrate", "--calibration", "c.npz", "--out", "c")
    assert_one_error_line(again, "c.npz", "already")


def test_another_networks_calibration_is_refused(in_tmp):
    save_weights(build_model("digits", CLASSES), "w.pt")
    assert invoke("calibrate", *workload(in_tmp), "--out", "c.npz").exit_code == 0
    torch.manual_seed(0)
    hashes = [weights_hash(build_model("digits", CLASSES)), weights_hash(load_model("digits", "w.pt"))]
    result = invoke(
        "run", "--model", "digits", "--data", f"npz:{in_tmp}", "--weights", "w.pt", "--calibration", "c.npz"
    )
    assert_one_error_line(result, "c.npz", "other weights", *(value[:16] for value in hashes))

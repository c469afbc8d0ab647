"""The smaller commands, the help, and what all commands share."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from tiny import CLASSES, assert_one_error_line, invoke, workload, write_images

import sysmt
from sysmt.cli import app
from sysmt.cli.options import EVERYTHING
from sysmt.nn.networks.checkpoints import read_metadata, save_weights
from sysmt.nn.networks.models import build_model, load_model
from sysmt.scalesim.simulate import draw_matrices
from sysmt.study.run_config import RunConfig


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Work in a directory of the test's own, with the tiny images in tiny.npz."""
    monkeypatch.chdir(tmp_path)
    return write_images(tmp_path / "tiny.npz")


def commands():
    return typer.main.get_command(app).commands


# -- shared ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_says_what_every_option_is(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    for option in commands()[name].params:
        assert option.help, f"sysmt {name}: {option.name} has no help"
    assert "Usage: sysmt" in result.stdout


def test_help_does_not_wait_for_torch():
    code = "import sys, sysmt.cli; sys.exit(any(m in sys.modules for m in ('torch', 'pandas', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_choice_of_a_run_has_an_option_with_the_same_default():
    fields = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    assert set(EVERYTHING) == set(fields)
    for option in commands()["run"].params:
        if option.name in fields:
            default = fields[option.name]
            assert option.default == (",".join(map(str, default)) if isinstance(default, tuple) else default)


def test_python_m_sysmt_is_the_same():
    def run(*args):
        return subprocess.run(
            [sys.executable, "-m", "sysmt", *args], capture_output=True, text=True, check=False
        )

    assert run("--version").stdout.strip() == f"sysmt {sysmt.__version__}"
    failed = run("gemm", "--threads", "3")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.splitlines() == ["error: threads=3 is not possible; a PE runs 1, 2 or 4 threads"]


def test_without_a_command_there_is_help():
    result = invoke()
    assert result.exit_code == 0
    assert "calibrate" in result.stdout
    assert_one_error_line(invoke("gem"), "gem", "Did you mean 'gemm'")


# -- info --------------------------------------------------------------------------------------


def test_info_as_json():
    facts = json.loads(invoke("info", "--json").stdout)
    assert facts["sysmt"] == sysmt.__version__
    assert facts["kernel_paths"] == list(sysmt.available_paths())
    assert facts["active_path"] == sysmt.active_path()
    assert facts["torch"] == torch.__version__


def test_info_reports_a_wrong_path_instead_of_failing(monkeypatch):
    monkeypatch.setenv("SYSMT_PATH", "sse9")
    result = invoke("info")
    assert result.exit_code == 0
    assert "sse9" in result.stdout


# -- gemm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["fast", "cycle", "reference"])
def test_gemm_gives_what_simulate_gemm_gives(in_tmp, engine):
    sizes = ["--m", 9, "--n", 5, "--k", 30, "--activation-density", 0.6, "--weight-density", 0.8, "--seed", 7]
    options = ["--threads", 4, "--policy", "S+aW", "--rows", 4, "--cols", 3, "--engine", engine, "--out", "g"]
    result = invoke("gemm", *sizes, *options)
    assert result.exit_code == 0, result.output
    config = sysmt.ArrayConfig(rows=4, cols=3, threads=4, policy="S+aW")
    expected = sysmt.simulate_gemm(*draw_matrices(9, 5, 30, 0.6, 0.8, 7), config)
    assert np.array_equal(np.load("g/product.npy"), expected.out_mn)
    record = json.loads(Path("g/gemm.json").read_text())
    assert record["tiles"] == 3 * 2
    assert record["cycles"] == expected.stats.cycles
    assert [record[f"active_{c}"] for c in range(5)] == list(expected.stats.active)
    assert pd.read_csv("g/gemm.csv")["reduced_weights"].item() == expected.stats.reduced_weights
    assert f"{expected.stats.cycles:,}" in result.stdout


def test_gemm_takes_operands_from_files(in_tmp):
    rng = np.random.default_rng(0)
    a = rng.integers(-128, 128, (6, 10), dtype=np.int8)
    b = rng.integers(-128, 128, (10, 3), dtype=np.int8)
    np.save("a.npy", a)
    np.save("b.npy", b)
    assert invoke("gemm", "--a", "a.npy", "--b", "b.npy", "--threads", 1, "--out", "g").exit_code == 0
    assert np.array_equal(np.load("g/product.npy"), a.astype(int) @ b.astype(int))
    assert invoke("gemm", "--b", "b.npy", "--m", 4, "--out", "h").exit_code == 0
    assert np.load("h/product.npy").shape == (4, 3)


def test_random_operands_have_the_asked_density():
    a, b = draw_matrices(200, 200, 200, 0.3, 0.9, 0)
    assert (a.dtype, b.dtype) == (np.uint8, np.int8)
    assert (a != 0).mean() == pytest.approx(0.3, abs=0.01)
    assert (b != 0).mean() == pytest.approx(0.9, abs=0.01)
    assert b.min() < -100
    assert b.max() > 100
    dense, _ = draw_matrices(50, 50, 50, 1.0, 1.0, 0)
    assert (dense != 0).all()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--threads", 3], ["threads=3"]),
        (["--m", -1], ["m=-1"]),
        (["--m", 10**9, "--k", 60000], ["not enough memory"]),
        (["--k", 70000], ["K=70000", "65535"]),
        (["--activation-density", 1.5], ["activation_density=1.5"]),
        (["--weight-density", "nan"], ["weight_density=nan"]),
        (["--a", "missing.npy"], ["missing.npy"]),
        (["--a", "tiny.npz"], ["tiny.npz", "matrix"]),
        (["--a", "vector.npy"], ["vector.npy", "matrix"]),
        (["--a", "floats.npy"], ["float64"]),
        (["--a", "short.npy", "--b", "short.npy"], ["K"]),
        (["--engine", "slow"], ["slow", "fast"]),
        (["--out", "tiny.npz"], ["tiny.npz"]),
    ],
)
def test_gemm_refuses(in_tmp, options, parts):
    np.save("vector.npy", np.zeros(3, np.uint8))
    np.save("floats.npy", np.zeros((3, 3)))
    np.save("short.npy", np.zeros((2, 3), np.int8))
    assert_one_error_line(invoke("gemm", *options), *parts)


# -- calibrate, prune, plot --------------------------------------------------------------------


@pytest.mark.parametrize("out", ["c.txt", "tiny.npz/c.npz", "."])
def test_calibrate_checks_its_file_before_it_works(in_tmp, monkeypatch, out):
    monkeypatch.setattr("sysmt.study.evaluate.Job", lambda *_: pytest.fail("something ran"))
    assert_one_error_line(invoke("calibrate", *workload(in_tmp), "--out", out))


@pytest.mark.parametrize("options", [["--sparsity", 0.5], ["--schedule", "0.2,0.5", "--epochs", 1]])
def test_a_pruned_checkpoint_runs(in_tmp, options):
    save_weights(build_model("digits", CLASSES), "w.pt")
    common = ["--model", "digits", "--data", f"npz:{in_tmp}", "--batch-size", 8]
    result = invoke("prune", *common, "--weights", "w.pt", *options, "--out", "sub/pruned.pt")
    assert result.exit_code == 0, result.output
    model = load_model("digits", "sub/pruned.pt")
    weights = [p for name, p in model.named_parameters() if "conv" in name and not name.startswith("conv1")]
    zeros = sum(int((p == 0).sum()) for p in weights)
    assert zeros == round(0.5 * sum(p.numel() for p in weights))
    assert (model.conv1.weight != 0).all()
    assert read_metadata("sub/pruned.pt")["steps"][-1] == 0.5
    run = ["--weights", "sub/pruned.pt", "--threads", 2, "--no-plots", "--out", "r"]
    assert invoke("run", *common, *run).exit_code == 0


def test_prune_to_a_pattern(in_tmp):
    options = ["--pattern", "2:4", "--out", "p.pt"]
    assert invoke("prune", *workload(in_tmp), *options).exit_code == 0
    weight = load_model("digits", "p.pt").layer2[0].conv2.weight
    assert ((weight.flatten(1).unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--sparsity", 1], ["sparsity=1"]),
        (["--pattern", "4:2"], ["4:2"]),
        (["--scope", "world"], ["world", "global"]),
        (["--schedule", "0.1,0.2"], ["--epochs"]),
        (["--schedule", "0.2,x"], ["0.2,x"]),
        (["--schedule", "0.2", "--sparsity", 0.2], ["--schedule"]),
        (["--epochs", -1], ["epochs=-1"]),
        (["--out", "tiny.npz/p.pt"], ["tiny.npz/p.pt"]),
    ],
)
def test_prune_refuses(in_tmp, options, parts):
    assert_one_error_line(invoke("prune", *workload(in_tmp), "--out", "p.pt", *options), *parts)
    assert not Path("p.pt").exists()


def test_plot_draws_again(in_tmp):
    assert invoke("run", *workload(in_tmp), "--threads", "1,2", "--no-plots", "--out", "r").exit_code == 0
    assert not list(Path("r").glob("*.png"))
    assert invoke("plot", "r", "--title", "again").exit_code == 0
    assert sorted(path.name for path in Path("r").glob("*.png")) == [
        "accuracy.png",
        "collisions.png",
        "energy.png",
    ]
    assert_one_error_line(invoke("plot", "nowhere"), "nowhere/summary.csv", "missing")


def test_an_unforeseen_error_is_one_line_and_a_file_for_a_report(monkeypatch, tmp_path):
    monkeypatch.delenv("SYSMT_RAISE")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def broken(*args, **kwargs):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("sysmt.hw.gemm.simulate_gemm", broken)
    result = invoke("gemm", "--m", 8, "--n", 8, "--k", 8)
    assert result.exit_code == 70, result.output
    assert "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: unforeseen, a fault of sysmt: ZeroDivisionError: a fault (")
    (report,) = tmp_path.glob("sysmt-error-*.txt")
    assert str(report) in line
    assert "in broken" in report.read_text()
    monkeypatch.setenv("SYSMT_RAISE", "1")
    assert isinstance(invoke("gemm", "--m", 8, "--n", 8, "--k", 8).exception, ZeroDivisionError)


@pytest.mark.parametrize("content", ["[run]\nthreads_map = [1]", "[run]\nseed = 18446744073709551616"])
def test_configurations_of_wrong_values_are_one_line(tmp_path, content):
    path = tmp_path / "config.toml"
    path.write_text(content)
    assert_one_error_line(invoke("run", "--config", path), "threads_map" if "map" in content else "seed")


def test_a_terminal_without_our_signs_gets_escapes():
    code = "from sysmt.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "gemm", "--m", "8", "--n", "8", "--k", "8"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

"""The smallest workload that the command line takes: 8 x 8 grey images, and the digits network untrained."""

import numpy as np
from typer.testing import CliRunner

from sysmt.cli import app

TEST_IMAGES, TRAIN_IMAGES, CLASSES = 20, 24, 6


def write_images(path, train=True, seed=0):
    """Write an .npz of random images."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, count in {"test": TEST_IMAGES, **({"train": TRAIN_IMAGES} if train else {})}.items():
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % CLASSES
    np.savez(path, **arrays)
    return path


def invoke(*args):
    """Run a command line in this process; stdout and stderr are apart."""
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="sysmt")


def workload(path):
    """The options that choose the tiny workload."""
    return ["--model", "digits", "--weights", "random", "--data", f"npz:{path}", "--batch-size", 8]


def assert_one_error_line(result, *parts):
    """Hold a failed command line against the house rules: exit code 2 and one line that says what."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    for part in parts:
        assert part in lines[0]

"""A network and images of one's own, by the files that build them, through run, sweep and search."""

import itertools
import tomllib

import pandas as pd
import pytest
import torch
from tiny import assert_one_error_line, invoke, write_images

from sysmt.nn.networks.models import build_model

NET = '''
import torch.nn.functional as F
from torch import nn


class Padded(nn.Conv2d):
    """Pads below and right only, as TensorFlow does for even sizes."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


def build(num_classes=6):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        Padded(4, 8, 2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, num_classes),
    )
'''

DATA = """
import numpy as np


class Blobs:
    classes = list("abcdef")

    def __init__(self, count, seed):
        self.pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.pixels[index], index % 6


def build(split):
    return Blobs(24, 0) if split == "train" else Blobs(20, 1)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write the two files and weights, and give the options that name them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "images.py").write_text(DATA)
    torch.manual_seed(0)
    torch.save({"state_dict": build_model("net.py:build", 6).state_dict()}, tmp_path / "net.pt")
    return ["--model", "net.py:build", "--weights", "net.pt", "--data", "images.py:build", "--batch-size", 8]


def test_a_run_measures_them_and_can_be_repeated_from_elsewhere(own, tmp_path, monkeypatch):
    result = invoke("run", *own, "--threads", "1,4", "--recalibrate", "--out", "out", "--no-plots")
    assert result.exit_code == 0, result.output
    layers = pd.read_csv("out/layers.csv", dtype={"name": str}).set_index(["setting", "name"])
    assert layers.loc[("4T", "3"), ["M", "N", "K", "threads"]].tolist() == [64, 8, 16, 4]
    config = tomllib.loads((tmp_path / "out" / "config.toml").read_text())
    assert config["run"]["model"] == f"{tmp_path / 'net.py'}:build"
    assert config["run"]["data"] == f"{tmp_path / 'images.py'}:build"
    assert set(config["made_by"]) >= {"model_code_sha256", "data_code_sha256"}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = invoke("run", "--config", tmp_path / "out" / "config.toml", "--out", "again", "--no-plots")
    assert again.exit_code == 0, again.output
    whole, repeated = (pd.read_csv(path) for path in (tmp_path / "out/summary.csv", "again/summary.csv"))
    times = ["images_per_second", "seconds"]
    assert whole.drop(columns=times).equals(repeated.drop(columns=times))


def test_a_study_refuses_a_file_that_has_changed(own, tmp_path):
    sweep = ["sweep", *own, "--threads", "1,4", "--out", "swept", "--no-plots"]
    result = invoke(*sweep)
    assert result.exit_code == 0, result.output
    assert len(pd.read_csv("swept/points.csv")) == 2
    (tmp_path / "net.py").write_text(NET + "\n# another line\n")
    assert_one_error_line(invoke(*sweep), "model_code_sha256")


def test_a_search_finds_maps_for_them(own):
    options = ["--evaluations", 5, "--seeds", 4, "--sensitivity-images", 8, "--held-out", 0.5, "--no-plots"]
    result = invoke("search", *own, *options, "--out", "found")
    assert result.exit_code == 0, result.output
    points = pd.read_csv("found/points.csv")
    assert {"threads of 3", "threads of 6"} <= set(points.columns)
    assert len(points) == 5


def test_classes_of_an_image_folder_come_from_their_names(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    for split, name in itertools.product(("train", "val"), ("owl", "cat")):
        folder = tmp_path / "photos" / split / name
        folder.mkdir(parents=True)
        for index in range(3):
            Image.new("L", (8, 8), 20 * index).save(folder / f"{index}.png")
    common = ["--model", "net.py:build", "--weights", "random", "--data", "imagefolder:photos"]
    common += ["--threads", "4", "--preprocessing", "digits", "--image-size", 8, "--no-plots"]
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\neel\nowl\n")
    result = invoke("run", *common, "--classes", "names.txt", "--out", "named")
    assert result.exit_code == 0, result.output
    wrong = invoke("run", *common, "--classes", "missing.txt", "--out", "wrong")
    assert_one_error_line(wrong, "missing.txt")


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("none.py:build", ["none.py"]),
        ("net.py:wrong", ["wrong"]),
        ("net.py:NET", ["NET"]),
        ("net.py", ["net.py"]),
    ],
)
def test_wrong_specifications_are_one_line(own, model, parts):
    options = ["--weights", "random", "--data", f"npz:{write_images('tiny.npz')}"]
    assert_one_error_line(invoke("run", "--model", model, *options), *parts)


def test_empty_data_is_no_data(own):
    assert_one_error_line(invoke("run", *own[:4], "--data", ""), "data ''")


def test_functional_layers_can_be_asked_for(own, tmp_path):
    call = """
class Call(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(nn.Conv2d(4, 8, 2).weight.detach())

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.kernel)


"""
    functional = NET.replace("Padded(4, 8, 2)", "Call()").replace("def build(", call + "def build(")
    (tmp_path / "net.py").write_text(functional)
    options = ["--model", "net.py:build", "--weights", "random", "--data", "images.py:build", "--no-plots"]
    for flag, threads in (([], 0), (["--functional"], 4)):
        result = invoke("run", *options, *flag, "--threads", "4", "--out", f"out{threads}")
        assert result.exit_code == 0, result.output
        layers = pd.read_csv(f"out{threads}/layers.csv").set_index("name")
        assert layers.loc["3.kernel", "threads"] == threads
        assert layers.loc["3.kernel", "K"] == 16

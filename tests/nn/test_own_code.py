"""Networks and data sets of the user's own, by file and function."""

import importlib.util
from pathlib import Path

import pytest

from sysmt.errors import ConfigError, DataError, WeightsError
from sysmt.nn.data.labelled_images import open_data
from sysmt.nn.networks.checkpoints import save_weights, weights_hash
from sysmt.nn.networks.evaluation import evaluate
from sysmt.nn.networks.models import build_model, load_model
from sysmt.nn.own_code import is_own_code, own_file

NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))

def build(num_classes=5):
    return Net(num_classes)

def fixed():
    return Net(2).train()

def broken():
    raise KeyError("no such thing")

def text():
    return "no network"
"""

DATA = """
import numpy as np
from PIL import Image

class Images:
    classes = ["dark", "light"]

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Image.new("RGB", (8, 8), (200 * (index % 2),) * 3), index % 2

def build(split):
    return Images({"train": 6, "test": 4}[split])

def test_only():
    return [(np.zeros((8, 8), np.uint8), 0), (np.ones((8, 8), np.uint8), 1)]

def floats():
    return [(np.zeros((8, 8, 3), np.float32), 0)]

def sizes():
    return [(np.zeros((8, 8, 3), np.uint8), 0), (np.zeros((9, 8, 3), np.uint8), 0)]

def bare():
    return [np.zeros((8, 8, 3), np.uint8)]

def number():
    return 3
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NETWORK)
    return str(tmp_path / "net.py")


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "data.py").write_text(DATA)
    return str(tmp_path / "data.py")


def test_what_is_a_specification_of_own_code() -> None:
    assert all(map(is_own_code, ["net.py:build", "/a b/net.py:build", "package.module:factory", "a.b.c:_f"]))
    assert not any(
        map(is_own_code, ["digits", "npz:x", "imagefolder:DIR", "timm:resnet18", "npz:a.b", "net.py"])
    )
    assert own_file("~/net.py:build") == Path("~/net.py").expanduser()
    assert own_file("sysmt.nn.passes:kept_modes").name == "passes.py"


def test_a_network_from_a_file_has_the_classes_asked_for(net: str) -> None:
    assert build_model(f"{net}:build").head.out_features == 5
    assert build_model(f"{net}:build", 7).head.out_features == 7
    model = build_model(f"{net}:fixed", 7)  # takes no number of classes
    assert (model.head.out_features, model.training) == (2, False)
    assert build_model("torchvision.models:resnet18", 3).fc.out_features == 3


def test_its_weights_say_how_many_classes(net: str, tmp_path: Path) -> None:
    source = build_model(f"{net}:build", 9)
    save_weights(source, tmp_path / "w.pt")
    model = load_model(f"{net}:build", tmp_path / "w.pt")
    assert weights_hash(model) == weights_hash(source)
    with pytest.raises(WeightsError, match="has 9 classes, not num_classes=4"):
        load_model(f"{net}:build", tmp_path / "w.pt", 4)
    with pytest.raises(WeightsError, match=r"head\.weight has shape \(9, 4\), the network needs \(2, 4\)"):
        load_model(f"{net}:fixed", tmp_path / "w.pt")


def test_a_changed_file_is_read_again(net: str) -> None:
    assert build_model(f"{net}:build").head.out_features == 5
    Path(net).write_text(NETWORK.replace("num_classes=5", "num_classes=6"))
    assert build_model(f"{net}:build").head.out_features == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("biuld", r"has no function 'biuld' \(did you mean 'build'\?\); it has .*fixed"),
        ("broken", "net.py:broken raised KeyError: 'no such thing'"),
        ("text", "gave a str; a torch.nn.Module is needed"),
    ],
)
def test_what_own_networks_do_wrong_is_named(net: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(f"{net}:{name}")


def test_files_that_cannot_be_imported_are_named(net: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing.py is missing; a Python file is needed"):
        build_model(f"{tmp_path}/nothing.py:build")
    (tmp_path / "bad.py").write_text("import math\nx = = 1\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match="bad.py cannot be imported: SyntaxError"):
            build_model(f"{tmp_path}/bad.py:build")
    with pytest.raises(ConfigError, match=r"no\.such\.module cannot be imported: ModuleNotFoundError"):
        build_model("no.such.module:build")


def test_a_data_set_from_a_file(data: str, net: str) -> None:
    opened = open_data(f"{data}:build")
    assert (opened.images("train"), opened.images("test"), opened.class_names) == (6, 4, ("dark", "light"))
    x, y = next(iter(opened.loader("test")))
    assert y.tolist() == [0, 1, 0, 1]
    assert bool((x[1] > x[0]).all())
    assert evaluate(build_model(f"{net}:build", 2), opened.loader("test"), progress=False).images == 4
    only = open_data(f"{data}:test_only")
    assert (only.images("test"), only.has("train"), only.preprocessing.channels) == (2, False, 1)
    assert open_data(f"{data}:test_only", train=f"{data}:test_only").images("train") == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("floats", r"gave images of \(8, 8, 3\) of float32; PIL images or uint8"),
        ("sizes", "of one size are needed"),
        ("bare", r"\(image, label\) pairs are needed"),
        ("number", "gave a int; a data set with a length and items is needed"),
        ("nothing", "has no function 'nothing'"),
    ],
)
def test_what_own_data_sets_do_wrong_is_named(data: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(f"{data}:{name}")


def test_timm_is_named_where_it_is_missing() -> None:
    if importlib.util.find_spec("timm") is None:
        with pytest.raises(ConfigError, match="needs the package timm"):
            build_model("timm:resnet18")
    else:
        assert build_model("timm:resnet18", 3).fc.out_features == 3
        with pytest.raises(ConfigError, match="timm has no model 'resnet81'"):
            build_model("timm:resnet81")

"""Networks by name: shapes, parameter counts of the papers, key names of public checkpoints."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import REPOSITORY, SHARED
from torch import nn

import sysmt
from sysmt.errors import ConfigError, WeightsError
from sysmt.nn.data.labelled_images import open_data
from sysmt.nn.networks.checkpoints import save_weights
from sysmt.nn.networks.models import (
    VGG7,
    MobileNetV1,
    build_model,
    build_shapes,
    classes_in_weights,
    load_model,
    model_names,
)
from sysmt.nn.networks.training import evaluate
from sysmt.nn.torchvision_import import torchvision


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is absent; name the directory of the measuring data in SYSMT_DATA")
    return SHARED / name


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # He et al., arXiv 1512.03385, table 6, in millions: 0.27, 0.46, 0.66, 0.85, 1.7
        ("resnet20", 269_722), ("resnet32", 464_154), ("resnet44", 658_586), ("resnet56", 853_018),
        ("resnet110", 1_727_962),
        # Howard et al., arXiv 1704.04861, table 4: 4.2 million
        ("mobilenet_v1", 4_231_976), ("mobilenet_v1_cifar", 4_231_976 - 990 * 1025),
        # Counted by hand: convolutions, hidden layer on 2 x 2 maps, classifier, BatchNorm
        ("vgg7", 4_574_592 + 2_097_152 + 10_250 + 2 * 2_816),
        # torchvision's documentation
        ("resnet18", 11_689_512), ("resnet50", 25_557_032), ("googlenet", 6_624_904),
        ("densenet121", 7_978_856),
    ],
)  # fmt: skip
def test_parameter_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        assert parameters(build_model(name)) == count


@pytest.mark.parametrize(
    ("name", "shape"),
    [("digits", (2, 1, 16, 16)), ("digits32", (2, 1, 32, 32)), ("resnet20", (2, 3, 32, 32)),
     ("mobilenet_v1", (1, 3, 64, 64)),     ("googlenet", (1, 3, 64, 64)), ("densenet121", (1, 3, 32, 32)),
     ("vgg7", (2, 3, 32, 32)), ("vgg7", (2, 3, 16, 16)), ("mobilenet_v1_cifar", (1, 3, 32, 32))],
)  # fmt: skip
def test_logits(name: str, shape: tuple[int, ...]) -> None:
    model = build_model(name, num_classes=7)
    assert not model.training
    with torch.inference_mode():
        assert model(torch.zeros(shape)).shape == (shape[0], 7)


@pytest.mark.parametrize("name", ["digits", "resnet20", "vgg7", "mobilenet_v1"])
def test_each_convolution_is_a_module_of_its_own(name: str) -> None:
    calls: list[nn.Module] = []
    model = build_model(name, in_channels=3)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        module.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))
    assert len(calls) == len(set(calls)) == len(convolutions)


def test_digits_takes_colour_on_request() -> None:
    model = build_model("digits", in_channels=3)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


def test_grey_weights_make_a_grey_network(tmp_path: Path) -> None:
    for name in ("vgg7", "mobilenet_v1_cifar", "digits"):
        save_weights(build_model(name, 3, in_channels=1), tmp_path / f"{name}.pt")
        model = load_model(name, tmp_path / f"{name}.pt")
        assert model(torch.zeros(1, 1, 16, 16)).shape == (1, 3)


def test_narrow_networks() -> None:
    for model in (VGG7(4, 1, width=8), MobileNetV1(4, 1, width=0.25, first_stride=1)):
        assert model.eval()(torch.zeros(1, 1, 16, 16)).shape == (1, 4)
    assert parameters(VGG7(width=16)) < parameters(VGG7()) / 60
    assert MobileNetV1(width=0.25).model[0][0].weight.shape == (8, 3, 3, 3)


def test_shortcut_pads_channels_on_both_sides() -> None:
    model = build_model("resnet20")
    block = model.layer2[0]
    for name in ("bn1", "bn2"):
        nn.init.zeros_(getattr(block, name).weight)  # the block adds nothing: only the shortcut is left
    x = torch.rand(1, 16, 4, 4)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_names() -> None:
    names = model_names()
    assert {"digits", "resnet20", "mobilenet_v1", "resnet18", "googlenet", "densenet121"} <= set(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "resnet21"}, "resnet20"),
        ({"name": "RESNET18"}, "unknown"),
        ({"name": "resnet20", "num_classes": 0}, "num_classes=0"),
        ({"name": "resnet18", "in_channels": 1}, "RGB"),
    ],
)
def test_impossible_models(arguments: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_model(**arguments)


@pytest.mark.parametrize("name", ["digits", "resnet20", "mobilenet_v1", "resnet18", "squeezenet1_0"])
def test_classes_come_from_the_weights(name: str, tmp_path: Path) -> None:
    save_weights(build_model(name, num_classes=13), tmp_path / "w.pt")
    model = load_model(name, tmp_path / "w.pt")
    assert classes_in_weights(name, model.state_dict()) == 13
    with pytest.raises(WeightsError, match="13 classes, not num_classes=10"):
        load_model(name, tmp_path / "w.pt", num_classes=10)


@pytest.mark.parametrize("name", ["regnet_y_400mf", "resnet20", "vit_b_16"])
def test_shapes_are_those_of_the_network_and_take_no_memory(name: str) -> None:
    shapes, model = build_shapes(name), build_model(name)
    every = (*shapes.parameters(), *shapes.buffers())
    assert {tensor.device.type for tensor in every} == {"meta"}
    assert {key: tensor.shape for key, tensor in shapes.state_dict().items()} == {
        key: tensor.shape for key, tensor in model.state_dict().items()
    }


TORCHVISION = [
    pytest.param(name, marks=[] if name in ("regnet_x_400mf", "mnasnet0_5") else pytest.mark.slow)
    for name in model_names()
    if name in torchvision.models.list_models(module=torchvision.models)
]


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_network_runs_with_random_weights_and_loads_a_checkpoint_of_its_own(
    name: str, tmp_path: Path
) -> None:
    shapes = build_shapes(name)
    assert classes_in_weights(name, shapes.state_dict()) == 1000
    if sum(parameter.numel() for parameter in shapes.parameters()) > 150e6:
        pytest.skip("its weights take gigabytes; that its classifier is found holds")
    torch.manual_seed(0)
    model = build_model(name, num_classes=2)
    save_weights(model, tmp_path / "own.pt")
    loaded = load_model(name, tmp_path / "own.pt")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    side = 224 if name.startswith(("vit", "maxvit", "swin")) else 96
    images = torch.rand(1, 3, side, side)
    with torch.no_grad():
        expected = model(images)
        with sysmt.attach(loaded, sysmt.ArrayConfig(threads=1), first=True, linear=True) as sim:
            sim.calibrate([images], images=1)
            logits = loaded(images)
            assert sim.cycles > 0
    assert logits.shape == (1, 2)
    torch.testing.assert_close(logits, expected, rtol=0.2, atol=0.2 * float(expected.abs().max()) + 1e-3)


def test_channels_come_from_the_weights(tmp_path: Path) -> None:
    save_weights(build_model("digits", in_channels=3), tmp_path / "w.pt")
    assert load_model("digits", tmp_path / "w.pt").conv1.in_channels == 3


def test_weights_of_another_network_name_what_differs(tmp_path: Path) -> None:
    save_weights(build_model("resnet20"), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"lacks .*layer1\.3\.conv1"):
        load_model("resnet32", tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"ResNet: it lacks .* has besides"):
        load_model("resnet18", tmp_path / "w.pt")


def test_importing_torchvision_leaves_its_own_operators_alone() -> None:
    """The schemas are defined where they are missing, and a second import changes nothing."""
    code = (
        "from sysmt.nn.torchvision_import import torchvision as one\n"
        "import importlib, sysmt.nn.torchvision_import as vision, torch\n"
        "two = importlib.reload(vision).torchvision\n"
        "assert one is two and hasattr(torch.ops.torchvision, 'nms')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "top1"),
    [("resnet20", "resnet20-12fca82f.th", 0.915), ("resnet32", "resnet32-d509ac18.th", 0.928)],
)
def test_public_cifar_networks_reach_their_accuracy(name: str, file: str, top1: float) -> None:
    model = load_model(name, shared(f"weights/{file}"))
    loader = open_data(f"npz:{shared('cifar10/lossless.npz')}").loader("test")
    assert evaluate(model, loader, progress=False).top1 == pytest.approx(top1, abs=0.0011)

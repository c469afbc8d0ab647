"""Networks by name: small residual networks, VGG-7 and MobileNet-v1 for small images, and torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sysmt.config import parse_count
from sysmt.errors import ConfigError, WeightsError, nearest
from sysmt.nn.networks.checkpoints import load_state, read_weights, resolve_weights, without_prefix
from sysmt.nn.own_code import call_own, is_own_code

__all__ = [
    "MobileNetV1",
    "SmallResNet",
    "VGG7",
    "build_model",
    "build_shapes",
    "classes_in_weights",
    "load_model",
    "model_names",
]

_SMALL_RESNETS = {
    "digits": ((1, 1, 1), 8),
    "digits32": ((1, 1, 1), 4),
    "resnet20": ((3, 3, 3), 16),
    "resnet32": ((5, 5, 5), 16),
    "resnet44": ((7, 7, 7), 16),
    "resnet56": ((9, 9, 9), 16),
    "resnet110": ((18, 18, 18), 16),
}
"""Blocks of the three stages, and channels of the first one (CIFAR: arXiv 1512.03385, section 4.2)."""

_TIMM = "timm:"

_FOR_SMALL_IMAGES = (*_SMALL_RESNETS, "vgg7", "mobilenet_v1_cifar")


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut without weights (option A of arXiv 1512.03385).

    Where the shape changes, the shortcut takes every second pixel and pads the new channels with
    zeros, half of them below and half above the old ones.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, ⌈H / stride⌉, ⌈W / stride⌉)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Map the block's input to the shape of its output."""
        below = self.new_channels // 2
        pixels = x[:, :, :: self.stride, :: self.stride]
        if not self.new_channels:
            return pixels
        return F.pad(pixels, (0, 0, 0, 0, below, self.new_channels - below))


class SmallResNet(nn.Module):
    """Residual network for small images: three stages, each with twice the channels of the one before.

    Module names are those of the widespread CIFAR checkpoints: ``conv1``, ``bn1``,
    ``layer1.0.conv1`` ..., ``linear``.

    Parameters
    ----------
    blocks : tuple of int
        Blocks of the three stages.
    num_classes : int
    in_channels : int
        1 for grey images, 3 for RGB.
    width : int
        Channels of the first stage.
    """

    def __init__(
        self, blocks: tuple[int, int, int], num_classes: int = 10, in_channels: int = 3, width: int = 16
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks[0], stride=1)
        self.layer2 = self._stage(width, 2 * width, blocks[1], stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks[2], stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


class VGG7(nn.Module):
    """VGG-7 of ternary weight networks (Li & Liu, arXiv 1605.04711): six convolutions and a hidden layer.

    Two 3 × 3 convolutions and a 2 × 2 max pooling, three times, with twice the channels each time, then
    a fully connected layer of as many units as eight times `width`; all with BatchNorm and ReLU. Unlike the
    original, which reads the 4 × 4 maps of 32 × 32 images, the hidden layer reads maps pooled to 2 × 2, so
    that smaller images will do.

    Parameters
    ----------
    num_classes : int
    in_channels : int
        1 for grey images, 3 for RGB.
    width : int
        Channels of the first convolution: 128 in the original.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for out_channels in (width, 2 * width, 4 * width):
            for _ in range(2):
                layers += [
                    nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(),
                ]
                channels = out_channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.hidden = nn.Sequential(
            nn.Linear(4 * channels, 8 * width, bias=False), nn.BatchNorm1d(8 * width), nn.ReLU()
        )
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W), 8 × 8 at least, to logits (N, num_classes)."""
        return self.linear(self.hidden(self.features(x)))  # type: ignore[no-any-return]


class MobileNetV1(nn.Module):
    """MobileNet-v1 (Howard et al., arXiv 1704.04861, table 1), by default for 224 × 224 RGB images.

    Module names are those of the widespread PyTorch checkpoints: ``model.0.0`` is the first
    convolution, ``model.1.0`` a depthwise and ``model.1.3`` a pointwise one, ``fc`` the classifier.

    Parameters
    ----------
    num_classes : int
    in_channels : int
        1 for grey images, 3 for RGB.
    width : float
        Width multiplier of all channels; at least 1/32.
    first_stride : int
        Stride of the first convolution: 2, or 1 for the small images of CIFAR.
    """

    _STAGES = (
        (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
        (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
    )  # fmt: skip
    """Output channels and stride of each depthwise-separable pair."""

    def __init__(
        self, num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, first_stride: int = 2
    ) -> None:
        super().__init__()
        channels = round(32 * width)
        first = nn.Conv2d(in_channels, channels, 3, first_stride, padding=1, bias=False)
        stages: list[nn.Module] = [nn.Sequential(first, nn.BatchNorm2d(channels), nn.ReLU())]
        for full_channels, stride in self._STAGES:
            out_channels = round(full_channels * width)
            stages.append(self._separable(channels, out_channels, stride))
            channels = out_channels
        self.model = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(channels, num_classes)

    @staticmethod
    def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        return self.fc(self.model(x).flatten(1))  # type: ignore[no-any-return]


@cache
def model_names() -> tuple[str, ...]:
    """Return every name that `build_model` takes: sysmt's own networks first, then torchvision's."""
    from sysmt.nn.torchvision_import import torchvision

    theirs = torchvision.models.list_models(module=torchvision.models)
    return (*_FOR_SMALL_IMAGES, "mobilenet_v1", *theirs)


def build_model(name: str, num_classes: int | None = None, in_channels: int | None = None) -> nn.Module:
    """Build a network with fresh weights, in evaluation mode.

    Parameters
    ----------
    name : str
        One of `model_names`; ``"timm:NAME"``; or a function of your own, ``"path/to/net.py:build"`` or
        ``"package.module:factory"``, which is called (so its code runs) with `num_classes` and `in_channels`
        if it takes them.
    num_classes : int, optional
        Logits; by default 10 for the small networks and 1000 for the others.
    in_channels : int, optional
        Image channels; by default 1 for ``"digits"`` and ``"digits32"``, and 3 for the others. Only networks
        for small images can be built for another number.

    Returns
    -------
    nn.Module
        In evaluation mode. GoogLeNet and Inception-v3 come without their auxiliary classifiers and
        with ``transform_input=True``, as torchvision's published weights need it: they expect
        images normalised like everybody else's.

    Raises
    ------
    ConfigError
        If the name is unknown, a number is impossible, or your own code raises or gives no network.
    """
    if num_classes is not None:
        num_classes = parse_count(num_classes, "num_classes")
    if in_channels is not None:
        in_channels = parse_count(in_channels, "in_channels")
    if _is_foreign(name):
        return _foreign_model(name, num_classes, in_channels)
    if name in _SMALL_RESNETS:
        channels = in_channels or (1 if name in ("digits", "digits32") else 3)
        blocks, width = _SMALL_RESNETS[name]
        return SmallResNet(blocks, num_classes or 10, channels, width).eval()
    if name == "vgg7":
        return VGG7(num_classes or 10, in_channels or 3).eval()
    if name == "mobilenet_v1_cifar":
        return MobileNetV1(num_classes or 10, in_channels or 3, first_stride=1).eval()
    if name not in model_names():
        raise ConfigError(
            f"model {name!r} is unknown{nearest(str(name), model_names())}; "
            f"known: {', '.join(_FOR_SMALL_IMAGES)}, mobilenet_v1, torchvision's classification networks, "
            "timm:NAME, and your own as path/to/net.py:build or package.module:factory"
        )
    if in_channels not in (None, 3):
        raise ConfigError(
            f"in_channels={in_channels} does not fit model {name!r}, which takes RGB images (3)"
        )
    if name == "mobilenet_v1":
        return MobileNetV1(num_classes or 1000).eval()
    return _torchvision_model(name, num_classes or 1000)


def _is_foreign(name: str) -> bool:
    return name.startswith(_TIMM) or is_own_code(name)


def _foreign_model(name: str, num_classes: int | None, in_channels: int | None) -> nn.Module:
    """Build one of timm's networks, or what the user's own code gives."""
    if name.startswith(_TIMM):
        import sysmt.nn.torchvision_import  # noqa: F401  (timm's import of torchvision may need its remedy)

        try:
            import timm
        except ImportError as error:
            raise ConfigError(f"model {name!r} needs the package timm: pip install timm") from error
        wanted = name.removeprefix(_TIMM)
        if not timm.is_model(wanted):
            raise ConfigError(f"timm has no model {wanted!r}{nearest(wanted, timm.list_models())}")
        model = timm.create_model(wanted, num_classes=num_classes, in_chans=in_channels)
    else:
        model = call_own(name, num_classes=num_classes, in_channels=in_channels)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} gave a {type(model).__name__}; a torch.nn.Module is needed")
    return model.eval()


def _load_foreign(name: str, state: Mapping[str, Tensor], path: Path, num_classes: int | None) -> nn.Module:
    """Build a network of other code with as many classes as the weights have, and load them."""
    model = build_model(name, num_classes)
    state = without_prefix(state, model.state_dict())
    layers = [key for key, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    own, found = (
        (weights[f"{layers[-1]}.weight"] if layers and f"{layers[-1]}.weight" in weights else None)
        for weights in (model.state_dict(), state)
    )
    if own is not None and found is not None and own.shape[0] != found.shape[0]:
        if num_classes is not None:
            raise WeightsError(f"{path} has {found.shape[0]} classes, not num_classes={num_classes}")
        model = build_model(name, int(found.shape[0]))
    load_state(model, state, path)
    return model


def _torchvision_model(name: str, num_classes: int) -> nn.Module:
    from sysmt.nn.torchvision_import import torchvision

    options: dict[str, bool] = {}
    if name in ("googlenet", "inception_v3"):  # their own initialisation takes a minute on a small CPU
        options = {"aux_logits": False, "init_weights": False, "transform_input": True}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    return model.eval()


class _ParametersWithoutValues(TorchFunctionMode):
    """Puts what parameters are made from on the meta device, and leaves other tensors their values."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs.setdefault("device", "meta")
        return func(*args, **kwargs)


def build_shapes(name: str) -> nn.Module:
    """Build a network on the meta device: its tensors have shapes, and neither memory nor values.

    Parameters
    ----------
    name : str
        One of `model_names`.

    Raises
    ------
    ConfigError
        If the name is unknown.
    """
    try:
        with torch.device("meta"):
            return build_model(name)
    except NotImplementedError:  # the constructor reads values that it computed in tensors, as RegNet's does
        with _ParametersWithoutValues():
            return build_model(name).to("meta")


def classes_in_weights(name: str, state: Mapping[str, Tensor]) -> int:
    """Read the number of classes off the classifier's shape.

    Parameters
    ----------
    name : str
        One of `model_names`.
    state : mapping of str to Tensor
        As `sysmt.nn.networks.checkpoints.read_weights` returns it.

    Returns
    -------
    int

    Raises
    ------
    ConfigError
        If the name is unknown.
    WeightsError
        If the state lacks the network's classifier.
    """
    classifier = _last_layer(name)
    weight = state.get(f"{classifier}.weight")
    if weight is None or weight.ndim < 2:
        present = ", ".join(list(state)[:3])
        raise WeightsError(
            f"the weights have no {classifier}.weight, the classifier of model {name!r}; "
            f"their first keys are {present}"
        )
    return int(weight.shape[0])


@cache
def _last_layer(name: str) -> str:
    """Name of the classifier: the last layer with weights, in the order of definition."""
    model = build_shapes(name)
    layers = [key for key, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return str(layers[-1])


def load_model(name: str, weights: str | Path | None = None, num_classes: int | None = None) -> nn.Module:
    """Build a network and load its weights, with as many classes and channels as these have.

    Parameters
    ----------
    name : str
        What `build_model` takes.
    weights : str or Path, optional
        A checkpoint's path, or ``"torchvision:NAME"`` for one that torchvision publishes. Without
        it the network keeps its fresh weights.
    num_classes : int, optional
        Checked against the weights where both are given.

    Returns
    -------
    nn.Module
        In evaluation mode.

    Raises
    ------
    ConfigError
        If a name is unknown.
    WeightsError
        If the weights are missing, damaged or another network's.
    """
    if weights is None:
        return build_model(name, num_classes)
    path = resolve_weights(weights, name)
    state = read_weights(path)
    if _is_foreign(name):
        return _load_foreign(name, state, path, num_classes)
    state = without_prefix(state, [f"{_last_layer(name)}.weight"])
    if f"{_last_layer(name)}.weight" not in state:
        load_state(build_model(name), state, path)  # raises, and names what differs
    found = classes_in_weights(name, state)
    if num_classes is not None and found != num_classes:
        raise WeightsError(f"{path} has {found} classes, not num_classes={num_classes}")
    first = next((tensor for tensor in state.values() if tensor.ndim == 4), None)
    channels = int(first.shape[1]) if name in _FOR_SMALL_IMAGES and first is not None else None
    model = build_model(name, found, channels)
    load_state(model, state, path)
    return model

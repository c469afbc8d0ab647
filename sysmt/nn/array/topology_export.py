"""A network's layers as a SCALE-Sim topology, with the padded sizes that SCALE-Sim wants."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sysmt.config import parse_count
from sysmt.cost.layer_shape import Layer
from sysmt.errors import ConfigError, UnsupportedLayerError
from sysmt.nn.array.layer_energy import layer_of
from sysmt.nn.array.lowering import LayerGeometry
from sysmt.nn.networks.models import build_shapes
from sysmt.nn.passes import evaluation_mode
from sysmt.scalesim.topology_file import DEPTHWISE_MARK, topology_csv

__all__ = ["ExportedTopology", "export_named", "export_topology", "input_size"]

_SIDES = {
    "digits": 16,
    **dict.fromkeys(("digits32", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"), 32),
    "inception_v3": 299,
}
_USUAL_SIDE = 224


@dataclasses.dataclass(frozen=True)
class ExportedTopology:
    """A network as SCALE-Sim reads it.

    Attributes
    ----------
    csv : str
        The topology file.
    notes : tuple of str
        What the format cannot say, layer by layer: nothing is left out without a line here.
    macs, left_out_macs : int
        Multiplications of the lines, and of what a note says is left out: together the network's.
    """

    csv: str
    notes: tuple[str, ...]
    macs: int
    left_out_macs: int


@dataclasses.dataclass(frozen=True)
class _Product:
    """One matrix product, convolution or attention of a forward.

    ``geometry`` and ``out_size`` (rows, columns) describe it as a convolution of ``images`` images; where it
    has no such form, ``geometry`` is None.
    """

    name: str
    geometry: LayerGeometry | None
    out_size: tuple[int, int]
    images: int
    macs: int


class _Recorder(TorchDispatchMode):
    """Records the matrix products, convolutions and attentions that run inside of a block, in their order.

    It sees what torch's kernels are asked for, whatever module or function asks. While such a mode is on,
    torch takes none of its fused paths but for oneDNN's LSTM, which `_without_onednn` switches off.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[_Product] = []
        self.used: set[str] = set()
        self._owners = {id(parameter): name for name, parameter in model.named_parameters()}
        self._running: list[tuple[str, nn.Module]] = [("", model)]
        self._counts = [0]

    def enter(self, name: str, module: nn.Module) -> None:
        self._running.append((name, module))
        self._counts.append(0)

    def leave(self) -> None:
        self._running.pop()
        self._counts.pop()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        operation = func.overloadpacket.__name__
        if operation in ("convolution", "_convolution"):
            self._convolution(args[0], args[1], args[3], args[5], args[6], args[8], out)
        elif operation in ("mm", "addmm"):
            a, b = args[-2:]
            self._add(self._name_of(b), LayerGeometry(*b.shape), (a.shape[0], 1))
        elif operation in ("mv", "addmv"):  # a row of activations times a matrix of weights
            matrix = args[-2]
            self._add(self._name_of(matrix), LayerGeometry(*reversed(matrix.shape)), (1, 1))
        elif operation in ("bmm", "baddbmm"):
            a, b = args[-2:]
            self._add_many(self._product_name(), len(a), a.shape[1], b.shape[2], b.shape[1])
        elif operation.startswith("_scaled_dot_product") and not operation.endswith("backward"):
            q, k, v = (x.flatten(0, -3) for x in args[:3])
            self._add_many(self._product_name(), len(q), q.shape[1], k.shape[1], q.shape[2])
            self._add_many(self._product_name(), len(q), q.shape[1], v.shape[2], v.shape[1])
        return out

    def _convolution(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        stride: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        groups: int,
        out: torch.Tensor,
    ) -> None:
        name, images, taps = self._name_of(weight), x.shape[0], math.prod(weight.shape[2:])
        pixels = x.shape[2:] if transposed else out.shape[2:]
        macs = images * math.prod(pixels) * math.prod(weight.shape)
        size = (1, *pixels)[-2:]
        if len(pixels) > 2:
            self._add(name, None, (0, 0), images, macs)
        elif transposed:  # each input pixel times all taps, which then are added up
            filters = groups * weight.shape[1] * taps
            self._add(name, LayerGeometry(weight.shape[0], filters, groups=groups), size, images)
        else:
            kernel, strides, apart = (
                (int(values[0]) if len(values) == 2 else 1, int(values[-1]))
                for values in (weight.shape[2:], stride, dilation)
            )
            if len(pixels) == 1:  # a single row, for which one stride is as good as another
                strides = (strides[1], strides[1])
            channels = groups * weight.shape[1]
            geometry = LayerGeometry(channels, weight.shape[0], kernel, strides, apart, groups)
            self._add(name, geometry, size, images)

    def _add_many(self, name: str, count: int, m: int, n: int, k: int) -> None:
        """Add `count` products of matrices that share nothing: groups of channels."""
        self._add(name, LayerGeometry(count * k, count * n, groups=count), (m, 1))

    def _add(
        self, name: str, geometry: LayerGeometry | None, size: tuple[int, int], images: int = 1, macs: int = 0
    ) -> None:
        if geometry is not None:
            if images > 1 and geometry.kernel == (1, 1):  # each pixel for itself: more rows of them
                size, images = (images * size[0], size[1]), 1
            macs = images * math.prod(size) * geometry.out_channels * geometry.gemm_k
        self.products.append(_Product(name, geometry, size, images, macs))
        self.used |= {name, self._running[-1][0]}

    def _name_of(self, weight: torch.Tensor) -> str:
        """Return the name of the layer that a weight, or a view of one, belongs to."""
        owner = self._owners.get(id(weight)) or self._owners.get(id(weight._base))
        if owner is None:
            running, module = self._running[-1]
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
                return running or type(module).__name__
            return self._product_name()
        layer = re.sub(r"[._]?weight$", "", owner)
        return layer or type(self._running[-1][1]).__name__

    def _product_name(self) -> str:
        """Return a name for a product of two activations, by the module that runs and its place there."""
        name, module = self._running[-1]
        place, self._counts[-1] = self._counts[-1], self._counts[-1] + 1
        attention = isinstance(module, nn.MultiheadAttention) and place < 2
        product = ("QK", "AV")[place] if attention else f"matmul{place}"
        return f"{name}.{product}" if name else product


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Have an LSTM run as the matrix products that it is made of."""
    enabled: bool = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _record(model: nn.Module, shape: Sequence[int]) -> _Recorder:
    """Run a forward on zeros, and return what it is made of."""
    recorder = _Recorder(model)
    parameter = next(model.parameters(), torch.empty(0))
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            for handle in (
                module.register_forward_pre_hook(lambda m, _, name=name: recorder.enter(name, m)),
                module.register_forward_hook(lambda *_: recorder.leave()),
            ):
                stack.callback(handle.remove)
        for context in (evaluation_mode(model), _without_onednn(), recorder):
            stack.enter_context(context)
        try:
            model(torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device))
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UnsupportedLayerError(
                f"the model does not run on an input of 1 x {list(shape)}: {reason}"
            ) from error
    return recorder


def export_topology(model: nn.Module, input_shape: Sequence[int]) -> ExportedTopology:
    """Write a line for each convolution and matrix product of a forward, in the order of execution.

    The input is as large as its used pixels with their padding: ``(out - 1) * stride + kernel``, so that
    SCALE-Sim computes just the network's own output sizes. A matrix product is a 1 x 1 convolution over its
    rows; a transposed convolution one over its input's pixels, with a filter for each tap of each output
    channel. Attention's products of activations, of each head, are a line each. Depthwise convolutions get
    `DEPTHWISE_MARK` before their names, other groups a line each; a dilated kernel is written as if its taps
    touched, and strides that differ as the smaller: M, N and K stay right.

    Parameters
    ----------
    model : nn.Module
        Run once in evaluation mode, on zeros, without gradients; its modes are restored.
    input_shape : sequence of int
        Of one image (channels, rows, columns), or whatever the model takes without the batch axis.

    Returns
    -------
    ExportedTopology

    Raises
    ------
    ConfigError
        If the sizes are no integers of at least 1, or the forward has no product at all.
    UnsupportedLayerError
        If the model does not run on such an input.
    """
    shape = [parse_count(size, "input size") for size in input_shape]
    recorder = _record(model, shape)
    if not recorder.products:
        raise ConfigError("the model's forward has no convolution or matrix product; nothing to export")
    notes: list[str] = []
    layers: list[tuple[Layer, int]] = []
    left_out = 0
    for product in recorder.products:
        if product.geometry is None:
            notes.append(
                f"{product.name}: a convolution over three axes cannot be written; {product.macs:,} MACs "
                "are left out"
            )
            left_out += product.macs
            continue
        plain = _expressible(product.geometry, product.name, notes)
        name = _file_name(product.name, plain, notes)
        for image in range(product.images):
            image_name = name if product.images == 1 else f"{name}_image{image}"
            layers.append((layer_of(image_name, plain, product.out_size), plain.groups))
    for name, module in model.named_modules():
        kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase, nn.MultiheadAttention)
        mine = f"{name}." if name else ""
        if isinstance(module, kinds) and not any(f"{used}.".startswith(mine) for used in recorder.used):
            notes.append(f"{name}: not reached by the forward, not exported")
    macs = sum(product.macs for product in recorder.products) - left_out
    return ExportedTopology(topology_csv(layers), tuple(dict.fromkeys(notes)), macs, left_out)


def _expressible(geometry: LayerGeometry, name: str, notes: list[str]) -> LayerGeometry:
    """Return a geometry of the same M, N and K without what the format lacks."""
    if geometry.dilation != (1, 1):
        notes.append(
            f"{name}: dilation {geometry.dilation} cannot be written; the kernel's taps touch instead"
        )
    stride = min(geometry.stride)
    if geometry.stride != (stride, stride):
        notes.append(f"{name}: strides {geometry.stride} cannot be written; both are {stride} instead")
    return dataclasses.replace(geometry, dilation=(1, 1), stride=(stride, stride))


def _file_name(name: str, geometry: LayerGeometry, notes: list[str]) -> str:
    """Return a layer's name as the format can hold it."""
    depthwise = geometry.groups > 1 and geometry.depthwise
    plain = name.replace(",", "_").replace(DEPTHWISE_MARK, DEPTHWISE_MARK.lower())
    if plain != name:
        notes.append(f"{name}: written as {plain}; commas and {DEPTHWISE_MARK!r} would be misread")
    return f"{DEPTHWISE_MARK}_{plain}" if depthwise else plain


def input_size(name: str) -> int:
    """Return the side of the images that a network is made for, in pixels."""
    return _SIDES.get(name, _USUAL_SIDE)


def export_named(name: str, image_size: int | None = None) -> ExportedTopology:
    """Export a network that `sysmt.nn.networks.models.build_model` knows, from its shapes alone.

    Parameters
    ----------
    name : str
    image_size : int, optional
        Side of the input in pixels; by default the one that the network is made for.

    Raises
    ------
    ConfigError
        If the name is unknown.
    UnsupportedLayerError
        If the network does not run on images of that size.
    """
    side = input_size(name) if image_size is None else parse_count(image_size, "image_size")
    return export_topology(build_shapes(name), (1 if name in ("digits", "digits32") else 3, side, side))

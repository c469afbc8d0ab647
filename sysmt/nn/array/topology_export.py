"""A network's layers as a SCALE-Sim topology, with the padded sizes that SCALE-Sim wants."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from sysmt.config import parse_count
from sysmt.errors import ConfigError, UnsupportedLayerError
from sysmt.nn.array.layer_energy import layer_of
from sysmt.nn.array.lowering import LayerGeometry
from sysmt.nn.networks.models import build_model
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
    """

    csv: str
    notes: tuple[str, ...]


def export_topology(model: nn.Module, input_shape: Sequence[int]) -> ExportedTopology:
    """Write a line for each Conv2d and Linear that a forward reaches, in the order of execution.

    The input is as large as its used pixels with their padding: ``(out - 1) * stride + kernel``, so that
    SCALE-Sim computes just the network's own output sizes. A Linear is a 1 x 1 convolution over its rows.
    Depthwise convolutions get `DEPTHWISE_MARK` before their names, other groups a line each; a dilated
    kernel is written as if its taps touched, and strides that differ as the smaller: M, N and K stay right.

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
        If the sizes are no integers of at least 1, or no Conv2d or Linear is reached.
    UnsupportedLayerError
        If the model does not run on such an input.
    """
    shape = [parse_count(size, "input size") for size in input_shape]
    named = {
        module: name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    reached: list[tuple[nn.Module, tuple[int, int]]] = []

    def note(module: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        linear = isinstance(module, nn.Linear)
        out_size = (made.shape[:-1].numel(), 1) if linear else (made.shape[-2], made.shape[-1])
        reached.append((module, out_size))

    parameter = next(model.parameters(), torch.empty(0))
    handles = [module.register_forward_hook(note) for module in named]
    try:
        with evaluation_mode(model):
            model(torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedLayerError(f"the model does not run on an input of 1 x {shape}: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()
    if not reached:
        raise ConfigError("the model's forward reaches no Conv2d or Linear; there is nothing to export")
    notes: list[str] = []
    layers = []
    for module, out_size in reached:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        name, geometry = named[module] or type(module).__name__, LayerGeometry.of(module)
        plain = _expressible(geometry, name, notes)
        layers.append((layer_of(_file_name(name, geometry, notes), plain, out_size), geometry.groups))
    seen = {module for module, _ in reached}
    notes += [
        f"{name}: not reached by the forward, not exported" for m, name in named.items() if m not in seen
    ]
    return ExportedTopology(topology_csv(layers), tuple(notes))


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
    with torch.device("meta"):  # shapes only: nothing is allocated or computed
        model = build_model(name)
    return export_topology(model, (1 if name in ("digits", "digits32") else 3, side, side))

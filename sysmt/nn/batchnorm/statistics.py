"""The running statistics of BatchNorm layers: which layers keep them, copies of them, and setting them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer

from sysmt.errors import WeightsError, nearest

__all__ = [
    "keeping_statistics",
    "layer_statistics",
    "load_statistics",
    "named_batchnorms",
    "running_buffers",
    "save_statistics",
    "scale_and_shift",
    "set_statistics",
]


def save_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the running statistics of every BatchNorm layer that keeps them.

    Returns
    -------
    dict of str to Tensor (channels,)
        ``<layer>.running_mean`` and ``<layer>.running_var``, the keys of `state_dict`. Empty for a
        network without BatchNorm.
    """
    saved: dict[str, Tensor] = {}
    for name, layer in keeping_statistics(model).items():
        mean_key, variance_key = _keys(name)
        saved[mean_key], saved[variance_key] = layer_statistics(layer)
    return saved


def load_statistics(model: nn.Module, statistics: Mapping[str, Any]) -> None:
    """Set the running statistics that `save_statistics` returned; all of them or, on an error, none.

    Parameters
    ----------
    model : nn.Module
        A network with the same BatchNorm layers.
    statistics : mapping of str to tensor or array (channels,)

    Raises
    ------
    WeightsError
        If keys are missing or unknown, shapes differ, or values are not finite or a variance negative.
    """
    layers = keeping_statistics(model)
    needed = {key for name in layers for key in _keys(name)}
    for key in statistics:
        if key not in needed:
            raise WeightsError(f"the network has no statistic {key!r}{nearest(key, needed)}")
    checked: list[tuple[_BatchNorm, Tensor, Tensor]] = []
    for name, layer in layers.items():
        values = []
        for key in _keys(name):
            if key not in statistics:
                raise WeightsError(
                    f"the statistics lack {key!r}; {len(statistics)} of {len(needed)} keys are there"
                )
            value = torch.as_tensor(statistics[key])
            if value.shape != (layer.num_features,):
                raise WeightsError(
                    f"{key!r} has shape {tuple(value.shape)}; the layer has {layer.num_features} channels"
                )
            if not value.isfinite().all() or (key.endswith("running_var") and (value < 0).any()):
                raise WeightsError(f"{key!r} holds values that are not finite, or a negative variance")
            values.append(value)
        checked.append((layer, values[0], values[1]))
    for layer, mean, variance in checked:
        set_statistics(layer, mean, variance)


def _keys(name: str) -> tuple[str, str]:
    """Return the two `state_dict` keys of a layer's running statistics."""
    prefix = f"{name}." if name else ""
    return f"{prefix}running_mean", f"{prefix}running_var"


def named_batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return every BatchNorm layer of a network by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def keeping_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers by name that have running statistics by now."""
    return {
        name: layer
        for name, layer in named_batchnorms(model).items()
        if layer.running_mean is not None
        and layer.running_var is not None
        and not isinstance(layer.running_mean, UninitializedBuffer)
    }


def running_buffers(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the buffers themselves."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def layer_statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return copies of running mean and variance."""
    mean, variance = running_buffers(layer)
    return mean.detach().clone(), variance.detach().clone()


def set_statistics(layer: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Copy values into a layer's running mean and variance."""
    with torch.no_grad():
        for buffer, value in zip(running_buffers(layer), (mean, variance), strict=True):
            buffer.copy_(value)


def scale_and_shift(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return what a layer multiplies each channel by in inference, and what it adds then.

    Returns
    -------
    scale, shift : float64 tensors (channels,)
        γ / sqrt(variance + eps), and β - mean · scale.
    """
    mean, variance = (value.detach().double() for value in running_buffers(layer))
    scale = (variance + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.detach().double()
    shift = -mean * scale
    if layer.bias is not None:
        shift = shift + layer.bias.detach().double()
    return scale, shift

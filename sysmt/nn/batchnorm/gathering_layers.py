"""Which normalisation layers gather statistics in a recalibration, and why the others do not."""

from __future__ import annotations

import math
from contextlib import suppress
from copy import deepcopy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer

from sysmt.errors import ConfigError
from sysmt.nn.batchnorm.statistics import running_buffers
from sysmt.nn.passes import kept_modes

__all__ = ["gathering_layers"]

_KNOWN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
"""Forwards that update the running statistics in training mode as torch's does."""


def gathering_layers(model: nn.Module) -> tuple[dict[str, _BatchNorm], dict[str, str]]:
    """Return the BatchNorm layers whose statistics can be gathered, and why the others' cannot.

    Raises
    ------
    ConfigError
        If there is none.
    """
    layers: dict[str, _BatchNorm] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        reason = _why_not(module)
        if reason:
            skipped[name] = reason
        elif isinstance(module, _BatchNorm):
            layers[name] = module
    if layers:
        return layers, skipped
    kind = type(model).__name__
    if skipped:
        reasons = "; ".join(f"{name!r} {reason}" for name, reason in list(skipped.items())[:3])
        more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        raise ConfigError(f"no BatchNorm layer of {kind} can be recalibrated: layer {reasons}{more}")
    others = {type(module).__name__ for module in model.modules() if isinstance(module, _NORMALISE_BY_INPUT)}
    raise ConfigError(
        f"{kind} has no BatchNorm layer: there are no statistics to recalibrate"
        + (
            f". Its {' and '.join(sorted(others))} layers take mean and variance of every input anew, and so "
            "follow the noise of the array by themselves; leave the recalibration out"
            if others
            else ""
        )
    )


_NORMALISE_BY_INPUT = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)


def _why_not(module: nn.Module) -> str | None:
    """Say why a layer with running statistics, or a BatchNorm without, gathers none."""
    if not isinstance(module, _BatchNorm):
        own = {name for name, _ in module.named_buffers(recurse=False)}
        if own >= {"running_mean", "running_var"}:
            return f"is a {type(module).__name__}, whose statistics are no BatchNorm's of torch"
        return None
    if module.running_mean is None or module.running_var is None or not module.track_running_stats:
        return "has track_running_stats=False: it keeps nothing to recalibrate"
    if isinstance(module.running_mean, UninitializedBuffer):
        return "is lazy and not initialised yet: run one batch first"
    if not _goes_into_training(module):
        return "is frozen: its train() leaves it in evaluation mode"
    if type(module).forward not in _KNOWN_FORWARDS and not _moves(module):
        return f"is frozen: the forward pass of {type(module).__name__} leaves its statistics as they are"
    return None


def _goes_into_training(layer: _BatchNorm) -> bool:
    """Whether a layer's own `train` puts it into training mode."""
    if "train" not in vars(layer) and type(layer).train is nn.Module.train:
        return True
    needs = [(value, value.requires_grad) for value in layer.parameters()]
    with kept_modes(layer):
        layer.train(True)
        trains = layer.training
    for value, needed in needs:  # a `train` that freezes may switch gradients off as well
        value.requires_grad_(needed)
    return trains


def _moves(layer: _BatchNorm) -> bool:
    """Whether a copy of a layer, in training mode, moves its statistics when it sees a small batch."""
    hung_in = vars(layer).get("forward")  # by a simulator, with all of its network behind it
    copy = deepcopy(layer, {id(hung_in): hung_in})
    vars(copy).pop("forward", None)
    copy._forward_hooks.clear()
    copy._forward_pre_hooks.clear()
    copy.training, copy.momentum = True, 0.5
    mean, variance = running_buffers(copy)
    kind = next((value.dtype for value in copy.parameters()), mean.dtype)
    for axes in ((), (2,), (2, 2), (1, 2, 2)):
        shape = (4, copy.num_features, *axes)
        x = torch.arange(math.prod(shape), device=mean.device).view(shape).to(kind)
        before = mean.clone(), variance.clone()
        with torch.no_grad(), suppress(Exception):  # whatever the layer raises for another rank
            copy(x)
            return not (torch.equal(before[0], mean) and torch.equal(before[1], variance))
    return False

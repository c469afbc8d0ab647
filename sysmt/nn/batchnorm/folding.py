"""Fold BatchNorm into the layer before it: float outputs stay, the extra layer goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer
from torch.nn.utils.prune import BasePruningMethod

from sysmt.errors import ConfigError
from sysmt.nn.batchnorm.dataflow import (
    LINEAR_LAYERS,
    TRANSPOSED,
    Flow,
    observe_flow,
    still_called,
    trace_flow,
)
from sysmt.nn.batchnorm.statistics import named_batchnorms, scale_and_shift

__all__ = ["FoldReport", "fold_batchnorm"]

_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
"""Where torch keeps the hooks of a module."""


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """Which BatchNorm layers were folded, and why the others were not.

    Attributes
    ----------
    folded : dict of str to str
        BatchNorm layer to the layer that absorbed it.
    kept : dict of str to str
        BatchNorm layer to the reason why it stays.
    """

    folded: dict[str, str]
    kept: dict[str, str]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per BatchNorm layer: `name`, `into` (empty if it stays) and `reason`."""
        rows = [(name, into, "") for name, into in self.folded.items()]
        rows += [(name, "", reason) for name, reason in self.kept.items()]
        return pd.DataFrame(rows, columns=["name", "into", "reason"])


def fold_batchnorm(model: nn.Module, example: Tensor | None = None) -> FoldReport:
    """Fold every BatchNorm that directly follows a convolution or Linear layer into it, in place.

    The layer's weights are multiplied by γ / sqrt(variance + eps), its bias takes the rest, and the
    BatchNorm becomes `nn.Identity`; a layer without bias gets one. Outputs in evaluation mode stay
    the same but for float rounding. All Conv, ConvTranspose and Linear layers of torch qualify;
    pruned weights keep their masks and zeros.

    A layer stays, with the reason in the report, where it is not certain that nothing else changes: hooks on
    it or on the layer before it, weights that are computed (weight and spectral norm, parametrisations of
    every kind) or that something else holds as well, subclasses with a forward of their own.

    What follows what is read off a `torch.fx` trace. Networks that cannot be traced, because their Python
    code depends on values, need an `example`: one forward pass is then watched tensor by tensor.
    A trace knows no shapes, and takes a Linear layer's output for (batch, features).

    Parameters
    ----------
    model : nn.Module
        The network, with its BatchNorm layers in evaluation mode and no simulator attached.
    example : Tensor, optional
        An input of the network. If given, its forward pass decides, and no trace is made.

    Returns
    -------
    FoldReport
        What was folded, and the reason for what was not, such as the pre-activation BatchNorm of
        DenseNet, which follows a concatenation.

    Raises
    ------
    ConfigError
        If a BatchNorm layer is in training mode, the simulator is attached, or the network cannot be
        traced and there is no `example`.

    After any exception, the network's own in a forward pass included, nothing has been folded.
    """
    layers = named_batchnorms(model)
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        if isinstance(module, _BatchNorm) and module.training and not _keeps_its_mode(module):
            raise ConfigError(
                f"BatchNorm layer {name!r} is in training mode; call model.eval() before folding"
            )
        if isinstance(module, LINEAR_LAYERS) and "forward" in vars(module):
            raise ConfigError(
                f"layer {name!r} has its forward replaced, as by an attached simulator; detach before folding"
            )
    flow = trace_flow(model) if example is None else observe_flow(model, example)
    shared = _sharing_memory(model)
    kept: dict[str, str] = {}
    folds: dict[str, _Fold] = {}
    for name, batchnorm in layers.items():
        found = _obstacle(batchnorm, flow, names, shared) or _fold(batchnorm, flow.sources[batchnorm])
        if isinstance(found, str):
            kept[name] = found
        else:
            folds[name] = found
    for name in _apply(model, example, folds):
        kept[name] = "the network holds it besides its submodules, as in a plain list"
    folded = {name: names[fold.layer] for name, fold in folds.items() if name not in kept}
    return FoldReport(folded, {name: kept[name] for name in layers if name in kept})


# What stands in the way


def _obstacle(
    batchnorm: _BatchNorm, flow: Flow, names: Mapping[nn.Module, str], shared: set[nn.Module]
) -> str | None:
    """Say why a BatchNorm cannot be folded, or return ``None``."""
    if batchnorm.training:
        return "it stays in training mode, whatever eval() is told"
    if batchnorm.running_mean is None or batchnorm.running_var is None:
        return "it keeps no running statistics"
    if isinstance(batchnorm.running_mean, UninitializedBuffer):
        return "it is lazy and not initialised yet"
    if type(batchnorm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return f"it is a {type(batchnorm).__name__}, which does more than scale and shift"
    if flow.runs[batchnorm] != 1:
        times = flow.runs[batchnorm]
        return f"the forward pass runs it {times} times" if times else "the forward pass never runs it"
    source = flow.sources[batchnorm]
    if isinstance(source, str):
        return f"it follows {source}, not a convolution or Linear layer"
    label = f"{type(source).__name__} {names[source]!r}"
    if type(source) not in LINEAR_LAYERS:
        return f"it follows {label}, not a plain convolution or Linear layer of torch"
    assert isinstance(source, LINEAR_LAYERS)
    if flow.runs[source] != 1:
        return f"the forward pass runs {label} before it {flow.runs[source]} times"
    if flow.readers[source] != 1:
        return f"the output of {label} also goes elsewhere"
    if source in flow.odd_outputs or _out_channels(source) != batchnorm.num_features:
        return f"it does not normalise the output channels of {label}"
    for module in (source, batchnorm):
        if module in flow.exposed or module in shared:
            return f"the parameters of {type(module).__name__} {names[module]!r} are used elsewhere, too"
    pruned = "weight_mask" in dict(source.named_buffers(recurse=False))
    if pruned and flow.constants:
        return f"the pruned weight of {label} may be read elsewhere, too; give example=, an input tensor"
    return _unproved(batchnorm, "it", ("weight", "bias")) or _unproved(
        source, label, ("weight_orig" if pruned else "weight", "bias")
    )


def _unproved(module: nn.Module, label: str, parameters: tuple[str, ...]) -> str | None:
    """Say what keeps a layer from computing just what its class and its parameters say, or ``None``."""
    if torch_module._has_any_global_hook():
        return "a hook on all modules of torch may change what layers compute"
    for name in vars(module):
        if callable(getattr(type(module), name, None)):
            return f"{label} has its {name} replaced"
    own = dict(module.named_parameters(recurse=False))
    for name in parameters:
        if name not in own and getattr(module, name, None) is not None:
            return f"the {name} of {label} is computed, not a parameter of its own"
    if any(not _masks(hook) for name in _HOOKS for hook in getattr(module, name).values()):
        return f"{label} has hooks"
    values: list[Tensor] = [own[name] for name in parameters if name in own]
    if isinstance(module, _BatchNorm):
        values += [value for value in (module.running_mean, module.running_var) if value is not None]
    for value in values:
        if value.is_meta or value.is_inference() or value.layout is not torch.strided:
            what = "on the meta device" if value.is_meta else "no plain tensors in memory"
            return f"the values of {label} are {what}"
    return None


def _keeps_its_mode(module: nn.Module) -> bool:
    """Whether a layer decides itself whether it is in training mode."""
    changed = {"train", "eval"} & set(vars(module))
    return bool(changed) or (type(module).train, type(module).eval) != (nn.Module.train, nn.Module.eval)


def _masks(hook: object) -> bool:
    """Whether a hook is one of `torch.nn.utils.prune` that multiplies by a mask and does nothing else."""
    plain = BasePruningMethod
    return (
        isinstance(hook, plain)
        and type(hook).__call__ is plain.__call__
        and type(hook).apply_mask is plain.apply_mask
    )


def _sharing_memory(model: nn.Module) -> set[nn.Module]:
    """Return the modules that hold a tensor whose memory another parameter, buffer or attribute uses, too."""
    spans: list[tuple[str, int, int, nn.Module]] = []
    for module in model.modules():
        for holder in (module._parameters, module._buffers, vars(module)):
            for tensor in holder.values():
                if (
                    isinstance(tensor, Tensor)
                    and type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
                    and not tensor.is_meta
                    and tensor.layout is torch.strided
                    and tensor.numel()
                ):
                    reach = sum(
                        (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
                    )
                    start = tensor.data_ptr()
                    end = start + (reach + 1) * tensor.element_size()
                    spans.append((str(tensor.device), start, end, module))
    sharing: set[nn.Module] = set()
    device, furthest, holder_of_it = "", 0, None
    for place, start, end, module in sorted(spans, key=lambda span: span[:3]):
        if place == device and start < furthest:
            assert holder_of_it is not None
            sharing |= {module, holder_of_it}
        if place != device or end > furthest:
            device, furthest, holder_of_it = place, end, module
    return sharing


def _out_channels(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else int(layer.out_channels)  # type: ignore[arg-type]


# Folding


@dataclasses.dataclass(frozen=True)
class _Fold:
    """New values of a layer that absorbs a BatchNorm; `weight` is what lies under a mask if it has one."""

    layer: nn.Module
    batchnorm: _BatchNorm
    weight: Tensor
    bias: Tensor


@torch.no_grad()
def _fold(batchnorm: _BatchNorm, layer: nn.Module | str) -> _Fold | str:
    """Compute what a layer becomes that absorbs a BatchNorm, or say why numbers do not allow it."""
    assert isinstance(layer, LINEAR_LAYERS)
    scale, shift = scale_and_shift(batchnorm)
    if not scale.isfinite().all() or not shift.isfinite().all():
        return "its scale or shift is not finite"
    weight = _weight(layer)
    scale, shift = scale.to(weight.device), shift.to(weight.device)
    if isinstance(layer, TRANSPOSED):  # (in, out / groups, ...): input channels of a group share its outputs
        per_group = scale.view(layer.groups, -1)
        factor = per_group.repeat_interleave(layer.in_channels // layer.groups, dim=0)
    else:
        factor = scale[:, None]
    factor = factor.view(*factor.shape, *[1] * (weight.dim() - 2))
    folded = (weight.double() * factor).to(weight.dtype)
    bias = (shift if layer.bias is None else layer.bias.double() * scale + shift).to(weight.dtype)
    if not folded.isfinite().all() or not bias.isfinite().all():
        return f"the folded weights would not be finite in {str(weight.dtype).removeprefix('torch.')}"
    return _Fold(layer, batchnorm, folded, bias)


def _weight(layer: nn.Module) -> nn.Parameter:
    """Return the parameter behind a layer's weight: what lies under the mask of a pruned one."""
    own = dict(layer.named_parameters(recurse=False))
    return own["weight_orig"] if "weight_orig" in own else own["weight"]


def _apply(model: nn.Module, example: Tensor | None, folds: Mapping[str, _Fold]) -> set[str]:
    """Fold all, or after an exception none; return the names of what turned out to be called regardless."""
    if not folds:
        return set()
    with ExitStack() as undo:
        returns: dict[nn.Module, Callable[[], None]] = {
            fold.batchnorm: _replace(model, fold.batchnorm, undo) for fold in folds.values()
        }
        called = still_called(model, example, returns.keys())
        for batchnorm in called:
            returns[batchnorm]()
        for fold in folds.values():
            if fold.batchnorm not in called:
                _absorb(fold, undo)
        undo.pop_all()
    return {name for name, fold in folds.items() if fold.batchnorm in called}


def _replace(model: nn.Module, old: nn.Module, undo: ExitStack) -> Callable[[], None]:
    """Put an Identity wherever `old` is registered, under one name or several; return what puts it back."""
    identity = nn.Identity().train(old.training)
    places = [
        (parent, key) for parent in model.modules() for key, child in parent._modules.items() if child is old
    ]

    def put(module: nn.Module) -> None:
        for parent, key in places:
            parent._modules[key] = module

    undo.callback(put, old)
    put(identity)
    return lambda: put(old)


@torch.no_grad()
def _absorb(fold: _Fold, undo: ExitStack) -> None:
    """Write the new values into the layer; `undo` brings the old ones back."""
    layer, weight = fold.layer, _weight(fold.layer)
    undo.callback(_write, weight, weight.clone())
    _write(weight, fold.weight)
    if layer.bias is None:
        undo.callback(setattr, layer, "bias", None)
        layer.bias = nn.Parameter(fold.bias, requires_grad=weight.requires_grad)
    else:
        assert isinstance(layer.bias, nn.Parameter)
        undo.callback(_write, layer.bias, layer.bias.clone())
        _write(layer.bias, fold.bias)
    if weight is not layer.weight:  # a pruned layer recomputes `weight` before every forward pass
        undo.callback(setattr, layer, "weight", layer.weight)
        layer.weight = weight * layer.get_buffer("weight_mask")


@torch.no_grad()
def _write(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)

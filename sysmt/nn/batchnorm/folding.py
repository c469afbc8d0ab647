"""Fold BatchNorm into the layer before it: float outputs stay, the extra layer goes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from sysmt.errors import ConfigError
from sysmt.nn.batchnorm.recalibration import named_batchnorms

__all__ = ["FoldReport", "fold_batchnorm"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)


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


@dataclasses.dataclass
class _Flow:
    """What one forward pass shows about the layers that may fold."""

    runs: Counter[nn.Module] = dataclasses.field(default_factory=Counter)
    readers: Counter[nn.Module] = dataclasses.field(default_factory=Counter)  # of the layer's output
    sources: dict[nn.Module, nn.Module | str] = dataclasses.field(default_factory=dict)  # of a BN's input
    exposed: set[nn.Module] = dataclasses.field(default_factory=set)  # parameters read from outside
    odd_outputs: set[nn.Module] = dataclasses.field(default_factory=set)  # channels are not axis 1


def fold_batchnorm(model: nn.Module, example: Tensor | None = None) -> FoldReport:
    """Fold every BatchNorm that directly follows a convolution or Linear layer into it, in place.

    The layer's weights are multiplied by γ / sqrt(variance + eps), its bias takes the rest, and the
    BatchNorm becomes `nn.Identity`; a layer without bias gets one. Outputs in evaluation mode stay
    the same but for float rounding. All Conv, ConvTranspose and Linear layers of torch qualify;
    pruned weights keep their masks and zeros.

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
        traced and there is no `example`. Nothing has been folded then.
    """
    layers = named_batchnorms(model)
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        if isinstance(module, _BatchNorm) and module.training:
            raise ConfigError(
                f"BatchNorm layer {name!r} is in training mode; call model.eval() before folding"
            )
        if isinstance(module, _FOLDABLE) and "forward" in vars(module):
            raise ConfigError(
                f"layer {name!r} has its forward replaced, as by an attached simulator; detach before folding"
            )
    flow = _traced_flow(model) if example is None else _observed_flow(model, example)
    owners = Counter(parameter for module in names for parameter in module.parameters(recurse=False))
    folded: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, batchnorm in layers.items():
        reason = _obstacle(batchnorm, flow, names, owners)
        if reason:
            kept[name] = reason
            continue
        source = flow.sources[batchnorm]
        assert isinstance(source, nn.Module)
        _absorb(source, batchnorm)
        _replace(model, batchnorm, nn.Identity().train(batchnorm.training))
        folded[name] = names[source]
    return FoldReport(folded, kept)


class _Tracer(fx.Tracer):
    """Traces through containers, and stops at every layer that may fold (subclasses included)."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*_FOLDABLE, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


def _traced_flow(model: nn.Module) -> _Flow:
    """Read the flow off a symbolic trace."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the network's own code raises on a proxy
        raise ConfigError(
            f"{type(model).__name__} cannot be traced by torch.fx ({error}); give example=, an input tensor"
        ) from error
    flow = _Flow()
    for node in graph.nodes:
        if node.op == "get_attr":
            flow.exposed.add(model.get_submodule(node.target.rpartition(".")[0]))
        if node.op != "call_module":
            continue
        module = model.get_submodule(node.target)
        flow.runs[module] += 1
        flow.readers[module] += len(node.users)
        if isinstance(module, _BatchNorm):
            before = node.all_input_nodes[0]
            if before.op == "call_module":
                flow.sources[module] = model.get_submodule(before.target)
            elif before.op == "placeholder":
                flow.sources[module] = "the network's input"
            else:
                flow.sources[module] = getattr(before.target, "__name__", str(before.target))
    return flow


class _Readers(TorchFunctionMode):
    """Counts which torch functions read each tensor, and remembers which one made it."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()
        self.maker: dict[int, str] = {}
        self._alive: list[Tensor] = []  # an id is unique only while its tensor lives

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = list(_tensors(result))
        if made:  # what gives no tensor asked for a shape or a type
            self.read(args, kwargs)
            self._alive += made
            self.maker |= {id(tensor): getattr(func, "__name__", str(func)) for tensor in made}
        return result

    def read(self, *values: Any) -> None:
        """Count one reader for every tensor inside `values`."""
        tensors = list(_tensors(values))
        self._alive += tensors
        self.count.update(id(tensor) for tensor in tensors)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _observed_flow(model: nn.Module, example: Tensor) -> _Flow:
    """Run one forward pass and see which tensor goes where."""
    flow, readers = _Flow(), _Readers()
    outputs: dict[nn.Module, Tensor] = {}
    makers: dict[int, nn.Module] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        what = "the network's input" if x is example else readers.maker.get(id(x), "outside the network")
        flow.sources[module] = makers.get(id(x), what)

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        flow.runs[module] += 1
        outputs[module] = output
        makers[id(output)] = module
        if isinstance(module, _FOLDABLE) and output.dim() != module.weight.dim():
            flow.odd_outputs.add(module)

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, (*_FOLDABLE, _BatchNorm)):
                hooks.callback(module.register_forward_hook(after).remove)
            if isinstance(module, _BatchNorm):
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        with torch.no_grad(), readers:
            readers.read(model(example))
    for module, output in outputs.items():
        flow.readers[module] = readers.count[id(output)]
        if any(readers.count[id(value)] > flow.runs[module] for value in module.parameters(recurse=False)):
            flow.exposed.add(module)
    return flow


def _obstacle(
    batchnorm: _BatchNorm, flow: _Flow, names: Mapping[nn.Module, str], owners: Mapping[nn.Parameter, int]
) -> str | None:
    """Say why a BatchNorm cannot be folded, or return ``None``."""
    if batchnorm.running_mean is None:
        return "it keeps no running statistics"
    if type(batchnorm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return f"it is a {type(batchnorm).__name__}, which does more than scale and shift"
    if flow.runs[batchnorm] != 1:
        times = flow.runs[batchnorm]
        return f"the forward pass runs it {times} times" if times else "the forward pass never runs it"
    source = flow.sources[batchnorm]
    if isinstance(source, str):
        return f"it follows {source}, not a convolution or Linear layer"
    label = f"{type(source).__name__} {names[source]!r}"
    if type(source) not in _FOLDABLE:
        return f"it follows {label}, not a plain convolution or Linear layer of torch"
    assert isinstance(source, _FOLDABLE)
    if flow.runs[source] != 1:
        return f"the forward pass runs {label} before it {flow.runs[source]} times"
    if flow.readers[source] != 1:
        return f"the output of {label} also goes elsewhere"
    if source in flow.odd_outputs or _out_channels(source) != batchnorm.num_features:
        return f"it does not normalise the output channels of {label}"
    for module in (source, batchnorm):
        if module in flow.exposed or any(owners[value] > 1 for value in module.parameters(recurse=False)):
            return f"the parameters of {type(module).__name__} {names[module]!r} are used elsewhere, too"
    if "bias_orig" in dict(source.named_parameters(recurse=False)):
        return f"the bias of {label} is pruned"
    if not all(value.isfinite().all() for value in _affine(batchnorm)):
        return "its scale or shift is not finite"
    return None


def _out_channels(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else int(layer.out_channels)  # type: ignore[arg-type]


def _affine(batchnorm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift that the layer applies per channel, in float64."""
    assert batchnorm.running_mean is not None
    assert batchnorm.running_var is not None
    mean, variance = batchnorm.running_mean.double(), batchnorm.running_var.double()
    scale = (variance + batchnorm.eps).rsqrt()
    if batchnorm.weight is not None:
        scale = scale * batchnorm.weight.detach().double()
    shift = -mean * scale
    if batchnorm.bias is not None:
        shift = shift + batchnorm.bias.detach().double()
    return scale, shift


@torch.no_grad()
def _absorb(layer: nn.Module, batchnorm: _BatchNorm) -> None:
    """Multiply the layer's output channels by the BatchNorm's scale and add its shift."""
    scale, shift = _affine(batchnorm)
    # A pruned layer recomputes `weight` from `weight_orig` and its mask before every forward pass.
    pruned = "weight_orig" in dict(layer.named_parameters(recurse=False))
    weight = layer.get_parameter("weight_orig" if pruned else "weight")
    if isinstance(layer, _TRANSPOSED):  # (in, out / groups, ...): input channels of a group share its outputs
        per_group = scale.view(layer.groups, -1)
        factor = per_group.repeat_interleave(layer.in_channels // layer.groups, dim=0)
    else:
        factor = scale[:, None]
    factor = factor.view(*factor.shape, *[1] * (weight.dim() - 2))
    weight.copy_(weight.double() * factor)
    if pruned:
        layer.weight = weight * layer.get_buffer("weight_mask")
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)
    else:
        assert isinstance(layer.bias, nn.Parameter)
        layer.bias.copy_(layer.bias.double() * scale + shift)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is registered; one module may have several names."""
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if child is old:
                parent.add_module(key, new)

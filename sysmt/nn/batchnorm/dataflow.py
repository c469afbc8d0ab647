"""Which layer's output reaches which BatchNorm: read off a trace, or watched in one forward pass."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from sysmt.errors import ConfigError
from sysmt.nn.passes import kept_modes

__all__ = ["LINEAR_LAYERS", "TRANSPOSED", "Flow", "observe_flow", "still_called", "trace_flow"]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEAR_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear)
"""Layers whose outputs a scale per channel can be moved into."""

_ASK_NO_VALUES = frozenset(
    (
        *("__get__", "__hash__", "__len__", "dim", "element_size", "get_device", "is_complex"),
        *("is_contiguous", "is_floating_point", "is_signed", "ndimension", "nelement", "numel"),
        *("size", "stride", "type"),
    )
)
"""Functions without a tensor for a result that ask for a shape or a type; all others read values."""


@dataclasses.dataclass
class Flow:
    """What one forward pass shows about the linear and BatchNorm layers of a network.

    Attributes
    ----------
    runs : Counter
        How often the forward pass runs each layer.
    readers : Counter
        How many functions and hooks read each layer's output.
    sources : dict
        What made the input of each BatchNorm: a layer, or the name of a function.
    exposed : set
        Layers whose parameters something besides themselves reads.
    odd_outputs : set
        Layers whose output channels are not axis 1.
    constants : bool
        Whether the forward pass uses tensors that are neither inputs nor parameters. A trace does not tell
        what those were computed from.
    """

    runs: Counter[nn.Module] = dataclasses.field(default_factory=Counter)
    readers: Counter[nn.Module] = dataclasses.field(default_factory=Counter)
    sources: dict[nn.Module, nn.Module | str] = dataclasses.field(default_factory=dict)
    exposed: set[nn.Module] = dataclasses.field(default_factory=set)
    odd_outputs: set[nn.Module] = dataclasses.field(default_factory=set)
    constants: bool = False


def still_called(model: nn.Module, example: Tensor | None, removed: Collection[nn.Module]) -> set[nn.Module]:
    """Return which of the layers that `model` no longer registers its forward pass calls all the same.

    A layer that a plain list or a closure holds besides is called even after another has taken its place
    among the network's submodules.
    """
    if example is None:
        tracer = _Tracer(removed)
        _trace(model, tracer)
        return tracer.called
    called: set[nn.Module] = set()
    with _evaluating(model), ExitStack() as hooks, torch.no_grad():
        for layer in removed:
            hooks.callback(layer.register_forward_pre_hook(lambda module, args: called.add(module)).remove)
        model(example)
    return called


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Let every module compute as in evaluation, layers included that refuse `eval()`."""
    with kept_modes(model):
        for module in model.modules():
            module.training = False
        yield


# Read off a symbolic trace


class _Tracer(fx.Tracer):
    """Traces through containers, and stops at every layer that may fold (subclasses included).

    Attributes
    ----------
    called : set
        Layers of `removed` that the forward pass calls.
    hooked : set
        Nodes that are inputs or outputs of a container with hooks.
    """

    def __init__(self, removed: Collection[nn.Module] = ()) -> None:
        super().__init__()
        self.removed = removed
        self.called: set[nn.Module] = set()
        self.hooked: set[fx.Node] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*LINEAR_LAYERS, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if m in self.removed:
            self.called.add(m)
            return next(_found(fx.Proxy, (args, kwargs)))  # it has no name to be called by any more
        result = super().call_module(m, forward, args, kwargs)
        if _has_forward_hooks(m) and not isinstance(m, (*LINEAR_LAYERS, _BatchNorm)):
            self.hooked.update(proxy.node for proxy in _found(fx.Proxy, (args, kwargs, result)))
        return result


def _trace(model: nn.Module, tracer: _Tracer) -> fx.Graph:
    """Trace a network and leave nothing behind in it."""
    before = set(vars(model))
    try:
        with _evaluating(model):
            return tracer.trace(model)
    except Exception as error:  # whatever the network's own code raises on a proxy
        raise ConfigError(
            f"{type(model).__name__} cannot be traced by torch.fx ({error}); give example=, an input tensor"
        ) from error
    finally:
        for name in set(vars(model)) - before:  # the trace keeps constants there
            delattr(model, name)


def trace_flow(model: nn.Module) -> Flow:
    """Read the flow off a symbolic trace; raise `ConfigError` if the network cannot be traced."""
    tracer, flow = _Tracer(), Flow()
    registered = model.state_dict(keep_vars=True)
    for node in _trace(model, tracer).nodes:
        if node.op == "get_attr":
            flow.constants |= node.target not in registered
            flow.exposed.add(model.get_submodule(node.target.rpartition(".")[0]))
        if node.op != "call_module":
            continue
        module = model.get_submodule(node.target)
        flow.runs[module] += 1
        flow.readers[module] += len(node.users) + (node in tracer.hooked)
        if isinstance(module, _BatchNorm):
            before = node.all_input_nodes[0]
            if before.op == "call_module":
                flow.sources[module] = model.get_submodule(before.target)
            elif before.op == "placeholder":
                flow.sources[module] = "the network's input"
            else:
                flow.sources[module] = getattr(before.target, "__name__", str(before.target))
    return flow


# Watched in one forward pass


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
        name = getattr(func, "__name__", str(func))
        made = list(_found(Tensor, result))
        if made or name not in _ASK_NO_VALUES:
            self.read(args, kwargs)
            self._alive += made
            self.maker |= {id(tensor): name for tensor in made}
        return result

    def read(self, *values: Any) -> None:
        """Count one reader for every tensor inside `values`."""
        tensors = list(_found(Tensor, values))
        self._alive += tensors
        self.count.update(id(tensor) for tensor in tensors)


def observe_flow(model: nn.Module, example: Tensor) -> Flow:
    """Run one forward pass and see which tensor goes where."""
    flow, readers = Flow(), _Readers()
    outputs: dict[nn.Module, Any] = {}
    makers: dict[int, nn.Module] = {}
    stale = {module: _plain_tensors(module) for module in model.modules()}  # a forward makes them anew

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(_found(Tensor, (args, kwargs)))
        what = "the network's input" if x is example else readers.maker.get(id(x), "outside the network")
        flow.sources[module] = makers.get(id(x), what)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        flow.runs[module] += 1
        outputs[module] = output
        makers[id(output)] = module
        if isinstance(module, LINEAR_LAYERS) and (
            not isinstance(output, Tensor) or output.dim() != module.weight.dim()
        ):
            flow.odd_outputs.add(module)

    def seen_by_hook(module: nn.Module, *values: Any) -> None:
        readers.read(values)

    with _evaluating(model), ExitStack() as hooks:
        for module in model.modules():
            layer = isinstance(module, (*LINEAR_LAYERS, _BatchNorm))
            if not layer and _has_forward_hooks(module):
                pre = module.register_forward_pre_hook(seen_by_hook, prepend=True, with_kwargs=True)
                post = module.register_forward_hook(seen_by_hook, prepend=True)
                hooks.callback(pre.remove)
                hooks.callback(post.remove)
            if layer:
                hooks.callback(module.register_forward_hook(after).remove)
            if isinstance(module, _BatchNorm):
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        with torch.no_grad(), readers:
            readers.read(model(example))
    for module, output in outputs.items():
        flow.readers[module] = readers.count[id(output)]
        values = [*module.parameters(recurse=False), *_plain_tensors(module)]
        if any(readers.count[id(value)] > flow.runs[module] for value in values) or any(
            readers.count[id(value)] for value in stale[module]
        ):
            flow.exposed.add(module)
    return flow


def _has_forward_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _plain_tensors(module: nn.Module) -> list[Tensor]:
    """Return the tensors that a module holds as plain attributes, such as a pruned weight."""
    return [value for value in vars(module).values() if isinstance(value, Tensor)]


_Kind = TypeVar("_Kind")


def _found(kind: type[_Kind], value: Any) -> Iterator[_Kind]:
    """Yield the objects of one kind inside nested lists, tuples and mappings."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, Mapping):
        yield from _found(kind, list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _found(kind, part)

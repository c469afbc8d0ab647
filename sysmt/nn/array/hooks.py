"""How a module's forward comes to run on the array: directly, or by catching the calls that it makes."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sysmt.errors import UnsupportedLayerError
from sysmt.nn.array.epilogue import NOTHING, Epilogue
from sysmt.nn.array.layer import ArrayLayer, LayerCall
from sysmt.nn.array.lowering import LayerGeometry
from sysmt.nn.array.stand_in import StandIn, patched_forward

__all__ = [
    "CALLS",
    "RUNNING",
    "CatchingHook",
    "Order",
    "DirectHook",
    "RootWatch",
    "compute_call",
    "has_standard_forward",
    "own_modes",
    "running",
]


def has_standard_forward(module: nn.Module) -> bool:
    """Whether a Conv2d or Linear computes what torch's own class does, from its own attributes."""
    kind = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    methods = ("forward", "_conv_forward") if kind is nn.Conv2d else ("forward",)
    return patched_forward(module) is None and all(
        inspect.getattr_static(type(module), method) is inspect.getattr_static(kind, method)
        for method in methods
    )


class Running(threading.local):
    """Who takes the calls that are made in this thread now; None where a layer is counted already."""

    owner: object = None
    function_modes: int = 0
    """How many of the modes on torch's stacks are a simulation's own."""
    dispatch_modes: int = 0


RUNNING = Running()


@contextmanager
def running(owner: object) -> Iterator[None]:
    """Let `owner` take the calls that are made inside the block."""
    before, RUNNING.owner = RUNNING.owner, owner
    try:
        yield
    finally:
        RUNNING.owner = before


Order = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


@contextmanager
def own_modes(function: bool, dispatch: bool) -> Iterator[None]:
    """Say that the modes which the block puts on torch's stacks are a simulation's own."""
    before = RUNNING.function_modes, RUNNING.dispatch_modes
    RUNNING.function_modes += function
    RUNNING.dispatch_modes += dispatch
    try:
        yield
    finally:
        RUNNING.function_modes, RUNNING.dispatch_modes = before


class DirectHook(StandIn):
    """Stands in for the forward of a Conv2d or Linear that is torch's own."""

    module: nn.Conv2d | nn.Linear

    def __init__(self, module: nn.Conv2d | nn.Linear, layer: ArrayLayer) -> None:
        super().__init__(module)
        self.layer = layer
        self._settings = _settings(module)
        self._geometry = layer.geometry

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; what stays in float passes through as it came."""
        if not self.in_place:
            return self.original_forward(*args, **kwargs)
        self.layer.announce()
        given = (*args, *kwargs.values())
        if self.layer.reason is not None or len(given) != 1 or kwargs.keys() - {"input"}:
            with running(None):
                y = self.original_forward(*args, **kwargs)
            self.layer.note_float(self._current_geometry(), y)
            return y
        return self._compute(given[0], NOTHING)

    def run_fused(self, x: Tensor, epilogue: Epilogue) -> Tensor:
        """Run the layer on the array, and what follows it while its output is stored."""
        self.layer.announce()
        return self._compute(x, epilogue)

    def _compute(self, x: Tensor, epilogue: Epilogue) -> Tensor:
        module = self.module
        call = LayerCall(x, module.weight, module.bias, self._current_geometry(), self.layer.is_linear)
        return self.layer.compute(call, lambda: self._in_float(x), epilogue)

    def _in_float(self, x: Tensor) -> Tensor:
        with running(None):
            y: Tensor = self.original_forward(x)
        return y

    def _current_geometry(self) -> LayerGeometry:
        """Follow a stride or padding that was changed since the last forward."""
        settings = _settings(self.module)
        if settings != self._settings:
            # Raises where the settings are impossible, and does so again next time.
            self._geometry = LayerGeometry.of(self.module)
            self._settings = settings
        return self._geometry


def _settings(module: nn.Conv2d | nn.Linear) -> tuple[Any, ...]:
    """Return all that `LayerGeometry.of` reads: quicker to compare than to parse."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    settings = (
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.padding_mode,
    )
    return tuple(tuple(value) if isinstance(value, list) else value for value in settings)


class CatchingHook(StandIn):
    """Stands in for a forward that is not torch's own, and runs it: its convolutions go to the array.

    Whatever the forward does to its input, its weights or its output is done as it says: padding of its
    own, standardised or masked weights, scales. Only calls of `conv2d` and `linear` inside it are taken,
    with the operands that they have. The first is the layer that has the module's name, a second one
    ``name#2`` and so on.

    Parameters
    ----------
    module : nn.Module
    name : str
    layers : mapping of str to ArrayLayer
        Those of the simulation, by name.
    make_layer : callable
        Makes and keeps the layer of a call that none has been seen of: (name, module, geometry, is_linear).
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        layers: Mapping[str, ArrayLayer],
        make_layer: Callable[[str, nn.Module, LayerGeometry, bool], ArrayLayer],
    ) -> None:
        super().__init__(module)
        self._name = name
        self._layers = layers
        self._make_layer = make_layer
        self._catcher = _Catcher(self)
        self._calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward as it was called."""
        if not self.in_place:
            return self.original_forward(*args, **kwargs)
        self._calls = 0
        with running(self), self._catcher:
            return self.original_forward(*args, **kwargs)

    def caught(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute one call of `conv2d` or `linear` in the module's forward."""
        call = CALLS[func](*args, **kwargs)
        self._calls += 1
        name = self._name if self._calls == 1 else f"{self._name}#{self._calls}"
        layer = self._layers.get(name)
        if layer is None:
            layer = self._make_layer(name, self.module, call.geometry, call.is_linear)
        return compute_call(layer, call, func, args, kwargs)


class _Catcher(TorchFunctionMode):
    """Sees every function of torch that a forward calls, and takes convolutions and products with weights."""

    def __init__(self, hook: CatchingHook) -> None:
        super().__init__()
        self._hook = hook

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in CALLS and RUNNING.owner is self._hook:
            return self._hook.caught(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _conv2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> LayerCall:
    geometry = LayerGeometry.of_call(weight.shape, stride, padding, dilation, groups)
    return LayerCall(input, weight, bias, geometry, is_linear=False)


def _linear(input: Any, weight: Any, bias: Any = None) -> LayerCall:
    return LayerCall(input, weight, bias, LayerGeometry.of_call(weight.shape), is_linear=True)


CALLS: dict[Any, Callable[..., LayerCall]] = {
    F.conv2d: _conv2d,
    torch.ops.aten.conv2d: _conv2d,
    torch.ops.aten.conv2d.default: _conv2d,
    torch.ops.aten.conv2d.padding: _conv2d,
    F.linear: _linear,
    torch.ops.aten.linear: _linear,
    torch.ops.aten.linear.default: _linear,
}
"""The functions that are taken, and how their arguments are named."""


def compute_call(
    layer: ArrayLayer,
    call: LayerCall,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    order: Order | None = None,
) -> Any:
    """Compute a call that was taken, for a layer: with torch's own function where it stays in float.

    Parameters
    ----------
    layer : ArrayLayer
    call : LayerCall
    func, args, kwargs
        The call as it was made.
    order : (callable, callable), optional
        Brings inputs and outputs into the order that the array wants, images first, and outputs back.
    """
    to_array, from_array = order or (_as_it_is, _as_it_is)

    def in_float() -> Any:
        with running(None):
            return to_array(func(*args, **kwargs))

    layer.is_linear = call.is_linear
    layer.announce()
    if layer.reason is None:
        call = dataclasses.replace(call, x=to_array(call.x))
        return from_array(layer.compute(call, in_float))
    y = in_float()
    layer.note_float(call.geometry, y)
    return from_array(y)


def _as_it_is(x: Tensor) -> Tensor:
    return x


# torch.compile leaves what is marked like this to Python, instead of compiling half of it.
DirectHook.__call__._torchdynamo_disable = True  # type: ignore[attr-defined]
CatchingHook.__call__._torchdynamo_disable = True  # type: ignore[attr-defined]


class RootWatch(StandIn):
    """Stands in for the forward of the whole network.

    Parameters
    ----------
    module : nn.Module
    forward : callable
        Returns the context that a forward runs in.
    """

    def __init__(self, module: nn.Module, forward: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__(module)
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network."""
        if not self.in_place:
            return self.original_forward(*args, **kwargs)
        with self._forward():
            return self.original_forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("__code__", "__globals__"):  # torch.export and TorchScript ask for them, and would go on
            raise UnsupportedLayerError(
                f"{type(self.module).__name__} is attached to a simulation: it cannot be exported, or "
                "compiled by TorchScript; detach() first"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


RootWatch.__call__._torchdynamo_disable = True  # type: ignore[attr-defined]

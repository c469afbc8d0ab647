"""Work that no layer does: functional calls and products, found where torch computes them.

Two modes watch a forward of the whole network. `FunctionalCalls` sees calls of `conv2d` and `linear` that
no module's stand-in has taken, and makes layers of them. `UncountedProducts` sees whatever else multiplies,
below all of torch's composite functions, and counts it in float.
"""

from __future__ import annotations

import math
import sys
import types
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sysmt.nn.array.hooks import CALLS, RUNNING, Order, compute_call
from sysmt.nn.array.layer import ArrayLayer
from sysmt.nn.array.lowering import LayerGeometry

__all__ = ["FunctionalCalls", "Product", "UncountedProducts"]

aten = torch.ops.aten


class _Names:
    """Names of calls by the module in whose forward they are made, the same in every forward."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._seen: Counter[str] = Counter()

    def begin(self) -> None:
        """Count calls anew: a forward begins."""
        self._seen.clear()

    def caller(self) -> tuple[str, nn.Module | None]:
        """Return the innermost module of the network whose method is running, and its name."""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_varnames[:1] == ("self",):
                found = frame.f_locals.get("self")
                if isinstance(found, nn.Module) and id(found) in self._names:
                    return self._names[id(found)], found
            frame = frame.f_back
        return "", None

    def numbered(self, name: str) -> str:
        """Return a name, or ``name#2`` and so on where this forward has had it before."""
        self._seen[name] += 1
        return name if self._seen[name] == 1 else f"{name}#{self._seen[name]}"


class FunctionalCalls(TorchFunctionMode):
    """Makes layers of the calls of `conv2d` and `linear` that a network makes without a module of its own.

    A call with the weight of a known layer is that layer's; others are named after the module in whose
    forward they are made, and its parameter: ``encoder.layers.0.self_attn.in_proj``.

    Parameters
    ----------
    model : nn.Module
    layers : mapping of str to ArrayLayer
        Those of the simulation, by name.
    make_layer : callable
        Makes and keeps a layer: (name, module, geometry, is_linear).

    Attributes
    ----------
    found : bool
        Whether any call was taken so far.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, ArrayLayer],
        make_layer: Callable[[str, nn.Module, LayerGeometry, bool], ArrayLayer],
    ) -> None:
        super().__init__()
        self._names = _Names(model)
        self._model = model
        self._layers = layers
        self._make_layer = make_layer
        self._by_weight: dict[int, str] = {}
        for name, layer in layers.items():
            weight = layer.module._parameters.get("weight")
            if weight is not None:
                self._by_weight[id(weight)] = name
        self.found = False

    def begin(self) -> None:
        """Count calls anew: a forward begins."""
        self._names.begin()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if RUNNING.owner is not self:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attention(*args, **kwargs)
        return self._call(func, args, kwargs) if func in CALLS else func(*args, **kwargs)

    def _call(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        order: Order | None = None,
    ) -> Any:
        call = CALLS[func](*args, **kwargs)
        self.found = True
        known = self._by_weight.get(id(call.weight))
        if known is not None:
            layer = self._layers[known]
        else:
            caller, module = self._names.caller()
            what = _parameter_name(module, call.weight) or ("linear" if call.is_linear else "conv2d")
            name = self._names.numbered(caller if what == "weight" else f"{caller}.{what}".strip("."))
            layer = self._layers.get(name) or self._make_layer(
                name,
                module or self._model,
                call.geometry,
                call.is_linear,
            )
        return compute_call(layer, call, func, args, kwargs, order)

    def _attention(self, *args: Any, **kwargs: Any) -> Any:
        """Run torch's own function of multi-head attention, with its products seen from here.

        Inside it, tokens come before images. On the array the rows of an image are one GEMM, so images
        are put first for the call, and last again after it.
        """
        query = args[0] if args else kwargs["query"]
        images = query.shape[1] if query.ndim == 3 else 1

        def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
            def images_first(x: Tensor) -> Tensor:
                return x.reshape(-1, images, x.shape[-1]).transpose(0, 1)

            def tokens_first(y: Tensor) -> Tensor:
                return y.transpose(0, 1).reshape(*input.shape[:-1], y.shape[-1])

            return self._call(F.linear, (input, weight, bias), {}, (images_first, tokens_first))

        return _with_linear(linear)(*args, **kwargs)


def _parameter_name(module: nn.Module | None, weight: Tensor) -> str | None:
    """Return what a module calls the parameter that a weight is, or is a part of."""
    for name, parameter in module.named_parameters(recurse=False) if module is not None else ():
        if weight is parameter or weight._base is parameter:
            return name.removesuffix("_weight")
    return None


def _with_linear(linear: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch's multi-head attention with another `linear`: the same code, other globals.

    The function hands itself to function modes as a whole, so that what it computes inside cannot be seen.
    """
    names: dict[str, Any] = dict(F.__dict__)
    names |= {"linear": linear, "has_torch_function": lambda *given: False}
    for inner in ("_in_projection_packed", "_in_projection"):
        if inner in names:
            names[inner] = _rebound(names[inner], names)
    return _rebound(F.multi_head_attention_forward, names)


def _rebound(function: Any, names: dict[str, Any]) -> Callable[..., Any]:
    made = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


# -- everything else -----------------------------------------------------------------------------


class Product(NamedTuple):
    """Equal GEMMs that torch has computed: `gemms` of M x N x K."""

    m: int
    n: int
    k: int
    gemms: int


class UncountedProducts(TorchDispatchMode):
    """Counts the products that neither a stand-in nor `FunctionalCalls` has taken.

    Parameters
    ----------
    model : nn.Module
    note : callable
        Told of each: (name, module, reason, products).

    Attributes
    ----------
    found : bool
        Whether there were any so far.
    """

    def __init__(self, model: nn.Module, note: Callable[[str, nn.Module, str, list[Product]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = _Names(model)
        self._model = model
        self._note = note
        self.found = False

    def begin(self) -> None:
        """Count calls anew: a forward begins."""
        self._names.begin()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        products = _PRODUCTS.get(func._overloadpacket)
        if products is None:
            with self:  # composite functions are seen as what they are made of
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        y = func(*args, **kwargs)
        if RUNNING.owner is not None:
            self.found = True
            caller, module = self._names.caller()
            reason, name = _describe(func, module, caller)
            self._note(
                self._names.numbered(name), module or self._model, reason, products(y, *args, **kwargs)
            )
        return y


def _describe(func: Any, module: nn.Module | None, caller: str) -> tuple[str, str]:
    """Return why a product stays in float, and a name for it."""
    if func._overloadpacket is aten.convolution:
        kind = type(module).__name__ if module is not None else "convolution"
        return f"{kind} is not simulated", caller or kind
    if isinstance(module, nn.RNNBase):
        return f"{type(module).__name__} is not simulated", caller or type(module).__name__
    return "product of activations", f"{caller}.matmul".strip(".")


def _convolution(y: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> list[Product]:
    *_, transposed, _, groups = settings
    images = x.shape[0] if x.ndim == weight.ndim else 1
    pixels = math.prod((x if transposed else y).shape[2:])
    if transposed:  # each input pixel meets all weights of its group
        return [Product(pixels, weight[0].numel(), weight.shape[0] // groups, images * groups)]
    return [Product(pixels, weight.shape[0] // groups, weight[0].numel(), images * groups)]


def _matrix(y: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> list[Product]:
    count = math.prod(a.shape[:-2])
    return [Product(a.shape[-2], b.shape[-1], a.shape[-1], count)]


def _added(y: Tensor, bias: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> list[Product]:
    return _matrix(y, a, b)


def _attention(y: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> list[Product]:
    heads = math.prod(q.shape[:-2])
    rows, columns = q.shape[-2], k.shape[-2]
    return [Product(rows, columns, q.shape[-1], heads), Product(rows, v.shape[-1], columns, heads)]


def _matrix_vector(y: Tensor, a: Tensor, vector: Tensor, *_: Any, **__: Any) -> list[Product]:
    return [Product(1, a.shape[0], a.shape[1], 1)]


def _added_matrix_vector(
    y: Tensor, bias: Tensor, a: Tensor, vector: Tensor, *_: Any, **__: Any
) -> list[Product]:
    return _matrix_vector(y, a, vector)


def _recurrent(
    y: Any, x: Tensor, from_input: Tensor, from_state: Tensor, *_: Any, **__: Any
) -> list[Product]:
    """One layer and direction of oneDNN's LSTM: all steps of the input at once, the state step by step."""
    steps, images, features = x.shape
    gates, state = from_state.shape
    return [Product(steps * images, gates, features, 1), Product(images, gates, state, steps)]


_PRODUCTS: dict[Any, Callable[..., list[Product]]] = {
    aten.mm: _matrix,
    aten.bmm: _matrix,
    aten.addmm: _added,
    aten.baddbmm: _added,
    aten.mv: _matrix_vector,
    aten.addmv: _added_matrix_vector,
    aten.mkldnn_rnn_layer: _recurrent,
    aten.convolution: _convolution,
    **{
        getattr(aten, name): _attention
        for name in (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
        )
        if hasattr(aten, name)
    },
}
"""Functions below which nothing is composite, and the GEMMs that they are."""

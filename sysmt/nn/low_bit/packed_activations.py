"""Activations kept for the backward pass as packed low-precision codes, and computed again from them.

In a network of BatchNorm, ReLU and convolution, what the backward pass needs of the ReLU and of the next
convolution follows from the normalised values by an affine map and a ReLU: so only these need be kept
(B. Graham, "Low-Precision Batch-Normalized Activations", 2017, sections 1.4 and 3).
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sysmt.errors import OperandError
from sysmt.nn.low_bit.packed_pooling import packed_max_pool2d
from sysmt.quant.logscale import decode, encode, pack, parse_format, unpack

__all__ = [
    "Packing",
    "affine",
    "in_memory_order",
    "note_recipe",
    "pack_values",
    "recomputed_activations",
    "saved_bytes",
]


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a tensor of normalised values lies in packed bytes.

    Attributes
    ----------
    fmt : str
        A name of `sysmt.quant.logscale.FORMATS`.
    shape : torch.Size
        With the axes in the order in which they lie in memory.
    axes : tuple of int
        Where each of the tensor's own axes is in `shape`.
    dtype : torch.dtype
        Of the values.
    """

    fmt: str
    shape: torch.Size
    axes: tuple[int, ...]
    dtype: torch.dtype

    def values(self, packed: Tensor) -> Tensor:
        """Return the quantised values, laid out in memory as they were."""
        fmt = parse_format(self.fmt)
        codes = unpack(packed, fmt.bits, self.shape.numel())
        return decode(codes, fmt, self.dtype, check=False).view(self.shape).permute(self.axes)


def in_memory_order(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return a contiguous view with the axes as they lie in memory, and the permutation that leads back.

    Tensors with gaps, and expanded ones, are copied.
    """
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda axis: -strides[axis])
    axes = tuple(sorted(range(x.dim()), key=order.__getitem__))
    return x.permute(order).contiguous(), axes


def pack_values(x: Tensor, fmt: str) -> tuple[Tensor, Packing]:
    """Quantise and pack a tensor of any shape.

    Returns
    -------
    Tensor, uint8, flat
        The packed codes.
    Packing
        What turns them into values again.
    """
    dense, axes = in_memory_order(x)
    packed = pack(encode(dense, fmt, check=False), parse_format(fmt).bits, check=False)
    return packed, Packing(fmt, dense.shape, axes, x.dtype)


def affine(values: Tensor, scale: Tensor | None, shift: Tensor) -> Tensor:
    """Return a · N + b by channel, in the dtype of `values` (N, C, ...)."""
    shape = (1, -1, *[1] * (values.dim() - 2))
    result = (
        values + shift.view(shape)
        if scale is None
        else torch.addcmul(shift.view(shape), values, scale.view(shape))
    )
    return result.to(values.dtype)


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How to compute an activation again."""

    packed: Tensor
    packing: Packing
    scale: Tensor | None
    shift: Tensor
    relu: bool = False

    def tensor(self) -> Tensor:
        result = affine(self.packing.values(self.packed), self.scale, self.shift)
        return result.relu_() if self.relu else result

    def kept(self) -> Iterator[Tensor]:
        yield from (tensor for tensor in (self.packed, self.scale, self.shift) if tensor is not None)


class _Recipes:
    """The recipes of tensors that are alive, found by where their values lie."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, _Recipe]] = {}
        self.next_saved: _Recipe | None = None
        """The recipe of what the running operation is going to save of its own result."""

    def note(self, tensor: Tensor, recipe: _Recipe) -> None:
        address = tensor.data_ptr()
        if address:

            def forget(reference: weakref.ref[Tensor]) -> None:
                if self._known.get(address, (None,))[0] is reference:
                    del self._known[address]

            self._known[address] = (weakref.ref(tensor, forget), tensor._version, recipe)

    def find(self, tensor: Tensor) -> _Recipe | None:
        """Return the recipe of a tensor that was noted and not been changed since, or of its like."""
        reference, version, recipe = self._known.get(tensor.data_ptr(), (None, 0, None))
        noted = reference() if reference is not None else None
        if noted is None or noted._version != version:
            return None
        same = (
            noted.shape == tensor.shape and noted.stride() == tensor.stride() and noted.dtype == tensor.dtype
        )
        return recipe if same else None

    def for_saved(self, tensor: Tensor) -> _Recipe | None:
        """Return the recipe of what an operation saves, if it has one."""
        return self.next_saved or self.find(tensor)


@dataclasses.dataclass(frozen=True)
class _AsIs:
    """A saved tensor without a recipe. With hooks, autograd leaves it to them to see in-place changes."""

    saved: Tensor
    version: int

    def tensor(self) -> Tensor:
        if self.saved._version != self.version:
            raise OperandError(
                f"an activation of shape {tuple(self.saved.shape)} was modified by an in-place operation "
                "after it had been saved for the backward pass"
            )
        return self.saved

    def kept(self) -> Iterator[Tensor]:
        yield self.saved


_recipes: ContextVar[_Recipes | None] = ContextVar("recipes", default=None)


def note_recipe(y: Tensor, packed: Tensor, packing: Packing, scale: Tensor | None, shift: Tensor) -> None:
    """Say how `y` follows from packed values; without `recomputed_activations` around it, nothing happens.

    `scale` and `shift` are copied: an optimiser may change them before the backward pass.
    """
    recipes = _recipes.get()
    if recipes is not None:
        kept = None if scale is None else scale.detach().clone()
        recipes.note(y, _Recipe(packed, packing, kept, shift.detach().clone()))


_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


class _FrugalFunctions(TorchFunctionMode):
    """Knows the result of a ReLU by its argument's recipe, and has max pooling keep packed places."""

    def __init__(self, recipes: _Recipes) -> None:
        super().__init__()
        self._recipes = recipes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.max_pool2d:
            return packed_max_pool2d(*args, **kwargs)
        if func not in _RELU:
            return func(*args, **kwargs)
        recipe = self._recipes.find(args[0] if args else kwargs["input"])
        if recipe is None:
            return func(*args, **kwargs)
        recipe = dataclasses.replace(recipe, relu=True)
        self._recipes.next_saved = recipe
        try:
            y = func(*args, **kwargs)
        finally:
            self._recipes.next_saved = None
        self._recipes.note(y, recipe)
        return y


@contextlib.contextmanager
def recomputed_activations(observe: Callable[[Tensor], object] | None = None) -> Iterator[None]:
    """Keep codes instead of activations: wrap a forward pass in it, or a whole training.

    Any operation that wants to save the output of a low-precision BatchNorm layer, or that output after a
    ReLU (function or module, in place or not), saves a reference to the layer's packed codes instead;
    the backward pass computes the activation again, bit by bit the same. Max pooling keeps the places of
    its maxima alone, which take 4 bits for windows of 3 x 3. Gradients do not change.
    What is saved of other tensors, such as the sum after a residual addition, is saved as ever.

    Parameters
    ----------
    observe : callable, optional
        Called with each tensor that is really kept; the same one may come several times.

    Raises
    ------
    OperandError
        In the backward pass, if something that was saved has been modified in place since.

    Examples
    --------
    >>> convert_batchnorm(model, "L4")
    >>> with recomputed_activations():
    ...     train(model, data, epochs=10)
    """
    recipes = _Recipes()

    def keep(tensor: Tensor) -> _AsIs | _Recipe:
        saved = recipes.for_saved(tensor) or _AsIs(tensor.detach(), tensor._version)
        if observe is not None:
            for kept in saved.kept():
                observe(kept)
        return saved

    def give_back(saved: _AsIs | _Recipe) -> Tensor:
        return saved.tensor()

    before = _recipes.set(recipes)
    try:
        with _FrugalFunctions(recipes), torch.autograd.graph.saved_tensors_hooks(keep, give_back):
            yield
    finally:
        _recipes.reset(before)


def saved_bytes(model: nn.Module, inputs: Tensor, *, recompute: bool = True) -> int:
    """Return the bytes that a training step of this batch keeps between forward and backward pass.

    Every storage that autograd keeps counts once and whole, apart from parameters, buffers and the batch.

    Parameters
    ----------
    model : nn.Module
        Runs in the mode it is in; running statistics are put back.
    inputs : Tensor
    recompute : bool
        Within `recomputed_activations`.
    """
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    given = (*model.parameters(), *model.buffers(), inputs)
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in given}
    sizes: dict[int, int] = {}

    def observe(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    if recompute:
        watching: Any = recomputed_activations(observe)
    else:
        watching = torch.autograd.graph.saved_tensors_hooks(observe, lambda tensor: tensor)
    with watching, torch.enable_grad():
        output = model(inputs)  # alive until all is counted, and with it everything that is saved
    del output
    with torch.no_grad():
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
    return sum(sizes.values())

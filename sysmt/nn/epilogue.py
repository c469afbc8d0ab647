"""Epilogues: BatchNorm with fixed statistics, and ReLU, done while a layer stores its output.

They save what torch spends on reading and writing the output once more for each, and change no bit. What
follows a layer is learned by watching: the layer hands out a `GuardedOutput`, which stands for its output
and hears of every torch function that it is given to. From the next forward on the layer does at once what
followed; a guarded output that is then used for anything else is computed again without it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from sysmt.errors import OperandError
from sysmt.hw.kernels import fingerprint

__all__ = ["Epilogue", "EpiloguePlan", "FixedBatchNorm", "GuardedOutput", "LayerRun"]

Affine = tuple[np.ndarray, np.ndarray]


@functools.cache
def batch_norm_is_fused() -> bool:
    """Whether torch's BatchNorm, statistics fixed, is one fused multiply-add a value.

    It is wherever torch runs its AVX2 or AVX-512 code. Elsewhere BatchNorm stays torch's own.
    """
    factor = 1 + 2.0**-12  # factor² - 1, rounded once, keeps the 2**-24 that a rounded product loses
    for shape in ((1, 3, 1, 1), (3, 19, 5, 5), (2, 16, 8, 8)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.full(shape, factor).to(memory_format=memory_format)
            zero, one = torch.zeros(shape[1]), torch.ones(shape[1])
            y = F.batch_norm(x, zero, one, factor * one, -one, eps=0.0)
            if not bool((y == 2.0**-11 + 2.0**-24).all()):
                return False
    return True


@dataclasses.dataclass(eq=False)
class FixedBatchNorm:
    """The operands of a BatchNorm with fixed statistics, and the module that has them, if one does."""

    running_mean: torch.Tensor
    running_var: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    module: _BatchNorm | None = None

    def __post_init__(self) -> None:
        self._key: tuple[int, ...] | None = None
        self._affine: Affine | None = None

    @property
    def affine(self) -> Affine | None:
        """Gain and shift by channel, float32 (C,), as of the last `refresh`."""
        return self._affine

    def is_same(self, other: FixedBatchNorm) -> bool:
        """Whether both read the same tensors."""
        return (
            self.running_mean is other.running_mean
            and self.running_var is other.running_var
            and self.weight is other.weight
            and self.bias is other.bias
            and self.eps == other.eps
        )

    def is_due(self) -> bool:
        """Whether the module, as it is now, would call `torch.nn.functional.batch_norm` with this."""
        module = self.module
        return module is None or not (
            module.training
            or module._forward_pre_hooks
            or module._forward_hooks
            or not self.is_same(operands_of(module))
        )

    def refresh(self) -> bool:
        """Follow tensors that changed; return whether BatchNorm is ``x * gain + shift``, bit for bit.

        Gain and shift are what torch's own function says, asked about one pixel.
        """
        tensors = [self.running_mean, self.running_var, self.weight, self.bias]
        present = [tensor for tensor in tensors if tensor is not None]
        if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in present):
            return False
        key = tuple(fingerprint(tensor.detach().contiguous().numpy()) for tensor in present)
        if key != self._key:
            self._key, self._affine = key, self._ask() if batch_norm_is_fused() else None
        return self._affine is not None

    def _ask(self) -> Affine | None:
        channels = self.running_mean.numel()
        ones = torch.ones(1, channels, 1, 1)
        centred = FixedBatchNorm(torch.zeros(channels), self.running_var, self.weight, None, self.eps)
        gain = centred(ones)
        if not bool(gain.isfinite().all()):
            return None
        shift = self(torch.copysign(0 * ones, -gain))  # gain * x is -0 then, which leaves even a shift of -0
        return gain.detach().numpy().reshape(-1), shift.detach().numpy().reshape(-1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Let torch normalise."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def operands_of(module: _BatchNorm) -> FixedBatchNorm:
    """Return what a module in evaluation mode normalises with."""
    assert module.running_mean is not None
    assert module.running_var is not None
    return FixedBatchNorm(
        module.running_mean, module.running_var, module.weight, module.bias, module.eps, module
    )


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What is done to an output before it is stored: BatchNorm, then ReLU."""

    batch_norm: FixedBatchNorm | None = None
    relu: bool = False

    @property
    def affine(self) -> Affine | None:
        """The BatchNorm's gain and shift."""
        return None if self.batch_norm is None else self.batch_norm.affine


NOTHING = Epilogue()


class EpiloguePlan:
    """What is known about the ops that directly follow one layer.

    Attributes
    ----------
    is_open : bool
        Whether outputs are guarded; False for good once guarding has been found not to pay.
    """

    def __init__(self, model: nn.Module) -> None:
        self.is_open = True
        self._model = model
        self._epilogue = NOTHING

    def due(self) -> Epilogue:
        """Return what to do in this forward."""
        batch_norm = self._epilogue.batch_norm
        is_due = batch_norm is None or (batch_norm.is_due() and batch_norm.refresh())
        return self._epilogue if is_due else NOTHING

    def learn(self, epilogue: Epilogue) -> None:
        """Do this from the next forward on."""
        self._epilogue = epilogue
        batch_norm = epilogue.batch_norm
        if batch_norm is None or batch_norm.module is not None:
            return
        if not batch_norm.refresh():
            self.give_up()
        for module in self._model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is batch_norm.running_mean:
                batch_norm.module = module

    def give_up(self) -> None:
        """Leave all that follows to torch, for good."""
        self._epilogue, self.is_open = NOTHING, False


class LayerRun:
    """One forward of a layer: its output and what was done to it, and how to get it with less done."""

    def __init__(
        self,
        name: str,
        plan: EpiloguePlan,
        epilogue: Epilogue,
        value: torch.Tensor,
        images: torch.Tensor,
        again: Callable[[torch.Tensor, Epilogue], torch.Tensor],
    ) -> None:
        self.name = name
        self.plan = plan
        self.epilogue = epilogue
        self.value = value
        self._images: torch.Tensor | None = images
        self._version = _version(images)
        self._again = again

    def after(self, epilogue: Epilogue, value: torch.Tensor | None) -> LayerRun:
        """Return this run for an output after some of the epilogue, holding no tensor that it can do without.

        With its value known, or after all of the epilogue, the layer's input may go.
        """
        if value is None and epilogue != self.epilogue:
            return self
        run = copy.copy(self)
        run._images = None
        run.value = self.value if value is None else value
        return run

    def output(self, epilogue: Epilogue) -> torch.Tensor:
        """Return the output after some of the epilogue; computed again if more has been done to it.

        Raises
        ------
        OperandError
            If the layer's input may have been changed since.
        """
        if epilogue == self.epilogue:
            return self.value
        self.plan.give_up()
        assert self._images is not None
        if self._version is None or self._version != _version(self._images):
            raise OperandError(
                f"layer {self.name!r}: its output is used otherwise than in the last forward, and its input "
                "may have changed since; run the forward again, or attach with fuse=False"
            )
        return self._again(self._images, epilogue)


def _version(x: torch.Tensor) -> int | None:
    """Return what changes when a tensor is written to; None where torch keeps no account."""
    return None if x.is_inference() else x._version


class GuardedOutput(torch.Tensor):
    """Stands for a layer's output, so far followed by `done`.

    It is a tensor to all of Python and torch: whatever it is given to gets the plain tensor instead.
    """

    _run: LayerRun
    _done: Epilogue
    _plain: torch.Tensor | None
    _is_used: bool

    @staticmethod
    def __new__(
        cls, run: LayerRun, done: Epilogue = NOTHING, plain: torch.Tensor | None = None
    ) -> GuardedOutput:
        """Make a tensor of the output's shape that has no memory of its own."""
        run = run.after(done, plain)
        like = run.value
        made: GuardedOutput = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        made._run, made._done, made._plain, made._is_used = run, done, plain, False
        return made

    def settle(self) -> torch.Tensor:
        """Return the plain tensor."""
        if self._plain is None:
            self._plain = self._run.output(self._done)
        return self._plain

    def _use(self) -> bool:
        """Note a use, and return whether it is the first, which alone can be foreseen."""
        is_first = not self._is_used
        self._is_used = True
        if not is_first:
            self._run.plan.give_up()
        return is_first

    def _used_otherwise(self) -> torch.Tensor:
        if self._use() and self._done == NOTHING:
            self._run.plan.give_up()  # nothing to be done early follows
        return self.settle()

    def _batch_norm(self, given: FixedBatchNorm) -> torch.Tensor:
        if not self._use() or self._done != NOTHING:
            return given(self.settle())
        planned = self._run.epilogue.batch_norm
        if planned is not None and planned.is_same(given):
            return GuardedOutput(self._run, Epilogue(planned))
        result, done = given(self.settle()), Epilogue(given)
        if not self._run.plan.is_open:
            return result
        self._run.plan.learn(done)
        return GuardedOutput(self._run, done, result)

    def _relu(self, inplace: bool) -> torch.Tensor:
        done = Epilogue(self._done.batch_norm, relu=True)
        if self._use() and self._plain is None and self._run.epilogue == done:
            if inplace:
                self._plain = self._run.value
            return self._run.value
        result = F.relu(self.settle(), inplace)
        if self._run.plan.is_open:
            self._run.plan.learn(done)
        return result

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See what the output is given to: what the layer may do itself, what only asks, and the rest."""
        kwargs = kwargs or {}
        if func in ASKS_ONLY:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if not torch.is_grad_enabled() and args and isinstance(args[0], cls):
            if func is F.batch_norm and (given := _fixed_batch_norm(*args, **kwargs)) is not None:
                return args[0]._batch_norm(given)
            if func is F.batch_norm and args[0]._run.epilogue == NOTHING:
                return func(args[0].settle(), *args[1:], **kwargs)  # training: it may follow again, fixed
            if func in RELUS and not set(kwargs) - {"inplace"}:
                return args[0]._relu(func in RELUS_IN_PLACE or kwargs.get("inplace", False))
        return _call_plain(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Serve compiled code, which calls no torch function."""
        return _call_plain(func, args, kwargs or {})


def _call_plain(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = pytree.tree_map_only(GuardedOutput, GuardedOutput._used_otherwise, (args, kwargs))
    return func(*args, **kwargs)


def settled(outputs: Any) -> Any:
    """Return a model's outputs with plain tensors in them."""
    return pytree.tree_map_only(GuardedOutput, GuardedOutput._used_otherwise, outputs)


def _fixed_batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> FixedBatchNorm | None:
    """Read the arguments of `torch.nn.functional.batch_norm`; None if statistics are not fixed."""
    if training or running_mean is None or running_var is None:
        return None
    return FixedBatchNorm(running_mean, running_var, weight, bias, eps)


RELUS_IN_PLACE = {torch.relu_, torch.Tensor.relu_}
RELUS = {F.relu, torch.relu, torch.Tensor.relu} | RELUS_IN_PLACE

ASKS_ONLY = {
    torch.Tensor.dim,
    torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point,
    torch.Tensor.numel,
    torch.Tensor.size,
    torch.Tensor.stride,
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("device", "dtype", "layout", "ndim", "requires_grad", "shape")
    ),
}
"""What may be called about an output without using it."""

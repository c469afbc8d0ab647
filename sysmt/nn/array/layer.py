"""One layer of an attached network: what it computes, in float, observed, or on the array.

A layer knows its settings, which are handed down to it, and somebody to tell that it ran. How a module's
forward comes to call it is the matter of `sysmt.nn.array.hooks`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from sysmt.config import ArrayConfig
from sysmt.errors import CalibrationError, OperandError, UnsupportedLayerError
from sysmt.hw.operands import MAX_K
from sysmt.hw.reorder import order_from_wide_counts
from sysmt.hw.stats import Counters
from sysmt.nn.array.epilogue import NOTHING, Epilogue
from sysmt.nn.array.layer_counts import LayerCounts
from sysmt.nn.array.layer_weights import LayerWeights
from sysmt.nn.array.lowering import LayerGeometry, im2col
from sysmt.nn.array.settings import ArraySettings
from sysmt.quant.uniform import ActivationRange, quantize_activations

__all__ = ["ArrayLayer", "CapturedGemm", "LayerCall", "Observer", "Watcher"]


@dataclasses.dataclass
class CapturedGemm:
    """Operands of one GEMM as the array saw them; empty until the next forward has run.

    Attributes
    ----------
    layer : str
        Name of the layer.
    image, group : int
        Which image of the batch and which group of the layer this GEMM is.
    config : ArrayConfig
        The array, with the layer's thread count.
    a_mk : ndarray (M, K), uint8 or int8, or None
        Activations, before `order` is applied.
    b_kn : ndarray (K, N), int8, or None
        Weights, before `order` is applied.
    order : ndarray or None
        Permutation of K in force, if the layer is reordered.
    """

    layer: str
    image: int
    group: int
    config: ArrayConfig
    a_mk: np.ndarray | None = None
    b_kn: np.ndarray | None = None
    order: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One convolution, or product of rows with weights, as torch is about to compute it.

    Attributes
    ----------
    x : Tensor
        (B, C, H, W) or (C, H, W); of a product (..., K).
    weight : Tensor
        (N, C / groups, kh, kw), or (N, K); read once, for it may be computed.
    bias : Tensor (N,) or None
    geometry : LayerGeometry
    is_linear : bool
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    geometry: LayerGeometry
    is_linear: bool


class Observer(Protocol):
    """Somebody who looks at a layer's input in calibration."""

    def observe(self, images: torch.Tensor, geometry: LayerGeometry) -> None:
        """Take note of one call with (B, C, H, W) activations."""


class Watcher(Protocol):
    """Somebody who is told what a layer does; the simulation."""

    def layer_called(self, layer: ArrayLayer) -> None:
        """A layer is about to run; its `reason` may still be settled."""

    def layer_ran(self, images: int) -> None:
        """A layer has computed so many images."""

    def knows_first(self) -> bool:
        """Whether it is settled which convolution is the first."""


class ArrayLayer:
    """A convolution or fully connected layer, its range and weights, and what it has counted.

    Attributes
    ----------
    name : str
    module : nn.Module
        The module that computes it.
    is_linear : bool
        Whether it is fully connected; otherwise a convolution.
    settings : ArraySettings
        Shared by all layers of a simulation, and replaced by it.
    reason : str or None
        Why the layer stays in float; None if it is simulated.
    threads : int
    range : ActivationRange or None
    wide_counts : list of ndarray (K,), or None
        For each group, how often each K position was wide in calibration; None without reordering.
    counts : LayerCounts
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        geometry: LayerGeometry,
        is_linear: bool,
        reason: str | None,
        settings: ArraySettings,
        watcher: Watcher,
    ) -> None:
        self.name = name
        self.module = module
        self.geometry = geometry
        self.is_linear = is_linear
        self.reason = reason
        self.settings = settings
        self.threads = settings.config.threads
        self.range: ActivationRange | None = None
        self.wide_counts: list[np.ndarray] | None = None
        self.observer: Observer | None = None
        self.captures: list[CapturedGemm] = []
        self.weights = LayerWeights(name, settings.per_channel)
        self._watcher = watcher
        self._warned_negative = False
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.counts = LayerCounts(self.threads)

    # -- what runs -----------------------------------------------------------------------------

    def announce(self) -> None:
        """Say that the layer is about to run; afterwards `reason` is settled."""
        self._watcher.layer_called(self)

    def note_float(self, geometry: LayerGeometry, y: torch.Tensor) -> None:
        """Count the macs and T = 1 cycles of a call that was computed in float, from the output it gave."""
        if self.is_linear:
            images = y.shape[0] if y.ndim > 1 else 1
            rows = y.numel() // max(1, images * y.shape[-1]) if y.ndim != 2 else 1
            out_size = (1, rows)
        else:
            images = y.shape[0] if y.ndim == 4 else 1
            out_size = (y.shape[-2], y.shape[-1])
        self.geometry = geometry
        self.counts.add(Counters(()), geometry, out_size, images, self.settings.array(1))
        self._watcher.layer_ran(images)

    def compute(
        self, call: LayerCall, in_float: Callable[[], torch.Tensor], epilogue: Epilogue = NOTHING
    ) -> torch.Tensor:
        """Compute a call that does not stay in float: observed, with `in_float`, or on the array.

        Raises
        ------
        CalibrationError
            If the layer has no range.
        OperandError
            If shapes do not fit.
        UnsupportedLayerError
            If the tensors are not what the array takes, or not finite, or gradients are asked of it.
        """
        self._check(call)
        images = self._as_images(call, call.x.detach())
        if self.observer is not None:
            self.observer.observe(images, call.geometry)
            self.geometry = call.geometry
            y = in_float()
        else:
            y = self._simulate(call, images, epilogue)
        self._watcher.layer_ran(images.shape[0])
        return y

    def takes_epilogue(self, x: torch.Tensor) -> bool:
        """Whether the next call will run on the array, and images as they are go in and out."""
        return (
            self.reason is None
            and self.observer is None
            and self.range is not None
            and self._watcher.knows_first()
            and not self.is_linear
            and x.ndim == 4
        )

    def _simulate(self, call: LayerCall, images: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        if self.range is None:
            raise CalibrationError(
                f"layer {self.name!r} has no activation range; call calibrate() with data that reaches it, "
                "or set_ranges()"
            )
        if call.geometry != self.geometry:
            self.geometry = call.geometry
            self.weights.forget()
        height, width = images.shape[2:]
        if not self.is_linear and min(self.geometry.output_size(height, width)) < 1:
            raise OperandError(
                f"layer {self.name!r}: input of {height} x {width} is too small for its kernel"
            )
        captures = self._due_captures(images)
        self.weights.refresh(call.weight)
        y = self._run(call, images, self.threads, count=True, epilogue=epilogue)
        if self.settings.errors:
            exact = y if self.threads == 1 else self._run(call, images, 1, count=False)
            self.counts.compare(y, exact)
        self._fill_captures(captures, images)
        self.weights.release()
        result = self._from_images(call, y)
        wanting = [t for t in (call.x, call.weight, call.bias) if t is not None and t.requires_grad]
        if torch.is_grad_enabled() and wanting:
            result = _NoGradient.apply(result, self.name, *wanting)  # type: ignore[no-untyped-call]
        return result

    def _run(
        self,
        call: LayerCall,
        images: torch.Tensor,
        threads: int,
        count: bool,
        epilogue: Epilogue = NOTHING,
    ) -> torch.Tensor:
        assert self.range is not None
        padded = self.geometry.pad_float(images)
        config = self.settings.array(threads)
        packed = self.weights.packed(config, self.geometry, self.range.signed, self.orders(threads))
        out_size = self.geometry.output_size(*images.shape[2:])
        y = torch.empty(
            (images.shape[0], self.geometry.out_channels, *out_size),
            dtype=torch.float32,
            device="cpu",
            memory_format=_memory_format(images),
        )
        result = packed.forward(
            padded.numpy(),
            self.range.scale,
            self.weights.scales,
            None if call.bias is None else call.bias.detach().resolve_neg().numpy(),
            out=y.numpy(),
            affine=epilogue.affine,
            relu=epilogue.relu,
            cpu_threads=torch.get_num_threads(),
            count=count,
        )
        if result.saw_nonfinite:
            raise UnsupportedLayerError(
                f"layer {self.name!r} got NaN or infinite activations; they cannot be quantised"
            )
        if result.saw_negative and not self.range.signed and not self._warned_negative:
            self._warned_negative = True
            warnings.warn(
                f"layer {self.name!r} is calibrated as unsigned but met activations below 0; they become 0",
                stacklevel=2,
            )
        if count:
            assert result.counters is not None
            self.counts.add(result.counters, self.geometry, out_size, images.shape[0], config)
        return y

    # -- operands ------------------------------------------------------------------------------

    def orders(self, threads: int) -> list[np.ndarray] | None:
        """Permutation of K for each group, or None if the layer is not reordered."""
        if not self.settings.reorder or self.wide_counts is None or threads == 1:
            return None
        return [order_from_wide_counts(counts, threads) for counts in self.wide_counts]

    def weight_codes(self) -> np.ndarray:
        """Return the module's weights as the array sees them: int8 (N, C / groups, kh, kw)."""
        self.weights.refresh(self.module.weight)  # type: ignore[arg-type]
        return self.weights.codes

    def _due_captures(self, images: torch.Tensor) -> list[CapturedGemm]:
        """Take the captures that wait for this forward; raise if one asks for an image it does not have."""
        due, self.captures = self.captures, []
        for capture in due:
            if capture.image >= images.shape[0]:
                raise OperandError(
                    f"capture of layer {self.name!r}: image {capture.image} of a batch of {images.shape[0]}"
                )
        return due

    def _fill_captures(self, captures: list[CapturedGemm], images: torch.Tensor) -> None:
        if not captures:
            return
        assert self.range is not None
        g = self.geometry
        a = im2col(quantize_activations(g.pad_float(images).numpy(), self.range), g)
        b = self.weights.codes.reshape(g.groups, g.gemm_n, g.gemm_k).transpose(0, 2, 1)
        orders = self.orders(self.threads)
        for capture in captures:
            capture.config = self.settings.array(self.threads)
            capture.a_mk = a[capture.group, capture.image]
            capture.b_kn = np.ascontiguousarray(b[capture.group])
            capture.order = None if orders is None else orders[capture.group]

    # -- tensors -------------------------------------------------------------------------------

    def _check(self, call: LayerCall) -> None:
        _check_tensor(self.name, "input", call.x)
        _check_tensor(self.name, "weight", call.weight)
        if call.bias is not None:
            _check_tensor(self.name, "bias", call.bias)
        g = call.geometry
        expected = (g.out_channels, g.in_channels // g.groups, *g.kernel)
        if tuple(call.weight.shape) not in (expected, expected[:2]):
            raise OperandError(
                f"layer {self.name!r} has a weight of shape {tuple(call.weight.shape)}, but its attributes "
                f"say {expected}"
            )
        if g.gemm_k > MAX_K:
            raise UnsupportedLayerError(
                f"layer {self.name!r} has K={g.gemm_k}, which could overflow a 32-bit accumulator; at most "
                f"{MAX_K} is possible. Name it in `exclude` to leave it in float"
            )

    def _as_images(self, call: LayerCall, x: torch.Tensor) -> torch.Tensor:
        """View the input as (B, C, H, W): rows of a product become the pixels of a row, C the features."""
        channels = call.geometry.in_channels
        x = x.resolve_neg()
        if call.is_linear:
            if x.ndim < 1 or x.shape[-1] != channels:
                raise OperandError(
                    f"layer {self.name!r} got shape {tuple(x.shape)}; (..., {channels}) is needed"
                )
            batch = x.shape[0] if x.ndim > 1 else 1
            rows = x.numel() // max(1, batch * channels) if x.ndim != 2 else 1
            return x.reshape(batch, 1, rows, channels).permute(0, 3, 1, 2)
        if x.ndim not in (3, 4) or x.shape[-3] != channels:
            raise OperandError(
                f"layer {self.name!r} got shape {tuple(x.shape)}; (B, {channels}, H, W) is needed"
            )
        return x if x.ndim == 4 else x.unsqueeze(0)

    def _from_images(self, call: LayerCall, y: torch.Tensor) -> torch.Tensor:
        if call.is_linear:
            return y.permute(0, 2, 3, 1).reshape(*call.x.shape[:-1], self.geometry.out_channels)
        return y if call.x.ndim == 4 else y.squeeze(0)


def _check_tensor(name: str, what: str, tensor: Any) -> None:
    """Refuse, with the layer's name, whatever is no plain float32 tensor in this machine's memory."""
    if not isinstance(tensor, torch.Tensor):
        raise OperandError(f"layer {name!r} got {what} of type {type(tensor).__name__}; a tensor is needed")
    if torch._C._get_tracing_state() is not None:
        raise UnsupportedLayerError(
            f"layer {name!r} is simulated and cannot be traced; detach() first, and trace the float network"
        )
    transformed = (
        torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or torch.autograd.forward_ad._current_level >= 0
        or type(tensor).__module__.startswith("torch._subclasses")
    )
    if transformed:
        raise UnsupportedLayerError(
            f"layer {name!r} is simulated and takes plain tensors, not those of torch.func, of forward-mode "
            "differentiation or of torch.export; detach() first"
        )
    if tensor.layout != torch.strided:
        raise UnsupportedLayerError(
            f"layer {name!r} got {what} of layout {tensor.layout}; the array takes dense tensors"
        )
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise UnsupportedLayerError(
            f"layer {name!r} got {what} of {tensor.dtype} on {tensor.device}; "
            "the array takes float32 tensors on the CPU"
        )


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    """Keep channels_last networks channels_last, as torch's own convolution does."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


class _NoGradient(torch.autograd.Function):
    """Passes values on, and says loudly that no gradient comes back from the array."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, name: str, *wanting: torch.Tensor) -> torch.Tensor:
        ctx.layer_name = name
        ctx.mark_dirty(y)  # not a view of it, which a following in-place ReLU could not change
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise UnsupportedLayerError(
            f"layer {ctx.layer_name!r} is simulated: no gradient comes back from the array; "
            "detach() before training"
        )

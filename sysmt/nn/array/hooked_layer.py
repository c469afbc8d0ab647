"""One layer of an attached network: what runs instead of its `forward`, and what it counted.

A `HookedLayer` sits in the instance's ``__dict__`` as ``forward`` and so goes before the class's
method; the module itself, its parameters and the user's own hooks stay as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from sysmt.config import ArrayConfig
from sysmt.errors import CalibrationError, OperandError, UnsupportedLayerError
from sysmt.hw.gemm import gemm_stats
from sysmt.hw.kernels import PackedConv, fingerprint
from sysmt.hw.reorder import order_from_wide_counts
from sysmt.hw.stats import Counters, GemmStats
from sysmt.nn.array.epilogue import NOTHING, Epilogue
from sysmt.nn.array.lowering import LayerGeometry, im2col
from sysmt.quant.error import sqnr_db_from_energies
from sysmt.quant.uniform import ActivationRange, quantize_activations, quantize_weights, weight_scales

if TYPE_CHECKING:
    from sysmt.nn.array.calibration import RangeObserver
    from sysmt.nn.array.simulation import Simulation

__all__ = ["CapturedGemm", "HookedLayer"]


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


class HookedLayer:
    """Stands in for the `forward` of one Conv2d or Linear while the simulator is attached."""

    def __init__(
        self, simulation: Simulation, name: str, module: nn.Conv2d | nn.Linear, reason: str | None
    ) -> None:
        self.simulation = simulation
        self.name = name
        self.module = module
        self.original_forward: Callable[[torch.Tensor], torch.Tensor] = module.forward
        self.geometry = LayerGeometry.of(module)
        self._settings = _settings(module)
        self.reason = reason
        """Why the layer stays in float; None if it is simulated."""
        self.threads = simulation.config.threads
        self.range: ActivationRange | None = None
        self.wide_counts: list[np.ndarray] | None = None
        """For each group, how often each K position was wide in calibration; None without reordering."""
        self.observer: RangeObserver | None = None
        self.captures: list[CapturedGemm] = []
        self._packed: dict[tuple[Any, ...], PackedConv] = {}
        self._weight_key: tuple[Any, ...] | None = None
        self._codes: np.ndarray | None = None
        self._codes_key: tuple[int, tuple[int, ...]] | None = None
        self._weight_scales = np.empty(0, np.float32)
        self.own_weight_scales: np.ndarray | None = None
        """Float32 (N,): scales that were set, instead of those that follow from the weights."""
        self._warned_negative = False
        self.reset()

    # -- what was counted ----------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.images = 0
        self.gemm_shape: tuple[int, int, int] | None = None
        self.images_of_size: Counter[tuple[int, int]] = Counter()
        """Images by the output rows and columns that the layer gave them."""
        self.stats = GemmStats((0,) * (self.threads + 1))
        self._signal_energy = self._noise_energy = 0.0
        self._outputs = 0

    @property
    def compared(self) -> bool:
        """Whether anything was compared with T = 1."""
        return self._outputs > 0

    @property
    def mse(self) -> float:
        """Mean squared difference to the same layer at T = 1; NaN before anything ran."""
        return self._noise_energy / self._outputs if self._outputs else float("nan")

    @property
    def sqnr_db(self) -> float:
        """Ratio of the T = 1 output's energy to that difference, in dB; NaN before anything ran."""
        return (
            sqnr_db_from_energies(self._signal_energy, self._noise_energy) if self._outputs else float("nan")
        )

    # -- what runs -----------------------------------------------------------------------------

    def __call__(self, input: torch.Tensor, epilogue: Epilogue = NOTHING) -> torch.Tensor:
        """Run the layer in float, observed, or on the array. Only the array applies the `epilogue`."""
        self.simulation.note_execution(self, self._as_images(input).shape[0])
        if self.reason is not None:
            self._count_float(input)
            return self.original_forward(input)
        self._check_input(input)
        if self.observer is not None:
            self.observer.observe(self._as_images(input.detach()))
            return self.original_forward(input)
        return self._simulate(input, epilogue)

    def _simulate(self, x: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        self._refresh_geometry()
        if self.range is None:
            raise CalibrationError(
                f"layer {self.name!r} has no activation range; call calibrate() with data that reaches it, "
                "or set_ranges()"
            )
        images = self._as_images(x.detach())
        height, width = images.shape[2:]
        out_h, out_w = self.geometry.output_size(height, width)
        if isinstance(self.module, nn.Conv2d) and (out_h < 1 or out_w < 1):
            raise OperandError(
                f"layer {self.name!r}: input of {height} x {width} is too small for its kernel"
            )
        captures = self._due_captures(images)
        y = self._run(images, self.threads, count=True, epilogue=epilogue)
        if self.simulation.errors:
            exact = y if self.threads == 1 else self._run(images, 1, count=False)
            self._compare(y, exact)
        self._fill_captures(captures, images)
        result = self._from_images(y, x)
        wanting = [t for t in (x, self.module.weight, self.module.bias) if t is not None and t.requires_grad]
        if torch.is_grad_enabled() and wanting:
            result = _NoGradient.apply(result, self.name, *wanting)  # type: ignore[no-untyped-call]
        return result

    def takes_epilogue(self, x: torch.Tensor) -> bool:
        """Whether the next call will run on the array, and images as they are go in and out."""
        return (
            self.reason is None
            and self.observer is None
            and self.range is not None
            and self.simulation.knows_first
            and isinstance(self.module, nn.Conv2d)
            and x.ndim == 4
        )

    def _run(
        self, images: torch.Tensor, threads: int, count: bool, epilogue: Epilogue = NOTHING
    ) -> torch.Tensor:
        assert self.range is not None
        padded = self.geometry.pad_float(images)
        packed = self._pack(threads)
        out_size = self.geometry.output_size(*images.shape[2:])
        y = torch.empty(
            (images.shape[0], self.geometry.out_channels, *out_size),
            dtype=torch.float32,
            device="cpu",
            memory_format=_memory_format(images),
        )
        bias = self.module.bias
        result = packed.forward(
            padded.numpy(),
            self.range.scale,
            self._weight_scales,
            None if bias is None else bias.detach().numpy(),
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
            self._count(result.counters, images.shape[0], out_size)
        return y

    def _count(self, counters: Any, image_count: int, out_size: tuple[int, int]) -> None:
        m, n, k = out_size[0] * out_size[1], self.geometry.gemm_n, self.geometry.gemm_k
        self.images_of_size[out_size] += image_count
        self.gemm_shape = (m, n, k)
        self.images += image_count
        self.stats += _stats(
            counters, m, n, k, self.simulation.config, self.threads, image_count * self.geometry.groups
        )

    def _count_float(self, x: torch.Tensor) -> None:
        """Count the macs and T = 1 cycles of a layer that stays in float, for the network's speedup."""
        shape = self._as_images(x).shape
        m = math.prod(self.geometry.output_size(*shape[2:]))
        n, k = self.geometry.gemm_n, self.geometry.gemm_k
        self.gemm_shape = (m, n, k)
        self.images += shape[0]
        self.stats += _stats(
            Counters(()), m, n, k, self.simulation.config, 1, shape[0] * self.geometry.groups
        )

    def _compare(self, y: torch.Tensor, exact: torch.Tensor) -> None:
        signal = exact.double()
        self._signal_energy += float(signal.square().sum())
        self._noise_energy += float((y.double() - signal).square().sum())
        self._outputs += y.numel()

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
        a, b = self.gemm_operands(images)
        orders = self.orders(self.threads)
        for capture in captures:
            capture.config = self.simulation.config.replace(threads=self.threads)
            capture.a_mk, capture.b_kn = a[capture.group, capture.image], b[capture.group]
            capture.order = None if orders is None else orders[capture.group]

    def gemm_operands(self, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Quantise and lower a batch: activations (groups, B, M, K) and weights (groups, K, N / groups)."""
        assert self.range is not None
        self._refresh_weights()
        a = im2col(quantize_activations(self.geometry.pad_float(images).numpy(), self.range), self.geometry)
        n, k = self.geometry.gemm_n, self.geometry.gemm_k
        b = self._weight_q.reshape(self.geometry.groups, n, k).transpose(0, 2, 1)
        return a, np.ascontiguousarray(b)

    # -- operands ------------------------------------------------------------------------------

    def orders(self, threads: int) -> list[np.ndarray] | None:
        """Permutation of K for each group, or None if the layer is not reordered."""
        if not self.simulation.reorder or self.wide_counts is None or threads == 1:
            return None
        return [order_from_wide_counts(counts, threads) for counts in self.wide_counts]

    def forget_packed(self) -> None:
        """Quantise and pack the weights anew at the next forward."""
        self._packed.clear()
        self._weight_key = None

    def _pack(self, threads: int) -> PackedConv:
        assert self.range is not None
        self._refresh_weights()
        key = (threads, self.range.signed)
        if key not in self._packed:
            g = self.geometry
            self._packed[key] = PackedConv(
                self._weight_q,
                self.simulation.config.replace(threads=threads),
                stride=g.stride,
                padding=g.padding,
                dilation=g.dilation,
                groups=g.groups,
                signed=self.range.signed,
                order=self.orders(threads),
            )
        self._codes = None  # a network's worth of memory; made again if there is something else to pack
        return self._packed[key]

    def _refresh_weights(self) -> None:
        """Quantise the weights again if they changed since the last forward."""
        weight = self.module.weight.detach()
        key = _content_key(weight)
        if key == self._weight_key:
            return
        values = weight.numpy()
        if not np.isfinite(values).all():
            raise UnsupportedLayerError(f"layer {self.name!r} has NaN or infinite weights")
        self._weight_key = None  # whatever ends this half-way, the next forward begins anew
        own = self.own_weight_scales
        self._weight_scales = (
            weight_scales(values, per_channel=self.simulation.per_channel) if own is None else own
        )
        self._codes = None
        codes_key = fingerprint(self._weight_q), self._weight_q.shape
        if codes_key != self._codes_key:
            self._packed.clear()
        self._weight_key, self._codes_key = key, codes_key

    def weight_codes(self) -> np.ndarray:
        """Return the weights as the array sees them: int8 (N, C / groups, kh, kw)."""
        self._refresh_weights()
        return self._weight_q

    @property
    def _weight_q(self) -> np.ndarray:
        """Quantise the weights, as (N, C / groups, kh, kw) of int8."""
        if self._codes is None:
            codes = quantize_weights(self.module.weight.detach().numpy(), self._weight_scales)
            self._codes = np.ascontiguousarray(codes[:, :, None, None] if codes.ndim == 2 else codes)
        return self._codes

    def _refresh_geometry(self) -> None:
        """Follow a stride or padding that was changed since the last forward."""
        settings = _settings(self.module)
        if settings == self._settings:
            return
        geometry = LayerGeometry.of(self.module)  # raises where it is impossible, and does so again next time
        if geometry != self.geometry:
            self.geometry = geometry
            self.forget_packed()
        self._settings = settings

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is packed: copies and pickles of the network pack their weights anew."""
        return self.__dict__ | {"_packed": {}, "_weight_key": None}

    def _check_input(self, x: torch.Tensor) -> None:
        for what, tensor in (("input", x), ("weight", self.module.weight)):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                raise UnsupportedLayerError(
                    f"layer {self.name!r} got {what} of {tensor.dtype} on {tensor.device}; "
                    "the array takes float32 tensors on the CPU"
                )

    def _as_images(self, x: torch.Tensor) -> torch.Tensor:
        """View the input as (B, C, H, W): a Linear's rows become the pixels of a row, C the features."""
        g = self.geometry
        if isinstance(self.module, nn.Linear):
            if x.ndim < 1 or x.shape[-1] != g.in_channels:
                raise OperandError(
                    f"layer {self.name!r} got shape {tuple(x.shape)}; (..., {g.in_channels}) is needed"
                )
            batch = x.shape[0] if x.ndim > 1 else 1
            rows = x.numel() // max(1, batch * g.in_channels) if x.ndim != 2 else 1
            return x.reshape(batch, 1, rows, g.in_channels).permute(0, 3, 1, 2)
        if x.ndim not in (3, 4) or x.shape[-3] != g.in_channels:
            raise OperandError(
                f"layer {self.name!r} got shape {tuple(x.shape)}; (B, {g.in_channels}, H, W) is needed"
            )
        return x if x.ndim == 4 else x.unsqueeze(0)

    def _from_images(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.module, nn.Linear):
            return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.geometry.out_channels)
        return y if x.ndim == 4 else y.squeeze(0)


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


@functools.lru_cache(maxsize=4096)
def _work(m: int, n: int, k: int, config: ArrayConfig, threads: int) -> GemmStats:
    """Macs and cycles of one GEMM, without counters."""
    return gemm_stats(Counters(()), m, n, k, config.replace(threads=threads))


def _stats(
    counters: Counters, m: int, n: int, k: int, config: ArrayConfig, threads: int, count: int
) -> GemmStats:
    """Join the counters of `count` equal GEMMs with their work and cycles."""
    one = _work(m, n, k, config, threads)
    return GemmStats(
        counters.active,
        counters.reduced_activations,
        counters.reduced_weights,
        count * one.macs,
        count * one.cycles,
        count * one.single_thread_cycles,
    )


def _content_key(weight: torch.Tensor) -> tuple[Any, ...]:
    """Tell weights apart by content, which sees every change, also those made through ``.data``."""
    last = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    dense = weight.permute(0, 2, 3, 1) if last else weight.contiguous()
    return fingerprint(dense.numpy(), torch.get_num_threads()), weight.shape, last


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

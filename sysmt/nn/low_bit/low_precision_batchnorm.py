"""BatchNorm whose normalised values have two to eight bits, forward, backward and in memory.

B. Graham, "Low-Precision Batch-Normalized Activations" (2017): between normalisation and affine map the
values are approximated by one of Table 1's formats, and stored as packed codes for the backward pass.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from sysmt.config import parse_count, parse_layer_names
from sysmt.errors import ConfigError, OperandError, nearest
from sysmt.nn.batchnorm.statistics import named_batchnorms
from sysmt.nn.low_bit.packed_activations import Packing, affine, in_memory_order, note_recipe, pack_values
from sysmt.quant.logscale import GRADIENT_FORMAT, approximate, parse_format

__all__ = [
    "LowPrecisionBatchNorm1d",
    "LowPrecisionBatchNorm2d",
    "convert_batchnorm",
    "quantize_gradients",
    "restore_batchnorm",
]


class _LowPrecisionBatchNorm(_BatchNorm):
    """What both dimensions share."""

    _ranks: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        fmt: str = "L4",
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        num_features = parse_count(num_features, "num_features")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.fmt = fmt

    @property
    def fmt(self) -> str:
        """Name of the format of the normalised values."""
        return self._fmt

    @fmt.setter
    def fmt(self, name: str) -> None:
        # By name, also of a `NumberFormat`: those beyond Table 1 are refused here, not in a forward.
        self._fmt = parse_format(getattr(name, "name", name)).name

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, approximate, scale and shift by channel: (N, C, ...) to the same shape."""
        by_batch = self.training or self.running_mean is None or self.running_var is None
        self._check(input, by_batch)
        with torch.no_grad():
            normalised, inverse_std = self._normalise(input.detach(), by_batch)
            shift = self._shift(normalised)
            wanting = [tensor for tensor in (input, self.weight, self.bias) if tensor is not None]
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanting)):
            dense, axes = in_memory_order(normalised)
            return affine(approximate(dense, self.fmt).permute(axes), self.weight, shift)
        packed, packing = pack_values(normalised, self.fmt)
        del normalised
        y: Tensor = _AffineOfPacked.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, packed, packing, inverse_std, shift, by_batch
        )
        note_recipe(y, packed, packing, self.weight, shift)
        return y

    def _check(self, x: Tensor, by_batch: bool) -> None:
        name = type(self).__name__
        if x.dim() not in self._ranks or x.shape[1] != self.num_features:
            ranks = " or ".join(map(str, self._ranks))
            raise OperandError(
                f"{name} got an input of shape {tuple(x.shape)}; it needs {ranks} axes, the second of "
                f"{self.num_features} channels"
            )
        if not x.is_floating_point():
            raise OperandError(f"{name} got {x.dtype}; floating-point values are needed")
        values = x.numel() // x.shape[1]
        if by_batch and values < 2:
            raise OperandError(
                f"{name} got an input of shape {tuple(x.shape)}: {values} value(s) per channel have no "
                "variance; use larger batches, or evaluation mode with running statistics"
            )

    def _normalise(self, x: Tensor, by_batch: bool) -> tuple[Tensor, Tensor]:
        """Return N(x) of equation (1) and 1 / sqrt(Var(x) + eps), with torch's update of the statistics."""
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # torch's sign for a plain average over all batches
            momentum = 1.0 / float(self.num_batches_tracked) if tracks else 0.0  # type: ignore[arg-type]
        mean, variance = (self.running_mean, self.running_var) if tracks or not by_batch else (None, None)
        normalised, _, inverse_std = torch.native_batch_norm(
            x, None, None, mean, variance, by_batch, momentum, self.eps
        )
        if not by_batch:
            assert variance is not None
            inverse_std = torch.rsqrt(variance + self.eps)
        return normalised, inverse_std

    def _shift(self, normalised: Tensor) -> Tensor:
        """Return β; NaN for channels with values that are not finite: codes would hide them."""
        axes = [axis for axis in range(normalised.dim()) if axis != 1]
        nought = (0 * _sum(normalised, axes)).to(normalised.dtype)
        return nought if self.bias is None else self.bias.detach() + nought

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fmt={self.fmt!r}"  # type: ignore[no-untyped-call]


class LowPrecisionBatchNorm2d(_LowPrecisionBatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with the normalised values approximated: γ · L4(N(x)) + β.

    Parameters, buffers and `state_dict` are those of torch's layer, and so are the running statistics, to
    the bit. The gradient is the paper's: the approximation passes it straight through, and equation (2)
    uses the approximated values. Only their packed codes, and a few numbers per channel, are kept for
    the backward pass; for the layers after it see
    `sysmt.nn.low_bit.packed_activations.recomputed_activations`.

    Parameters
    ----------
    num_features : int
        Channels C of the input (N, C, H, W).
    fmt : str
        ``"L2"``, ``"L3"``, ``"L4"``, ``"L5"``, ``"U4"``, ``"U5"``, ``"U8"`` or ``"O4"`` (Table 1).
    eps, momentum, affine, track_running_stats, device, dtype
        As in torch.

    Raises
    ------
    ConfigError
        If the format is unknown or `num_features` is no positive number.
    OperandError
        In a forward pass, for an input of another shape or type, or with one value per channel where
        statistics of the batch are needed.
    """

    _ranks = (4,)


class LowPrecisionBatchNorm1d(_LowPrecisionBatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with the normalised values approximated; inputs (N, C) or (N, C, L).

    See `LowPrecisionBatchNorm2d`.
    """

    _ranks = (2, 3)


class _AffineOfPacked(torch.autograd.Function):
    """The layer from its packed normalised values on; its backward pass goes back to the input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        packed: Tensor,
        packing: Packing,
        inverse_std: Tensor,
        shift: Tensor,
        by_batch: bool,
    ) -> Tensor:
        ctx.save_for_backward(packed, weight, inverse_std)
        ctx.packing, ctx.by_batch = packing, by_batch
        return affine(packing.values(packed), weight, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Equation (2), with the approximated values for N.

        ∇x = (∇N - mean(∇N) - N ∘ mean(N ∘ ∇N)) / sqrt(Var(x) + eps), where ∇N = γ ∇y. With running
        statistics, which are constants, the two means fall away.
        """
        packed, weight, inverse_std = ctx.saved_tensors
        n = ctx.packing.values(packed)
        axes = [axis for axis in range(n.dim()) if axis != 1]
        shape = (1, -1, *[1] * (n.dim() - 2))
        grad_bias = _sum(grad, axes)
        grad_weight = _sum(grad * n, axes)
        grad_x = None
        if ctx.needs_input_grad[0]:
            scale = inverse_std if weight is None else inverse_std * weight
            if ctx.by_batch:
                values = n.numel() // n.shape[1]
                # Means, which half precision holds where it does not hold the sums.
                grad_x = n.mul_((-grad_weight / values).to(n.dtype).view(shape)).add_(grad)
                grad_x = grad_x.sub_((grad_bias / values).to(n.dtype).view(shape)).mul_(scale.view(shape))
            else:
                grad_x = grad * scale.view(shape)
            grad_x = grad_x.to(grad.dtype)
        wanted = zip((grad_x, grad_weight, grad_bias), ctx.needs_input_grad[:3], strict=True)
        return *(one if wants else None for one, wants in wanted), None, None, None, None, None


def _sum(values: Tensor, axes: list[int]) -> Tensor:
    """Sum in float32 at least: in half precision, sums of a large batch are infinite."""
    half = values.dtype in (torch.float16, torch.bfloat16)
    return values.sum(dim=axes, dtype=torch.float32 if half else None)


# -- whole networks ----------------------------------------------------------------------------

_LOW_PRECISION: dict[type, type[_LowPrecisionBatchNorm]] = {
    nn.BatchNorm1d: LowPrecisionBatchNorm1d,
    nn.BatchNorm2d: LowPrecisionBatchNorm2d,
}
_WITH_BLOCKS = re.compile(r"from block (\d+)")


def convert_batchnorm(
    model: nn.Module, fmt: str = "L4", where: str | Collection[str] = "all"
) -> tuple[str, ...]:
    """Make a network's BatchNorm layers low-precision ones, in place and in one call.

    The modules themselves change their class: names, parameters, statistics, hooks, optimisers that hold
    the parameters and the `state_dict` stay as they are. `restore_batchnorm` undoes it.

    Parameters
    ----------
    model : nn.Module
    fmt : str
        Format of Table 1. Layers that are low-precision already change theirs.
    where : str or collection of str
        ``"all"``; ``"all but the first"``, in the order of definition; ``"from block N"``, N from 1: all
        from the N-th block on, where blocks are the parts of the network that hold several BatchNorm layers
        (the stages of a ResNet, the dense blocks of a DenseNet: with ``"from block 2"`` three out of four,
        as in Tables 5 and 6); or the layers' names.

    Returns
    -------
    tuple of str
        The names of the converted layers.

    Raises
    ------
    ConfigError
        If the format or a name is unknown, nothing is left to convert, or a chosen layer is no plain
        BatchNorm1d or BatchNorm2d. Nothing has been converted then.
    """
    fmt = parse_format(fmt).name
    layers = named_batchnorms(model)
    names = _chosen(model, list(layers), where)
    if not names:
        raise ConfigError(
            f"where={where!r} leaves nothing to convert of the {len(layers)} BatchNorm layer(s) of "
            f"{type(model).__name__}"
        )
    for name in names:
        kind = type(layers[name])
        if kind not in _LOW_PRECISION and kind not in _LOW_PRECISION.values():
            raise ConfigError(
                f"BatchNorm layer {name!r} is a {kind.__qualname__}; only torch's own BatchNorm1d and "
                "BatchNorm2d have a low-precision form"
            )
    for name in names:
        layer = layers[name]
        layer.__class__ = _LOW_PRECISION.get(type(layer), type(layer))
        assert isinstance(layer, _LowPrecisionBatchNorm)
        layer.fmt = fmt
    return tuple(names)


def restore_batchnorm(model: nn.Module) -> tuple[str, ...]:
    """Make all low-precision BatchNorm layers torch's own again, in place, and return their names."""
    torchs: dict[type, type] = {low: plain for plain, low in _LOW_PRECISION.items()}
    names = []
    for name, layer in named_batchnorms(model).items():
        if type(layer) in torchs:
            layer.__class__ = torchs[type(layer)]
            del layer._fmt
            names.append(name)
    return tuple(names)


def _chosen(model: nn.Module, names: list[str], where: str | Collection[str]) -> list[str]:
    """Return the names of the layers to convert, in the order of definition."""
    if not isinstance(where, str):
        where = parse_layer_names(where, "where")
        for name in sorted(where):
            if name not in names:
                raise ConfigError(f"where names {name!r}, which is no BatchNorm layer{nearest(name, names)}")
        return [name for name in names if name in where]
    if where == "all":
        return names
    if where == "all but the first":
        return names[1:]
    match = _WITH_BLOCKS.fullmatch(where)
    if match is None or match[1] == "0":
        raise ConfigError(
            f"where={where!r} is unknown; allowed: 'all', 'all but the first', 'from block N' with "
            "N from 1, or names of layers"
        )
    blocks = _blocks(model)
    if int(match[1]) > len(blocks):
        has = f"has the blocks {', '.join(blocks)}" if blocks else "has no blocks of several BatchNorm layers"
        raise ConfigError(f"where={where!r} is not possible: {type(model).__name__} {has}")
    start = blocks[int(match[1]) - 1]
    first = next(index for index, name in enumerate(names) if name.startswith(f"{start}."))
    return names[first:]


def _blocks(model: nn.Module, prefix: str = "") -> list[str]:
    """Return the names of the parts with several BatchNorm layers, at the first level with two such."""
    parts = {
        f"{prefix}{name}": child for name, child in model.named_children() if len(named_batchnorms(child)) > 1
    }
    if len(parts) == 1:
        [(name, child)] = parts.items()
        return _blocks(child, f"{name}.") or [name]
    return list(parts)


def quantize_gradients(model: nn.Module) -> contextlib.ExitStack:
    """Quantise the gradient that reaches each convolution to 8 bits, just before it is used (section 2.5).

    Gradients go through the rest of the network as floats; what a convolution multiplies with, for
    its weights' gradient and its input's, is of the set ±2^(k/2), k = -127 .. 0.

    Returns
    -------
    ExitStack
        Undoes it: with `close`, or at the end of a ``with`` block.

    Raises
    ------
    ConfigError
        If the network has no convolution.
    """
    convolutions = [module for module in model.modules() if isinstance(module, _ConvNd)]
    if not convolutions:
        raise ConfigError(f"{type(model).__name__} has no convolution whose gradient could be quantised")
    undo = contextlib.ExitStack()
    for convolution in convolutions:
        undo.callback(convolution.register_forward_hook(_quantize_gradient_of_output).remove)
    return undo


def _quantize_gradient_of_output(module: nn.Module, args: Any, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(_to_gradient_format)


def _to_gradient_format(grad: Tensor) -> Tensor:
    return approximate(grad, GRADIENT_FORMAT)

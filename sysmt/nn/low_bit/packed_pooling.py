"""Max pooling that keeps, for the backward pass, where in its window each maximum lay: a few bits.

torch keeps the input itself and 64 bits for each output; "Low-Precision Batch-Normalized Activations",
section 1.4, asks for "the indices of the maximal inputs within each pooling region" alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair

from sysmt.quant.logscale import pack, unpack

__all__ = ["packed_max_pool2d"]

_MAX_WINDOW = 256
"""Places in a window that 8 bits can tell."""


def packed_max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Do what `torch.nn.functional.max_pool2d` does: same values, same gradient, less memory.

    What is not a batch (N, C, H, W), or has windows of more than 256 places, torch does itself.
    """
    kernel_size, padding, dilation = (_two(value) for value in (kernel_size, padding, dilation))
    stride = _two(stride) if stride else kernel_size
    height, width = kernel_size
    wanted = torch.is_grad_enabled() and input.requires_grad
    if not wanted or return_indices or input.dim() != 4 or height * width > _MAX_WINDOW:
        pool: Any = F.max_pool2d
        return pool(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    window = (kernel_size, stride, padding, dilation, ceil_mode)
    return _PackedMaxPool.apply(input, window)  # type: ignore[no-untyped-call]


def _two(value: Any) -> tuple[int, int]:
    """Expand a number, or torch's sequence of one, to height and width."""
    pair = _pair(value[0] if isinstance(value, list | tuple) and len(value) == 1 else value)
    return pair[0], pair[1]


class _PackedMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[Any, ...]) -> Tensor:
        y, indices = torch.ops.aten.max_pool2d_with_indices(x, *window)
        (height, width), _, _, dilation, _ = window
        starts = _starts(indices, window)
        rows = (indices // x.shape[3] - starts[0]) // dilation[0]
        columns = (indices % x.shape[3] - starts[1]) // dilation[1]
        places = (rows * width + columns).to(torch.uint8)
        bits = max(2, (height * width - 1).bit_length())
        ctx.save_for_backward(pack(places, bits, check=False))
        ctx.window, ctx.bits, ctx.shape, ctx.out_shape = window, bits, x.shape, y.shape
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        ctx.layout = torch.channels_last if last else torch.contiguous_format
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (packed,) = ctx.saved_tensors
        (_, width), _, _, dilation, _ = ctx.window
        places = unpack(packed, ctx.bits, ctx.out_shape.numel()).view(ctx.out_shape).long()
        starts = _starts(places, ctx.window)
        rows = starts[0] + places // width * dilation[0]
        columns = starts[1] + places % width * dilation[1]
        indices = rows * ctx.shape[3] + columns
        shape_alone = grad.new_empty(()).expand(ctx.shape)  # of the input, nothing else is read
        grad_x = torch.ops.aten.max_pool2d_with_indices_backward(
            grad.contiguous(), shape_alone, *ctx.window, indices
        )
        return grad_x.contiguous(memory_format=ctx.layout), None  # layers before sum in its order


def _starts(like: Tensor, window: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Return the row (H, 1) and the column (W,) where each output's window starts, padding included."""
    _, stride, padding, _, _ = window
    rows, columns = (torch.arange(size, device=like.device) for size in like.shape[2:])
    return (rows * stride[0] - padding[0])[:, None], columns * stride[1] - padding[1]

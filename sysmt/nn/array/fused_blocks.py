"""Well-known blocks, with forwards in which a simulated convolution does the BatchNorm and ReLU behind it.

Only where a block's own forward is known can it be said that nothing else sees what lies between. So each
forward here repeats one of `FORWARDS`, convolution for convolution; `attach` puts it into the instances'
``__dict__``. Whoever has a hook on one of the modules, or records torch's functions, gets the block's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sysmt.nn.array.epilogue import Epilogue, fixed_affine
from sysmt.nn.array.hooks import RUNNING, DirectHook
from sysmt.nn.array.settings import ArraySettings
from sysmt.nn.array.stand_in import StandIn, patched_forward

__all__ = ["FORWARDS", "FusedBlock", "known_forward"]

Forward = Callable[[Any, Tensor], Tensor]


class FusedBlock(StandIn):
    """Stands in for the `forward` of one block.

    Attributes
    ----------
    settings : ArraySettings
        Of the simulation, which replaces them.
    """

    def __init__(self, module: nn.Module, forward: Forward, settings: ArraySettings) -> None:
        super().__init__(module)
        self.settings = settings
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, convolutions with what follows them where nobody can tell the difference."""
        simple = len(args) == 1 and not kwargs and type(args[0]) is Tensor
        wanted = self.in_place and self.settings.fuse and not self.settings.errors
        if simple and wanted and _is_unobserved():
            return self._forward(self.module, args[0])
        return self.original_forward(*args, **kwargs)


def _is_unobserved() -> bool:
    """Whether nobody records gradients, or what torch is asked to do."""
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_function_stack() > RUNNING.function_modes
        or torch._C._len_torch_dispatch_stack() > RUNNING.dispatch_modes
        or torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
        or torch_module._has_any_global_hook()
    )


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is torch's own, and without hooks."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (kind is not nn.Conv2d and patched_forward(module) is not None)
    )


def _follow(
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module | None = None,
    relu: nn.Module | Callable[..., Tensor] | None = None,
) -> Tensor:
    """Run a convolution and what follows it: in one go where the convolution is simulated."""
    hook = conv.__dict__.get("forward")
    fused_relu = relu is None or relu in _RELUS or (isinstance(relu, nn.Module) and _is_plain(relu, nn.ReLU))
    is_plain = _is_plain(conv, nn.Conv2d) and (norm is None or _is_plain(norm, nn.BatchNorm2d)) and fused_relu
    if is_plain and isinstance(hook, DirectHook) and type(x) is Tensor and hook.layer.takes_epilogue(x):
        affine = fixed_affine(norm) if isinstance(norm, nn.BatchNorm2d) else None
        fits = norm is None or (affine is not None and affine[0].size == hook.layer.geometry.out_channels)
        if fits:
            return hook.run_fused(x, Epilogue(affine, relu=relu is not None))
    x = conv(x)
    x = x if norm is None else norm(x)
    return x if relu is None else relu(x)


def _relu_in_place(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


_RELUS = (F.relu, torch.relu, torch.relu_, _relu_in_place)
"""Functions that are known to be ReLU; a block may have any other in the same place."""


# -- the forwards ------------------------------------------------------------------------------


def _sequential(block: nn.Sequential, x: Tensor) -> Tensor:
    modules = list(block)
    at = 0
    while at < len(modules):
        conv, followers = modules[at], modules[at + 1 : at + 3]
        if type(conv) is not nn.Conv2d:
            x, at = conv(x), at + 1
            continue
        norm = followers.pop(0) if followers and type(followers[0]) is nn.BatchNorm2d else None
        relu = followers.pop(0) if followers and type(followers[0]) is nn.ReLU else None
        x, at = _follow(x, conv, norm, relu), at + 1 + (norm is not None) + (relu is not None)
    return x


def _basic_convolution(block: Any, x: Tensor) -> Tensor:
    return _follow(x, block.conv, block.bn, _relu_in_place)


def _add_shortcut(block: Any, y: Tensor, x: Tensor) -> Tensor:
    y += x if block.downsample is None else block.downsample(x)
    return block.relu(y)  # type: ignore[no-any-return]


def _basic_block(block: Any, x: Tensor) -> Tensor:
    y = _follow(x, block.conv1, block.bn1, block.relu)
    return _add_shortcut(block, _follow(y, block.conv2, block.bn2), x)


def _bottleneck(block: Any, x: Tensor) -> Tensor:
    y = _follow(x, block.conv1, block.bn1, block.relu)
    y = _follow(y, block.conv2, block.bn2, block.relu)
    return _add_shortcut(block, _follow(y, block.conv3, block.bn3), x)


def _small_block(block: Any, x: Tensor) -> Tensor:
    y = _follow(x, block.conv1, block.bn1, F.relu)
    y = _follow(y, block.conv2, block.bn2)
    return torch.relu_(y + block.shortcut(x))  # in place: nobody else has the sum


_RESIDUAL = ("conv1", "bn1", "relu", "conv2", "bn2")

FORWARDS: dict[str, tuple[Forward, tuple[str, ...]]] = {
    "torch.nn.modules.container.Sequential.forward": (_sequential, ()),
    "torchvision.models.resnet.BasicBlock.forward": (_basic_block, (*_RESIDUAL, "downsample")),
    "torchvision.models.resnet.Bottleneck.forward": (_bottleneck, (*_RESIDUAL, "conv3", "bn3", "downsample")),
    "torchvision.models.googlenet.BasicConv2d.forward": (_basic_convolution, ("conv", "bn", "F", "relu")),
    "torchvision.models.inception.BasicConv2d.forward": (_basic_convolution, ("conv", "bn", "F", "relu")),
    "sysmt.nn.networks.models.BasicBlock.forward": (
        _small_block,
        ("F", "relu", "bn1", "conv1", "bn2", "conv2", "shortcut"),
    ),
}
"""By qualified name, and the names in its code: another version of the block may do something else."""


def known_forward(module: nn.Module) -> Forward | None:
    """Return what `FORWARDS` has for a module, if its forward is of its class."""
    if isinstance(module, torch.jit.ScriptModule) or patched_forward(module) is not None:
        return None
    forward = type(module).forward
    if not inspect.isfunction(forward):
        return None
    found = FORWARDS.get(f"{forward.__module__}.{forward.__qualname__}")
    if found is None or forward.__code__.co_names != found[1]:
        return None
    functional = forward.__globals__.get("F", F) if "F" in found[1] else F
    return found[0] if functional is F else None

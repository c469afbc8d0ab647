"""What goes before a module's own forward while a network is attached, and how it leaves again."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["StandIn", "patched_forward"]


class StandIn:
    """Runs instead of a module's forward: an entry ``forward`` of the instance's ``__dict__``.

    The module, its parameters, its hooks and its state_dict keys stay as they are. Whoever copies, pickles
    or saves the module gets one with its own forward: a copy is a plain float network.

    Attributes
    ----------
    module : nn.Module
    original_forward : callable
        What the module ran before.
    in_place : bool
        False before `install` and after `remove`. Another tool may have kept a reference to the stand-in,
        which then runs the original.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._patched = patched_forward(module)
        self.original_forward: Callable[..., Any] = module.forward
        self.in_place = False

    def install(self) -> None:
        """Go before the module's forward."""
        self.module.forward = self  # type: ignore[assignment]
        self.in_place = True

    def remove(self) -> None:
        """Leave the module as it was; a wrapper that another tool has put around this one stays."""
        self.in_place = False
        if self.module.__dict__.get("forward") is not self:
            return
        del self.module.forward
        if self._patched is not None:
            self.module.forward = self._patched

    def __reduce__(self) -> tuple[Any, ...]:
        return _own_forward, (self.module, self._patched)


def _own_forward(module: nn.Module, patched: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return what a copied module runs: the forward it was given, or that of its class."""
    return MethodType(type(module).forward, module) if patched is None else patched


def patched_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the forward that somebody gave to this one instance; None where it runs that of its class."""
    found: Callable[..., Any] | None = module.__dict__.get("forward")
    if isinstance(found, MethodType) and found.__self__ is module and found.__func__ is type(module).forward:
        return None  # as copies of attached modules have it
    return found

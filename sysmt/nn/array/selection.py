"""Which layers of a network are simulated, and why the others stay in float."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from sysmt.errors import ConfigError, UnsupportedLayerError, nearest
from sysmt.hw.operands import MAX_K
from sysmt.nn.array.lowering import LayerGeometry

__all__ = [
    "DEPTHWISE",
    "EXCLUDED",
    "FIRST_CONVOLUTION",
    "LINEAR",
    "NOT_REACHED",
    "FUNCTIONAL",
    "NEW",
    "Choice",
    "Exclusion",
    "excluded_layers",
    "is_layer",
    "string_entries",
    "unsupported",
]

FIRST_CONVOLUTION = "first convolution (first=False)"
LINEAR = "fully connected layer (linear=False)"
DEPTHWISE = "depthwise convolution (depthwise=False)"
EXCLUDED = "excluded by name"
FUNCTIONAL = "functional call (functional=False)"
NEW = "made or added after attach"
NOT_REACHED = "not reached by any forward so far"

Exclusion = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A layer or block by name or pattern, all of a type, or those for which a function says yes."""


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution (of any dimension) or fully connected."""
    return isinstance(module, _ConvNd | nn.Linear)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which kinds of layers are simulated.

    Attributes
    ----------
    first, linear, depthwise, functional : bool
        As in `sysmt.attach`.
    excluded : frozenset of str
        Names of layers that stay in float in any case.
    patterns : tuple of str
        The names and patterns that were excluded, for calls that belong to no layer's module.
    """

    first: bool
    linear: bool
    depthwise: bool
    functional: bool
    excluded: frozenset[str]
    patterns: tuple[str, ...]

    def functional_reason(
        self, name: str, module: nn.Module, geometry: LayerGeometry, is_linear: bool
    ) -> str | None:
        """Return the same for a call of `conv2d` or `linear` that no hooked module makes."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            return NEW
        if not self.functional and not isinstance(module, nn.MultiheadAttention):
            return FUNCTIONAL
        return self.reason(name, geometry, is_linear)

    def reason(self, name: str, geometry: LayerGeometry, is_linear: bool) -> str | None:
        """Return why a layer stays in float, or None if it is simulated.

        Raises
        ------
        UnsupportedLayerError
            If it should be simulated and its K is too large.
        """
        if name.partition("#")[0] in self.excluded:
            return EXCLUDED
        if any(_lies_in(name, entry) or fnmatch.fnmatchcase(name, entry) for entry in self.patterns):
            return EXCLUDED
        if is_linear and not self.linear:
            return LINEAR
        if geometry.depthwise and not self.depthwise:
            return DEPTHWISE
        if geometry.gemm_k > MAX_K:
            raise UnsupportedLayerError(
                f"layer {name!r} has K={geometry.gemm_k}, which could overflow a 32-bit accumulator; at most "
                f"{MAX_K} is possible. Name it in `exclude` to leave it in float"
            )
        return None


def unsupported(name: str, module: nn.Module) -> str | None:
    """Return why the array cannot take a layer, or None if it can: a Conv2d or Linear that has a shape."""
    if not isinstance(module, nn.Conv2d | nn.Linear):
        return f"layer {name!r} is a {type(module).__name__}; the array runs Conv2d and Linear"
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return f"layer {name!r} is lazy and has no shape yet; run one float forward first"
    return None


def string_entries(exclude: Exclusion | Iterable[Exclusion]) -> tuple[str, ...]:
    """Return the names and patterns among the entries of `exclude`."""
    if isinstance(exclude, str):
        return (exclude,)
    if isinstance(exclude, type) or callable(exclude):
        return ()
    return tuple(entry for entry in exclude if isinstance(entry, str))


def excluded_layers(model: nn.Module, exclude: Exclusion | Iterable[Exclusion]) -> frozenset[str]:
    """Return the names of the layers that `exclude` leaves out.

    Parameters
    ----------
    model : nn.Module
    exclude : str, type, callable, or iterable of these
        A name means that layer, or all layers of the block of that name; a pattern (``"blocks.*.fc1"``) all
        layers whose name it matches; a type all layers that are, or lie in, modules of it; a callable takes
        name and module of each layer.

    Raises
    ------
    ConfigError
        If an entry is something else, or leaves out no layer.
    """
    layers = {name: module for name, module in model.named_modules() if is_layer(module)}
    if isinstance(exclude, str | type) or callable(exclude):
        exclude = [exclude]
    if not isinstance(exclude, Iterable):
        raise ConfigError(
            f"exclude={exclude!r} has type {type(exclude).__name__}; names of layers are needed"
        )
    found: set[str] = set()
    for entry in exclude:
        names = _matching(entry, model, layers)
        if not names:
            raise ConfigError(_matches_nothing(entry, model, layers))
        found |= names
    return frozenset(found)


def _matching(entry: Any, model: nn.Module, layers: dict[str, nn.Module]) -> set[str]:
    if isinstance(entry, str):
        if entry in dict(model.named_modules()):
            return {name for name in layers if _lies_in(name, entry)}
        return {name for name in layers if fnmatch.fnmatchcase(name, entry)}
    if isinstance(entry, type):
        blocks = [name for name, module in model.named_modules() if isinstance(module, entry)]
        return {name for name in layers if any(_lies_in(name, block) for block in blocks)}
    if callable(entry):
        return {name for name, module in layers.items() if entry(name, module)}
    raise ConfigError(
        f"exclude has {entry!r} of type {type(entry).__name__} in it; names are strings (types of modules "
        "and functions of name and module are allowed, too)"
    )


def _lies_in(name: str, block: str) -> bool:
    return block in ("", name) or name.startswith(f"{block}.")


def _matches_nothing(entry: Exclusion, model: nn.Module, layers: dict[str, nn.Module]) -> str:
    if isinstance(entry, str):
        if entry in dict(model.named_modules()):
            return f"exclude names {entry!r}, in which there is no convolution or Linear"
        return f"exclude names {entry!r}, which the model does not have{nearest(entry, layers)}"
    return f"exclude has {entry!r} in it, which leaves out no layer"

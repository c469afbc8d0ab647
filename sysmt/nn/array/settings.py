"""What all layers of one simulation share: the array, and how it is used. Handed down, never up."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from sysmt.config import ArrayConfig

__all__ = ["ArraySettings", "array_with_threads"]


@dataclasses.dataclass(frozen=True)
class ArraySettings:
    """How a simulation runs its layers.

    Attributes
    ----------
    config : ArrayConfig
        The array; each layer has its own thread count beside it.
    per_channel : bool
        Weight scales per output channel, or per layer.
    errors : bool
        Run every layer at T = 1 as well, and compare.
    fuse : bool
        Let convolutions do the BatchNorm and ReLU behind them, where that changes no bit.
    reorder : bool
        Run with the orders of K that calibration gathered.
    """

    config: ArrayConfig
    per_channel: bool = True
    errors: bool = False
    fuse: bool = True
    reorder: bool = False

    def replaced(self, changes: Mapping[str, object]) -> ArraySettings:
        """Return a copy with the named fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def array(self, threads: int) -> ArrayConfig:
        """Return the array with a layer's thread count."""
        return array_with_threads(self.config, threads)


@functools.lru_cache(maxsize=256)
def array_with_threads(config: ArrayConfig, threads: int) -> ArrayConfig:
    """Return `config` with other threads; looked up, since every layer of every forward asks."""
    return config.replace(threads=threads)

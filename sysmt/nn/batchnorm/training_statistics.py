"""Which batches BatchNorm's inference statistics come from while a network is trained.

Nicholls & Kanemura, "Final Sample Batch Normalization For Quantized Neural Networks", compare population
statistics, gathered over many batches with a decay of 0.99 (BN-pop), with those of the final batch alone, a
decay of 0 (BN-final), and name a third way: statistics that are frozen after some steps, from where on
training normalises by them, too (Krishnamoorthi, arXiv 1806.08342). The loss and its gradients are the same
for the first two: only evaluation differs.

TensorFlow's decay d is torch's momentum 1 - d, the weight of the new batch. torch stores the unbiased
variance, n / (n - 1) times the one that it normalises the batch by, n = images · height · width; so the
running variance after a final batch is by that factor above the one that the batch itself was
normalised with: 0.04 % for 100 images of 5 × 5, and nothing to care about unless maps are 1 × 1 and
batches small.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import StrEnum

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sysmt.config import parse_count, parse_name
from sysmt.errors import ConfigError
from sysmt.nn.batchnorm.statistics import named_batchnorms

__all__ = ["POPULATION_DECAY", "BatchStatistics", "batch_statistics", "check_statistics"]

POPULATION_DECAY = 0.99
"""Share of the old statistics that a new batch leaves, under population statistics."""


class BatchStatistics(StrEnum):
    """Where the statistics that inference normalises by come from."""

    POPULATION = "population"
    FINAL = "final"
    FROZEN = "frozen"


def check_statistics(
    statistics: str | BatchStatistics | None, freeze_after: int | None
) -> BatchStatistics | None:
    """Return the kind of statistics, checked together with the step after which they are frozen.

    Raises
    ------
    ConfigError
        If the kind is unknown, or `freeze_after` is missing, impossible or without use.
    """
    kind = None if statistics is None else parse_name(BatchStatistics, statistics, "statistics")
    if freeze_after is not None:
        parse_count(freeze_after, "freeze_after")
    if (kind is BatchStatistics.FROZEN) != (freeze_after is not None):
        raise ConfigError(
            f"statistics={kind and kind.value!r} and freeze_after={freeze_after} do not go together: frozen "
            "statistics need the number of steps after which they are, the others have none"
        )
    return kind


@contextlib.contextmanager
def batch_statistics(model: nn.Module, kind: BatchStatistics | None) -> Iterator[tuple[_BatchNorm, ...]]:
    """Let BatchNorm layers gather statistics of one kind meanwhile; their momentum is restored afterwards.

    Parameters
    ----------
    model : nn.Module
    kind : BatchStatistics or None
        None leaves every layer's momentum as it is. Frozen ones are gathered like population statistics.

    Yields
    ------
    tuple of BatchNorm layers

    Raises
    ------
    ConfigError
        If a layer keeps no running statistics: it normalises every batch by its own, in evaluation too.
    """
    layers = named_batchnorms(model)
    if kind is not None:
        for name, layer in layers.items():
            if layer.running_mean is None or layer.running_var is None:
                raise ConfigError(
                    f"BatchNorm layer {name!r} has track_running_stats=False: it keeps no {kind.value} "
                    "statistics"
                )
    before = {layer: layer.momentum for layer in layers.values()}
    try:
        if kind is not None:
            for layer in layers.values():
                layer.momentum = 1.0 if kind is BatchStatistics.FINAL else 1.0 - POPULATION_DECAY
        yield tuple(layers.values())
    finally:
        for layer, momentum in before.items():
            layer.momentum = momentum

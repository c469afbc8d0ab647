"""BatchNorm under a noisy array: recalibrate its statistics, save and load them.

The method is Shomron & Weiser's "Post-Training BatchNorm Recalibration", section 2: squeezed threads
change the distributions inside the network, and BatchNorm layers that regather their running mean and
variance with that noise on win back much of the accuracy, without labels or gradients.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sysmt.config import RecalibrationMode, parse_count, parse_number, parse_recalibration
from sysmt.errors import CalibrationError
from sysmt.nn.batchnorm.gathering_layers import gathering_layers
from sysmt.nn.batchnorm.statistics import (
    layer_statistics,
    load_statistics,
    named_batchnorms,
    running_buffers,
    save_statistics,
    set_statistics,
)
from sysmt.nn.passes import image_batches, kept_modes
from sysmt.progress import progress_bar

__all__ = [
    "LayerShift",
    "RecalibrationReport",
    "load_statistics",
    "named_batchnorms",
    "recalibrate_batchnorm",
    "save_statistics",
]


# Recalibration


@dataclasses.dataclass(frozen=True)
class LayerShift:
    """How far recalibration moved the statistics of one BatchNorm layer.

    Attributes
    ----------
    name : str
        The layer's name in the network.
    channels : int
        Its channels.
    values : int
        Values per channel that its new statistics rest on (under ``ema``: that it saw); 0 if the
        forward pass never ran it, and it kept its statistics.
    mean_shift, max_mean_shift : float
        Shift of the mean in units of the old standard deviation, sqrt(variance + eps): root mean
        square over the channels, and the largest absolute one.
    log_variance_ratio, max_log_variance_ratio : float
        ln((new variance + eps) / (old variance + eps)): mean over the channels, and the largest
        absolute one.
    """

    name: str
    channels: int
    values: int
    mean_shift: float
    max_mean_shift: float
    log_variance_ratio: float
    max_log_variance_ratio: float


@dataclasses.dataclass(frozen=True)
class RecalibrationReport:
    """What a recalibration used and what it moved.

    Attributes
    ----------
    mode : RecalibrationMode
        How batches were combined.
    momentum : float
        Weight of a new batch; used by ``ema`` alone.
    images, batches : int
        Images and batches that went through the network.
    layers : tuple of LayerShift
        One entry per BatchNorm layer that gathered, in the network's order of definition.
    skipped : dict of str to str
        Layers that gather no statistics, whatever the mode, and why.
    """

    mode: RecalibrationMode
    momentum: float
    images: int
    batches: int
    layers: tuple[LayerShift, ...]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per BatchNorm layer that gathered, the columns named as in `LayerShift`."""
        columns = [field.name for field in dataclasses.fields(LayerShift)]
        return pd.DataFrame([dataclasses.asdict(layer) for layer in self.layers], columns=columns)


class _Pool:
    """Mean and squared deviations per channel over everything added, in float64."""

    # Values converted to float64 at a time: bounds the extra memory to 32 MiB or one image.
    CHUNK = 1 << 22

    def __init__(self) -> None:
        self.values = 0
        self._mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Merge a batch (N, C, ...) by the pairwise update of Chan, Golub & LeVeque (1979)."""
        images = max(1, self.CHUNK // max(1, x[0].numel()))
        for part in torch.split(x.detach(), images):
            axes = [axis for axis in range(part.dim()) if axis != 1]
            variance, mean = torch.var_mean(part.double(), axes, correction=0)
            values = part.numel() // part.shape[1]
            total = self.values + values
            delta = mean - self._mean
            self._mean = self._mean + delta * (values / total)
            self._squares = (
                self._squares + variance * values + delta.square() * (self.values * (values / total))
            )
            self.values = total

    def store(self, layer: _BatchNorm) -> None:
        """Write mean and unbiased variance into the layer's running statistics."""
        mean, variance = running_buffers(layer)
        mean.copy_(self._mean)
        variance.copy_(self._squares / (self.values - 1))


class _Gatherer:
    """Watches the inputs of the BatchNorm layers; pools them unless torch's own update does the work."""

    def __init__(self, layers: Mapping[str, _BatchNorm], mode: RecalibrationMode) -> None:
        self.layers = layers
        self.mode = mode
        self.values: Counter[str] = Counter()
        self._pools: dict[str, _Pool] = {}
        self._kept_pools: dict[str, _Pool] = {}

    def watch(self, name: str) -> Callable[..., None]:
        """Return a forward pre-hook for one layer."""

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            values = x.numel() // max(1, x.shape[1])
            if values < 2:
                raise CalibrationError(
                    f"BatchNorm layer {name!r} met an input of shape {tuple(x.shape)}: {values} value(s) per "
                    "channel have no variance; use larger batches, or a number of images that leaves no "
                    "single image for the last batch"
                )
            if self.mode is RecalibrationMode.EMA:
                self.values[name] += values
            else:
                self._pools.setdefault(name, _Pool()).add(x)

        return hook

    def end_batch(self, full: bool) -> None:
        """Close a batch; under ``final`` keep its statistics if it was a full one."""
        if self.mode is RecalibrationMode.FINAL:
            if full:
                self._kept_pools = self._pools
            self._pools = {}

    def store(self) -> None:
        """Write what was pooled into the layers, and refuse statistics that are no numbers."""
        pools = self._kept_pools if self.mode is RecalibrationMode.FINAL else self._pools
        for name, pool in pools.items():
            pool.store(self.layers[name])
            self.values[name] = pool.values
        for name, layer in self.layers.items():
            if not all(statistic.isfinite().all() for statistic in running_buffers(layer)):
                raise CalibrationError(
                    f"BatchNorm layer {name!r} gathered statistics that are not finite: "
                    "the images, or the layers before it, gave NaN or infinity"
                )


def recalibrate_batchnorm(
    model: nn.Module,
    loader: Iterable[Any],
    mode: str | RecalibrationMode = "ema",
    momentum: float = 0.1,
    images: int = 2048,
    progress: bool = False,
) -> RecalibrationReport:
    """Regather running mean and variance of every BatchNorm layer, with the network as it is.

    With the simulator attached its noise is on, which is the point. No labels and no gradients are
    used; γ, β and all other weights stay as they are. Only BatchNorm layers are in training mode
    meanwhile (dropout stays off), so each of them normalises by the statistics of the batch, not by
    the running ones: that is how the paper does it, and why deeper layers see inputs that are
    already corrected. Batches should therefore be as large as in training.

    Afterwards training flags, `momentum` and `num_batches_tracked` of the layers are what they
    were; after an exception the statistics are, too. The same images in the same batches give
    the same statistics. Images must pass through the augmentation that the network was trained with.

    Parameters
    ----------
    model : nn.Module
        The network, changed in place.
    loader : iterable
        Input tensors (N, ...) or (input, target) pairs; targets are ignored.
    mode : {"ema", "cumulative", "final"}
        ``ema`` starts from the current statistics and applies torch's update,
        ``(1 - momentum) * running + momentum * batch``, per batch; ``cumulative`` pools all images exactly
        (variance around the pooled mean, unbiased); ``final`` keeps the statistics of the last full
        batch alone, the last one that is as large as any before it. A layer that a forward pass runs
        more than once counts every run.
    momentum : float
        Weight of a new batch under ``ema``, in (0, 1].
    images : int
        Images to use, at least 1: the last batch is cut to make it exactly this many. A `UserWarning`
        says so if the loader has fewer.
    progress : bool
        Show a progress bar.

    Returns
    -------
    RecalibrationReport
        How far each layer's statistics moved.

    Raises
    ------
    ConfigError
        On an unknown `mode`, `momentum` or `images` out of range, or a network without a layer that gathers.
    CalibrationError
        If the loader is empty or gives something other than tensors, if a batch leaves one value
        per channel, or if statistics come out as NaN or infinity.

    References
    ----------
    G. Shomron and U. Weiser, "Post-Training BatchNorm Recalibration", section 2.
    """
    mode = parse_recalibration(mode, "mode")
    images = parse_count(images, "images")
    momentum = parse_number(
        momentum, "momentum", "a number in (0, 1], the weight of a new batch,", lambda value: 0 < value <= 1
    )
    layers, skipped = gathering_layers(model)
    for name, reason in skipped.items():
        warnings.warn(f"BatchNorm layer {name!r} {reason}; it is not recalibrated", stacklevel=2)
    gatherer = _Gatherer(layers, mode)
    used = batches = largest = 0
    with _only_batchnorm_training(model, layers, momentum) as before, ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(gatherer.watch(name), with_kwargs=True)
            stack.callback(handle.remove)
        bar = stack.enter_context(progress_bar("recalibrating BatchNorm", images, enabled=progress))
        for batch in image_batches(loader, images):
            model(batch)
            gatherer.end_batch(full=len(batch) >= largest)
            used += len(batch)
            batches += 1
            bar.advance(len(batch))
            largest = max(largest, len(batch))
        gatherer.store()
    shifts = tuple(
        _shift(name, layer, before[layer], gatherer.values[name]) for name, layer in layers.items()
    )
    return RecalibrationReport(mode, momentum, used, batches, shifts, skipped)


@contextmanager
def _only_batchnorm_training(
    model: nn.Module, layers: Mapping[str, _BatchNorm], momentum: float
) -> Iterator[dict[_BatchNorm, tuple[Tensor, Tensor]]]:
    """Put the given layers alone into training mode; undo all of it, after an exception statistics too.

    Yields the statistics that the layers start with.
    """
    momenta = {layer: layer.momentum for layer in layers.values()}
    counts = {
        layer: layer.num_batches_tracked.clone()
        for layer in layers.values()
        if layer.num_batches_tracked is not None
    }
    statistics = {layer: layer_statistics(layer) for layer in layers.values()}
    try:
        with kept_modes(model), torch.no_grad():
            for module in model.modules():
                module.training = False
            for layer in layers.values():
                layer.training = True
                layer.momentum = momentum
            yield statistics
    except BaseException:
        for layer, (mean, variance) in statistics.items():
            set_statistics(layer, mean, variance)
        raise
    finally:
        for layer, value in momenta.items():
            layer.momentum = value
        for layer, count in counts.items():
            layer.num_batches_tracked.copy_(count)  # type: ignore[union-attr]


def _shift(name: str, layer: _BatchNorm, before: tuple[Tensor, Tensor], values: int) -> LayerShift:
    """Compare a layer's statistics with those it had before."""
    (old_mean, old_variance), (mean, variance) = before, layer_statistics(layer)
    old_spread = (old_variance.double() + layer.eps).clamp_min(1e-300)
    spread = (variance.double() + layer.eps).clamp_min(1e-300)
    shift = (mean.double() - old_mean.double()).abs() / old_spread.sqrt()
    ratio = (spread / old_spread).log()
    return LayerShift(
        name,
        layer.num_features,
        values,
        math.sqrt(float(shift.square().mean())),
        float(shift.max()),
        float(ratio.mean()),
        float(ratio.abs().max()),
    )

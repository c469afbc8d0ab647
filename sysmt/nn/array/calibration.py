"""Calibration: activation ranges, and how often each K position is wide, from the float network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from sysmt.errors import CalibrationError
from sysmt.nn.array.lowering import LayerGeometry
from sysmt.nn.passes import evaluation_mode
from sysmt.quant.uniform import ActivationRange, activation_range, inverse_scale

__all__ = ["RangeObserver", "WideObserver", "run_observed"]


class _Observer(Protocol):
    def end_forward(self) -> None: ...


class RangeObserver:
    """Collects each image's maximum (or percentile) at one layer's input.

    Parameters
    ----------
    layer : str
        Name used in messages.
    percentile : float, optional
        Percentile in (0, 100] of each image's values to use instead of their maximum.
    """

    def __init__(self, layer: str, percentile: float | None = None) -> None:
        self.layer = layer
        self.percentile = percentile
        self._unsigned: list[torch.Tensor] = []
        self._magnitude: list[torch.Tensor] = []
        self._saw_negative = False
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def observe(self, images: torch.Tensor, geometry: LayerGeometry) -> None:
        """Take note of one call of the layer with (B, C, H, W) activations."""
        if not images.numel():
            return
        flat = images.flatten(1)
        low, high = flat.amin(1), flat.amax(1)
        finite = low.isfinite() & high.isfinite()
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0])
            raise CalibrationError(
                f"layer {self.layer!r} got NaN or infinite activations in image {bad} of a calibration batch"
            )
        self._saw_negative |= bool((low < 0).any())
        if self.percentile is None:
            self._pending.append((high, torch.maximum(high, -low)))
        else:
            values, magnitudes = flat.numpy(), flat.abs().numpy()
            self._pending.append(
                tuple(
                    torch.from_numpy(np.percentile(v, self.percentile, axis=1)) for v in (values, magnitudes)
                )  # type: ignore[arg-type]
            )

    def end_forward(self) -> None:
        """Join the calls of one forward: a layer used twice sees an image's maximum over both uses."""
        if not self._pending:
            return
        sizes = {high.shape[0] for high, _ in self._pending}
        groups = [self._pending] if len(sizes) == 1 else [[call] for call in self._pending]
        for calls in groups:
            self._unsigned.append(torch.stack([high for high, _ in calls]).amax(0))
            self._magnitude.append(torch.stack([magnitude for _, magnitude in calls]).amax(0))
        self._pending = []

    def result(self) -> ActivationRange | None:
        """Return the range, or None if the layer was never reached."""
        if not self._unsigned:
            return None
        maxima = torch.cat(self._magnitude if self._saw_negative else self._unsigned).double().numpy()
        return activation_range(np.maximum(maxima, 0.0), self._saw_negative)


class WideObserver:
    """Counts, for each K position of one layer, how often the quantised activation is wide."""

    def __init__(self, range_: ActivationRange | None, geometry: LayerGeometry) -> None:
        self.range = range_
        self.counts = np.zeros((geometry.groups, geometry.gemm_k), np.int64)

    def observe(self, images: torch.Tensor, geometry: LayerGeometry) -> None:
        """Take note of one call of the layer with (B, C, H, W) activations."""
        range_ = self.range
        if range_ is None or not images.numel():
            return
        g = geometry
        codes = torch.round(g.pad_float(images) * float(inverse_scale(range_.scale)))
        wide = (codes < -8) | (codes > 7) if range_.signed else codes > 15
        (top, bottom), (left, right) = g.padding
        wide = F.pad(wide, (left, right, top, bottom))
        out_h, out_w = g.output_size(*images.shape[2:])
        windows = [
            wide[
                :,
                :,
                i * g.dilation[0] : i * g.dilation[0] + g.stride[0] * (out_h - 1) + 1 : g.stride[0],
                j * g.dilation[1] : j * g.dilation[1] + g.stride[1] * (out_w - 1) + 1 : g.stride[1],
            ].sum((0, 2, 3))
            for i in range(g.kernel[0])
            for j in range(g.kernel[1])
        ]
        self.counts += torch.stack(windows, dim=1).reshape(self.counts.shape).numpy()

    def end_forward(self) -> None:
        """Nothing is pending between the calls of one forward."""


def run_observed(
    model: nn.Module, observers: Mapping[str, _Observer], batches: Iterable[torch.Tensor]
) -> None:
    """Run the float network over `batches`, and tell its layers' observers where each forward ends.

    Parameters
    ----------
    model : nn.Module
    observers : mapping of str to observer
        By layer; more may come in while the network runs.
    batches : iterable of Tensor
    """
    with evaluation_mode(model):
        for batch in batches:
            model(batch)
            for observer in observers.values():
                observer.end_forward()

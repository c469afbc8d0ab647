"""Variance of the loss's gradients layer by layer: measured by hooks, and predicted from the layers' widths.

Sari & Partovi Nia, "Understanding BatchNorm in Ternary Training": with s the dot products of a layer
(its output before BatchNorm and activation), the variance of ∂L/∂s grows towards the input by a factor per
layer, which equation (6) gives without BatchNorm and equation (13) with it.
"""

from __future__ import annotations

import dataclasses
import math
from types import TracebackType
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from sysmt.errors import ConfigError, nearest

__all__ = ["GradientRecorder", "predict_variances"]


@dataclasses.dataclass
class _Layer:
    """What one Conv2d or Linear showed so far."""

    module: nn.Conv2d | nn.Linear
    outputs: int = 0
    samples: int = 0
    values: int = 0
    total: float = 0.0
    squares: float = 0.0


class GradientRecorder:
    """Measures V(∂L/∂s) of every Conv2d and Linear layer while it is open, over all backward passes.

    Use it as a context manager around forward and backward passes. Gradients themselves are left alone,
    and nothing stays on the network.

    Parameters
    ----------
    model : nn.Module

    Raises
    ------
    ConfigError
        If there is no such layer.

    Examples
    --------
    >>> with GradientRecorder(model) as recorder:
    ...     F.cross_entropy(model(x), y).backward()
    >>> recorder.report()
    """

    def __init__(self, model: nn.Module) -> None:
        self._named = {
            module: name
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        }
        if not self._named:
            raise ConfigError(f"{type(model).__name__} has no Conv2d or Linear layer to watch")
        self._layers: dict[str, _Layer] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> GradientRecorder:
        self._handles = [module.register_forward_hook(self._watch) for module in self._named]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _watch(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        layer = self._layers.setdefault(self._named[module], _Layer(module))
        channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        layer.samples = output.numel() // channels
        layer.outputs = output[0].numel() if output.dim() > 1 and len(output) else output.numel()
        if output.requires_grad:
            output.register_hook(lambda gradient: _add(layer, gradient))

    def report(self) -> pd.DataFrame:
        """Return what was measured, a row per layer in the order of execution.

        Returns
        -------
        DataFrame
            `name`; `depth` from 1; `fan_in`, inputs that one output sums over; `outputs`, per image;
            `samples`, values per channel in a batch (images · height · width); `weight_variance`, the mean
            square of the weights that the forward pass uses; `variance` of the gradients, in squared
            units of the loss; NaN where none came, or one that was no number.
        """
        rows = []
        for depth, (name, layer) in enumerate(self._layers.items(), start=1):
            with torch.no_grad():
                weight = layer.module.weight
                mean_square = float(weight.double().square().mean())
            variance = math.nan
            if layer.values:
                variance = layer.squares / layer.values - (layer.total / layer.values) ** 2
            rows.append(
                {
                    "name": name,
                    "depth": depth,
                    "fan_in": weight[0].numel(),
                    "outputs": layer.outputs,
                    "samples": layer.samples,
                    "weight_variance": mean_square,
                    "variance": variance if math.isfinite(variance) else math.nan,
                }
            )
        return pd.DataFrame(rows)


def _add(layer: _Layer, gradient: Tensor) -> None:
    values = gradient.detach().double()
    layer.values += values.numel()
    layer.total += float(values.sum())
    layer.squares += float(values.square().sum())


def predict_variances(
    report: pd.DataFrame, batchnorm: bool, last: str | None = None, centred: bool = False
) -> pd.Series:
    """Predict the gradients' variance from one layer backwards: equation (6), or (13) with BatchNorm.

    From layer l + 1 to layer l the variance is multiplied by

    - without BatchNorm: ``K⁺ V(w) / 2``, with w the weights of layer l + 1 (equation (6));
    - with it: ``(B² + 2 B - 1 + V(ŝ²)) / B² · K⁺ V(w) / (K⁻ V(w⁻))``, with w⁻ the weights of layer l, B the
      values per channel in a batch and V(ŝ²) = 2, as for normal ŝ. That is equation (11) with (12) put
      in; where all layers' weights have one variance, it is equation (13).

    K⁻ is the fan-in of layer l. K⁺ is the number of weights that one output of layer l feeds: all outputs
    of a fully connected layer l + 1. For convolutions it is counted on average, outputs of layer l + 1
    times its fan-in over outputs of layer l, so that strides and pooling between them thin it out.

    The equations assume one chain of layers, each with ReLU, and weights and signals that are independent:
    shortcuts are left out, and max pooling, which prefers positive outputs, lets through up to 1.9
    times as much. Equation (12) takes the mean square of what a layer reads, 1/2 after ReLU, for its
    variance, which is 1/2 - 1/(2π), because BatchNorm takes the mean off; so (13) is too low by
    π / (π - 1) = 1.47 for each layer.

    Parameters
    ----------
    report : DataFrame
        What `GradientRecorder.report` returned.
    batchnorm : bool
        Whether BatchNorm stands between the layers.
    last : str, optional
        The layer whose measured variance is the start, by default the last one. Later ones get NaN.
    centred : bool
        With BatchNorm: put the variance after ReLU into equation (12), not the paper's mean square.

    Returns
    -------
    Series
        Predicted variances, one per row of `report`.

    Raises
    ------
    ConfigError
        If there is no layer `last`, or no layer at all.
    """
    if report.empty:
        raise ConfigError("the report has no rows: record the gradients of a backward pass first")
    names = list(report["name"])
    last = names[-1] if last is None and names else last
    if last not in names:
        raise ConfigError(f"last={last!r} is no layer of the report{nearest(str(last), names)}")
    rows: list[dict[str, Any]] = [dict(row) for row in report.to_dict("records")]  # type: ignore[arg-type]
    after_relu = 0.5 - 0.5 / math.pi if centred else 0.5
    end = names.index(last)
    predicted = [math.nan] * len(rows)
    predicted[end] = rows[end]["variance"]
    for index in range(end - 1, -1, -1):
        here, after = rows[index], rows[index + 1]
        fan_out = after["outputs"] * after["fan_in"] / here["outputs"]
        factor = 0.5 * fan_out * after["weight_variance"]
        if batchnorm:
            b = here["samples"]
            spread = after_relu * here["fan_in"] * here["weight_variance"]
            factor *= (b * b + 2 * b - 1 + 2) / (b * b) / spread if spread else math.nan
        predicted[index] = predicted[index + 1] * factor
    return pd.Series(predicted, index=report.index, name="predicted")

"""A whole network in Q format on the array, and its SQNR after each stage: input, convolution, BatchNorm.

The simulation model of the article "Batch Normalization: A different perspective from Quantized Inference
Model", with squeezed threads: the noise of the number format and of the array are measured together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import pandas as pd
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from sysmt.config import ArrayConfig, parse_count, parse_threads
from sysmt.errors import CalibrationError, ConfigError, UnsupportedLayerError
from sysmt.hw.operands import MAX_K
from sysmt.nn.array.lowering import LayerGeometry
from sysmt.nn.array.stand_in import patched_forward
from sysmt.nn.batchnorm.statistics import load_statistics, save_statistics
from sysmt.nn.low_bit.integer_layers import parse_rounding
from sysmt.nn.low_bit.integer_stages import QBatchNorm, QConv, QLayer
from sysmt.nn.passes import check_loader, evaluation_mode, image_batches, input_batch

__all__ = ["QNetwork"]

OPERAND_BITS = 8
"""The array's operands have 8 bits; formats of fewer use a part of them."""


class QNetwork:
    """A network whose Conv2d and BatchNorm2d run in Q format, the convolutions on the array.

    Each layer's input, weights and output have a Qm.n format each, from their dynamic range, which is that
    over the calibration images where it depends on images. ReLU and pooling by maximum keep the values in
    their format. What else a network does between the layers, such as the sums of residual blocks and
    average pooling, is done in float and rounded to the next layer's input format. Fully connected
    layers stay in float.

    The instances' `forward` is replaced until `detach`; it is a context manager. The network gives no
    gradients meanwhile. `recalibrate_batchnorm` gathers statistics under the noise of format and array.

    Parameters
    ----------
    model : nn.Module
        float32, on the CPU.
    config : ArrayConfig, optional
        The array; by default one thread, which is exact.
    bits : int
        Of every format, 2 .. 8.
    rounding : {"floor", "nearest"}
        How sums are shifted to 8 bits: down, as in the article, or to nearest.

    Attributes
    ----------
    model : nn.Module
    config : ArrayConfig
    bits : int
    rounding : str

    Raises
    ------
    ConfigError
        If there is no Conv2d, the network is attached to a simulator, a BatchNorm2d keeps no statistics, or
        bits or rounding are impossible.
    UnsupportedLayerError
        If a convolution is no plain Conv2d, or a layer has a `forward` of its own.

    Examples
    --------
    >>> with QNetwork(model, sysmt.ArrayConfig(threads=2)) as network:
    ...     network.calibrate(loader, images=512)
    ...     print(network.compare(test_loader))
    """

    def __init__(
        self,
        model: nn.Module,
        config: ArrayConfig | None = None,
        *,
        bits: int = 8,
        rounding: str = "floor",
    ) -> None:
        config = ArrayConfig(threads=1) if config is None else config
        if not isinstance(config, ArrayConfig):
            raise ConfigError(f"config has type {type(config).__name__}; an ArrayConfig is needed")
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model has type {type(model).__name__}; a torch.nn.Module is needed")
        self.bits = parse_count(bits, "bits", minimum=2)
        if self.bits > OPERAND_BITS:
            raise ConfigError(f"bits={bits} is too large; the array's operands have {OPERAND_BITS}")
        self.rounding = parse_rounding(rounding)
        self.model, self.config = model, config
        self.mode = "run"
        self.isolated = False
        self._statistics: dict[str, Tensor] = {}
        self._last: tuple[QLayer, Tensor] | None = None
        self.layers = dict(self._wrap(model))
        if not any(isinstance(layer, QConv) for layer in self.layers.values()):
            raise ConfigError(f"{type(model).__name__} has no Conv2d to run in Q format")
        for layer in self.layers.values():
            layer.install()

    def _wrap(self, model: nn.Module) -> Iterator[tuple[str, QLayer]]:
        for name, module in model.named_modules():
            if not isinstance(module, _ConvNd | nn.BatchNorm2d):
                continue
            if patched_forward(module) is not None:
                raise ConfigError(
                    f"layer {name!r} has its forward replaced, as by an attached simulator; detach first"
                )
            if isinstance(module, nn.BatchNorm2d):
                if type(module).forward is not _BatchNorm.forward:
                    raise UnsupportedLayerError(
                        f"layer {name!r} ({type(module).__name__}) has a forward of its own"
                    )
                if module.running_mean is None:
                    raise ConfigError(
                        f"BatchNorm layer {name!r} keeps no running statistics; inference needs them"
                    )
                yield name, QBatchNorm(self, name, module)
                continue
            own = [
                method
                for method in ("forward", "_conv_forward")
                if getattr(type(module), method) is not getattr(nn.Conv2d, method)
            ]
            if not isinstance(module, nn.Conv2d) or own:
                raise UnsupportedLayerError(
                    f"layer {name!r} is a {type(module).__name__}, not torch's plain Conv2d"
                )
            k = LayerGeometry.of(module).gemm_k
            if k > MAX_K:
                raise UnsupportedLayerError(
                    f"layer {name!r} has K={k}, which could overflow a 32-bit accumulator; at most {MAX_K}"
                )
            yield name, QConv(self, name, module)

    # -- life ----------------------------------------------------------------------------------

    def __enter__(self) -> QNetwork:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Give the layers their own forward back; statistics that were recalibrated meanwhile stay."""
        for layer in self.layers.values():
            layer.remove()

    def note(self, layer: QLayer, x: Tensor, y: Tensor) -> None:
        """Remember which convolution a BatchNorm follows directly."""
        if isinstance(layer, QConv):
            self._last = (layer, y)
        elif self._last is not None and x is self._last[1]:
            layer.follows = self._last[0].name

    # -- work ----------------------------------------------------------------------------------

    def calibrate(self, loader: Iterable[Any], images: int = 512) -> None:
        """Find all formats from the float network's dynamic ranges; its statistics are the reference's.

        Parameters
        ----------
        loader : iterable
            Of input tensors or (input, target) pairs.
        images : int
            How many to use; the last batch is cut.

        Raises
        ------
        CalibrationError
            If there are no images, or activations that are not finite.
        """
        for layer in self.layers.values():
            layer.forget()
            layer.reset()
        self._statistics = save_statistics(self.model)
        self.mode = "observe"
        try:
            with evaluation_mode(self.model):
                for batch in image_batches(loader, parse_count(images, "images")):
                    self.model(batch)
        except BaseException:
            for layer in self.layers.values():
                layer.forget()
            raise
        finally:
            self.mode, self._last = "run", None

    def set_threads(self, threads: int) -> None:
        """Set the threads of all convolutions, 1, 2 or 4, and forget what was compared."""
        self.config = self.config.replace(threads=parse_threads(threads))
        self.reset()

    def reset(self) -> None:
        """Forget what was compared and counted."""
        for layer in self.layers.values():
            layer.reset()

    def compare(self, loader: Iterable[Any], *, isolated: bool = False) -> pd.DataFrame:
        """Run images in float and in Q format, and compare stage by stage.

        The float network has the BatchNorm statistics of `calibrate`, whatever was recalibrated since.

        Parameters
        ----------
        loader : iterable
            Of input tensors or (input, target) pairs.
        isolated : bool
            Give every convolution the float network's own input, so that a stage shows the noise of its
            layer alone; by default noise comes in from the layers before.

        Returns
        -------
        DataFrame
            As `report`.
        """
        if not self._statistics and any(isinstance(layer, QBatchNorm) for layer in self.layers.values()):
            raise CalibrationError("the network is not calibrated; call calibrate() first")
        check_loader(loader, CalibrationError)
        self.reset()
        now = save_statistics(self.model)
        self.isolated = isolated
        try:
            with evaluation_mode(self.model):
                for item in loader:
                    batch = input_batch(item, CalibrationError)
                    self.mode = "record"
                    load_statistics(self.model, self._statistics)
                    self.model(batch)
                    self.mode = "run"
                    load_statistics(self.model, now)
                    self.model(batch)
        finally:
            self.mode, self.isolated = "run", False
            load_statistics(self.model, now)
            for layer in self.layers.values():
                layer.forget_references()
        return self.report()

    def report(self) -> pd.DataFrame:
        """Return a row per stage, in the network's order.

        Returns
        -------
        DataFrame
            ``layer``; ``stage``: input, conv, bn, or "bn, exact", which is the float BatchNorm of the
            convolution's quantised output; ``follows``: the convolution right before a BatchNorm;
            ``format`` (of the result) and its ``step``; ``sqnr_db``; ``channel_sqnr_db``, around the
            channels' means, as a median over channels; ``mean_error``, quantised minus float;
            ``collision_rate`` of a convolution, in [0, 1].
        """
        rows = []
        for layer in self.layers.values():
            for stage, error in layer.errors.items():
                if not error.values:
                    continue
                of = layer.formats[0 if stage == "input" else 1]
                exact = stage == "bn, exact"
                rows.append(
                    {
                        "layer": layer.name,
                        "stage": stage,
                        "follows": layer.follows,
                        "format": "float" if exact else str(of),
                        "step": math.nan if exact else of.step,
                        "sqnr_db": error.sqnr_db,
                        "channel_sqnr_db": error.channel_sqnr_db,
                        "mean_error": error.mean_error,
                        "collision_rate": layer.stats.collision_rate if stage == "conv" else math.nan,
                    }
                )
        return pd.DataFrame(rows)

    def channels(self, layer: str, stage: str) -> pd.DataFrame:
        """Return the channel means of one stage, float and quantised; see `StageError.channels`."""
        if layer not in self.layers or stage not in self.layers[layer].errors:
            known = ", ".join(f"{name} {stage}" for name, one in self.layers.items() for stage in one.stages)
            raise ConfigError(f"there is no stage {layer!r} {stage!r}; known: {known}")
        error = self.layers[layer].errors[stage]
        if not error.values:
            raise ConfigError(
                f"nothing has been compared at {layer!r} {stage!r} yet; call compare(loader) first"
            )
        return error.channels()

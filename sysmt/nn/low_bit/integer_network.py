"""A whole network in Q format on the array, and its SQNR after each stage: input, convolution, BatchNorm.

The simulation model of the article "Batch Normalization: A different perspective from Quantized Inference
Model", with squeezed threads: the noise of the number format and of the array are measured together.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from sysmt.config import ArrayConfig, parse_count, parse_threads
from sysmt.errors import CalibrationError, ConfigError, OperandError, UnsupportedLayerError
from sysmt.hw.kernels import PackedGemm, fingerprint
from sysmt.hw.operands import MAX_K
from sysmt.hw.stats import GemmStats
from sysmt.nn.array.lowering import LayerGeometry
from sysmt.nn.batchnorm.recalibration import load_statistics, save_statistics
from sysmt.nn.low_bit.integer_layers import (
    accumulate,
    add_bias,
    pack,
    parse_rounding,
    requantize,
    scale_and_shift,
)
from sysmt.nn.passes import check_loader, evaluation_mode, image_batches, input_batch
from sysmt.quant.error import sqnr_db_from_energies
from sysmt.quant.fixedpoint import QFormat, align_bias

__all__ = ["QNetwork", "StageError"]

OPERAND_BITS = 8
"""The array's operands have 8 bits; formats of fewer use a part of them."""


class StageError:
    """How far a stage's quantised output is from the float one, channel by channel; adds up over batches."""

    def __init__(self) -> None:
        self.values = 0
        """Values per channel."""
        self._sums = np.zeros((0, 0))
        """Per channel: signal, quantised, signal squared, error squared."""

    def add(self, signal: Tensor, quantized: Tensor) -> None:
        """Compare a batch (B, C, ...) of outputs."""
        s, q = (x.detach().transpose(0, 1).flatten(1).double() for x in (signal, quantized))
        sums = torch.stack([s.sum(1), q.sum(1), s.square().sum(1), (q - s).square().sum(1)]).numpy()
        self._sums = self._sums + sums if self.values else sums
        self.values += s.shape[1]

    @property
    def sqnr_db(self) -> float:
        """10 log10 of signal energy over noise energy."""
        return sqnr_db_from_energies(float(self._sums[2].sum()), float(self._sums[3].sum()))

    @property
    def channel_sqnr_db(self) -> float:
        """The same of a channel around its means, in dB: the median over channels whose signal varies.

        Neither a factor nor an offset per channel changes it, so that an exact BatchNorm leaves it as it is.
        """
        s, q, energy, noise = self._sums / max(1, self.values)
        signal, error = energy - s**2, np.maximum(noise - (q - s) ** 2, 0.0)
        varies = signal > 1e-12 * energy
        if not varies.any():
            return math.nan
        with np.errstate(divide="ignore"):
            return float(np.median(10 * np.log10(signal[varies] / error[varies])))

    @property
    def mean_error(self) -> float:
        """Mean of quantised minus float, in the signal's unit."""
        return float((self._sums[1] - self._sums[0]).sum() / max(1, self.values * self._sums.shape[1]))

    def channels(self) -> pd.DataFrame:
        """Return a row per channel: its mean in float and quantised, and the difference."""
        s, q = self._sums[:2] / max(1, self.values)
        return pd.DataFrame({"channel": np.arange(s.size), "float": s, "quantized": q, "difference": q - s})


class _QLayer:
    """Stands in for the `forward` of a layer: observes its ranges, keeps its float output, or runs it."""

    stages: tuple[str, ...] = ()

    def __init__(self, network: QNetwork, name: str, module: nn.Module) -> None:
        self.network, self.name, self.module = network, name, module
        self.original_forward = module.forward
        self.follows = ""
        self._peaks = [0.0, 0.0]
        self._reached = False
        self._references: deque[tuple[Tensor, Tensor]] = deque()
        self.reset()

    def reset(self) -> None:
        """Forget what was compared and counted."""
        self.errors = {stage: StageError() for stage in self.stages}
        self.stats = GemmStats(())

    def forget(self) -> None:
        """Forget the ranges."""
        self._peaks, self._reached, self.follows = [0.0, 0.0], False, ""

    def forget_references(self) -> None:
        """Drop float outputs that were not compared."""
        self._references.clear()

    def __call__(self, input: Tensor) -> Tensor:
        """Run the layer as the network's mode says."""
        mode = self.network.mode
        if mode == "run":
            return self._run(self._checked(input))
        y: Tensor = self.original_forward(input)
        if mode == "record":
            self._references.append((input.clone(), y.clone()))  # what follows may change them in place
            return y
        self._reached = True
        for index, tensor in enumerate((input, y)):
            if tensor.numel():
                self._peaks[index] = max(self._peaks[index], float(tensor.abs().max()))
            if not math.isfinite(self._peaks[index]) or bool(tensor.isnan().any()):
                raise CalibrationError(f"layer {self.name!r} met NaN or infinity in calibration")
        self.network.note(self, input, y)
        return y

    @property
    def formats(self) -> tuple[QFormat, QFormat]:
        """Formats of input and output, from their dynamic ranges in calibration."""
        if not self._reached:
            raise CalibrationError(
                f"layer {self.name!r} has no formats; call calibrate() with data that reaches it"
            )
        of_input, of_output = (QFormat.of([peak], self.network.bits) for peak in self._peaks)
        return of_input, of_output

    def _reference(self) -> tuple[Tensor, Tensor] | None:
        return self._references.popleft() if self._references else None

    def _checked(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cpu" or x.ndim != 4:
            raise UnsupportedLayerError(
                f"layer {self.name!r} got {x.dtype} of shape {tuple(x.shape)} on {x.device}; "
                "float32 (B, C, H, W) on the CPU is needed"
            )
        return x.detach()

    def _format(self, values: npt.NDArray[Any], what: str) -> QFormat:
        try:
            return QFormat.of(values, self.network.bits)
        except OperandError as error:
            raise UnsupportedLayerError(f"layer {self.name!r}, {what}: {error}") from None

    def _codes(self, x: Tensor, to: QFormat) -> npt.NDArray[Any]:
        try:
            return to.quantize(x.numpy())
        except OperandError as error:
            raise UnsupportedLayerError(f"layer {self.name!r}: {error}") from None

    def _run(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _QConv(_QLayer):
    stages = ("input", "conv")
    module: nn.Conv2d

    def __init__(self, network: QNetwork, name: str, module: nn.Conv2d) -> None:
        super().__init__(network, name, module)
        self._packed: dict[int, list[PackedGemm]] = {}
        self._weight_key: object = None
        self._weight_format = QFormat(0)

    def _run(self, x: Tensor) -> Tensor:
        if self.module.training:
            raise UnsupportedLayerError(
                f"layer {self.name!r} runs in Q format, which gives no gradients; call eval() or detach()"
            )
        of_input, of_output = self.formats
        reference = self._reference()
        if reference is not None and self.network.isolated:
            x = reference[0].detach()
        geometry = LayerGeometry.of(self.module)
        codes = self._codes(geometry.pad_float(x), of_input)
        packed = self._pack(geometry)
        sums, stats = accumulate(codes, packed, geometry, torch.get_num_threads())
        self.stats += stats
        fraction = of_input.fraction_bits + self._weight_format.fraction_bits
        if self.module.bias is not None:
            bias = self.module.bias.detach().numpy()
            own = self._format(bias, "bias")
            sums = add_bias(sums, align_bias(own.quantize(bias), own.fraction_bits, fraction))
        y = _values(requantize(sums, fraction, of_output, self.network.rounding), of_output)
        if reference is not None:
            self.errors["input"].add(reference[0], _values(of_input.quantize(x.numpy()), of_input))
            self.errors["conv"].add(reference[1], y)
        return y

    def _pack(self, geometry: LayerGeometry) -> list[PackedGemm]:
        """Quantise and pack the weights, anew where they or the threads changed."""
        weight = self.module.weight.detach().contiguous().numpy()
        key = (fingerprint(weight), weight.shape, geometry)
        if key != self._weight_key:
            self._weight_format = self._format(weight, "weight")
            self._packed.clear()
            self._weight_key = key
        config = self.network.config
        if config.threads not in self._packed:
            self._packed[config.threads] = pack(self._weight_format.quantize(weight), geometry, config)
        return self._packed[config.threads]


class _QBatchNorm(_QLayer):
    stages = ("bn", "bn, exact")
    module: nn.BatchNorm2d

    def _run(self, x: Tensor) -> Tensor:
        of_input, of_output = self.formats
        if self.module.training:  # recalibration: normalised in float by the batch, then shifted likewise
            fine = QFormat(of_output.fraction_bits + 16, 32)
            codes = self._codes(self.original_forward(x), fine)
            return _values(requantize(codes, fine.fraction_bits, of_output, self.network.rounding), of_output)
        scale, bias = self.coefficients()
        of_scale, of_bias = (QFormat.of(values, self.network.bits) for values in (scale, bias))
        codes = scale_and_shift(
            self._codes(x, of_input),
            of_scale.quantize(scale),
            of_bias.quantize(bias),
            formats=(of_input, of_scale, of_output),
            bias_fraction=of_bias.fraction_bits,
            rounding=self.network.rounding,
        )
        y = _values(codes, of_output)
        reference = self._reference()
        if reference is not None:
            self.errors["bn"].add(reference[1], y)
            self.errors["bn, exact"].add(reference[1], self.original_forward(x))
        return y

    def coefficients(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return scale and combined bias (C,) of equation (1.4)."""
        layer = self.module
        assert layer.running_mean is not None
        assert layer.running_var is not None
        scale = (layer.running_var.double() + layer.eps).rsqrt()
        if layer.weight is not None:
            scale = scale * layer.weight.detach().double()
        bias = -layer.running_mean.double() * scale
        if layer.bias is not None:
            bias = bias + layer.bias.detach().double()
        if not (scale.isfinite().all() and bias.isfinite().all()):
            raise UnsupportedLayerError(f"layer {self.name!r} has a scale or bias that is not finite")
        return scale.numpy(), bias.numpy()


def _values(codes: npt.NDArray[Any], of: QFormat) -> Tensor:
    """Return the values of 8-bit codes, exact in float32."""
    return torch.from_numpy(np.ldexp(codes.astype(np.float32), -of.fraction_bits))


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
        self._last: tuple[_QLayer, Tensor] | None = None
        self.layers = dict(self._wrap(model))
        if not any(isinstance(layer, _QConv) for layer in self.layers.values()):
            raise ConfigError(f"{type(model).__name__} has no Conv2d to run in Q format")
        for layer in self.layers.values():
            layer.module.forward = layer

    def _wrap(self, model: nn.Module) -> Iterator[tuple[str, _QLayer]]:
        for name, module in model.named_modules():
            if not isinstance(module, _ConvNd | nn.BatchNorm2d):
                continue
            if "forward" in vars(module):
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
                yield name, _QBatchNorm(self, name, module)
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
            yield name, _QConv(self, name, module)

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
            if vars(layer.module).get("forward") is layer:
                del layer.module.forward

    def note(self, layer: _QLayer, x: Tensor, y: Tensor) -> None:
        """Remember which convolution a BatchNorm follows directly."""
        if isinstance(layer, _QConv):
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
        if not self._statistics and any(isinstance(layer, _QBatchNorm) for layer in self.layers.values()):
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

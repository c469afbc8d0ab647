"""Layers in Q format on the array, and how far each stage's output is from the float one."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from sysmt.config import ArrayConfig
from sysmt.errors import CalibrationError, OperandError, UnsupportedLayerError
from sysmt.hw.kernels import PackedGemm, fingerprint
from sysmt.hw.stats import GemmStats
from sysmt.nn.array.lowering import LayerGeometry
from sysmt.nn.array.stand_in import StandIn
from sysmt.nn.batchnorm.statistics import scale_and_shift as inference_affine
from sysmt.nn.low_bit.integer_layers import accumulate, add_bias, pack, requantize, scale_and_shift
from sysmt.quant.error import sqnr_db_from_energies
from sysmt.quant.fixedpoint import QFormat, align_bias

__all__ = ["QBatchNorm", "QConv", "QLayer", "StageError"]


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


class Host(Protocol):
    """What a layer needs to know of the network that it is in."""

    mode: str
    bits: int
    rounding: str
    isolated: bool
    config: ArrayConfig

    def note(self, layer: Any, x: Tensor, y: Tensor) -> None:
        """Hear that a layer ran in calibration."""


class QLayer(StandIn):
    """Stands in for the `forward` of a layer: observes its ranges, keeps its float output, or runs it."""

    stages: tuple[str, ...] = ()

    def __init__(self, network: Host, name: str, module: nn.Module) -> None:
        super().__init__(module)
        self.network, self.name = network, name
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
        if not self.in_place:
            return self.original_forward(input)  # type: ignore[no-any-return]
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


class QConv(QLayer):
    """A convolution: int8 codes into 32-bit sums on the array, bias aligned, shifted, saturated."""

    stages = ("input", "conv")
    module: nn.Conv2d

    def __init__(self, network: Host, name: str, module: nn.Conv2d) -> None:
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


class QBatchNorm(QLayer):
    """A BatchNorm: scale and shift per channel in integers, or by the batch where it is recalibrated."""

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
        scale, bias = (values.cpu() for values in inference_affine(self.module))
        if not (scale.isfinite().all() and bias.isfinite().all()):
            raise UnsupportedLayerError(f"layer {self.name!r} has a scale or bias that is not finite")
        return scale.numpy(), bias.numpy()


def _values(codes: npt.NDArray[Any], of: QFormat) -> Tensor:
    """Return the values of 8-bit codes, exact in float32."""
    return torch.from_numpy(np.ldexp(codes.astype(np.float32), -of.fraction_bits))

"""A layer's weights as the array takes them: quantised, packed, and made anew where they have changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sysmt.config import ArrayConfig
from sysmt.errors import ConfigError, UnsupportedLayerError
from sysmt.hw.kernels import PackedConv, fingerprint
from sysmt.nn.array.lowering import LayerGeometry
from sysmt.quant.uniform import quantize_weights, weight_scales

__all__ = ["LayerWeights"]


class LayerWeights:
    """Scales, codes and packed forms of the weight tensor that a layer's last call had.

    Attributes
    ----------
    name : str
        Name of the layer, for messages.
    per_channel : bool
        One scale for each output channel, or one for all.
    own_scales : float32 ndarray (N,) or (), or None
        Scales that were set, or one for all channels, instead of those that follow from the weights.
    scales : float32 ndarray (N,)
        Those in force.
    """

    def __init__(self, name: str, per_channel: bool) -> None:
        self.name = name
        self.per_channel = per_channel
        self.own_scales: np.ndarray | None = None
        self.scales = np.empty(0, np.float32)
        self._packed: dict[tuple[Any, ...], PackedConv] = {}
        self._values: np.ndarray | None = None
        self._key: tuple[Any, ...] | None = None
        self._codes: np.ndarray | None = None
        self._codes_key: tuple[int, tuple[int, ...]] | None = None

    def forget(self) -> None:
        """Quantise and pack anew at the next forward."""
        self._packed.clear()
        self._key = None

    def refresh(self, weight: torch.Tensor) -> None:
        """Take the weights of this call; quantise them again if they are not those of the last one."""
        weight = weight.detach().resolve_neg()
        self._values = weight.numpy()
        key = _content_key(weight)
        if key == self._key:
            return
        if not np.isfinite(self._values).all():
            raise UnsupportedLayerError(f"layer {self.name!r} has NaN or infinite weights")
        self._key = None  # whatever ends this half-way, the next forward begins anew
        self.scales = self._scales_for(self._values)
        self._codes = None
        codes_key = fingerprint(self.codes), self.codes.shape
        if codes_key != self._codes_key:
            self._packed.clear()
        self._key, self._codes_key = key, codes_key

    def _scales_for(self, values: np.ndarray) -> np.ndarray:
        own, channels = self.own_scales, values.shape[0]
        if own is None:
            return weight_scales(values, per_channel=self.per_channel)
        if own.ndim and own.size != channels:
            raise ConfigError(
                f"layer {self.name!r} has {channels} output channels now, but weight scales were set for "
                f"{own.size}; set_weight_scales anew, or to None"
            )
        return np.broadcast_to(own, channels).copy()

    def release(self) -> None:
        """Let go of what is as large as the weights and can be made again."""
        self._values = self._codes = None

    @property
    def codes(self) -> np.ndarray:
        """The weights as the array sees them, int8 (N, C / groups, kh, kw)."""
        if self._codes is None:
            assert self._values is not None
            codes = quantize_weights(self._values, self.scales)
            self._codes = np.ascontiguousarray(codes[:, :, None, None] if codes.ndim == 2 else codes)
        return self._codes

    def packed(
        self,
        config: ArrayConfig,
        geometry: LayerGeometry,
        signed: bool,
        orders: Sequence[np.ndarray] | None,
    ) -> PackedConv:
        """Return the weights packed for an array with its threads; looked up where they were before."""
        key = (config, geometry, signed)
        if key not in self._packed:
            self._packed[key] = PackedConv(
                self.codes,
                config,
                stride=geometry.stride,
                padding=geometry.padding,
                dilation=geometry.dilation,
                groups=geometry.groups,
                signed=signed,
                order=orders,
            )
        return self._packed[key]


def _content_key(weight: torch.Tensor) -> tuple[Any, ...]:
    """Tell weights apart by content, which sees every change, also those made through ``.data``."""
    last = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    dense = weight.permute(0, 2, 3, 1) if last else weight.contiguous()
    return fingerprint(dense.numpy(), torch.get_num_threads()), weight.shape, last

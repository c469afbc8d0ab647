"""What one layer of an attached network has counted since the last reset."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import torch

from sysmt.config import ArrayConfig
from sysmt.hw.gemm import gemm_stats
from sysmt.hw.stats import Counters, GemmStats
from sysmt.nn.array.lowering import LayerGeometry, Pair
from sysmt.quant.error import sqnr_db_from_energies

__all__ = ["LayerCounts"]


class LayerCounts:
    """Images, GEMMs, counters and errors of one layer.

    Attributes
    ----------
    images : int
    gemm_shape : (int, int, int) or None
        M, N, K of one GEMM of the last forward; None before any.
    sizes : Counter of (LayerGeometry, (int, int))
        Images by the layer's geometry and the output rows and columns that it gave them.
    stats : GemmStats
        Summed over images and groups.
    """

    def __init__(self, threads: int) -> None:
        self.images = 0
        self.gemm_shape: tuple[int, int, int] | None = None
        self.sizes: Counter[tuple[LayerGeometry, Pair]] = Counter()
        self.stats = GemmStats((0,) * (threads + 1))
        self._signal_energy = self._noise_energy = 0.0
        self._outputs = 0

    def add(
        self,
        counters: Counters,
        geometry: LayerGeometry,
        out_size: Pair,
        images: int,
        config: ArrayConfig,
    ) -> None:
        """Count a forward of `images` images; in float the counters are empty and `config` has one thread."""
        m, n, k = math.prod(out_size), geometry.gemm_n, geometry.gemm_k
        self.gemm_shape = (m, n, k)
        self.images += images
        self.sizes[geometry, out_size] += images
        self.stats += gemm_stats(counters, m, n, k, config, images * geometry.groups)

    def add_products(
        self, products: Iterable[tuple[int, int, int, int]], images: int, config: ArrayConfig
    ) -> None:
        """Count GEMMs that torch has computed, each (M, N, K, how many); `config` has one thread."""
        for m, n, k, count in products:
            self.gemm_shape = (m, n, k)
            self.stats += gemm_stats(Counters(()), m, n, k, config, count)
        self.images += images

    def compare(self, y: torch.Tensor, exact: torch.Tensor) -> None:
        """Note how far an output is from that of T = 1."""
        signal = exact.double()
        self._signal_energy += float(signal.square().sum())
        self._noise_energy += float((y.double() - signal).square().sum())
        self._outputs += y.numel()

    @property
    def compared(self) -> bool:
        """Whether anything was compared with T = 1."""
        return self._outputs > 0

    @property
    def mse(self) -> float:
        """Mean squared difference to the same layer at T = 1; NaN before anything ran."""
        return self._noise_energy / self._outputs if self._outputs else math.nan

    @property
    def sqnr_db(self) -> float:
        """Ratio of the T = 1 output's energy to that difference, in dB; NaN before anything ran."""
        return sqnr_db_from_energies(self._signal_energy, self._noise_energy) if self._outputs else math.nan

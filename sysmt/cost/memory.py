"""SRAM and DRAM traffic of a GEMM on the array, the bandwidth that it needs, and stalls where it has less.

The model, word by word of one byte per operand:

- **SRAM to array.** Every tile reads its rows' activations and its columns' weights once, slot by slot;
  padding of edge tiles and of K is not read. Each of the T threads of a PE row takes an operand per cycle,
  so an edge of R rows reads up to T·R words a cycle. Totals do not depend on T: M·K·⌈N/C⌉, N·K·⌈M/R⌉, and
  M·N outputs.
- **DRAM to SRAM.** Each SRAM is double-buffered: one half works, the other is filled. What is in the working
  half stays there as long as it fits, and goes least recently used first, a tile's share (its *strip*) at a
  time. An operand that fits whole is fetched once. Input pixels of a convolution lie in the SRAM once, with
  all their channels, padding included; windows that overlap share them. Within a tile a pixel is fetched
  once, also where the strip does not fit: K runs channel by channel, which keeps a pixel's uses together.
- **Tile order.** Which operand is swept again and again: `TileOrder`.
- **Outputs** are complete when they leave the array: each is written once, in `output_bytes` bytes.
- **Time.** While a tile computes, the next tile's operands are fetched and the last tile's outputs are
  written, each over an interface of its own; a tile takes as long as the slowest of these. The first tile's
  operands come before cycle 0 and the last tile's outputs leave at the end: neither is a stall.

Limits: prefetching looks one tile ahead only; no row buffers, banks, refresh or contention; images and groups
share nothing, weights are fetched anew for each image.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from sysmt.config import ArrayConfig, Drain, parse_count, parse_name
from sysmt.cost.layer_shape import Layer
from sysmt.cost.shared_pixels import Windows
from sysmt.errors import ConfigError
from sysmt.hw.timing import slot_count

__all__ = ["Bandwidth", "Memory", "Prefetch", "TileOrder", "Traffic", "layer_traffic"]

CALC_READ_BANDWIDTH = 10
"""Bytes per cycle at which the first tile is fetched when no bandwidth is given: SCALE-Sim's own number."""


class TileOrder(StrEnum):
    """Which loop over tiles is the outer one."""

    ROWS_OUTER = "rows-outer"
    COLUMNS_OUTER = "columns-outer"


class Bandwidth(NamedTuple):
    """DRAM bandwidth of each operand's interface, bytes per cycle."""

    ifmap: float
    filter: float
    ofmap: float


class Prefetch(NamedTuple):
    """Cycles to fetch the first tile's operands, side by side."""

    ifmap: int
    filter: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """What lies between the array and DRAM.

    Attributes
    ----------
    ifmap_kib, filter_kib, ofmap_kib : int
        SRAM of activations, weights and outputs, KiB of 1,024 bytes, at least 1; half of each is the
        working half. The defaults are SCALE-Sim's.
    bandwidth : Bandwidth or None
        DRAM bandwidth, bytes per cycle; None is as much as needed, so that nothing stalls.
    tile_order : TileOrder
        ``"columns-outer"``: a tile column's weights stay while all activations pass, as in SCALE-Sim.
        ``"rows-outer"``: a tile row's activations stay while all weights pass. Neither changes a
        result or, without stalls, a cycle.
    output_bytes : int
        Bytes of an output as written: 1 (requantised at the array's edge) to 4 (the accumulator).

    Raises
    ------
    ConfigError
        If a value is outside what is listed above.
    """

    ifmap_kib: int = 256
    filter_kib: int = 256
    ofmap_kib: int = 128
    bandwidth: Bandwidth | None = None
    tile_order: TileOrder = TileOrder.COLUMNS_OUTER
    output_bytes: int = 1

    def __post_init__(self) -> None:
        for field in ("ifmap_kib", "filter_kib", "ofmap_kib", "output_bytes"):
            object.__setattr__(self, field, parse_count(getattr(self, field), field))
        if self.output_bytes > 4:
            raise ConfigError(f"output_bytes={self.output_bytes} is too large; an accumulator has 4")
        object.__setattr__(self, "tile_order", parse_name(TileOrder, self.tile_order, "tile_order"))
        if self.bandwidth is not None:
            bandwidth = Bandwidth(*self.bandwidth)
            for name, value in bandwidth._asdict().items():
                if not (math.isfinite(value) and value > 0):
                    raise ConfigError(
                        f"bandwidth {name}={value} must be a positive number of bytes per cycle"
                    )
            object.__setattr__(self, "bandwidth", bandwidth)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one GEMM moves, and how long it waits for it.

    Attributes
    ----------
    sram_ifmap_reads, sram_filter_reads, sram_ofmap_writes : int
        Words between the SRAMs and the array.
    dram_ifmap_bytes, dram_filter_bytes, dram_ofmap_bytes : int
        Bytes read for the operands and written for the outputs.
    compute_cycles, stall_cycles : int
        Cycles of the array at work, drains included, and of the array waiting.
    prefetch_cycles : Prefetch
        To fetch the first tile's operands, before cycle 0.
    writeback_cycles : int
        To write the last tile's outputs.
    required : Bandwidth
        Bytes per cycle with which no tile would wait: the largest fetch (write) for a single tile
        over the cycles of the tile that it runs beside. 0 where a single tile leaves nothing to overlap.
    sram_peak_words : int
        Most words that an operand's SRAM must deliver in one cycle: T times the rows or columns in use.
    first_tile_end, last_tile_start : int
        Cycle after the first tile, its waiting included; cycle in which the last tile starts.
    ifmap_fetch_end, filter_fetch_end : int
        Cycle of the last operand fetch; -1 if all came before cycle 0.
    """

    sram_ifmap_reads: int
    sram_filter_reads: int
    sram_ofmap_writes: int
    dram_ifmap_bytes: int
    dram_filter_bytes: int
    dram_ofmap_bytes: int
    compute_cycles: int
    stall_cycles: int
    prefetch_cycles: Prefetch
    writeback_cycles: int
    required: Bandwidth
    sram_peak_words: int
    first_tile_end: int
    last_tile_start: int
    ifmap_fetch_end: int
    filter_fetch_end: int

    @property
    def cycles(self) -> int:
        """Compute and stall cycles."""
        return self.compute_cycles + self.stall_cycles

    @property
    def overall_cycles(self) -> int:
        """From the first fetch to the last write."""
        return max(self.prefetch_cycles) + self.cycles + self.writeback_cycles


def layer_traffic(layer: Layer, config: ArrayConfig, memory: Memory) -> Traffic:
    """Work out the traffic and stalls of one GEMM (one image, one group).

    Parameters
    ----------
    layer : Layer
    config : ArrayConfig
        Rows, columns, threads and drain matter.
    memory : Memory

    Returns
    -------
    Traffic
    """
    return _traffic(layer.renamed(""), config, memory)


@functools.lru_cache(maxsize=1024)
def _traffic(layer: Layer, config: ArrayConfig, memory: Memory) -> Traffic:
    rows = _strip_lengths(layer.m, config.rows)
    cols = _strip_lengths(layer.n, config.cols)
    row_strips = _row_strips(layer, config.rows, memory.ifmap_kib * 512)
    col_strips = _Strips(cols * layer.k, cols * layer.k, layer.n * layer.k <= memory.filter_kib * 512)
    col_strips = col_strips.that_fit(memory.filter_kib * 512)
    bandwidth = memory.bandwidth or Bandwidth(math.inf, math.inf, math.inf)
    compute_cycles = slot_count(layer.k, config.threads) + config.rows + config.cols - 2
    compute_cycles += config.rows if config.drain is Drain.SERIAL else 0
    by_rows = _Operand(row_strips, rows, bandwidth.ifmap)
    by_cols = _Operand(col_strips, cols, bandwidth.filter)
    rows_outer = memory.tile_order is TileOrder.ROWS_OUTER
    outer, inner = (by_rows, by_cols) if rows_outer else (by_cols, by_rows)
    sweeps = _Sweeps(outer, inner, bandwidth.ofmap, memory.output_bytes, compute_cycles)
    ifmap, weights = (sweeps.outer, sweeps.inner) if rows_outer else (sweeps.inner, sweeps.outer)
    drain_end_cycles = config.rows if config.drain is Drain.OVERLAPPED else 0
    before = memory.bandwidth or Bandwidth(CALC_READ_BANDWIDTH, CALC_READ_BANDWIDTH, config.cols)
    last_bytes = int(rows[-1] * cols[-1]) * memory.output_bytes
    return Traffic(
        sram_ifmap_reads=layer.m * layer.k * len(cols),
        sram_filter_reads=layer.n * layer.k * len(rows),
        sram_ofmap_writes=layer.m * layer.n,
        dram_ifmap_bytes=ifmap.total,
        dram_filter_bytes=weights.total,
        dram_ofmap_bytes=layer.m * layer.n * memory.output_bytes,
        compute_cycles=compute_cycles * len(rows) * len(cols) + drain_end_cycles,
        stall_cycles=sweeps.cycles - compute_cycles * len(rows) * len(cols),
        prefetch_cycles=Prefetch(
            _cycles_for(row_strips.fetched[0], before.ifmap),
            _cycles_for(col_strips.fetched[0], before.filter),
        ),
        writeback_cycles=_cycles_for(last_bytes, before.ofmap),
        required=Bandwidth(
            *(most / compute_cycles for most in (ifmap.most, weights.most, sweeps.most_written))
        ),
        sram_peak_words=min(config.threads, layer.k) * int(max(rows[0], cols[0])),
        first_tile_end=sweeps.tile(0, 0)[1],
        last_tile_start=sweeps.tile(sweeps.shape[0] - 1, sweeps.shape[1] - 1)[0],
        ifmap_fetch_end=ifmap.end,
        filter_fetch_end=weights.end,
    )


class _Operand(NamedTuple):
    """Strips of an operand, how many rows (columns) of outputs each belongs to, and its DRAM bandwidth."""

    strips: _Strips
    lengths: np.ndarray
    bandwidth: float


class _Fetches(NamedTuple):
    """Of one operand's interface: bytes in all, the most beside one tile, and the cycle of the last fetch."""

    total: int
    most: int
    end: int


class _Sweeps:
    """All tiles in order: for each strip of the outer operand, a sweep over all strips of the inner one.

    Most sweeps are alike. Each kind is worked out once, tile by tile, so that the work grows with the number
    of strips and not with that of tiles.
    """

    def __init__(
        self,
        outer_operand: _Operand,
        inner_operand: _Operand,
        output_bandwidth: float,
        output_bytes: int,
        compute_cycles: int,
    ) -> None:
        outer, outer_lengths, outer_bandwidth = outer_operand
        inner, inner_lengths, inner_bandwidth = inner_operand
        self.shape = sweeps, tiles = len(outer_lengths), len(inner_lengths)
        again = np.where(outer.fits, 0, outer.footprint)  # fetched once more for each further tile of a sweep
        numbers = np.arange(sweeps)
        following = np.append(outer.fetched[1:], 0)
        kinds, self._kind = np.unique(
            np.stack(
                [
                    again,
                    following,
                    outer_lengths,
                    np.append(0, outer_lengths[:-1]),  # of the sweep before
                    numbers == 0,
                    numbers == sweeps - 1,
                ]
            ),
            axis=1,
            return_inverse=True,
        )
        self._kind = self._kind.reshape(-1)
        first_of_inner = 0 if inner.stays else int(inner.fetched[0])
        self._took: list[np.ndarray] = []
        most = [0, 0, 0]
        for once_more, next_outer, length, length_before, is_first, is_last in kinds.T.tolist():
            # Beside each tile: what the next one needs, and what the one before has made.
            beside_outer = np.append(np.full(tiles - 1, once_more), next_outer)
            beside_inner = np.zeros(tiles, np.int64)
            if is_first or not inner.stays:
                beside_inner[:-1] = inner.fetched[1:]
            beside_inner[-1] = 0 if is_last else first_of_inner
            written = np.append(length_before * inner_lengths[-1], length * inner_lengths[:-1]) * output_bytes
            took = np.full(tiles, compute_cycles)
            moved = (beside_outer, beside_inner, written)
            for index, bandwidth in enumerate((outer_bandwidth, inner_bandwidth, output_bandwidth)):
                took = np.maximum(took, np.ceil(moved[index] / bandwidth).astype(np.int64))
                most[index] = max(most[index], int(moved[index].max()))
            self._took.append(took)
        totals = np.array([int(took.sum()) for took in self._took])[self._kind]
        self._starts = np.cumsum(totals) - totals
        self.cycles = int(totals.sum())
        self.most_written = most[2]
        sweeps_of_inner = 1 if inner.stays else sweeps
        self.outer = _Fetches(
            int(outer.fetched.sum()) + (tiles - 1) * int(again.sum()),
            most[0],
            self._end(_last_outer(outer.fetched, again, tiles), outer_bandwidth),
        )
        self.inner = _Fetches(
            sweeps_of_inner * int(inner.fetched.sum()),
            most[1],
            self._end(_last_inner(inner.fetched, sweeps_of_inner), inner_bandwidth),
        )

    def tile(self, sweep: int, tile: int) -> tuple[int, int]:
        """Return the cycle in which a tile starts, and the one after its last."""
        took = self._took[self._kind[sweep]]
        start = int(self._starts[sweep]) + int(took[:tile].sum())
        return start, start + int(took[tile])

    def _end(self, last: tuple[int, int, int], bandwidth: float) -> int:
        """Return the last cycle of a fetch for a tile; without a limit it takes all of the tile before."""
        sweep, tile, fetched = last
        if fetched == 0 or (sweep, tile) == (0, 0):
            return -1
        start, end = self.tile(sweep, tile - 1) if tile else self.tile(sweep - 1, self.shape[1] - 1)
        return (end if math.isinf(bandwidth) else start + _cycles_for(fetched, bandwidth)) - 1


def _last_outer(fetched: np.ndarray, again: np.ndarray, tiles: int) -> tuple[int, int, int]:
    """Return sweep, tile and bytes of the outer operand's last fetch."""
    any_again = (again > 0) & (tiles > 1)
    where = np.flatnonzero((fetched > 0) | any_again)
    if not where.size:
        return 0, 0, 0
    sweep = int(where[-1])
    return (sweep, tiles - 1, int(again[sweep])) if any_again[sweep] else (sweep, 0, int(fetched[sweep]))


def _last_inner(fetched: np.ndarray, sweeps: int) -> tuple[int, int, int]:
    """Return sweep, tile and bytes of the inner operand's last fetch."""
    where = np.flatnonzero(fetched)
    return (sweeps - 1, int(where[-1]), int(fetched[where[-1]])) if where.size else (0, 0, 0)


def _strip_lengths(total: int, at_once: int) -> np.ndarray:
    """Rows (or columns) of each tile row (or column) of tiles, int64; only the last may be short."""
    lengths = np.full(-(-total // at_once), at_once, np.int64)
    lengths[-1] = total - at_once * (lengths.size - 1)
    return lengths


def _cycles_for(moved_bytes: float, bandwidth: float) -> int:
    return math.ceil(float(moved_bytes) / bandwidth)


@dataclasses.dataclass(frozen=True)
class _Strips:
    """The shares of an operand that the tiles of one sweep need, in bytes.

    ``footprint[i]``: all of strip i. ``fetched[i]``: what of it is not in the working half when it comes
    after strip i - 1 of the same sweep. ``stays``: the operand fits whole. ``fits[i]``: strip i fits.
    """

    footprint: np.ndarray
    fetched: np.ndarray
    stays: bool
    fits: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, bool))

    def that_fit(self, capacity_bytes: int) -> _Strips:
        return dataclasses.replace(self, fits=self.footprint <= capacity_bytes)


def _row_strips(layer: Layer, rows: int, capacity_bytes: int) -> _Strips:
    """Find out which input pixels the tiles' rows share, and which of them are still there when needed.

    Strip i finds the pixels of the strips `oldest` .. i - 1 in the working half, where `oldest` is the first
    whose pixels fit there together with all that follow, up to its own.
    """
    return _shared_strips(layer.renamed(""), rows, capacity_bytes)


@functools.lru_cache(maxsize=256)
def _shared_strips(layer: Layer, rows: int, capacity_bytes: int) -> _Strips:
    windows, strip = Windows(layer), np.arange(-(-layer.m // rows))

    def pixels(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        return windows.pixels(first * rows, np.minimum((last + 1) * rows, layer.m) - 1)

    capacity = capacity_bytes // layer.channels  # in pixels
    low, high = np.zeros_like(strip), strip + 1  # more strips together never are fewer pixels: halve
    while (low < high).any():
        middle = (low + high) // 2
        fits = (middle > strip) | (pixels(np.minimum(middle, strip), strip) <= capacity)
        low, high = np.where(fits, low, middle + 1), np.where(fits, middle, high)
    oldest = np.minimum(low, strip)  # a strip that does not fit alone is fetched whole
    footprint = pixels(strip, strip)
    fetched = np.where(low > strip, footprint, pixels(oldest, strip) - pixels(oldest, strip - 1))
    stays = int(pixels(strip[:1], strip[-1:])[0]) <= capacity
    strips = _Strips(footprint * layer.channels, fetched * layer.channels, stays)
    return strips.that_fit(capacity_bytes)

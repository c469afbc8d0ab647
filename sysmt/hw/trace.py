"""One tile, cycle by cycle: what every PE does, as CSV and as VCD.

The cycle engine runs the tile and says how busy the array is; what each PE holds in each cycle is replayed
beside it, register by register, and must agree with the engine, cycle by cycle and PE by PE.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
import numpy.typing as npt
from vcd import VCDWriter

from sysmt.config import ArrayConfig, parse_count
from sysmt.errors import ConfigError
from sysmt.hw import cycle
from sysmt.hw.activity import Activity
from sysmt.hw.operands import apply_order, check_operands, split_threads
from sysmt.hw.slots import work_slots

__all__ = ["TileCycle", "TileTrace", "trace_tile"]

CSV_COLUMNS = (
    "cycle",
    "phase",
    "busy_pes",
    "active_pes",
    "active_threads",
    "collisions",
    "reduced_activations",
    "reduced_weights",
    "utilization",
)


@dataclasses.dataclass(frozen=True, eq=False)
class TileCycle:
    """What all PEs do in one cycle; arrays are (R, C).

    Attributes
    ----------
    cycle : int
        From 0, when the first operands enter.
    draining : bool
        Whether accumulators shift out in this cycle.
    slot : ndarray, intp
        Slot that the PE works on, or -1.
    operands : ndarray, uint64
        The PE's slot register: thread t's activation in bits 16t..16t+7, its weight in the 8 bits above.
    active, reduced_activations, reduced_weights : ndarray, uint8
        Bit t is thread t: both operands non-zero; operand selected for reduction.
    collision : ndarray, bool
        Two or more active threads.
    accumulator : ndarray, int32
        At the end of the cycle.
    """

    cycle: int
    draining: bool
    slot: np.ndarray
    operands: np.ndarray
    active: np.ndarray
    reduced_activations: np.ndarray
    reduced_weights: np.ndarray
    collision: np.ndarray
    accumulator: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class TileTrace:
    """One tile of a GEMM, ready to be replayed.

    Attributes
    ----------
    config : ArrayConfig
    tile : (int, int)
        Which row and column of tiles.
    a_mtl : ndarray (m, T, L)
        Activations of the tile's rows, cut into slots.
    b_tln : ndarray (T, L, n)
        Weights of its columns.
    activity : Activity
        What the cycle engine saw of this tile.
    """

    config: ArrayConfig
    tile: tuple[int, int]
    a_mtl: np.ndarray
    b_tln: np.ndarray
    activity: Activity

    @property
    def cycles(self) -> int:
        """Cycles of the tile, its drain included."""
        return self.activity.cycles

    def replay(self) -> Iterator[TileCycle]:
        """Go through the cycles one by one."""
        rows, cols = self.config.rows, self.config.cols
        m, _, slots = self.a_mtl.shape
        n = self.b_tln.shape[2]
        computing = slots + rows + cols - 2
        # Slot that PE (i, j) would work on in cycle 0: it comes i + j cycles late.
        delay = np.add.outer(np.arange(rows), np.arange(cols))
        used = (np.arange(rows) < m)[:, None] & (np.arange(cols) < n)
        a_ltm = np.zeros((slots, self.config.threads, rows), np.int64)
        b_ltn = np.zeros((slots, self.config.threads, cols), np.int64)
        a_ltm[:, :, :m] = self.a_mtl.transpose(2, 1, 0)
        b_ltn[:, :, :n] = self.b_tln.transpose(1, 0, 2)
        row, col = np.indices((rows, cols))
        accumulator = np.zeros((rows, cols), np.int64)
        for tick in range(self.cycles):
            draining = tick >= computing
            at = tick - delay
            working = used & (at >= 0) & (at < slots) & (not draining)
            held = np.clip(at, 0, slots - 1)
            a_rct = a_ltm[held, :, row] * working[..., None]
            b_rct = b_ltn[held, :, col] * working[..., None]
            slots_rc = work_slots(a_rct, b_rct, self.config, self.a_mtl.dtype == np.int8)
            active = _bits(slots_rc.active)
            if draining:
                accumulator = np.vstack([np.zeros((1, cols), np.int64), accumulator[:-1]])
            accumulator = accumulator + slots_rc.value
            yield TileCycle(
                tick,
                draining,
                np.where(working, at, -1),
                _packed(a_rct, b_rct),
                active,
                _bits(slots_rc.reduced_activations),
                _bits(slots_rc.reduced_weights),
                _ones(active) > 1,
                accumulator.astype(np.int32),
            )

    def write_csv(self, file: IO[str]) -> None:
        """Write a line per cycle: what all PEs together do.

        ``cycle, phase`` (compute or drain), ``busy_pes`` (working on a slot), ``active_pes`` (with an active
        thread), ``active_threads``, ``collisions`` (PEs with two or more of them), ``reduced_activations``,
        ``reduced_weights`` (operands), ``utilization`` (active PEs over all PEs, in [0, 1]).

        Raises
        ------
        RuntimeError
            If the replay differs from the cycle engine, which is a bug.
        """
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for seen in self._checked_replay():
            active_pes = int((seen.active > 0).sum())
            writer.writerow(
                [
                    seen.cycle,
                    "drain" if seen.draining else "compute",
                    int((seen.slot >= 0).sum()),
                    active_pes,
                    int(_ones(seen.active).sum()),
                    int(seen.collision.sum()),
                    int(_ones(seen.reduced_activations).sum()),
                    int(_ones(seen.reduced_weights).sum()),
                    active_pes / seen.active.size,
                ]
            )

    def write_vcd(
        self,
        file: IO[str],
        first: int = 0,
        last: int | None = None,
        after_cycle: Callable[[], object] = lambda: None,
    ) -> None:
        """Write the waveform, as GTKWave and other viewers open it.

        One cycle is 2 ns, the clock's rising edge at its start. Each PE is a scope ``array.row_i.pe_i_j``
        with ``slot`` (32 bits, z where the PE has none), ``operands`` (its slot register, 16 bits per thread:
        weight, activation), ``active``, ``reduced_activations``,
        ``reduced_weights`` (a bit per thread), ``collision``, ``reduce`` (1 bit) and ``accumulator`` (32
        bits, two's complement).

        Parameters
        ----------
        file : text file
        first, last : int
            Cycles to write, both included; by default all.
        after_cycle : callable
            Called after each cycle of the tile, written or not: a progress bar's.

        Raises
        ------
        ConfigError
            If the cycles are not in the tile.
        RuntimeError
            If the replay differs from the cycle engine, which is a bug.
        """
        last = self.cycles - 1 if last is None else parse_count(last, "last", 0)
        if not parse_count(first, "first", 0) <= last < self.cycles:
            raise ConfigError(f"cycles {first}..{last} are not in the tile, which has 0..{self.cycles - 1}")
        threads = self.config.threads
        shape = (self.config.rows, self.config.cols)
        comment = f"tile {self.tile[0]},{self.tile[1]}; {self.config.to_record()}"
        with VCDWriter(file, timescale="1 ns", date="", version="sysmt", comment=comment) as writer:
            clock = writer.register_var("array", "clock", "wire", size=1, init=0)
            sizes = {
                "slot": 32,
                "operands": 16 * threads,
                "active": threads,
                "collision": 1,
                "reduce": 1,
                "reduced_activations": threads,
                "reduced_weights": threads,
                "accumulator": 32,
            }
            masks = [(1 << size) - 1 for size in sizes.values()]
            variables = [
                [
                    writer.register_var(f"array.row_{i}.pe_{i}_{j}", name, "wire", size=size, init="x")
                    for name, size in sizes.items()
                ]
                for i, j in np.ndindex(shape)
            ]
            before: np.ndarray | None = None
            for seen in self._checked_replay():
                if first <= seen.cycle <= last:
                    time_ns = 2 * seen.cycle
                    writer.change(clock, time_ns, 1)
                    signals = _signals(seen)
                    # Most PEs of a large array are idle most of the time: only changes are written, and not
                    # through the writer, which takes microseconds for each, but for the initial values.
                    initial = before is None
                    changed = np.ones(signals.shape, bool) if before is None else signals != before
                    if before is not None:  # from a value to none, or back, is a change of the operands, too
                        changed[:, 1] |= (signals[:, 0] < 0) != (before[:, 0] < 0)
                    before = signals
                    columns = (*(place.tolist() for place in np.nonzero(changed)), signals[changed].tolist())
                    idle = (signals[:, 0] < 0).tolist()
                    lines = []
                    for pe, signal, value in zip(*columns, strict=True):
                        variable, none = variables[pe][signal], signal < 2 and idle[pe]
                        if initial:
                            writer.change(variable, time_ns, "z" if none else value & masks[signal])
                            continue
                        bits = "z" if none else f"{value & masks[signal]:b}"
                        is_scalar = masks[signal] == 1
                        lines.append(
                            f"{bits}{variable.ident}\n" if is_scalar else f"b{bits} {variable.ident}\n"
                        )
                    file.write("".join(lines))
                    writer.change(clock, time_ns + 1, 0)
                after_cycle()

    def _checked_replay(self) -> Iterator[TileCycle]:
        """Replay, and compare with the cycle engine on the way."""
        activity = self.activity
        collisions = np.zeros_like(activity.collisions_rc)
        for seen in self.replay():
            busy, active = int((seen.slot >= 0).sum()), int((seen.active > 0).sum())
            if (busy, active) != (activity.busy_pes[seen.cycle], activity.active_pes[seen.cycle]):
                raise RuntimeError(f"cycle {seen.cycle}: the replay differs from the cycle engine")
            collisions += seen.collision
            yield seen
        if not np.array_equal(collisions, activity.collisions_rc):
            raise RuntimeError("collisions per PE: the replay differs from the cycle engine")


def _signals(seen: TileCycle) -> np.ndarray:
    """Values of the signals of all PEs, row by row: int64 (PEs, 8); of 64 bits, unsigned ones wrap."""
    columns = (
        seen.slot,
        seen.operands.view(np.int64),
        seen.active,
        seen.collision,
        (seen.reduced_activations | seen.reduced_weights) > 0,
        seen.reduced_activations,
        seen.reduced_weights,
        seen.accumulator,
    )
    return np.stack([column.ravel().astype(np.int64) for column in columns], axis=1)


def _bits(flags: np.ndarray) -> np.ndarray:
    """Pack flags (R, C, T) into one number per PE, bit t for thread t."""
    return np.packbits(flags, axis=2, bitorder="little")[:, :, 0]


def _packed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pack operands (R, C, T) as the slot register holds them: 16 bits per thread, thread 0 lowest."""
    pairs = (a & 255 | (b & 255) << 8).astype(np.uint64)
    shifts = 16 * np.arange(a.shape[2], dtype=np.uint64)
    packed: np.ndarray = np.bitwise_or.reduce(pairs << shifts, axis=2)
    return packed


@functools.cache
def _ones_table() -> np.ndarray:
    return np.array([bin(value).count("1") for value in range(16)], np.int64)


def _ones(bits: np.ndarray) -> np.ndarray:
    counts: np.ndarray = _ones_table()[bits]
    return counts


def trace_tile(
    a_mk: npt.ArrayLike,
    b_kn: npt.ArrayLike,
    config: ArrayConfig,
    tile: tuple[int, int] = (0, 0),
    order: npt.ArrayLike | None = None,
) -> TileTrace:
    """Run one tile of a GEMM through the cycle engine, to be looked at closely.

    Parameters
    ----------
    a_mk : array (M, K), uint8 or int8
    b_kn : array (K, N), int8
    config : ArrayConfig
    tile : (int, int)
        Row and column of tiles, from 0.
    order : array of int, optional
        Permutation of K, as `sysmt.simulate_gemm` takes it.

    Returns
    -------
    TileTrace

    Raises
    ------
    OperandError
        If the operands or the order do not fit.
    ConfigError
        If there is no such tile.
    """
    a, b = check_operands(a_mk, b_kn)
    tiles = (-(-a.shape[0] // config.rows), -(-b.shape[1] // config.cols)) if a.shape[1] else (0, 0)
    index = (parse_count(tile[0], "tile row", 0), parse_count(tile[1], "tile column", 0))
    if index[0] >= tiles[0] or index[1] >= tiles[1]:
        raise ConfigError(
            f"tile {index[0]},{index[1]} is not there: the GEMM has {tiles[0]} x {tiles[1]} tiles"
        )
    a, b = apply_order(a, b, order, config.threads)
    a = a[index[0] * config.rows :][: config.rows]
    b = b[:, index[1] * config.cols :][:, : config.cols]
    _, _, activity = cycle.simulate(a, b, config)
    a_mtl, b_tln = split_threads(a, b, config.threads)
    return TileTrace(config, index, a_mtl, b_tln, activity)

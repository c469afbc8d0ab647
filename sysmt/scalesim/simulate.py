"""Layers of a topology on the array: operands are drawn or read, simulated, and counted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from sysmt.config import ArrayConfig, parse_count
from sysmt.cost.energy import EnergyTable
from sysmt.cost.events import EventCounts, count_events
from sysmt.cost.layer_shape import Layer
from sysmt.cost.memory import Memory, Traffic, layer_traffic
from sysmt.errors import ConfigError, OperandError
from sysmt.hw.gemm import simulate_gemm
from sysmt.hw.operands import MAX_K
from sysmt.hw.stats import GemmStats
from sysmt.scalesim.text_file import LARGEST

__all__ = ["LayerResult", "draw_matrices", "draw_operands", "read_matrix", "read_operands", "simulate_layer"]

SPREAD = 4.0
"""Standard deviations from 0 to the largest code, in drawn operands."""

DRAWN_AT_ONCE = 2**20
"""Values drawn at a time: in float64, before they are codes of one byte."""

Operands = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """One layer, simulated.

    Attributes
    ----------
    layer : Layer
    config : ArrayConfig
    memory : Memory
    stats : GemmStats
    traffic : Traffic
        Of the array as configured.
    single_thread_traffic : Traffic
        Of the same array with one thread, memory and drain unchanged.
    events : EventCounts
    energy : dict of str to float
        By what spends it, in the table's unit.
    area : float or None
        As the table gives it.
    """

    layer: Layer
    config: ArrayConfig
    memory: Memory
    stats: GemmStats
    traffic: Traffic
    single_thread_traffic: Traffic
    events: EventCounts
    energy: dict[str, float]
    area: float | None

    @property
    def total_energy(self) -> float:
        """Energy in the table's unit."""
        return sum(self.energy.values())

    @property
    def speedup_cycles(self) -> float:
        """Cycles at T = 1 over cycles at T; both include their stalls."""
        return self.single_thread_traffic.cycles / self.traffic.cycles

    @property
    def speedup_compute_cycles(self) -> float:
        """Compute cycles at T = 1 over compute cycles at T: the speedup if nothing stalled."""
        return self.single_thread_traffic.compute_cycles / self.traffic.compute_cycles

    @property
    def energy_delay(self) -> float:
        """Energy times cycles, stalls included."""
        return self.total_energy * self.traffic.cycles


def simulate_layer(
    layer: Layer,
    operands: Operands,
    config: ArrayConfig,
    memory: Memory,
    table: EnergyTable,
    cpu_threads: int = 1,
) -> LayerResult:
    """Run one layer on the array, and derive traffic, events and energy.

    Parameters
    ----------
    layer : Layer
    operands : (ndarray (M, K), ndarray (K, N))
        As `sysmt.simulate_gemm` takes them.
    config : ArrayConfig
    memory : Memory
    table : EnergyTable
    cpu_threads : int
        The result does not depend on it.

    Raises
    ------
    OperandError
        Naming the layer, if the operands do not fit it, or K is too large.
    """
    a, b = operands
    if a.shape != (layer.m, layer.k) or b.shape != (layer.k, layer.n):
        raise OperandError(
            f"layer {layer.name!r}: operands have shapes {a.shape} and {b.shape}; "
            f"({layer.m}, {layer.k}) and ({layer.k}, {layer.n}) are needed"
        )
    try:
        stats = simulate_gemm(a, b, config, cpu_threads=cpu_threads).stats
    except OperandError as error:
        raise OperandError(f"layer {layer.name!r}: {error}") from None
    events = count_events(stats, {layer: 1}, config, memory)
    return LayerResult(
        layer,
        config,
        memory,
        stats,
        layer_traffic(layer, config, memory),
        layer_traffic(layer, config.replace(threads=1), memory),
        events,
        table.energy(events, config, memory),
        table.area(config),
    )


def draw_operands(
    layer: Layer, activation_density: float, weight_density: float, seed: int | Iterable[int] = 0
) -> Operands:
    """Draw operands that look like a trained layer's.

    Input pixels are half-normal in 1..255 and weights normal in ±1..±127, the largest code at four
    standard deviations; each is zero with probability 1 - density. Where the layer has an N:M density, all
    but N of every M weights in a row along K are zero besides. Overlapping windows share their pixels.

    Parameters
    ----------
    layer : Layer
    activation_density, weight_density : float
        Share of non-zero values, in [0, 1].
    seed : int or iterable of int

    Returns
    -------
    a_mk : uint8 ndarray (M, K)
    b_kn : int8 ndarray (K, N)

    Raises
    ------
    ConfigError
        If a density is outside [0, 1] or the seed is negative.
    """
    _check_densities(activation_density, weight_density)
    seeds = [parse_count(part, "seed", minimum=0) for part in ([seed] if isinstance(seed, int) else seed)]
    rng = np.random.default_rng(seeds)
    pixels = _draw_activations((layer.channels, *layer.ifmap), activation_density, rng)
    weights = _draw_weights((layer.k, layer.n), weight_density, rng)
    if layer.density[0] < layer.density[1]:
        _prune(weights, layer.density, rng)
    return layer.im2col(pixels), weights


def draw_matrices(
    m: int, n: int, k: int, activation_density: float, weight_density: float, seed: int = 0
) -> Operands:
    """Draw the operands of a GEMM without windows, distributed as those of `draw_operands`.

    Parameters
    ----------
    m, n, k : int
        At least 0.
    activation_density, weight_density : float
        Share of non-zero values, in [0, 1].
    seed : int

    Returns
    -------
    a_mk : uint8 ndarray (M, K)
    b_kn : int8 ndarray (K, N)

    Raises
    ------
    ConfigError
        If a size is negative or above 2,147,483,647, or a density outside [0, 1].
    OperandError
        If K is above 65,535.
    """
    if k > MAX_K:  # before so much is drawn
        raise OperandError(f"K={k} is too large; it must be at most {MAX_K}")
    for field, size in (("m", m), ("n", n), ("k", k)):
        parse_count(size, field, minimum=0, maximum=LARGEST)
    parse_count(seed, "seed", minimum=0)
    _check_densities(activation_density, weight_density)
    rng = np.random.default_rng(seed)
    a_mk = _draw_activations((m, k), activation_density, rng)
    return a_mk, _draw_weights((k, n), weight_density, rng)


def _check_densities(activation_density: float, weight_density: float) -> None:
    for field, density in (("activation_density", activation_density), ("weight_density", weight_density)):
        if not 0 <= density <= 1:
            raise ConfigError(f"{field}={density} is out of range; it must be in [0, 1]")


def _draw_activations(size: tuple[int, ...], density: float, rng: np.random.Generator) -> np.ndarray:
    def code(drawn: np.ndarray) -> np.ndarray:
        codes: np.ndarray = np.clip(np.rint(np.abs(drawn) * (255 / SPREAD)), 1, 255)
        return codes

    return _draw(size, density, rng, np.uint8, code)


def _draw_weights(size: tuple[int, ...], density: float, rng: np.random.Generator) -> np.ndarray:
    def code(drawn: np.ndarray) -> np.ndarray:
        scaled = drawn * (127 / SPREAD)
        codes: np.ndarray = np.copysign(np.clip(np.rint(np.abs(scaled)), 1, 127), scaled)
        return codes

    return _draw(size, density, rng, np.int8, code)


def _draw(
    size: tuple[int, ...],
    density: float,
    rng: np.random.Generator,
    dtype: type[np.generic],
    code: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Draw normal values, turn them into codes and zero some, block by block: a value takes 8 bytes."""
    codes = np.empty(math.prod(size), dtype)
    blocks = [slice(start, start + DRAWN_AT_ONCE) for start in range(0, codes.size, DRAWN_AT_ONCE)]
    for block in blocks:
        codes[block] = code(rng.standard_normal(codes[block].size)).astype(dtype)
    for block in blocks:
        codes[block][rng.random(codes[block].size) >= density] = 0
    return codes.reshape(size)


def _prune(weights: np.ndarray, density: tuple[int, int], rng: np.random.Generator) -> None:
    """Zero all but N of every M weights in a row along K, drawn at random."""
    kept, of = density
    k, n = weights.shape
    at_once = max(1, DRAWN_AT_ONCE // (of * n))
    blocks = -(-k // of)
    for start in range(0, blocks, at_once):
        count = min(at_once, blocks - start)
        ranks = rng.random((count, of, n)).argsort(axis=1).argsort(axis=1)
        here = weights[start * of : (start + count) * of]
        here *= (ranks < kept).reshape(-1, n)[: len(here)]


def read_operands(layer: Layer, directory: str | Path) -> Operands:
    """Read a layer's operands from ``<directory>/<layer>.a_mk.npy`` and ``<layer>.b_kn.npy``.

    Raises
    ------
    OperandError
        If a file is missing, is no plain .npy matrix, or has another shape than the layer.
    """
    a, b = (read_matrix(Path(directory) / f"{layer.name}.{part}.npy") for part in ("a_mk", "b_kn"))
    return a, b


def read_matrix(path: str | Path) -> np.ndarray:
    """Read a matrix from a plain .npy file; raise `OperandError` naming the file otherwise."""
    advice = "save one matrix of integers with numpy.save"
    try:
        with Path(path).open("rb") as file:
            start = file.read(6)
            plain = start == b"\x93NUMPY"
            file.seek(0)
            matrix = np.lib.format.read_array(file, allow_pickle=False) if plain else None
    except OSError as error:
        raise OperandError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:  # numpy's own message may advise to load Python objects
        raise OperandError(f"{path} holds Python objects or is damaged; {advice}") from error
    if matrix is None:
        kind = "a .npz archive" if start[:2] == b"PK" else "no .npy file"
        raise OperandError(f"{path} is {kind}; {advice}")
    if matrix.ndim != 2:
        raise OperandError(f"{path} holds an array of shape {matrix.shape}; a matrix is needed")
    return matrix

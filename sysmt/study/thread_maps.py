"""Thread maps, the threads of each simulated layer: families, files, and the layers that suffer most."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from sysmt.config import THREAD_COUNTS, THREADS_OF, parse_count, parse_threads
from sysmt.errors import CalibrationError, ConfigError, nearest
from sysmt.files import Cell, read_table, read_toml, written_whole
from sysmt.nn.array.simulation import Simulation
from sysmt.nn.passes import evaluation_mode, image_batches

__all__ = [
    "FAMILIES",
    "columns_of",
    "greedy_maps",
    "layer_errors",
    "map_speedup",
    "measure_errors",
    "one_at_a_time",
    "prefixes",
    "random_maps",
    "read_rows",
    "read_threads_map",
    "read_threads_maps",
    "spread",
    "suffixes",
    "threads_of",
    "throttle",
    "uniform",
    "write_threads_map",
]


def map_speedup(threads: Mapping[str, int], macs: Mapping[str, int]) -> float:
    """Return the MAC-weighted speedup of a thread map, over the layers of `macs` (per image)."""
    return sum(macs.values()) / sum(count / threads[layer] for layer, count in macs.items())


def threads_of(row: Mapping[Any, Any]) -> dict[str, int]:
    """Return the thread map in a row of a table of points, or in a point's parameters."""
    return {
        key.removeprefix(THREADS_OF): int(count)
        for key, count in row.items()
        if isinstance(key, str) and key.startswith(THREADS_OF)
    }


def columns_of(threads: Mapping[str, int]) -> dict[str, int]:
    """Return a thread map as columns of a table of points; the reverse of `threads_of`."""
    return {f"{THREADS_OF}{name}": count for name, count in threads.items()}


# -- families ------------------------------------------------------------------------------------


def uniform(layers: Sequence[str], counts: Iterable[int]) -> Iterator[dict[str, int]]:
    """Yield the same thread count for all layers, for each count."""
    return (dict.fromkeys(layers, count) for count in counts)


def one_at_a_time(layers: Sequence[str], counts: Iterable[int]) -> Iterator[dict[str, int]]:
    """Yield maps at the largest count where one layer has each of the smaller ones."""
    *lower, most = sorted(counts)
    return ({**dict.fromkeys(layers, most), layer: count} for count in lower for layer in layers)


def prefixes(layers: Sequence[str], counts: Iterable[int]) -> Iterator[dict[str, int]]:
    """Yield maps where the first layers have a smaller count than the others, for each pair of counts."""
    return (
        {layer: (low if place < cut else high) for place, layer in enumerate(layers)}
        for low, high in itertools.combinations(sorted(counts), 2)
        for cut in range(1, len(layers))
    )


def suffixes(layers: Sequence[str], counts: Iterable[int]) -> Iterator[dict[str, int]]:
    """Yield maps where the last layers have a smaller count than the others, for each pair of counts."""
    return (
        {layer: (high if place < cut else low) for place, layer in enumerate(layers)}
        for low, high in itertools.combinations(sorted(counts), 2)
        for cut in range(1, len(layers))
    )


FAMILIES = {"uniform": uniform, "one-at-a-time": one_at_a_time, "prefix": prefixes, "suffix": suffixes}
"""The families of thread maps that `sysmt sweep` knows by name."""


def random_maps(layers: Sequence[str], wanted: int, seed: int) -> list[dict[str, int]]:
    """Draw thread maps whose speedups spread over the whole range.

    Each map first draws how common 1, 2 and 4 threads are in it, uniformly from all mixtures; layers
    drawn independently at even odds would all come out near the same speedup.
    """
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(wanted):
        mixture = rng.dirichlet(np.ones(len(THREAD_COUNTS)))
        drawn = rng.choice(THREAD_COUNTS, size=len(layers), p=mixture)
        maps.append({layer: int(count) for layer, count in zip(layers, drawn, strict=True)})
    return maps


def greedy_maps(errors: Mapping[str, float], wanted: int) -> list[dict[str, int]]:
    """Lower the layers of the highest MSE first, one after the other: the papers' throttling.

    Parameters
    ----------
    errors : mapping of str to float
        Each layer's MSE at the most threads.
    wanted : int
        How many maps, evenly taken from all steps of 4 to 2 threads, 4 to 1, and 2 to 1.
    """
    worst = sorted(errors, key=lambda layer: -errors[layer])
    steps = {}
    for low, high in ((2, 4), (1, 4), (1, 2)):
        for lowered in range(len(worst) + 1):
            one = {layer: (low if layer in worst[:lowered] else high) for layer in errors}
            steps[tuple(one.values())] = one
    return spread(list(steps.values()), wanted)


def spread(maps: Sequence[dict[str, int]], wanted: int) -> list[dict[str, int]]:
    """Take so many of a list, evenly."""
    taken = np.unique(np.linspace(0, len(maps) - 1, min(wanted, len(maps))).round().astype(int))
    return [maps[index] for index in taken]


# -- files ---------------------------------------------------------------------------------------


def read_threads_map(path: str | Path) -> dict[str, int]:
    """Read threads by layer from TOML.

    ``"layer1.0.conv1" = 2`` and so on, with or without quotes, at the top or in a table ``[threads]``;
    ``default = 4`` is for the layers that are not named.

    Raises
    ------
    ConfigError
        If the file is missing, no TOML, empty, or a count is not 1, 2 or 4.
    """
    content = read_toml(path)
    table = content.get("threads", content)
    flat = dict(_flatten(table)) if isinstance(table, Mapping) else {}
    if not flat:
        raise ConfigError(f'{path} names no layers; lines such as "layer1.0.conv1" = 2 are needed')
    return {name: parse_threads(count, f"{path}: threads of layer {name!r}") for name, count in flat.items()}


def write_threads_map(path: str | Path, threads: Mapping[str, int]) -> None:
    """Write threads by layer, such as `Simulation.threads` returns them, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(tomli_w.dumps({"threads": dict(threads)}), encoding="utf-8")


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Turn nested tables, which TOML makes of unquoted dots, back into dotted names."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read_threads_maps(path: str | Path, layers: Sequence[str]) -> list[dict[str, int]]:
    """Read thread maps from a file.

    Parameters
    ----------
    path : str or Path
        A CSV with a column per layer (as `sysmt sweep --export` writes, with ``threads of`` before the
        names, or without) and a row per map; or a TOML with tables ``[[points]]`` of threads by layer. A
        column or key ``default`` is for layers that are not named.
    layers : sequence of str

    Returns
    -------
    list of dict

    Raises
    ------
    ConfigError
        If the file cannot be read, has a row longer or shorter than its header, names a layer that is
        not simulated, leaves one out, or has a count other than 1, 2 or 4.
    """
    maps = [
        _complete(row, layers, f"{path}, point {number}")
        for number, row in enumerate(read_rows(Path(path)), 1)
    ]
    if not maps:
        raise ConfigError(f"{path} has no points")
    return maps


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """Read threads by layer as the file has them, whatever the layers are."""
    if path.suffix == ".toml":
        points = read_toml(path).get("points", [])
        if not isinstance(points, list) or not all(isinstance(row, Mapping) for row in points):
            raise ConfigError(f"{path}: points must be tables, [[points]]")
        return points
    table = read_table(path)
    exported = [name for name in table.columns if name.startswith(THREADS_OF)]
    names = {name: name.removeprefix(THREADS_OF) for name in exported or table.columns}
    return [{layer: _count(row[name], layer) for name, layer in names.items()} for row in table.rows]


def _complete(row: Mapping[str, Any], layers: Sequence[str], where: str) -> dict[str, int]:
    for name in row:
        if name not in (*layers, "default"):
            raise ConfigError(f"{where} names {name!r}, which is not simulated{nearest(name, layers)}")
    threads = {}
    for layer in layers:
        count = row.get(layer, row.get("default"))
        if count is None:
            raise ConfigError(f"{where} leaves out layer {layer!r}; name it, or set a default")
        threads[layer] = parse_threads(count, f"{where}: threads of layer {layer!r}")
    return threads


def _count(cell: Cell, layer: str) -> int:
    """Read a thread count; spreadsheets make 2.0 of a 2 now and then."""
    try:
        number = float(cell.text)
    except ValueError:
        number = math.nan
    whole = int(number) if number.is_integer() else cell.text
    return parse_threads(whole, f"{cell.place}: threads of layer {layer!r}")


# -- the layers that suffer most -----------------------------------------------------------------


def measure_errors(sim: Simulation, loader: Iterable[Any], images: int) -> None:
    """Run images through the array, comparing every layer with T = 1; the report then has `mse`.

    Parameters
    ----------
    sim : Simulation
        Calibrated, with the thread counts of interest. Its counters are reset first.
    loader : iterable
        Input tensors or (input, target) pairs.
    images : int
    """
    errors = sim.errors
    sim.errors = True
    try:
        sim.reset()
        with evaluation_mode(sim.model):
            for batch in image_batches(loader, images):
                sim.model(batch)
    finally:
        sim.errors = errors


def layer_errors(sim: Simulation, loader: Iterable[Any], images: int) -> dict[str, float]:
    """Measure each layer's MSE against T = 1 with 4 threads everywhere; thread counts are restored."""
    before = sim.threads()
    try:
        sim.set_threads(max(THREAD_COUNTS))
        measure_errors(sim, loader, images)
        return {layer.name: layer.counts.mse for layer in sim.simulated()}
    finally:
        sim.set_threads(before)


def throttle(sim: Simulation, layers: int, to_threads: int = 1) -> dict[str, int]:
    """Lower the layers with the highest NB-SMT error to fewer threads.

    As in the recalibration paper, table 1, where GoogLeNet† leaves "a single high MSE layer"
    unaccelerated. The error is the `mse` measured so far, by `measure_errors` or any forward with
    ``errors=True``.

    Parameters
    ----------
    sim : Simulation
        Changed in place, and its counters reset.
    layers : int
        How many layers, of those that run more than `to_threads`, to lower; all if there are fewer.
    to_threads : int
        1 or 2.

    Returns
    -------
    dict of str to int
        The threads of every simulated layer, as they are now.

    Raises
    ------
    CalibrationError
        If no errors were measured.
    ConfigError
        If a number is impossible.
    """
    layers = parse_count(layers, "layers", minimum=0)
    to_threads = parse_threads(to_threads, "to_threads")
    if to_threads == max(THREAD_COUNTS):
        raise ConfigError(f"to_threads={to_threads} lowers nothing; layers are lowered to 1 or 2")
    measured = {
        layer.name: layer.counts.mse
        for layer in sim.simulated()
        if layer.threads > to_threads and not math.isnan(layer.counts.mse)
    }
    if not measured and any(layer.threads > to_threads for layer in sim.simulated()):
        raise CalibrationError(
            "throttling needs the layers' errors; measure_errors(sim, loader, images) first"
        )
    worst = sorted(measured, key=lambda name: -measured[name])[:layers]
    sim.set_threads(dict.fromkeys(worst, to_threads))
    return sim.threads()

"""Threads layer by layer: maps in files, and lowering the layers that suffer most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from sysmt.config import THREAD_COUNTS, parse_count, parse_threads
from sysmt.errors import CalibrationError, ConfigError
from sysmt.files import written_whole
from sysmt.nn.array.simulation import Simulation
from sysmt.nn.passes import evaluation_mode, image_batches
from sysmt.study.run_directory import read_toml

__all__ = ["measure_errors", "read_threads_map", "throttle", "write_threads_map"]


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

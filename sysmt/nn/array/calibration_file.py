"""Calibrations on disk: ranges, reordering statistics and BatchNorm statistics, bound to their weights.

An ``.npz`` without pickles: an entry ``header`` holds JSON (format, weights hash, ranges), the other
entries are arrays, ``wide/<layer>`` of shape (groups, K) and ``statistics/<key>`` of shape (channels,).
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sysmt.archives import read_npz
from sysmt.errors import CalibrationError, ConfigError, WeightsError
from sysmt.files import written_whole
from sysmt.nn.array.selection import FIRST_CONVOLUTION
from sysmt.nn.array.simulation import Simulation
from sysmt.nn.batchnorm.recalibration import load_statistics, save_statistics
from sysmt.nn.networks.checkpoints import weights_hash
from sysmt.quant.uniform import ActivationRange

__all__ = ["check_suffix", "load_calibration", "save_calibration"]

FORMAT = "sysmt calibration 1"

_WIDE, _STATISTICS = "wide/", "statistics/"


def save_calibration(sim: Simulation, path: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Save what calibration (and BatchNorm recalibration) gathered, whole or not at all.

    Parameters
    ----------
    sim : Simulation
        Calibrated.
    path : str or Path
        Ends in ``.npz``; an existing file is replaced.
    notes : mapping, optional
        Plain values that `load_calibration` gives back, such as how statistics were recalibrated.

    Raises
    ------
    CalibrationError
        If no layer has a range.
    ConfigError
        If the path has another suffix.
    OutputError
        If the file cannot be written.
    """
    path = Path(path)
    check_suffix(path)
    ranges = sim.ranges()
    if not ranges:
        raise CalibrationError("there is nothing to save: no layer has a range; calibrate first")
    first = [name for name, layer in sim.layers.items() if layer.reason == FIRST_CONVOLUTION]
    header = {
        "format": FORMAT,
        "weights_sha256": weights_hash(sim.model),
        "first_convolution": first[0] if first else None,
        "ranges": {name: {"scale": r.scale, "signed": r.signed} for name, r in ranges.items()},
        "notes": dict(notes or {}),
    }
    arrays = {_STATISTICS + key: value.numpy() for key, value in save_statistics(sim.model).items()}
    for layer in sim.simulated():
        if layer.wide_counts is not None:
            arrays[_WIDE + layer.name] = np.stack(layer.wide_counts)
    with written_whole(path) as temporary:
        np.savez(temporary, header=np.array(json.dumps(header)), **arrays)  # type: ignore[arg-type]


def check_suffix(path: str | Path) -> None:
    """Raise `ConfigError` unless a calibration's name ends in ``.npz``."""
    if Path(path).suffix != ".npz":
        raise ConfigError(f"{path} must end in .npz, as calibrations do")


def load_calibration(sim: Simulation, path: str | Path) -> dict[str, Any]:
    """Put a saved calibration in force: ranges, BatchNorm statistics, and orders where it has them.

    Resets the counters. Nothing changes if the file does not fit.

    Parameters
    ----------
    sim : Simulation
        Of a network with the very weights that the calibration was made with.
    path : str or Path

    Returns
    -------
    dict
        The `notes` it was saved with.

    Raises
    ------
    CalibrationError
        If the file is missing, damaged or another network's, or lacks a layer that is simulated.
    """
    header, arrays = _read(Path(path))
    own, theirs = weights_hash(sim.model), str(header["weights_sha256"])
    if own != theirs:
        raise CalibrationError(
            f"{path} was made for other weights: it belongs to {theirs[:16]}, the network has {own[:16]}"
        )
    try:
        ranges = {name: ActivationRange(r["scale"], r["signed"]) for name, r in header["ranges"].items()}
    except (ConfigError, AttributeError, KeyError, TypeError) as error:
        raise CalibrationError(f"{path} is damaged: its ranges cannot be read ({error})") from error
    first = sim.layers.get(header["first_convolution"] or "")
    if first is not None:
        sim.layer_called(first)
    simulated = list(sim.simulated())
    lacking = [layer.name for layer in simulated if layer.name not in ranges]
    if lacking:
        raise CalibrationError(
            f"{path} has no range for layer {lacking[0]!r}, which is simulated here; calibrate with the same "
            "choice of layers (first, linear, depthwise)"
        )
    wide = {name.removeprefix(_WIDE): value for name, value in arrays.items() if name.startswith(_WIDE)}
    if wide and not set(wide) >= {layer.name for layer in simulated}:
        raise CalibrationError(f"{path} has reordering statistics of some layers only; calibrate again")
    for layer in simulated:
        shape = (layer.geometry.groups, layer.geometry.gemm_k)
        if layer.name in wide and wide[layer.name].shape != shape:
            raise CalibrationError(
                f"{path}: reordering statistics of layer {layer.name!r} have shape {wide[layer.name].shape}, "
                f"not {shape}"
            )
    statistics = {
        name.removeprefix(_STATISTICS): value
        for name, value in arrays.items()
        if name.startswith(_STATISTICS)
    }
    try:
        load_statistics(sim.model, statistics)
    except WeightsError as error:
        raise CalibrationError(f"{path}: {error}") from error
    sim.set_ranges({layer.name: ranges[layer.name] for layer in simulated})
    for layer in simulated:
        layer.wide_counts = list(wide[layer.name]) if layer.name in wide else None
    sim.reorder = bool(wide)
    return dict(header["notes"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read header and arrays; every kind of damage becomes a `CalibrationError`."""
    if not path.is_file():
        raise CalibrationError(
            f"{path} is {'a directory' if path.is_dir() else 'missing'}; a calibration file (.npz) is needed"
        )
    try:
        arrays = read_npz(path)
        header = json.loads(str(arrays.pop("header")))
        if header["format"] != FORMAT:
            raise CalibrationError(f"{path} has format {header['format']!r}; {FORMAT!r} is understood")
        for key in ("weights_sha256", "first_convolution", "ranges", "notes"):
            header[key]
        _check_kinds(header, arrays)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path} is damaged or no calibration file ({error})") from error
    return header, arrays


def _check_kinds(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Raise `TypeError` for parts of other types than `save_calibration` writes."""
    for key in ("ranges", "notes"):
        if not isinstance(header[key], dict):
            raise TypeError(f"its {key} are {header[key]!r}, not names with values")
    if not isinstance(header["first_convolution"], str | None):
        raise TypeError(f"its first convolution is {header['first_convolution']!r}, not a name")
    for name, value in arrays.items():
        if name.startswith(_WIDE) and (value.dtype.kind not in "iu" or (value < 0).any()):
            raise TypeError(f"{name} has {value.dtype} values; counts of at least 0 are needed")
        if name.startswith(_STATISTICS) and value.dtype.kind != "f":
            raise TypeError(f"{name} has {value.dtype} values; floating-point ones are needed")

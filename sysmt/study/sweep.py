"""Sweeps: lists of points, and the bench that measures one point after the other.

`Bench` opens a network once and calibrates it once per sparsity; a study's workers call it for each point.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sysmt
from sysmt.config import Policy, parse_name, parse_threads
from sysmt.errors import ConfigError, nearest
from sysmt.files import Cell, read_table, read_toml
from sysmt.study.evaluate import Job, Measurement, paired_difference
from sysmt.study.run_config import RECALIBRATION_MODES, RunConfig, Setting
from sysmt.study.store import LAYER, NOT_RECALIBRATED, Point

__all__ = ["KINDS", "Bench", "Sweep", "one_at_a_time", "prefixes", "read_points", "suffixes", "uniform"]

_NOT_FACTS = (
    "weights", "data", "train_data", "cpu_threads",  # where things lie, and how fast; hashes stand for them
    "threads", "threads_map", "policy", "prune", "recalibrate",  # each point has its own
    "throttle", "throttle_to", "errors", "clock_mhz", "calibration",
)  # fmt: skip


class Bench:
    """A network and its data, ready to measure any point.

    Parameters
    ----------
    config : RunConfig
        Its thread counts, policy, pruning and recalibration are the points' own matter.
    held_out : float
        Share of the test images, in [0, 1), drawn by the configuration's seed, that ``top1`` does not
        see. A search picks points by ``top1``, and so by luck as well; accuracy on these images is
        free of that.

    Attributes
    ----------
    config : RunConfig
    layers : list of str
        The simulated layers, in the network's order of definition.
    notes : list of str
        What was decided or found on the way, for the user to see.
    """

    def __init__(self, config: RunConfig, held_out: float = 0.0) -> None:
        if not 0 <= held_out < 1:
            raise ConfigError(f"held_out={held_out} is out of range; it must be in [0, 1)")
        if config.calibration is not None:
            raise ConfigError("studies calibrate themselves, for each sparsity anew; leave out calibration")
        self.config = dataclasses.replace(
            config, threads_map=None, recalibrate=None, throttle=0, prune=None, errors=False
        )
        self.notes: list[str] = []
        self.held_out = held_out
        self._sparsity = 0.0
        self._job, self._float = self._open(0.0)
        self._seen()  # raises where one side would have no images
        self.notes += self._job.notes
        self.layers = list(self._job.sim.threads())

    @property
    def job(self) -> Job:
        """The network as it was measured last: calibrated, and pruned to that point's sparsity."""
        return self._job

    @property
    def float_top1(self) -> float:
        """Accuracy of the network off the array, on the images of ``top1``, in [0, 1]."""
        return float(self._float.evaluation.correct[self._seen()].mean())

    @property
    def float_held_out_top1(self) -> float:
        """The same on the images that are held out; NaN if none are."""
        correct = self._float.evaluation.correct[~self._seen()]
        return float(correct.mean()) if correct.size else math.nan

    def _seen(self) -> np.ndarray:
        """Mark the test images that ``top1`` sees."""
        images = self._float.evaluation.images
        order = np.random.default_rng(self.config.seed).permutation(images)
        kept_out = round(images * self.held_out)
        if self.held_out and not 0 < kept_out < images:
            raise ConfigError(f"held_out={self.held_out} of {images} test images leaves one side without any")
        return order >= kept_out

    def _open(self, sparsity: float) -> tuple[Job, Measurement]:
        job = Job(dataclasses.replace(self.config, prune=sparsity or None))
        measured = job.measure_float()
        job.calibrate()
        return job, measured

    def select(self, sparsity: float) -> Job:
        """Open the network at another sparsity, unless it is open."""
        if sparsity != self._sparsity:
            self._job, self._float = self._open(sparsity)
            self._sparsity = sparsity
        return self._job

    def facts(self) -> dict[str, Any]:
        """Return what all points of a study share: what joins them must have the same."""
        record = {key: value for key, value in self.config.to_record().items() if key not in _NOT_FACTS}
        return record | {
            "weights_sha256": self._job.weights_sha256,
            "data_sha256": self._job.data.fingerprint(),
            **({"held_out": self.held_out} if self.held_out else {}),
        }

    def measure(self, point: Point) -> dict[str, Any]:
        """Measure one point.

        Returns
        -------
        dict
            ``top1``, ``top5`` in [0, 1], ``loss`` in nats, ``images``; ``float_top1``;
            ``top1_difference`` to it, paired by image, and its standard error ``top1_difference_se``;
            with images held out, ``top1`` and what belongs to it is that of the others, and
            ``held_out_top1``, ``held_out_difference`` and ``held_out_difference_se`` are theirs (``top5``,
            ``loss`` and ``images`` are those of all together); what `sysmt.study.evaluate.array_facts`
            gives; ``seconds`` of the evaluation; ``path`` of the kernels.
        """
        job = self.select(point.sparsity)
        if job.sim.config.policy != point.policy:
            job.sim.reconfigure(policy=parse_name(Policy, point.policy, "policy"))
        recalibrate = None if point.recalibrate == NOT_RECALIBRATED else point.recalibrate
        job.config = dataclasses.replace(job.config, recalibrate=recalibrate)
        setting = Setting("point", 1, point.threads, recalibrate=recalibrate is not None)
        measured = job.measure(setting)
        correct, reference = measured.evaluation.correct, self._float.evaluation.correct
        seen = self._seen()
        difference, error = paired_difference(correct[seen], reference[seen])
        accuracies = {
            "top1": float(correct[seen].mean()),
            "float_top1": float(reference[seen].mean()),
            "top1_difference": difference,
            "top1_difference_se": error,
        }
        if self.held_out:
            difference, error = paired_difference(correct[~seen], reference[~seen])
            accuracies |= {
                "held_out_top1": float(correct[~seen].mean()),
                "held_out_difference": difference,
                "held_out_difference_se": error,
            }
        return {
            **measured.evaluation.to_record(),
            **accuracies,
            **measured.facts,
            "path": sysmt.active_path(),
        }


# -- thread maps -------------------------------------------------------------------------------


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


KINDS = {"uniform": uniform, "one-at-a-time": one_at_a_time, "prefix": prefixes, "suffix": suffixes}
"""The families of thread maps that `sysmt sweep` knows by name."""


def read_points(path: str | Path, layers: Sequence[str]) -> list[dict[str, int]]:
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
        for number, row in enumerate(_read_rows(Path(path)), 1)
    ]
    if not maps:
        raise ConfigError(f"{path} has no points")
    return maps


def _read_rows(path: Path) -> list[Mapping[str, Any]]:
    """Read threads by layer as the file has them, whatever the layers are."""
    if path.suffix == ".toml":
        points = read_toml(path).get("points", [])
        if not isinstance(points, list) or not all(isinstance(row, Mapping) for row in points):
            raise ConfigError(f"{path}: points must be tables, [[points]]")
        return points
    table = read_table(path)
    exported = [name for name in table.columns if name.startswith(LAYER)]
    names = {name: name.removeprefix(LAYER) for name in exported or table.columns}
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


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Which points a sweep evaluates: the product of maps, policies, sparsities and recalibrations.

    Attributes
    ----------
    kinds : tuple of str
        Families of `KINDS`.
    counts : tuple of int
        Thread counts that these use.
    maps_file : str or None
        File for `read_points`, besides.
    policies : tuple of Policy
    sparsities : tuple of float
        Each in [0, 1).
    recalibrate : tuple of str
        Recalibration modes to measure besides the network as it is.

    Raises
    ------
    ConfigError
        If a value is unknown or out of range.
    """

    kinds: tuple[str, ...] = ("uniform",)
    counts: tuple[int, ...] = (1, 2, 4)
    maps_file: str | None = None
    policies: tuple[Policy, ...] = (Policy.SA,)
    sparsities: tuple[float, ...] = (0.0,)
    recalibrate: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError(
                    f"kind={kind!r} is unknown{nearest(kind, KINDS)}; allowed: {', '.join(KINDS)}"
                )
        for mode in self.recalibrate:
            if mode not in RECALIBRATION_MODES:
                raise ConfigError(
                    f"recalibrate={mode!r} is unknown{nearest(mode, RECALIBRATION_MODES)}; allowed: "
                    f"{', '.join(RECALIBRATION_MODES)}"
                )
        for sparsity in self.sparsities:
            if not 0 <= sparsity < 1:
                raise ConfigError(f"sparsity={sparsity} is out of range; it must be in [0, 1)")
        if not self.kinds and self.maps_file is None:
            raise ConfigError("a sweep needs kinds of thread maps, or a file with some")
        if self.maps_file is not None:
            if not Path(self.maps_file).is_file():
                raise ConfigError(f"{self.maps_file} is missing; a CSV or TOML with thread maps is needed")
            _read_rows(Path(self.maps_file))  # a wrong shape is found before anything runs
        object.__setattr__(self, "counts", tuple(parse_threads(count) for count in self.counts))
        object.__setattr__(
            self, "policies", tuple(parse_name(Policy, policy, "policy") for policy in self.policies)
        )

    def points(self, layers: Sequence[str]) -> list[Point]:
        """Return the points, each once: sparsity changes slowest, as it costs a calibration."""
        maps = [threads for kind in self.kinds for threads in KINDS[kind](layers, self.counts)]
        if self.maps_file is not None:
            maps += read_points(self.maps_file, layers)
        product = itertools.product(
            self.sparsities, self.policies, (NOT_RECALIBRATED, *self.recalibrate), maps
        )
        points = [
            Point(threads, policy.value, float(sparsity), mode) for sparsity, policy, mode, threads in product
        ]
        return list({point.key: point for point in points}.values())


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

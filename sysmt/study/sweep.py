"""Sweeps: lists of points, and the bench that measures one point after the other.

`Bench` opens a network once and calibrates it once per sparsity; a study's workers call it for each point.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sysmt
from sysmt.config import Policy, RecalibrationMode, parse_name, parse_recalibration, parse_threads
from sysmt.errors import ConfigError, nearest
from sysmt.study.evaluate import Job, Measurement, paired_difference
from sysmt.study.run_config import RunConfig, Setting
from sysmt.study.store import Point
from sysmt.study.thread_maps import FAMILIES, read_rows, read_threads_maps

__all__ = ["Bench", "Sweep"]

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
        mode = parse_name(RecalibrationMode, point.recalibrate, "recalibrate")
        recalibrate = mode is not RecalibrationMode.NONE
        job.config = dataclasses.replace(job.config, recalibrate=mode if recalibrate else None)
        setting = Setting("point", 1, point.threads, recalibrate=recalibrate)
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


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Which points a sweep evaluates: the product of maps, policies, sparsities and recalibrations.

    Attributes
    ----------
    kinds : tuple of str
        Families of `FAMILIES`.
    counts : tuple of int
        Thread counts that these use.
    maps_file : str or None
        File for `read_threads_maps`, besides.
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
            if kind not in FAMILIES:
                raise ConfigError(
                    f"kind={kind!r} is unknown{nearest(kind, FAMILIES)}; allowed: {', '.join(FAMILIES)}"
                )
        for mode in self.recalibrate:
            parse_recalibration(mode, "recalibrate")
        for sparsity in self.sparsities:
            if not 0 <= sparsity < 1:
                raise ConfigError(f"sparsity={sparsity} is out of range; it must be in [0, 1)")
        if not self.kinds and self.maps_file is None:
            raise ConfigError("a sweep needs kinds of thread maps, or a file with some")
        if self.maps_file is not None:
            if not Path(self.maps_file).is_file():
                raise ConfigError(f"{self.maps_file} is missing; a CSV or TOML with thread maps is needed")
            read_rows(Path(self.maps_file))  # a wrong shape is found before anything runs
        object.__setattr__(self, "counts", tuple(parse_threads(count) for count in self.counts))
        object.__setattr__(
            self, "policies", tuple(parse_name(Policy, policy, "policy") for policy in self.policies)
        )

    def points(self, layers: Sequence[str]) -> list[Point]:
        """Return the points, each once: sparsity changes slowest, as it costs a calibration."""
        maps = [threads for kind in self.kinds for threads in FAMILIES[kind](layers, self.counts)]
        if self.maps_file is not None:
            maps += read_threads_maps(self.maps_file, layers)
        product = itertools.product(
            self.sparsities, self.policies, (RecalibrationMode.NONE.value, *self.recalibrate), maps
        )
        points = [
            Point(threads, policy.value, float(sparsity), mode) for sparsity, policy, mode, threads in product
        ]
        return list({point.key: point for point in points}.values())


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

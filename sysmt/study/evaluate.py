"""The main job: a network in float and on the array, setting by setting, compared image by image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sysmt.cost.energy import EnergyTable, load_table
from sysmt.errors import ConfigError
from sysmt.hw.stats import GemmStats
from sysmt.nn.array.calibration_file import load_calibration
from sysmt.nn.array.layer_energy import energy_facts
from sysmt.nn.array.simulation import Simulation
from sysmt.nn.batchnorm.recalibration import load_statistics, save_statistics
from sysmt.nn.networks.checkpoints import weights_hash
from sysmt.nn.networks.pruning import prune_model
from sysmt.nn.networks.training import Evaluation
from sysmt.progress import Counted, progress_bar
from sysmt.study.run_config import RunConfig, Setting
from sysmt.study.thread_maps import measure_errors, throttle
from sysmt.study.workload import OpenWorkload

__all__ = [
    "FLOAT",
    "Job",
    "Measurement",
    "array_facts",
    "layer_table",
    "paired_difference",
    "summary_table",
]

FLOAT = "float"
"""Name of the row that the others are compared with."""

THROTTLE_IMAGES = 512
"""Calibration images (at most) that decide which layers are throttled."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row of the results: how a setting did on the test images.

    Attributes
    ----------
    setting : Setting or None
        None is the float network.
    evaluation : Evaluation
        Accuracy, image by image, and wall time on this machine.
    facts : dict
        What the array did, as `array_facts` says it; empty for the float network.
    layers : DataFrame or None
        `Simulation.report`; None for the float network.
    recalibrated : bool
        Whether its BatchNorm statistics were recalibrated, here or in the calibration file.
    """

    setting: Setting | None
    evaluation: Evaluation
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    layers: pd.DataFrame | None = None
    recalibrated: bool = False

    @property
    def name(self) -> str:
        """The setting's name, or ``"float"``."""
        return self.setting.name if self.setting else FLOAT


def paired_difference(correct: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Compare two evaluations of the same images.

    Parameters
    ----------
    correct, reference : bool ndarray (images,)

    Returns
    -------
    difference : float
        Mean of ``correct - reference``, in [-1, 1].
    standard_error : float
        Of that mean; NaN for a single image. Pairing removes what the images have in common, so
        it is far smaller than the standard error of either accuracy.
    """
    if correct.shape != reference.shape:
        raise ValueError(f"{correct.shape} and {reference.shape} are not the same images")
    difference = correct.astype(np.float64) - reference
    images = difference.size
    spread = difference.std(ddof=1) / math.sqrt(images) if images > 1 else math.nan
    return float(difference.mean()), float(spread)


class Job:
    """A network, its data and the array, ready to measure.

    Opening it reads everything and checks it; `calibrate` and `measure` do the work.

    Parameters
    ----------
    config : RunConfig

    Attributes
    ----------
    config : RunConfig
    workload : OpenWorkload
    model : nn.Module
    data : ImageData
        Those of the workload.
    sim : Simulation
        Attached.
    notes : list of str
        What was decided or found on the way, for the user to see.
    energy : EnergyTable
        What prices the events.
    calibration_notes : dict
        What the calibration file says about itself; empty without one.

    Raises
    ------
    SysmtError
        If the model, weights, data or calibration cannot be had or do not fit each other.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.energy = load_table(config.energy) if config.energy else load_table()
        self.notes: list[str] = []
        self.calibration_notes: dict[str, Any] = {}
        self._throttled: dict[int, dict[str, int]] = {}
        self.workload = OpenWorkload(config)
        self.model, self.data = self.workload.model, self.workload.data
        self.notes += self.data.notes
        self.weights_sha256 = weights_hash(self.model)
        if config.prune is not None:
            prune_model(self.model, config.prune)
            self.notes.append(f"{config.prune:.0%} of the weights are pruned, in the float row, too")
        if config.calibration is None or config.recalibrate or config.throttle:
            self.workload.training_images(1, config.seed)  # raises where there are no training images
        self.sim = self.workload.attach(errors=config.errors)
        for setting in config.settings():
            self.sim.set_threads(setting.threads_map)
        if config.calibration is not None:
            self._try_calibration_file(config.calibration)

    def _try_calibration_file(self, path: str) -> None:
        """Load it for its errors alone: the float network comes first, with its own statistics."""
        statistics = save_statistics(self.model)
        self.calibration_notes = load_calibration(self.sim, path)
        load_statistics(self.model, statistics)
        mode = self.calibration_notes.get("recalibrated")
        if mode and self.config.recalibrate:
            raise ConfigError(
                f"{path} has recalibrated BatchNorm statistics ({mode}) already; leave out recalibrate"
            )

    # -- work ----------------------------------------------------------------------------------

    def settings(self) -> list[Setting]:
        """Return the settings, marked where the calibration file brings recalibrated statistics."""
        settings = self.config.settings()
        if not self.calibration_notes.get("recalibrated"):
            return settings
        return [dataclasses.replace(one, name=f"{one.name} recalibrated") for one in settings]

    def calibrate(self) -> None:
        """Gather activation ranges (and orders), or load them from the calibration file."""
        config = self.config
        if config.calibration is not None:
            load_calibration(self.sim, config.calibration)
            self.notes.append(f"calibration loaded from {config.calibration}")
            return
        images = self.workload.calibrate(self.sim, config.seed, reorder=config.reorder)
        few = ", all there are" if images < config.calibration_images else ""
        self.notes.append(f"calibrated on {images} training images{few}")

    def measure_float(self) -> Measurement:
        """Evaluate the network off the array."""
        self.sim.detach()
        try:
            return Measurement(None, self.workload.evaluate(FLOAT))
        finally:
            self.sim = self.workload.attach(errors=self.config.errors)

    def measure(self, setting: Setting) -> Measurement:
        """Evaluate one setting; BatchNorm statistics are afterwards what they were before."""
        self.sim.set_threads(setting.threads)
        self.sim.set_threads(setting.threads_map)
        if setting.throttled:
            self._throttle(setting)
        statistics = save_statistics(self.model)
        try:
            if setting.recalibrate:
                self.recalibrate(setting.name)
            self.sim.reset()
            evaluation = self.workload.evaluate(setting.name)
        finally:
            load_statistics(self.model, statistics)
        facts = array_facts(self.sim, self.config.clock_mhz, self.energy)
        recalibrated = setting.recalibrate or bool(self.calibration_notes.get("recalibrated"))
        return Measurement(setting, evaluation, facts, self.sim.report(self.energy), recalibrated)

    def _throttle(self, setting: Setting) -> None:
        if setting.threads in self._throttled:  # for the same setting without recalibration
            self.sim.set_threads(self._throttled[setting.threads])
            return
        images = min(THROTTLE_IMAGES, self.config.calibration_images)
        loader = self.workload.training_images(images, self.config.seed)
        before = self.sim.threads()
        with progress_bar(f"{setting.name}: layer errors", loader.images) as bar:
            measure_errors(self.sim, Counted(loader, bar), loader.images)
        after = throttle(self.sim, setting.throttled, self.config.throttle_to)
        self._throttled[setting.threads] = after
        lowered = [name for name, count in after.items() if count < before[name]]
        self.notes.append(f"{setting.name}: {', '.join(lowered)} at {self.config.throttle_to}T")

    def recalibrate(self, what: str) -> None:
        """Regather the BatchNorm statistics with the threads as they are set; `what` is for the bar."""
        assert self.config.recalibrate is not None
        images = self.config.recalibration_images
        self.workload.recalibrate(self.config.recalibrate, images, self.config.seed, what=what)

    def run(self) -> Iterator[Measurement]:
        """Calibrate and measure everything the configuration asks for, the float network first."""
        yield self.measure_float()
        self.calibrate()
        for setting in self.settings():
            yield self.measure(setting)


def array_facts(
    sim: Simulation, clock_mhz: float | None = None, energy: EnergyTable | None = None
) -> dict[str, Any]:
    """Sum up what the array did since the last reset.

    Parameters
    ----------
    sim : Simulation
    clock_mhz : float, optional
        Clock of the array, MHz.
    energy : EnergyTable, optional
        By default the 45 nm table.

    Returns
    -------
    dict
        ``speedup`` and ``network_speedup`` (MAC-weighted) and both in cycles; ``collision_rate``
        and ``utilization`` of the simulated layers, in [0, 1]; ``macs`` and ``cycles`` of the
        whole network (layers in float at T = 1), ``cycles_per_image``; ``energy_pj_per_image`` and
        ``energy_delay_pj_cycles_per_image`` of the simulated layers (or in the table's unit); with a
        clock ``latency_ms`` per image and ``array_images_per_second``.
    """
    total = sum((layer.counts.stats for layer in sim.simulated()), GemmStats(()))
    facts: dict[str, Any] = {
        "speedup": sim.speedup,
        "network_speedup": sim.network_speedup,
        "speedup_cycles": sim.speedup_cycles,
        "network_speedup_cycles": sim.network_speedup_cycles,
        "collision_rate": total.collision_rate,
        "utilization": total.utilization,
        "macs": sum(layer.counts.stats.macs for layer in sim.layers.values()),
        "cycles": sim.cycles,
        "cycles_per_image": sim.cycles / sim.images if sim.images else math.nan,
        **energy_facts(sim.simulated(), sim.images, energy),
    }
    if clock_mhz is not None:
        facts["latency_ms"] = facts["cycles_per_image"] / (clock_mhz * 1e3)
        facts["array_images_per_second"] = 1e3 / facts["latency_ms"]
    return facts


def summary_table(measurements: Sequence[Measurement]) -> pd.DataFrame:
    """Make the table of a run: a row for each setting, compared with the float network in the first.

    Returns
    -------
    DataFrame
        ``setting``; ``threads`` (0: float); ``recalibrated``; ``throttled`` layers; ``images``;
        ``top1``, ``top5`` in [0, 1]; ``loss`` in nats; ``top1_difference`` to float and its standard
        error ``top1_difference_se``, paired by image, in [-1, 1]; what `array_facts` gives;
        ``images_per_second`` and ``seconds`` of the evaluation on this machine.
    """
    reference = measurements[0].evaluation.correct
    rows = []
    for measurement in measurements:
        setting, evaluation = measurement.setting, measurement.evaluation
        difference, standard_error = paired_difference(evaluation.correct, reference)
        rows.append(
            {
                "setting": measurement.name,
                "threads": setting.threads if setting else 0,
                "recalibrated": measurement.recalibrated,
                "throttled": setting.throttled if setting else 0,
                "images": evaluation.images,
                "top1": evaluation.top1,
                "top5": evaluation.top5,
                "loss": evaluation.loss,
                "top1_difference": difference if setting else math.nan,
                "top1_difference_se": standard_error if setting else math.nan,
                **measurement.facts,
                "images_per_second": evaluation.images / evaluation.seconds,
                "seconds": evaluation.seconds,
            }
        )
    counts = [name for name in ("macs", "cycles") if name in rows[-1]]
    return pd.DataFrame(rows).astype(dict.fromkeys(counts, "Int64"))  # integers, though float has none


def layer_table(measurements: Sequence[Measurement]) -> pd.DataFrame:
    """Join the settings' layer reports: a row per setting and layer."""
    reports = []
    for measurement in measurements:
        if measurement.layers is not None:
            report = measurement.layers.copy()
            report.insert(0, "setting", measurement.name)
            reports.append(report)
    return pd.concat(reports, ignore_index=True) if reports else pd.DataFrame()

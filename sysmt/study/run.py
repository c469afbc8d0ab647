"""One run on disk: measure, write after every setting, and keep what there is whatever happens."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sysmt.errors import ConfigError
from sysmt.files import read_toml
from sysmt.study.evaluate import Job, Measurement, layer_table, summary_table
from sysmt.study.plots.run import draw_run
from sysmt.study.run_directory import RunDirectory, provenance

__all__ = ["FILES", "Outcome", "read_config", "run_job", "warn_of_differences"]

FILES = ("config.toml", "summary.csv", "layers.csv", "accuracy.png", "collisions.png", "energy.png")
"""What a run writes."""

_HEAD = """\
`sysmt run --config FILE` repeats this run from [run] alone; options given besides take precedence.
[made_by] and [outcome] are for the record."""


@dataclasses.dataclass
class Outcome:
    """What a run came to.

    Attributes
    ----------
    measurements : list of Measurement
        The float network first; complete up to where an error or Ctrl-C ended it.
    error : BaseException or None
        What ended the run early.
    """

    measurements: list[Measurement]
    error: BaseException | None = None

    @property
    def status(self) -> str:
        """``"complete"``, ``"interrupted"``, or ``"failed: "`` and why."""
        if self.error is None:
            return "complete"
        if isinstance(self.error, KeyboardInterrupt):
            return "interrupted"
        return f"failed: {self.error or type(self.error).__name__}"


def run_job(job: Job, directory: RunDirectory, plots: bool = True) -> Outcome:
    """Measure everything a job asks for, writing tables and configuration after every setting.

    Parameters
    ----------
    job : Job
    directory : RunDirectory
    plots : bool
        Draw the plots at the end, of what was measured.

    Returns
    -------
    Outcome
        An exception, Ctrl-C included, is in `error`; raise it once its results are shown.
    """
    outcome = Outcome([])
    made_by = provenance() | {
        "title": f"{job.config.model} on {job.data.name}, policy {job.config.policy}",
        "cpu_threads": torch.get_num_threads(),
        "weights_sha256": job.weights_sha256,
        "data_sha256": job.data.fingerprint(),
    }
    start = time.monotonic()

    def record(status: str) -> None:
        directory.write_toml(
            "config.toml",
            {
                "run": job.config.to_record(),
                "made_by": made_by,
                "outcome": {
                    "status": status,
                    "seconds": round(time.monotonic() - start, 1),
                    "notes": job.notes,
                },
            },
            comment=_HEAD,
        )

    try:
        for measurement in job.run():
            outcome.measurements.append(measurement)
            directory.write_csv("summary.csv", summary_table(outcome.measurements))
            if measurement.layers is not None:
                directory.write_csv("layers.csv", layer_table(outcome.measurements))
            record("running")
    except BaseException as error:
        outcome.error = error
    if outcome.measurements:
        record(outcome.status)
        if plots and len(outcome.measurements) > 1:
            try:
                draw_run(directory.path)
            except BaseException as error:  # the caller still has a table to show
                outcome.error = outcome.error or error
    return outcome


def read_config(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read ``config.toml``: the values for `RunConfig.from_record`, and what made it.

    Raises
    ------
    ConfigError
        If it is missing, no TOML, or has no table ``[run]``.
    """
    content = read_toml(path)
    run, made_by = content.get("run"), content.get("made_by", {})
    if not isinstance(run, dict) or not isinstance(made_by, dict):
        raise ConfigError(f"{path} has no table [run]; a config.toml that `sysmt run` wrote is needed")
    return run, made_by


def warn_of_differences(job: Job, made_by: Mapping[str, Any], where: str | Path) -> None:
    """Warn if weights or images are not those that a configuration was recorded with."""
    for what, key, found in (
        ("weights", "weights_sha256", job.weights_sha256),
        ("images", "data_sha256", job.data.fingerprint()),
    ):
        if made_by.get(key, found) != found:
            warnings.warn(f"the {what} are not those that {where} was made with", stacklevel=2)

"""`sysmt run`: the main job, from weights and images to a table, CSVs, plots and a configuration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sysmt.cli.app import print_table, say
from sysmt.cli.options import EVERYTHING, takes
from sysmt.study.run_config import RunConfig

if TYPE_CHECKING:
    from sysmt.study.evaluate import Measurement

__all__ = ["run"]

_RESULTS = "Results"


@takes(*EVERYTHING)
def run(
    chosen: dict[str, Any],
    config: Annotated[
        Path | None,
        typer.Option(
            help="Repeat the run of this config.toml; options given besides take precedence.",
            rich_help_panel=_RESULTS,
            metavar="FILE",
            show_default="none",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory for the results; new or empty.",
            rich_help_panel=_RESULTS,
            metavar="DIR",
            show_default="results/run-MODEL-n",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results in --out.", rich_help_panel=_RESULTS)
    ] = False,
    plots: Annotated[bool, typer.Option(help="Draw the plots.", rich_help_panel=_RESULTS)] = True,
) -> None:
    """Measure a network in float and on the array: accuracy, speedup, collisions.

    Without options: a small network on handwritten digits, trained on the spot and kept. Calibrates
    on training images, evaluates the float network and each setting on the same test images, prints
    one table and writes summary.csv, layers.csv (a row per layer and setting), accuracy.png,
    collisions.png and config.toml, which repeats the run.

    CSVs are written after every setting: Ctrl-C or an error keeps what was measured. Ratios are in
    [0, 1] in CSVs and in percent in the table.
    """
    from sysmt.study import run as study
    from sysmt.study.evaluate import Job
    from sysmt.study.run_directory import RunDirectory

    recorded, made_by = study.read_config(config) if config is not None else ({}, {})
    settings = RunConfig.from_record(recorded | chosen, str(config) if config else "")
    with RunDirectory(out, name=f"run-{settings.model}", overwrite=overwrite, stale=study.FILES) as directory:
        job = Job(settings)
        if config is not None:
            study.warn_of_differences(job, made_by, config)
        said = _say_notes(job.notes, 0)
        outcome = study.run_job(job, directory, plots)
        _say_notes(job.notes, said)
    if outcome.measurements:
        print_results(outcome.measurements)
        say(f"results {'so far ' if outcome.error else ''}are in {directory.path}")
    if outcome.error is not None:
        raise outcome.error


def _say_notes(notes: list[str], said: int) -> int:
    for note in notes[said:]:
        say(note, "dim")
    return len(notes)


def print_results(measurements: list[Measurement]) -> None:
    """Print the table of a run."""
    from sysmt.study.evaluate import summary_table

    summary = summary_table(measurements)
    with_clock = "latency_ms" in summary
    header = ["setting", "top-1\n%", "top-5\n%", "vs float\npoints ± s.e.", "speedup\n", "network\nspeedup"]
    header += ["collisions\n%", "utilization\n%"]
    header += ["latency\nms", "array\nimages/s"] if with_clock else []
    rows = []
    for row in summary.to_dict("records"):
        cells = [row["setting"], f"{100 * row['top1']:.2f}", f"{100 * row['top5']:.2f}"]
        cells.append(_difference(row["top1_difference"], row["top1_difference_se"]))
        cells += [_number(row.get(key), "{:.2f}x") for key in ("speedup", "network_speedup")]
        cells += [_number(row.get(key), "{:.1f}", 100) for key in ("collision_rate", "utilization")]
        if with_clock:
            cells += [
                _number(row["latency_ms"], "{:.4g}"),
                _number(row["array_images_per_second"], "{:,.0f}"),
            ]
        rows.append(cells)
    images = measurements[0].evaluation.images
    print_table(header, rows, caption=f"{images} test images")


def _difference(difference: float, standard_error: float) -> str:
    if math.isnan(difference):
        return "-"
    spread = "" if math.isnan(standard_error) else f" ± {100 * standard_error:.2f}"
    return f"{100 * difference:+.2f}{spread}"


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "-" if value is None or math.isnan(value) else form.format(factor * value)

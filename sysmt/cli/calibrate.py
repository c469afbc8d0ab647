"""`sysmt calibrate`: gather ranges, orders and BatchNorm statistics once, for many runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sysmt.cli.app import say
from sysmt.cli.options import ARRAY, CALIBRATION, LAYERS, MACHINE, NETWORK, takes
from sysmt.config import parse_threads
from sysmt.study.run_config import RunConfig

__all__ = ["calibrate"]


@takes(*NETWORK, "prune", *CALIBRATION, "recalibrate", "recalibration_images", *LAYERS, *ARRAY, *MACHINE)
def calibrate(
    chosen: dict[str, Any],
    out: Annotated[
        Path, typer.Option(help="File to write, ending in .npz; replaced if it is there.", metavar="FILE")
    ],
    threads: Annotated[
        int,
        typer.Option(
            help="Threads per PE under whose noise --recalibrate works.", rich_help_panel="The array"
        ),
    ] = 4,
) -> None:
    """Save activation ranges, reordering statistics and BatchNorm statistics to a file.

    The file belongs to the very weights it was made with: `sysmt run --calibration FILE` refuses
    others. With --recalibrate it holds BatchNorm statistics recalibrated at --threads.
    """
    config = RunConfig.from_record(chosen | {"threads": (parse_threads(threads),)})
    from sysmt.nn.array.calibration_file import check_suffix, save_calibration
    from sysmt.study.evaluate import Job
    from sysmt.study.run_directory import check_writable

    check_suffix(out)
    check_writable(out)
    job = Job(config)
    job.calibrate()
    notes: dict[str, Any] = {
        "model": config.model,
        "data": job.data.name,
        "images": config.calibration_images,
    }
    if config.recalibrate is not None:
        job.sim.set_threads(threads)
        job.recalibrate(f"{threads}T")
        notes |= {"recalibrated": config.recalibrate.value, "recalibrated_threads": threads}
        job.notes.append(f"BatchNorm recalibrated ({config.recalibrate}) at {threads}T")
    save_calibration(job.sim, out, notes)
    for note in job.notes:
        say(note, "dim")
    signed = sum(range_.signed for range_ in job.sim.ranges().values())
    say(f"{len(job.sim.ranges())} layers ({signed} of them signed) are in {out}")

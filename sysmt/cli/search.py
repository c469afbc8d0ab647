"""`sysmt search`: threads for each layer that give the best accuracy at each speedup."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from sysmt.cli.app import say
from sysmt.cli.options import (
    ARRAY,
    CALIBRATION,
    LAYERS,
    MACHINE,
    NETWORK,
    StudyName,
    StudyNew,
    StudyOut,
    StudyOverwrite,
    StudyPlots,
    StudyRetry,
    StudyStorage,
    takes,
)
from sysmt.cli.sweep import end_if_incomplete, points_to_float, print_points, say_start
from sysmt.config import THREAD_COUNTS, THREADS_OF, RecalibrationMode, parse_name
from sysmt.errors import ConfigError
from sysmt.study.run_config import RunConfig

__all__ = ["search"]

_SEARCH = "Search"


def _search(help: str, **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=_SEARCH, **more)


@takes(*NETWORK, "prune", "images", "recalibration_images", *LAYERS, *ARRAY, *CALIBRATION, *MACHINE)
def search(
    chosen: dict[str, Any],
    target_speedup: Annotated[
        float | None,
        _search("Pick the most accurate network at this MAC-weighted speedup.", show_default="none"),
    ] = None,
    max_drop: Annotated[
        float | None,
        _search(
            "Pick the fastest network that loses at most so many points of top-1 to float.",
            show_default="none",
        ),
    ] = None,
    evaluations: Annotated[int, _search("Thread maps to evaluate.")] = 48,
    seeds: Annotated[
        int, _search("Of these, at most so many from the integer program; the others refine them.")
    ] = 28,
    sensitivity_images: Annotated[
        int, _search("Training images, unlabelled, for the layers' sensitivities.")
    ] = 256,
    held_out: Annotated[
        float,
        _search(
            "Share of the test images that pick no points: accuracy on them is free of the luck of picking."
        ),
    ] = 0.5,
    recalibrate: Annotated[
        str, _search("BatchNorm recalibration of every map: ema, cumulative, final or none.", metavar="MODE")
    ] = "ema",
    baselines: Annotated[
        bool, _search("Evaluate as many uniform, random and greedy (highest MSE first) maps, too.")
    ] = False,
    out: StudyOut = None,
    overwrite: StudyOverwrite = False,
    storage: StudyStorage = None,
    study: StudyName = None,
    new: StudyNew = False,
    retry_failed: StudyRetry = False,
    plots: StudyPlots = True,
) -> None:
    """Find threads for each layer: the best accuracy for every speedup.

    Measures how much each layer's thread count disturbs the output, solves for the least disturbance
    at a range of speedups (exactly, as an integer program), evaluates these maps and refines
    them by NSGA-II. Writes front.csv, maps/*.toml for `sysmt run --threads-map`, sensitivities.csv,
    points.csv and plots. Interrupted, the same command goes on; `sysmt sweep --join DIR` helps.
    """
    if target_speedup is not None and max_drop is not None:
        raise ConfigError("pick by --target-speedup or by --max-drop, not by both")
    most = float(max(THREAD_COUNTS))
    if target_speedup is not None and not 1 <= target_speedup <= most:
        raise ConfigError(f"target_speedup={target_speedup} cannot be reached; it must be in [1, {most:g}]")
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise ConfigError(f"max_drop={max_drop} is out of range; it must be in [0, 100] percentage points")
    mode = parse_name(RecalibrationMode, recalibrate, "recalibrate")
    config = RunConfig.from_record(chosen)
    from sysmt.study.search import SearchConfig, choose, front_table
    from sysmt.study.session import Session

    plan = SearchConfig(
        evaluations=evaluations,
        seeds=seeds,
        sensitivity_images=sensitivity_images,
        policy=config.policy,
        sparsity=config.prune or 0.0,
        recalibrate=mode,
        seed=config.seed,
    )
    session = Session(
        "search",
        config,
        out=out,
        storage=storage,
        study=study,
        overwrite=overwrite,
        held_out=held_out,
        asked=dataclasses.asdict(plan) | {"baselines": baselines},
        new=new,
    )
    with session:
        say_start(session)
        try:
            points = session.search(plan, baselines, retry_failed)
        finally:
            say(f"the study is in {session.store.shown_url}; results are in {session.directory.path}")
        if plots:
            session.draw()
        left_out = session.store.left_out()
        print_points(front_table(points), left_out)
        if target_speedup is not None or max_drop is not None:
            row = choose(points, target_speedup=target_speedup, max_drop=max_drop)
            say_choice(row, points, session.keep_choice(row))
    end_if_incomplete(left_out)


def say_choice(row: dict[str, Any], points: Any, path: Path) -> None:
    """Say what the picked network costs, and what the uniform ones would."""
    print(f"picked: {_described(row)}; its threads are in {path}")
    columns = [name for name in points.columns if name.startswith(THREADS_OF)]
    for _, other in points[points[columns].nunique(axis=1) == 1].sort_values("speedup").iterrows():
        print(f"uniform {int(other[columns[0]])}T: {_described(other)}")


def _described(row: Any) -> str:
    judged = "held_out_top1" in row
    top1 = row["held_out_top1" if judged else "top1"]
    return (
        f"{row['speedup']:.2f}x ({row['network_speedup_cycles']:.2f}x in the network's cycles), top-1 "
        f"{100 * top1:.2f} %, {points_to_float(row, 'held_out' if judged else 'top1')} points to float"
        + (" on the images held out" if judged else "")
    )

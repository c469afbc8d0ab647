"""`sysmt sweep`: evaluate many settings of one network, on one machine or many."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from sysmt.cli.app import print_table, say
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
    study_option,
    takes,
)
from sysmt.config import THREADS_OF, parse_count
from sysmt.errors import EXIT_INCOMPLETE, ConfigError
from sysmt.study.run_config import RunConfig

__all__ = ["sweep"]

_POINTS = "Points"


def _points(help: str, **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=_POINTS, **more)


@takes(
    *(name for name in NETWORK if name != "prune"),
    "threads",
    "images",
    "recalibration_images",
    *LAYERS,
    *(name for name in ARRAY if name != "policy"),
    *CALIBRATION,
    *MACHINE,
)
def sweep(
    chosen: dict[str, Any],
    kinds: Annotated[
        str,
        _points(
            "Thread maps made of --threads: a list of uniform, one-at-a-time (one layer lowered), prefix, "
            "suffix (first or last layers lowered); none for those of --maps alone.",
            metavar="LIST",
        ),
    ] = "uniform",
    maps: Annotated[
        Path | None,
        _points(
            "More thread maps: a CSV with a column per layer, or a TOML with tables [[points]].",
            metavar="FILE",
            show_default="none",
        ),
    ] = None,
    policies: Annotated[str, _points("Policies to evaluate every map under.", metavar="LIST")] = "S+A",
    sparsities: Annotated[
        str, _points("Shares of weights, in [0, 1), set to zero first, without training.", metavar="LIST")
    ] = "0",
    recalibrate: Annotated[
        str | None,
        _points(
            "Evaluate every point again with BatchNorm recalibrated: a list of ema (also if none is "
            "given), cumulative, final.",
            metavar="[LIST]",
            show_default="off",
        ),
    ] = None,
    out: StudyOut = None,
    overwrite: StudyOverwrite = False,
    storage: StudyStorage = None,
    study: StudyName = None,
    workers: Annotated[int, study_option("Processes on this machine, which share its CPUs.")] = 1,
    join: Annotated[
        str | None,
        study_option(
            "Help with a sweep or search that was started elsewhere: its URL, study.db, or directory. Takes "
            "the configuration from there; name --weights and --data where they lie elsewhere.",
            metavar="STORAGE",
            show_default="none",
        ),
    ] = None,
    export: Annotated[
        Path | None,
        study_option(
            "Write the points also to this CSV.", metavar="FILE", show_default="points.csv in --out"
        ),
    ] = None,
    new: StudyNew = False,
    retry_failed: StudyRetry = False,
    helper: Annotated[
        bool,
        study_option("Read the storage from stdin, and end once that closes: for --workers.", hidden=True),
    ] = False,
    plots: StudyPlots = True,
) -> None:
    """Evaluate many settings of a network: thread maps x policies x sparsities x recalibration.

    Every point is kept in a database once it is measured: after Ctrl-C or kill -9 the same command
    goes on, and no finished point is evaluated again. Any number of processes and machines
    can work on one study (--workers, --join).
    """
    from sysmt.study.run_directory import check_writable, export_table

    if export is not None:
        check_writable(export)
    if join is not None:
        _join(_from_parent() if helper else join, study, chosen, export, retry_failed)
        return
    from sysmt.study.session import Session
    from sysmt.study.sweep import Sweep

    config = RunConfig.from_record(chosen)
    plan = Sweep(
        kinds=() if kinds == "none" else _words(kinds),
        counts=config.threads,
        maps_file=str(maps) if maps else None,
        policies=_words(policies),  # type: ignore[arg-type]  # parsed there
        sparsities=_numbers(sparsities),
        recalibrate=_words(recalibrate) if recalibrate else (),
    )
    workers = parse_count(workers, "workers")
    session = Session(
        "sweep",
        config,
        out=out,
        storage=storage,
        study=study,
        overwrite=overwrite,
        asked=dataclasses.asdict(plan),
        new=new,
    )
    with session:
        say_start(session)
        try:
            table = session.sweep(plan, workers, retry_failed)
        finally:
            say(f"the study is in {session.store.shown_url}; results are in {session.directory.path}")
        if export is not None:
            export_table(table, export)
        if plots and len(table) and not session.helps:
            session.draw()
        left_out = session.store.left_out()
        print_points(table, left_out)
    end_if_incomplete(left_out)


def _from_parent() -> str:
    """Read the storage's URL from the process that started this one; end as by SIGTERM once that is gone."""
    storage = sys.stdin.readline().rstrip("\n")

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    return storage


def _join(
    storage: str, study: str | None, chosen: dict[str, Any], export: Path | None, retry_failed: bool
) -> None:
    from sysmt.progress import progress_bar
    from sysmt.study.session import join
    from sysmt.study.store import Store

    with progress_bar("points evaluated here", unit="points") as bar:
        done = join(storage, study, chosen, lambda point, measured: bar.advance(), retry_failed)
    store = Store(storage, study)
    say(f"{done} points were evaluated here; the study has {len(store.table())}")
    if export is not None:
        from sysmt.study.run_directory import export_table

        export_table(store.table(), export)
    end_if_incomplete(store.left_out())


def say_start(session: Any) -> None:
    """Say what was decided, and whether a study is gone on with."""
    for note in session.bench.notes:
        say(note, "dim")
    counts = session.store.counts()
    if session.helps:
        say(f"another process is working on {session.directory.path}; helping it", "dim")
    elif session.goes_on or counts["complete"]:
        say(f"going on with {counts['complete']} finished points in {session.directory.path}", "dim")


def end_if_incomplete(left_out: Any) -> None:
    """End with an exit code of its own if points are missing from the result, saying how many and why."""
    if not len(left_out):
        return
    why = ", ".join(dict.fromkeys(left_out["reason"]))
    points = "1 point is" if len(left_out) == 1 else f"{len(left_out)} points are"
    say(f"incomplete: {points} left out ({why}); --retry-failed takes up those that were given up", "yellow")
    raise typer.Exit(EXIT_INCOMPLETE)


def print_points(table: Any, left_out: Any = (), most: int = 40) -> None:
    """Print the points of a study, fastest first, and those that are left out."""
    rows, judged = [], "held_out_top1" in table
    if not len(table):
        table = left_out[:0]
    for row in table.sort_values("speedup", ascending=False).head(most).to_dict("records"):
        rows.append(
            [
                *_setting(row),
                f"{row['speedup']:.2f}x",
                f"{row['network_speedup_cycles']:.2f}x",
                f"{100 * row['top1']:.2f}",
                points_to_float(row, "top1"),
                *([points_to_float(row, "held_out")] if judged else []),
                f"{100 * row['collision_rate']:.1f}",
            ]
        )
    for row in left_out.to_dict("records") if len(left_out) else ():
        rows.append([*_setting(row), "left out", *["-"] * (5 if judged else 4)])
    header = [
        "layers",
        "policy",
        "pruned\n%",
        "recalibrated",
        "speedup\n",
        "network\ncycles",
        "top-1\n%",
        "vs float\npoints ± s.e.",
    ]
    shown = f"{most} of {len(table)} points, fastest first" if most < len(table) else ""
    if judged:
        header.append("held out\npoints ± s.e.")
    print_table([*header, "collisions\n%"], rows, caption=shown)


def _setting(row: Any) -> list[str]:
    """Write what a point is: its threads, policy, sparsity and recalibration."""
    threads = [int(value) for key, value in row.items() if key.startswith(THREADS_OF)]
    layers = "/".join(f"{threads.count(count)}x{count}T" for count in (1, 2, 4) if count in threads)
    return [layers, row["policy"], f"{100 * row['sparsity']:.0f}", row["recalibrate"]]


def points_to_float(row: Any, kind: str) -> str:
    """Write a point's difference to float in points: of kind ``"top1"``, or ``"held_out"`` images'."""
    return f"{100 * row[f'{kind}_difference']:+.2f} ± {100 * (row[f'{kind}_difference_se'] or 0):.2f}"


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"sparsities={text!r} is no list of shares, such as 0,0.2,0.4") from None

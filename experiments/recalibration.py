"""How many images and which mode BatchNorm recalibration needs.

Accuracy at 2T and 4T after recalibration on more and more training images: as an exponential moving
average over batches (``ema``, the main paper's), pooled over all images (``cumulative``), and from the last
batch alone (``final``, as "Final Sample Batch Normalization" does).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from common.command import OPTIONS, Out, Preset, Quick, main, numbers_in
from common.ledgers import open_ledger
from common.networks import Workload, workloads
from common.panels import legend_below, markers, panels
from common.points import Key, joined_seeds, measure_float, recalibrated, still_missing, those_of
from common.tables import markdown, percent, publish

from sysmt.cli.options import takes
from sysmt.config import RECALIBRATION_MODES
from sysmt.errors import ConfigError
from sysmt.progress import Bar, progress_bar
from sysmt.study.ledger import Ledger
from sysmt.study.plots.style import FLOAT_GREY

KEYS = ("network", "threads", "mode", "recalibration_images", "seed")
COUNTS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUICK_COUNTS = (32, 128, 512)
NONE = "none"
SHARED = ("resnet20",)


@takes(*(name for name in OPTIONS if name != "recalibration_images"))
def recalibration(
    chosen: dict[str, Any],
    preset: Preset = None,
    seeds: Annotated[int, typer.Option(help="Seeds of calibration and recalibration: 0, 1, ...", min=1)] = 3,
    counts: Annotated[
        str | None,
        typer.Option(
            help="Numbers of recalibration images.", metavar="LIST", show_default="32, 64 .. 4096, or all"
        ),
    ] = None,
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Measure accuracy against the number of recalibration images, for ema, cumulative and final."""
    networks = workloads(chosen, preset, quick, SHARED)
    wanted = _parse(counts) if counts else QUICK_COUNTS if quick else COUNTS
    with open_ledger("recalibration", networks, KEYS, out, preset, quick) as ledger:
        points_each = seeds * 2 * (1 + len(wanted) * len(RECALIBRATION_MODES)) + 1
        tables = []
        with progress_bar("recalibration", len(networks) * points_each, "points") as bar:
            for network in networks:
                points = measure(network, wanted, seeds, ledger, bar)
                tables.append(summarise(ledger, points))
        table = pd.concat(tables, ignore_index=True)
        ledger.write("recalibration.csv", table)
        publish(ledger, "recalibration", networks, table, layout_of, draw)


def _parse(text: str) -> tuple[int, ...]:
    counts = tuple(sorted(set(numbers_in(text, "counts", int, "32,128,512"))))
    if counts[0] < 2:
        raise ConfigError(f"counts={text!r} has {counts[0]}; a variance needs 2 images at least")
    return counts


def points_of(network: str, counts: Sequence[int], seeds: int) -> list[Key]:
    """Return the keys of all points of one network, the float network first."""

    def point(threads: int, mode: str, images: int, seed: int) -> Key:
        return dict(zip(KEYS, (network, threads, mode, images, seed), strict=True))

    points = [point(0, NONE, 0, 0)]
    for seed, threads in itertools.product(range(seeds), (2, 4)):
        points.append(point(threads, NONE, 0, seed))
        points += [point(threads, *rest, seed) for rest in itertools.product(RECALIBRATION_MODES, counts)]
    return points


def measure(network: Workload, counts: Sequence[int], seeds: int, ledger: Ledger, bar: Bar) -> list[Key]:
    """Measure what is missing of one network, and return the keys of all its points."""
    subject = network.open(ledger)
    # More images than there are would be measured again and again.
    available = subject.data.images("train")
    counts = sorted({min(count, available) for count in counts})
    points = points_of(network.name, counts, seeds)
    missing = still_missing(points, ledger, bar)
    measure_float(missing, subject, ledger, bar)
    for seed in range(seeds):
        here = [point for point in missing if point["seed"] == seed]
        if not here:
            continue
        with subject.on_array(seed) as sim:
            for point in here:
                sim.set_threads(point["threads"])
                mode, images = point["mode"], point["recalibration_images"]
                what = f"{point['threads']}T {mode} {images}"
                with recalibrated(mode != NONE, subject, mode, images, seed):
                    evaluation = subject.evaluate(what)
                ledger.add(point | evaluation.to_record(), evaluation.correct)
                bar.advance(1, f"{what}: {percent(evaluation.top1)} %")
    return points


def summarise(ledger: Ledger, points: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Join the seeds: a row per network, threads, mode and number of images.

    Parameters
    ----------
    ledger : Ledger
    points : sequence of mapping
        The keys of finished points; the ledger may hold others.

    Returns
    -------
    DataFrame
        ``top1``, mean over the seeds; ``top1_seed_sd``; ``difference`` to float and ``difference_se``,
        paired by image, each image counting with its mean over the seeds.
    """
    rows = []
    for key, group in those_of(points, ledger.points()).groupby(list(KEYS[:-1]), sort=False):
        reference = ledger.correct(network=key[0], threads=0, mode=NONE, recalibration_images=0, seed=0)
        rows.append(dict(zip(KEYS, key, strict=False)) | joined_seeds(group, KEYS, ledger, reference))
    return pd.DataFrame(rows)


def layout_of(table: pd.DataFrame, network: str) -> str:
    """Lay out one network's points: numbers of images down, threads and modes across."""
    here = table[table["network"] == network]
    indexed = here.set_index(["threads", "mode", "recalibration_images"]).sort_index()
    columns = list(itertools.product((2, 4), RECALIBRATION_MODES))
    header = [f"{network}: images", *(f"{threads}T {mode}, %" for threads, mode in columns)]
    counts = sorted(here.loc[here["mode"] != NONE, "recalibration_images"].unique())
    rows = [["0", *(percent(indexed.loc[(threads, NONE, 0), "top1"]) for threads, _ in columns)]]
    rows += [
        [str(count), *(percent(indexed.loc[(*column, count), "top1"]) for column in columns)]
        for count in counts
    ]
    reference = indexed.loc[(0, NONE, 0)]
    worst = 100 * here.loc[here["threads"] > 0, "difference_se"].max()
    note = (
        f"Float {percent(reference['top1'])} %; {int(reference['images']):,} test images, means over "
        f"{int(here['seeds'].max())} seeds. Standard errors of the differences to float are at most "
        f"{worst:.2f} points.\n"
    )
    return f"{markdown(header, rows)}\n{note}"


def draw(table: pd.DataFrame, path: Path, title: str) -> None:
    """Draw accuracy against the number of images, a panel per thread count."""
    with panels(path, 8.0, 3.4, columns=2, sharey=True) as (drawing, (both,)):
        accuracy = 100 * float(table.loc[table["threads"] == 0, "top1"].iloc[0])
        for threads, panel in zip((2, 4), both, strict=True):
            rows = table[table["threads"] == threads]
            without = 100 * float(rows.loc[rows["mode"] == NONE, "top1"].iloc[0])
            panel.axhline(accuracy, color=FLOAT_GREY, linestyle="--", linewidth=1, label="float")
            panel.axhline(without, color=FLOAT_GREY, linestyle=":", linewidth=1.4, label="not recalibrated")
            for index, mode in enumerate(RECALIBRATION_MODES):
                line = rows[rows["mode"] == mode].sort_values("recalibration_images")
                places = line["recalibration_images"] * (1 + 0.05 * (index - 1))  # side by side
                errors = line["top1_seed_sd"].fillna(0)
                markers(panel, places, line["top1"], errors, index, linestyle="-", label=mode)
            panel.set_xscale("log", base=2)
            counts = sorted(rows.loc[rows["mode"] != NONE, "recalibration_images"].unique())
            crowded = len(counts) > 1 and counts[-1] < 1.5 * counts[-2]
            ticks = [*counts[:-2], counts[-1]] if crowded else counts
            panel.set_xticks(ticks, [str(count) for count in ticks], fontsize=7)
            panel.set_xlabel("training images")
            panel.set_title(f"{title}, {threads}T", fontsize=9)
        both[0].set_ylabel("top-1 accuracy, %")
        legend_below(drawing, both[0])


if __name__ == "__main__":
    main(recalibration)

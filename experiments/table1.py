"""Table 1 of "Post-Training BatchNorm Recalibration": accuracy at 2T and 4T, without and with recalibration.

Beyond the paper's table: every difference to the float network with its standard error, paired by image;
the spread over calibration seeds; float and A8W8 recalibrated too, as controls; and how far the
statistics of each BatchNorm layer moved. Rows marked † leave the layer with the highest error at one thread.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from common.command import OPTIONS, Mode, Out, Preset, Quick, main
from common.ledgers import open_ledger
from common.networks import Workload, workloads
from common.panels import markers
from common.points import Key, compared, joined_seeds, mean_correct, recalibrated, still_missing
from common.tables import give_or_take, markdown, percent, signed

from sysmt.cli.options import takes
from sysmt.nn.array.simulation import Simulation
from sysmt.progress import Bar, progress_bar
from sysmt.study.evaluate import array_facts
from sysmt.study.ledger import Ledger
from sysmt.study.plots.style import figure
from sysmt.study.thread_maps import measure_errors, throttle
from sysmt.study.workload import OpenWorkload

KEYS = ("network", "setting", "recalibrated", "seed")
THREADS = {"FP32": 0, "A8W8": 1, "2T": 2, "4T": 4, "2T†": 2, "4T†": 4}
ERROR_IMAGES = 512
"""Training images (at most) that decide which layer a † row leaves alone."""

SHARED = ("resnet20", "resnet32", "resnet20-jpeg", "resnet18-tiny")


@takes(*OPTIONS)
def table1(
    chosen: dict[str, Any],
    preset: Preset = None,
    seeds: Annotated[int, typer.Option(help="Calibration seeds: 0, 1, ...", min=1)] = 3,
    mode: Mode = "ema",
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Reproduce Table 1: networks down, FP32, A8W8, 2T and 4T without and with recalibration across."""
    networks = workloads(chosen, preset, quick, SHARED, recalibration_images=4096)
    with open_ledger("table1", networks, KEYS, out, preset, quick, mode=mode) as ledger:
        total = len(networks) * len(list(points_of("", seeds)))
        with progress_bar("table 1", total, "points") as bar:
            for network in networks:
                measure(network, seeds, mode, ledger, bar)
        table = summarise(ledger, [network.name for network in networks], seeds)
        ledger.write("table1.csv", table)
        layout = paper_layout(table)
        ledger.write_text("table1.md", layout)
        draw(table, ledger.path / "table1.png")
        print(layout)


def points_of(network: str, seeds: int) -> Iterator[Key]:
    """Yield the keys of all points of one network; float without recalibration has no seed to vary."""
    for seed, setting, again in itertools.product(range(seeds), THREADS, (False, True)):
        if setting != "FP32" or again or not seed:
            yield dict(zip(KEYS, (network, setting, again, seed), strict=True))


def measure(network: Workload, seeds: int, mode: str, ledger: Ledger, bar: Bar) -> None:
    """Measure what is missing of one network."""
    points = list(points_of(network.name, seeds))
    missing = still_missing(points, ledger, bar)
    if not missing:
        return
    subject = network.open(ledger)
    measurer = _Measurer(subject, mode, ledger, bar)
    for point in missing:
        if point["setting"] == "FP32":
            measurer.add(point, None)
    for seed in range(seeds):
        here = [point for point in missing if point["seed"] == seed and point["setting"] != "FP32"]
        if not here:
            continue
        with subject.on_array(seed) as sim:
            alone = worst_layer(subject, sim, seed) if any("†" in point["setting"] for point in here) else ""
            for point in here:
                sim.set_threads(THREADS[point["setting"]])
                throttled = alone if "†" in point["setting"] else ""
                if throttled:
                    sim.set_threads({throttled: 1})
                measurer.add(point | {"throttled": throttled}, sim)


def worst_layer(subject: OpenWorkload, sim: Simulation, seed: int) -> str:
    """Return the layer with the highest mean squared error at 4T."""
    loader = subject.training_images(min(ERROR_IMAGES, subject.config.calibration_images), seed)
    sim.set_threads(4)
    measure_errors(sim, loader, loader.images)
    return next(name for name, count in throttle(sim, 1).items() if count == 1)


class _Measurer:
    """Evaluates one network in the state that it is in, recalibrated or not, and stores the point."""

    def __init__(self, subject: OpenWorkload, mode: str, ledger: Ledger, bar: Bar) -> None:
        self._subject, self._mode, self._ledger, self._bar = subject, mode, ledger, bar

    def add(self, point: Mapping[str, Any], sim: Simulation | None) -> None:
        subject, again = self._subject, point["recalibrated"]
        what = f"{point['network']} {point['setting']}{' recalibrated' if again else ''}"
        images = subject.config.recalibration_images
        with recalibrated(again, subject, self._mode, images, point["seed"]) as report:
            tables = {"shifts": report.to_frame()} if report else {}
            if sim:
                sim.reset()
            evaluation = subject.evaluate(what)
        reference = point | {"setting": "FP32", "recalibrated": False, "seed": 0}
        is_reference = all(point[key] == reference[key] for key in KEYS)
        float_correct = evaluation.correct if is_reference else self._ledger.correct(**reference)
        values = {
            **{key: point[key] for key in KEYS},
            "threads": THREADS[point["setting"]],
            "throttled": point.get("throttled", ""),
            **evaluation.to_record(),
            **compared(evaluation.correct, float_correct),
            **(array_facts(sim) if sim else {}),
        }
        self._ledger.add(values, evaluation.correct, tables)
        self._bar.advance(1, f"{what}: {percent(evaluation.top1)} %")


# -- the table ---------------------------------------------------------------------------------


def summarise(ledger: Ledger, networks: Sequence[str], seeds: int) -> pd.DataFrame:
    """Join the seeds: a row per network, setting and recalibration.

    Parameters
    ----------
    ledger : Ledger
    networks : sequence of str
    seeds : int
        Their points up to this seed are complete; the ledger may hold some of others.

    Returns
    -------
    DataFrame
        ``top1`` is the mean over the seeds and ``top1_seed_sd`` its standard deviation (NaN for one
        seed); ``difference`` to float with ``difference_se``, paired by image, each image counting with
        its mean over the seeds; ``gain`` of recalibration with ``gain_se``, likewise.
    """
    points = ledger.points()
    points = points[points["network"].isin(networks) & (points["seed"] < seeds)]
    rows = []
    for (network, setting, again), group in points.groupby(list(KEYS[:3]), sort=False):
        base = {"network": network, "setting": setting, "recalibrated": False}
        reference = ledger.correct(network=network, setting="FP32", recalibrated=False, seed=0)
        gain = {"gain": math.nan, "gain_se": math.nan}
        if again:
            without = points[(points[list(base)] == pd.Series(base)).all(axis=1)]
            both = (mean_correct(some[list(KEYS)].to_dict("records"), ledger) for some in (group, without))
            gain = compared(*both, "gain")
        rows.append(
            {
                "network": network,
                "setting": setting,
                "recalibrated": again,
                **joined_seeds(group, KEYS, ledger, reference),
                **gain,
                "speedup": group["speedup"].mean(),
                "collision_rate": group["collision_rate"].mean(),
                "throttled": " ".join(sorted(set(group["throttled"].fillna("")))).strip(),
            }
        )
    return pd.DataFrame(rows)


def paper_layout(table: pd.DataFrame) -> str:
    """Lay the table out as the paper does, with standard errors; † rows stand below their network."""
    indexed = table.set_index(["network", "setting", "recalibrated"])
    columns = [(setting, again) for setting in ("FP32", "A8W8", "2T", "4T") for again in (False, True)]
    header = ["top-1, %", *(f"{setting} {'w/' if again else 'w/o'}" for setting, again in columns)]
    rows = []
    for network in table["network"].unique():
        for mark in ("", "†"):
            cells = [network + mark]
            for setting, again in columns:
                name = setting + (mark if setting in ("2T", "4T") else "")
                cells.append(_cell(indexed.loc[(network, name, again)], setting == "FP32" and not again))
            rows.append(cells)
    return markdown(header, rows) + "\n" + _notes(table)


def _cell(row: pd.Series, is_reference: bool) -> str:
    if is_reference:
        return percent(row["top1"])
    return f"{percent(row['top1'])} ({give_or_take(signed(row['difference']), row['difference_se'])})"


def _notes(table: pd.DataFrame) -> str:
    """Say what the numbers are, and what stands in no cell: seeds' spread, gains, the layers of †."""
    counts = table.groupby("network", sort=False)[["images", "seeds"]].max()
    lines = [
        "w/o, w/: without and with BatchNorm recalibration. In brackets: difference to FP32 w/o in points ±",
        "one standard error, paired by image. Test images and calibration seeds: "
        + "; ".join(f"{row.Index}: {row.images:,} and {row.seeds}" for row in counts.itertuples())
        + ".",
        "",
    ]
    rows = []
    for row in table[table["recalibrated"]].itertuples():
        plain = table[
            (table["network"] == row.network) & (table["setting"] == row.setting) & ~table["recalibrated"]
        ].iloc[0]
        rows.append(
            [
                f"{row.network}, {row.setting}",
                give_or_take(signed(row.gain), row.gain_se),
                _spread(plain["top1_seed_sd"]),
                _spread(row.top1_seed_sd),
                f"{row.speedup:.2f}x" if row.speedup == row.speedup else "-",
                percent(row.collision_rate, 1) if row.collision_rate == row.collision_rate else "-",
                row.throttled or "-",
            ]
        )
    header = [
        "recalibration",
        "gain, points",
        "seeds' s.d. w/o",
        "seeds' s.d. w/",
        "speedup",
        "collisions, %",
    ]
    return "\n".join(lines) + "\n" + markdown([*header, "layer at 1T"], rows)


def _spread(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f}"


def draw(table: pd.DataFrame, path: Any) -> None:
    """Draw the differences to float: one column per network and setting, without and with recalibration."""
    shown = ["A8W8", "2T", "2T†", "4T", "4T†"]
    networks = list(table["network"].unique())
    width = 2.2 + 1.9 * len(networks)
    with figure(path, width_in=max(4.5, width), height_in=3.6) as (_, axes):
        axes.axhline(0, color="#555555", linestyle="--", linewidth=1)
        ticks, labels = [], []
        for block, network in enumerate(networks):
            start = block * (len(shown) + 1)
            for again in (False, True):
                rows = table[(table["network"] == network) & (table["recalibrated"] == again)]
                rows = rows.set_index("setting").loc[shown]
                places = np.arange(len(shown)) + start + (0.14 if again else -0.14)
                label = None if block else "BatchNorm recalibrated" if again else "as calibrated"
                markers(axes, places, rows["difference"], rows["difference_se"], again, label=label)
            ticks += [start + place for place in range(len(shown))]
            labels += shown
            axes.text(
                start + (len(shown) - 1) / 2,
                1.0,
                network.replace(", ", "\n"),
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=8,
            )
        axes.set_xticks(ticks, labels, fontsize=8)
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("top-1 against float, points")
        axes.legend(loc="lower left")


if __name__ == "__main__":
    main(table1)

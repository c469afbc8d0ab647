"""What each squeezing policy costs: nine policies x 2T and 4T x reordering on and off.

The policies are those of the NB-SMT paper (Shomron and Weiser, MICRO 2020); the experiments of
"Post-Training BatchNorm Recalibration" leave its reordering off. Every layer is compared with itself at one
thread on the same input.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pandas as pd
from common.command import OPTIONS, Out, Preset, Quick, main
from common.ledgers import open_ledger
from common.networks import Workload, workloads
from common.panels import legend_below, panels
from common.points import Key, compared, measure_float, still_missing
from common.tables import give_or_take, markdown, percent, publish
from matplotlib.axes import Axes

from sysmt.cli.options import takes
from sysmt.config import Policy
from sysmt.progress import Bar, progress_bar
from sysmt.study.evaluate import array_facts
from sysmt.study.ledger import Ledger
from sysmt.study.plots.style import COLOURS, FLOAT_GREY, MARKERS

KEYS = ("network", "policy", "threads", "reorder")
FLOAT = "float"
SHARED = ("resnet20",)


@takes(*(name for name in OPTIONS if name not in ("policy", "recalibration_images")))
def policies(chosen: dict[str, Any], preset: Preset = None, quick: Quick = False, out: Out = None) -> None:
    """Measure every policy at 2T and 4T, with and without reordering: accuracy, MSE and SQNR."""
    networks = workloads(chosen, preset, quick, SHARED)
    with open_ledger("policies", networks, KEYS, out, preset, quick) as ledger:
        with progress_bar("policies", len(networks) * len(points_of("")), "points") as bar:
            for network in networks:
                measure(network, ledger, bar)
        publish(ledger, "policies", networks, ledger.points(), layout_of, draw)


def points_of(network: str) -> list[Key]:
    """Return the keys of all points of one network, the float network first and then one thread."""
    alone = [(network, FLOAT, 0, False), (network, "exact", 1, False)]
    squeezed = [
        (network, policy.value, threads, reorder)
        for threads, reorder, policy in itertools.product((2, 4), (False, True), Policy)
    ]
    return [dict(zip(KEYS, point, strict=True)) for point in alone + squeezed]


def measure(network: Workload, ledger: Ledger, bar: Bar) -> None:
    """Measure what is missing of one network."""
    points = points_of(network.name)
    missing = still_missing(points, ledger, bar)
    if not missing:
        return
    subject = network.open(ledger)
    measure_float(missing, subject, ledger, bar)
    reference = ledger.correct(**points[0])
    with subject.on_array(network.config.seed, reorder=True, errors=True) as sim:
        for point in missing:
            if point["threads"] > 1:
                sim.reconfigure(policy=point["policy"])
            sim.set_threads(point["threads"])
            sim.reorder = point["reorder"]
            what = f"{point['policy']} {point['threads']}T{' reordered' if point['reorder'] else ''}"
            evaluation = subject.evaluate(what)
            layers = sim.report()
            simulated = layers[layers["threads"] > 0]
            values = {
                **point,
                **evaluation.to_record(),
                **compared(evaluation.correct, reference),
                # Layers differ in scale: the mean over layers of dB weighs them alike, that of MSE does not.
                "mse": simulated["mse"].mean(),
                "sqnr_db": simulated["sqnr_db"].mean(),
                **array_facts(sim),
            }
            ledger.add(values, evaluation.correct, {"layers": layers.drop(columns="threads")})
            bar.advance(1, f"{what}: {percent(evaluation.top1)} %")


def layout_of(points: pd.DataFrame, network: str) -> str:
    """Lay out one network's points: policies down, thread counts and reordering across."""
    here = points[points["network"] == network]
    indexed = here.set_index(["policy", "threads", "reorder"])
    reference = indexed.loc[(FLOAT, 0, False)]
    exact = indexed.loc[("exact", 1, False)]
    header = [network]
    for threads, reorder in itertools.product((2, 4), (False, True)):
        name = f"{threads}T{' reordered' if reorder else ''}"
        header += [f"{name}: top-1, %", "SQNR, dB", "MSE"]
    rows = []
    for policy in Policy:
        row = [policy.value]
        for threads, reorder in itertools.product((2, 4), (False, True)):
            point = indexed.loc[(policy.value, threads, reorder)]
            row += [
                give_or_take(percent(point["top1"]), point["difference_se"]),
                f"{point['sqnr_db']:.1f}",
                f"{point['mse']:.2e}",
            ]
        rows.append(row)
    note = (
        f"Float {percent(reference['top1'])} %, one thread {percent(exact['top1'])} %; "
        f"{int(reference['images']):,} test images. ±: one standard error of the difference to float, paired "
        "by image. SQNR and MSE: against one thread on the same input, means over the simulated layers.\n"
    )
    return f"{markdown(header, rows)}\n{note}"


def draw(points: pd.DataFrame, path: Path, title: str) -> None:
    """Draw accuracy and SQNR by policy, side by side."""
    with panels(path, 9.0, 3.4, columns=2) as (drawing, ((left, right),)):
        accuracy = 100 * float(points.loc[points["threads"] == 0, "top1"].iloc[0])
        left.axhline(accuracy, color=FLOAT_GREY, linestyle="--", linewidth=1, label=f"float, {accuracy:.2f}")
        _by_policy(left, points, "top1", 100, errors=True)
        left.set_ylabel("top-1 accuracy, %")
        left.set_title(title)
        _by_policy(right, points, "sqnr_db", 1, errors=False)
        right.set_ylabel("SQNR against one thread, dB")
        legend_below(drawing, left)


def _by_policy(axes: Axes, points: pd.DataFrame, column: str, factor: float, errors: bool) -> None:
    names = [policy.value for policy in Policy]
    series = list(itertools.product((2, 4), (False, True)))
    for index, (threads, reorder) in enumerate(series):
        rows = points[(points["threads"] == threads) & (points["reorder"] == reorder)]
        rows = rows.set_index("policy").loc[names]
        axes.errorbar(
            [place + 0.16 * (index - 1.5) for place in range(len(names))],
            factor * rows[column],
            yerr=factor * rows["difference_se"] if errors else None,
            color=COLOURS[index // 2],
            marker=MARKERS[index],
            markerfacecolor="white" if reorder else COLOURS[index // 2],
            linestyle="none",
            capsize=2,
            label=f"{threads}T{', reordered' if reorder else ''}",
        )
    axes.set_xticks(range(len(names)), names)
    axes.grid(axis="x", visible=False)


if __name__ == "__main__":
    main(policies)

"""BatchNorm statistics of the final batch, quantised and float: the final-sample paper's Figures 1 to 4.

A small VGG-7 learns with 1-bit weights and 2-bit activations, or in float; it is tested with population
statistics (BN-pop), those of the final batch (BN-final), and statistics that are frozen half-way, the
related method that the paper names. The paper's networks (LmnetV1, 100,000 steps of 100 images) do not
train here in any useful time; its learning rates are not given, so one that falls and one that stays are
measured side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from common.command import Out, Quick, main, names_in
from common.ledgers import open_ledger
from common.panels import legend_below, markers, panels
from common.points import Key, grid, those_of
from common.tables import give_or_take, markdown, percent, signed
from common.trainings import (
    BatchSize,
    Data,
    Epochs,
    Images,
    LearningRate,
    Runs,
    SmallPreset,
    TrainingImages,
    learn,
    open_images,
    recipe,
    train_missing,
)
from torch import nn

from sysmt.errors import ConfigError
from sysmt.files import read_csv
from sysmt.nn.batchnorm.training_statistics import BatchStatistics
from sysmt.nn.low_bit.straight_through import (
    ActivationQuantizer,
    BinaryWeight,
    per_image_standardization,
    quantize_network,
)
from sysmt.nn.networks.models import VGG7
from sysmt.nn.networks.training import History
from sysmt.study.ledger import Ledger
from sysmt.study.plots.style import COLOURS

KEYS = ("variant", "schedule", "statistics", "run")
FLOAT, USUAL = "float", "channelwise"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One network of the paper's figures.

    Attributes
    ----------
    scale : str or None
        What 1-bit weights share a scale; None leaves the network in float.
    standardised : bool
        Whether images are standardised one by one, or are pixel / 255.
    """

    scale: str | None
    standardised: bool = True


VARIANTS = {
    FLOAT: Variant(None),
    USUAL: Variant("channel"),
    "layerwise": Variant("layer"),
    "divide255": Variant("channel", standardised=False),
}
STATISTICS = tuple(kind.value for kind in BatchStatistics)
LABELS = {"population": "BN-pop", "final": "BN-final", "frozen": "frozen half-way"}
SCHEDULES = ("step", "constant")
LAST_TESTS = 3
"""Of each run, as in the paper's section 3.2."""

_RECIPE = {"weight_decay": 1e-4, "milestones": (0.5, 0.75)}


def _list_option(what: str, known: Sequence[str]) -> Any:
    return typer.Option(help=f"{what}: a list of {', '.join(known)}.", metavar="LIST", show_default="all")


def final_sample_bn(
    data: Data = None,
    preset: SmallPreset = None,
    variants: Annotated[str | None, _list_option("Networks", tuple(VARIANTS))] = None,
    statistics: Annotated[str | None, _list_option("BatchNorm statistics", STATISTICS)] = None,
    schedules: Annotated[str | None, _list_option("Learning rate", SCHEDULES)] = None,
    runs: Runs = 2,
    epochs: Epochs = None,
    images: TrainingImages = None,
    width: Annotated[
        int | None, typer.Option(help="Channels of the first convolution.", min=1, show_default="16")
    ] = None,
    batch_size: BatchSize = 50,
    lr: LearningRate = 0.05,
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Measure test accuracy over training with population, final and frozen BatchNorm statistics."""
    pixels = open_images(data, preset, 600 if quick and images is None else images, (0.0,) * 3, (1.0,) * 3)
    # A smaller last batch would be the final one; the paper's 45,000 images fill theirs.
    pixels = dataclasses.replace(pixels, images=pixels.images - pixels.images % batch_size)
    if not pixels.images:
        raise ConfigError(f"batch_size={batch_size} is more than there are training images")
    study = Study(pixels, recipe(epochs, batch_size, lr, quick), width or (8 if quick else 16))
    points = grid(
        KEYS,
        names_in(variants, "variants", VARIANTS, (FLOAT, USUAL) if quick else VARIANTS),
        names_in(schedules, "schedules", SCHEDULES, SCHEDULES[1:] if quick else SCHEDULES),
        names_in(statistics, "statistics", STATISTICS, STATISTICS[:2] if quick else STATISTICS),
        range(runs),
    )
    name = "final_sample_bn"
    with open_ledger(name, [pixels], KEYS, out, preset, quick, **study.settings) as ledger:
        train_missing(points, ledger, lambda point: study.train(point, ledger))
        summary = summarise(ledger, points)
        ledger.write(f"{name}.csv", summary)
        layout = layout_of(summary, pixels.name)
        ledger.write_text(f"{name}.md", layout)
        draw_accuracies(summary, ledger.path / f"{name}.png", pixels.name)
        draw_curves(tests_of(ledger, points), ledger.path / "curves.png", pixels.name)
        print(layout)


@dataclasses.dataclass(frozen=True)
class Study:
    """What all trainings have in common."""

    images: Images
    options: Mapping[str, Any]
    width: int

    @property
    def settings(self) -> dict[str, Any]:
        """Every choice that the points depend on besides their keys and the images."""
        milestones = {"milestones": list(_RECIPE["milestones"])}
        return {**_RECIPE, **milestones, **self.options, "width": self.width, "last_tests": LAST_TESTS}

    def network(self, variant: Variant, seed: int) -> nn.Module:
        """Build a network with fresh weights."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = VGG7(self.images.data.num_classes, self.images.data.preprocessing.channels, self.width)
        if variant.scale is not None:
            quantize_network(model, BinaryWeight(variant.scale), ActivationQuantizer(2))
        if variant.standardised:
            per_image_standardization(model)
        return model

    def train(self, point: Key, ledger: Ledger) -> tuple[dict[str, Any], dict[str, pd.DataFrame], str]:
        """Train one network, and test it after each epoch."""
        steps = self.images.images // self.options["batch_size"] * self.options["epochs"]
        frozen = point["statistics"] == BatchStatistics.FROZEN
        history = learn(
            self.network(VARIANTS[point["variant"]], point["run"]),
            self.images,
            ledger,
            point,
            **_RECIPE,
            **self.options,
            seed=point["run"],
            schedule=point["schedule"],
            statistics=point["statistics"],
            freeze_after=max(1, steps // 2) if frozen else None,
            test_every=steps // self.options["epochs"],
        )
        tests = tests_table(history)
        last = tests["test_top1"].tail(LAST_TESTS)
        values = {
            "converged": history is not None,
            "last_top1": last.mean(),
            "loss": history.epochs[-1]["loss"] if history else None,
            "steps": steps,
            "seconds": history.seconds if history else None,
        }
        note = f"{percent(last.mean())} %" if history else "did not converge"
        return values, {"tests": tests}, note


def tests_table(history: History | None) -> pd.DataFrame:
    """Return a training's tests; one row of NaN for a training that diverged."""
    records = history.tests if history else ({"step": 0, "epochs": 0.0, "test_top1": float("nan")},)
    return pd.DataFrame(records)


# -- the results -------------------------------------------------------------------------------


def tests_of(ledger: Ledger, points: Sequence[Key]) -> pd.DataFrame:
    """Return the tests of the given points."""
    return those_of(points, read_csv(ledger.path / "tests.csv"))


def summarise(ledger: Ledger, points: Sequence[Key]) -> pd.DataFrame:
    """Join the runs, as section 3.2 does: the last 3 tests of each run, their mean and deviation.

    Returns
    -------
    DataFrame
        ``top1`` and ``top1_sd``; ``gain`` over population statistics and ``gain_sd``, of the differences
        test by test (the weights are the same ones, but for frozen statistics); ``jitter``, the mean change
        from one test to the next over the second half of training.
    """
    tests = tests_of(ledger, points)
    rows = []
    for key, group in tests.groupby(list(KEYS[:-1]), sort=False):
        last = _last(group)
        population = tests[(tests[list(KEYS[:2])] == list(key[:2])).all(axis=1)]
        difference = last - _last(population[population["statistics"] == "population"])
        second_half = group[group["epochs"] > group["epochs"].max() / 2]
        jitter = second_half.groupby("run")["test_top1"].apply(lambda top1: top1.diff().abs().mean())
        rows.append(
            {
                **dict(zip(KEYS[:-1], key, strict=True)),
                "tests": len(last),
                "top1": last.mean(),
                "top1_sd": last.std(),
                "gain": difference.mean(),
                "gain_sd": difference.std(),
                "jitter": jitter.mean(),
            }
        )
    return pd.DataFrame(rows)


def _last(tests: pd.DataFrame) -> pd.Series:
    """Return the last tests of each run, by run and number."""
    kept = tests.groupby("run").tail(LAST_TESTS)
    return kept.set_index(["run", "step"])["test_top1"]


def layout_of(summary: pd.DataFrame, title: str) -> str:
    """Lay out the summary: a row per network and learning rate, statistics across."""
    kinds = [kind for kind in STATISTICS if kind in set(summary["statistics"])]
    header = [
        f"{title}, %",
        *(LABELS[kind] for kind in kinds),
        "BN-final gains",
        "jitter pop",
        "jitter final",
    ]
    rows = []
    for (variant, schedule), group in summary.groupby(["variant", "schedule"], sort=False):
        here = group.set_index("statistics")
        cells = [_cell(here, kind, "top1") for kind in kinds]
        cells.append(_cell(here, "final", "gain", signs=True))
        for kind in ("population", "final"):
            jitter = here["jitter"].get(kind, np.nan)
            cells.append("" if np.isnan(jitter) else percent(jitter))
        rows.append([f"{variant}, {schedule} rate", *cells])
    note = (
        f"Mean ± standard deviation of the last {LAST_TESTS} tests of each run. Gains are test by test, over "
        "population statistics of the same weights. Jitter: mean change from one test to the next over "
        "the second half.\n"
    )
    return f"{markdown(header, rows)}\n{note}"


def _cell(here: pd.DataFrame, kind: str, column: str, signs: bool = False) -> str:
    if kind not in here.index:
        return ""
    mean, deviation = here.loc[kind, column], here.loc[kind, f"{column}_sd"]
    if np.isnan(mean):  # of a gain: one of the two kinds was not measured, or did not converge
        return "" if signs else "did not converge"
    text = signed(mean) if signs else percent(mean)
    return give_or_take(text, deviation) if deviation >= 0 else text


def draw_accuracies(summary: pd.DataFrame, path: Path, title: str) -> None:
    """Draw Figures 1, 2 and 4: accuracies of each network with each kind of statistics."""
    schedules = list(dict.fromkeys(summary["schedule"]))
    variants = list(dict.fromkeys(summary["variant"]))
    compared = summary[summary["statistics"] != "frozen"]  # which may collapse, and squeeze the rest
    lowest = (compared["top1"] - compared["top1_sd"].fillna(0)).min()
    floor = 0.0 if np.isnan(lowest) else max(0.0, 100 * float(lowest) - 5)
    width_in = 4.2 * len(schedules) + 0.6
    with panels(path, width_in, 3.4, columns=len(schedules), sharey=True) as (drawing, (row,)):
        for panel, schedule in zip(row, schedules, strict=True):
            for index, kind in enumerate(STATISTICS):
                rows = summary[(summary["schedule"] == schedule) & (summary["statistics"] == kind)]
                if rows.empty:
                    continue
                places = [variants.index(variant) + 0.18 * (index - 1) for variant in rows["variant"]]
                for place, top1 in zip(places, 100 * rows["top1"], strict=True):
                    if top1 < floor:
                        panel.text(
                            place, floor, f"↓ {top1:.0f}", color=COLOURS[index], ha="center", va="bottom"
                        )
                markers(panel, places, rows["top1"], rows["top1_sd"].fillna(0), index, label=LABELS[kind])
            panel.set_xticks(range(len(variants)), variants)
            panel.set_xlim(-0.5, len(variants) - 0.5)
            panel.set_ylim(floor, min(100.0, 100 * summary["top1"].max() + 5) if floor else 100)
            panel.set_title(f"{title}: {_rate(schedule)}")
        row[0].set_ylabel("test accuracy, %")
        legend_below(drawing, row[0])


def draw_curves(tests: pd.DataFrame, path: Path, title: str) -> None:
    """Draw Figure 3, test accuracy over the epochs, for the float network and a quantised one."""
    schedules = list(dict.fromkeys(tests["schedule"]))
    present = list(dict.fromkeys(tests["variant"]))
    quantised = [name for name in (USUAL, *present) if name in present and name != FLOAT][:1]
    variants = [name for name in present if name == FLOAT] + quantised
    floor, top = _floor(tests), 100 * tests["test_top1"].max() + 3
    size = (4.2 * len(schedules) + 0.6, 2.6 * len(variants) + 0.6)
    shape = (len(variants), len(schedules))
    with panels(path, *size, *shape, sharex=True, sharey=True) as (drawing, grid_of_panels):
        for row, variant in enumerate(variants):
            for column, schedule in enumerate(schedules):
                panel = grid_of_panels[row, column]
                here = tests[(tests["variant"] == variant) & (tests["schedule"] == schedule)]
                for index, kind in enumerate(STATISTICS):
                    of_kind = here[here["statistics"] == kind]
                    for number, (_, run) in enumerate(of_kind.groupby("run")):
                        panel.plot(
                            run["epochs"],
                            100 * run["test_top1"],
                            color=COLOURS[index],
                            linewidth=1.1,
                            alpha=0.6 if number else 1.0,
                            label=None if number else LABELS[kind],
                        )
                panel.set_title(f"{title}, {variant}: {_rate(schedule)}", fontsize=9)
                panel.set_ylim(floor, top if floor < top < 100 else 100)
        for panel in grid_of_panels[-1]:
            panel.set_xlabel("epochs")
        for panel in grid_of_panels[:, 0]:
            panel.set_ylabel("test accuracy, %")
        legend_below(drawing, grid_of_panels[0, 0])


def _floor(tests: pd.DataFrame) -> float:
    """Leave the first epochs below the frame, where they would squeeze the rest."""
    late = tests[(tests["epochs"] > tests["epochs"].max() / 3) & (tests["statistics"] != "frozen")][
        "test_top1"
    ]
    return max(0.0, 100 * float(late.quantile(0.02)) - 5) if late.notna().any() else 0.0


def _rate(schedule: str) -> str:
    return {"step": "rate falls", "constant": "rate stays"}[schedule]


if __name__ == "__main__":
    main(final_sample_bn)

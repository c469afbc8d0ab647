"""What BatchNorm does in ternary training: the paper's Table 1 and the gradients' variance by depth.

VGG-7, ResNet-56 and MobileNet-v1 learn with ternary weights: with and without BatchNorm, each by the
threshold of ternary weight networks and by that of equation (8), the "sparse" columns. Before training, the
gradients' variance is measured layer by layer, in double precision, and predicted by equations (6) and
(13). The networks are narrow and the images few, unless asked otherwise: full size would take days on a
CPU.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch.nn.functional as F
import typer
from common.command import Out, Quick, main, names_in
from common.ledgers import open_ledger
from common.panels import legend_below, panels
from common.points import Key, grid, those_of
from common.tables import markdown, percent
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
from torch.nn.utils import parametrize

from sysmt.files import read_csv
from sysmt.nn.low_bit.gradient_variance import GradientRecorder, predict_variances
from sysmt.nn.low_bit.straight_through import (
    TernaryThreshold,
    TernaryWeight,
    initialise_uniform,
    quantize_network,
    remove_batchnorm,
)
from sysmt.nn.networks.models import VGG7, MobileNetV1, SmallResNet
from sysmt.study.ledger import Ledger
from sysmt.study.plots.style import COLOURS

KEYS = ("network", "column", "seed")


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of Table 1."""

    batchnorm: bool
    threshold: TernaryThreshold


COLUMNS = {
    "BN": Column(True, TernaryThreshold.TWN),
    "No BN": Column(False, TernaryThreshold.TWN),
    "Sparse BN": Column(True, TernaryThreshold.VARIANCE),
    "Sparse No BN": Column(False, TernaryThreshold.VARIANCE),
}


@dataclasses.dataclass(frozen=True)
class Network:
    """One row of Table 1.

    Attributes
    ----------
    build : callable
        Takes classes, image channels and the width.
    small, full : float
        Width here and in the paper: channels of the first stage, or MobileNet's multiplier.
    published : tuple of str
        The paper's accuracies on CIFAR-10, %, by column; "-": did not converge.
    """

    build: Callable[[int, int, float], nn.Module]
    small: float
    full: float
    published: tuple[str, str, str, str]


NETWORKS = {
    "vgg7": Network(
        lambda classes, channels, width: VGG7(classes, channels, int(width)),
        16, 128, ("93.5", "78.1", "-", "-"),
    ),
    "resnet56": Network(
        lambda classes, channels, width: SmallResNet((9, 9, 9), classes, channels, int(width)),
        8, 16, ("92.7", "85.7", "38.9", "39.3"),
    ),
    "mobilenet": Network(
        lambda classes, channels, width: MobileNetV1(classes, channels, width, first_stride=1),
        0.25, 1.0, ("88.3", "-", "-", "-"),
    ),
}  # fmt: skip
QUICK_NETWORKS = ("vgg7",)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
"""Of the inputs, as in the paper's section 4."""

_RECIPE: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4, "schedule": "step"}
GRADIENT_IMAGES = 100
BETTER_THAN_CHANCE = 5.0
"""A network has converged if its best test is so many standard errors better than chance."""


def ternary_bn(
    data: Data = None,
    preset: SmallPreset = None,
    networks: Annotated[
        str | None,
        typer.Option(help=f"A list of {', '.join(NETWORKS)}.", metavar="LIST", show_default="all"),
    ] = None,
    seeds: Runs = 1,
    epochs: Epochs = None,
    images: TrainingImages = None,
    batch_size: BatchSize = 50,
    lr: LearningRate = 0.1,
    scaled: Annotated[
        bool,
        typer.Option("--scaled", help="Ternary weights times TWN's scale, which the equations leave out."),
    ] = False,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="First and last layer ternary, too.")
    ] = False,
    full_width: Annotated[
        bool, typer.Option("--full-width", help="Networks as wide as the paper's; wants a GPU.")
    ] = False,
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Train ternary networks with and without BatchNorm, by two thresholds."""
    pixels = open_images(data, preset, 400 if quick and images is None else images, MEAN, STD)
    study = Study(pixels, recipe(epochs, batch_size, lr, quick), scaled, all_layers, full_width)
    chosen = names_in(networks, "networks", NETWORKS, QUICK_NETWORKS if quick else NETWORKS)
    points = grid(KEYS, chosen, COLUMNS, range(seeds))
    name = "ternary_bn"
    with open_ledger(name, [pixels], KEYS, out, preset, quick, **study.settings) as ledger:
        train_missing(points, ledger, lambda point: study.train(point, ledger))
        gradients = those_of(points, read_csv(ledger.path / "gradients.csv"))
        summary = summarise(those_of(points, ledger.points()), gradients)
        ledger.write(f"{name}.csv", summary)
        layout = layout_of(summary, pixels.name)
        ledger.write_text(f"{name}.md", layout)
        draw_gradients(gradients, ledger.path / "gradients.png", pixels.name)
        tests = those_of(points, read_csv(ledger.path / "tests.csv"))
        draw_curves(tests, ledger.path / "curves.png", pixels.name)
        print(layout)


@dataclasses.dataclass(frozen=True)
class Study:
    """What all trainings have in common."""

    images: Images
    options: Mapping[str, Any]
    scaled: bool
    all_layers: bool
    full_width: bool

    @property
    def settings(self) -> dict[str, Any]:
        """Every choice that the points depend on besides their keys and the images."""
        flags = {"scaled": self.scaled, "all_layers": self.all_layers, "full_width": self.full_width}
        return {**_RECIPE, **self.options, **flags}

    def network(self, name: str, column: Column, seed: int) -> nn.Module:
        """Build a ternary network with fresh weights."""
        network = NETWORKS[name]
        data = self.images.data
        width = network.full if self.full_width else network.small
        model = network.build(data.num_classes, data.preprocessing.channels, width)
        if not column.batchnorm:
            remove_batchnorm(model)
        initialise_uniform(model, seed)
        both = self.all_layers
        quantize_network(model, TernaryWeight(column.threshold, self.scaled), first=both, last=both)
        return model

    def train(self, point: Key, ledger: Ledger) -> tuple[dict[str, Any], dict[str, pd.DataFrame], str]:
        """Measure one network's gradients, and train it."""
        column = COLUMNS[point["column"]]
        model = self.network(point["network"], column, point["seed"])
        gradients = self.gradients(model, column, point["seed"])
        history = learn(model, self.images, ledger, point, **_RECIPE, **self.options, seed=point["seed"])
        records = history.to_records() if history else []
        tests = pd.DataFrame(records or [{"epoch": 0, "loss": math.nan, "test_top1": math.nan}])
        best = tests["test_top1"].max()
        counts = self.images.data.class_counts("test")
        chance = counts.max() / counts.sum()
        error = math.sqrt(chance * (1 - chance) / self.images.test_images)
        converged = bool(best > chance + BETTER_THAN_CHANCE * error)
        values = {
            "best_top1": best,
            "last_top1": tests["test_top1"].iloc[-1],
            "loss": tests["loss"].iloc[-1],
            "chance": chance,
            "diverged": history is None,
            "converged": converged,
            "zero_weights": zero_share(model),
            "seconds": history.seconds if history else math.nan,
        }
        tables = {"gradients": gradients, "tests": tests[["epoch", "loss", "test_top1"]]}
        return values, tables, f"{percent(best)} %" if converged else "did not converge"

    def gradients(self, model: nn.Module, column: Column, seed: int) -> pd.DataFrame:
        """Measure the gradients' variance of a fresh network on one batch, and predict it.

        Double precision holds what overflows in training. The start is the last convolution: what follows
        is pooled, which the equations do not know.
        """
        loader = self.images.data.loader(
            "train", images=GRADIENT_IMAGES, batch_size=GRADIENT_IMAGES, seed=seed
        )
        inputs, labels = next(iter(loader))
        double = copy.deepcopy(model).double().train()
        with GradientRecorder(double) as recorder:
            F.cross_entropy(double(inputs.double()), labels).backward()
        report = recorder.report()
        convolutions = [name for name, module in double.named_modules() if isinstance(module, nn.Conv2d)]
        last = [name for name in report["name"] if name in convolutions][-1]
        return report.assign(
            predicted=predict_variances(report, column.batchnorm, last),
            centred=predict_variances(report, column.batchnorm, last, centred=column.batchnorm),
        )


def zero_share(model: nn.Module) -> float:
    """Return the share of zeros among the quantised weights."""
    weights = [module.weight for module in model.modules() if parametrize.is_parametrized(module)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


# -- the results -------------------------------------------------------------------------------


def summarise(points: pd.DataFrame, gradients: pd.DataFrame) -> pd.DataFrame:
    """Join the seeds: a row per network and column.

    Returns
    -------
    DataFrame
        ``top1``, the best test of each training, mean over the seeds that converged; how many did; the
        share of zero weights at the end; ``growth``, the measured variance of gradients at the second
        layer over that at the last convolution, before training (geometric mean over the seeds), and
        what the equations predict for it.
    """
    rows = []
    for key, group in points.groupby(list(KEYS[:2]), sort=False):
        here = gradients[(gradients[list(KEYS[:2])] == list(key)).all(axis=1)]
        rows.append(
            {
                "network": key[0],
                "column": key[1],
                "seeds": len(group),
                "converged": int(group["converged"].sum()),
                "diverged": int(group["diverged"].sum()),
                "top1": group.loc[group["converged"], "best_top1"].mean(),
                "last_top1": group["last_top1"].mean(),
                "zero_weights": group["zero_weights"].mean(),
                **{f"growth_{name}": _growth(here, name) for name in ("variance", "predicted", "centred")},
            }
        )
    return pd.DataFrame(rows).rename(columns={"growth_variance": "growth_measured"})


def _growth(gradients: pd.DataFrame, column: str) -> float:
    """Return a variance at the second layer over that at the start of the prediction."""
    logs = []
    for _, one in gradients.groupby("seed"):
        chain = one[one["predicted"].notna()]
        if len(chain) > 1 and (chain[column].iloc[[1, -1]] > 0).all():
            logs.append(math.log10(chain[column].iloc[1]) - math.log10(chain[column].iloc[-1]))
    return float(10.0 ** (sum(logs) / len(logs))) if logs else math.nan


def layout_of(summary: pd.DataFrame, title: str) -> str:
    """Lay out Table 1, and the growth of the gradients' variance below it."""
    indexed = summary.set_index(["network", "column"])
    networks = list(dict.fromkeys(summary["network"]))
    accuracies, growths = [], []
    for network in networks:
        rows = [indexed.loc[(network, column)] for column in COLUMNS]
        accuracies.append([network, *map(_accuracy, rows)])
        accuracies.append([f"{network}, published (CIFAR-10)", *NETWORKS[network].published])
        growths.append([f"{network}, measured", *(f"{row['growth_measured']:.2g}" for row in rows)])
        growths.append([f"{network}, predicted", *(f"{row['growth_predicted']:.2g}" for row in rows)])
        centred = [f"{row['growth_centred']:.2g}" if COLUMNS[row.name[1]].batchnorm else "" for row in rows]
        growths.append([f"{network}, predicted without the mean", *centred])
    zeros = [
        [network, *(percent(indexed.loc[(network, c), "zero_weights"], 1) for c in COLUMNS)]
        for network in networks
    ]
    note = (
        'Best test accuracy, %. "-": did not converge, that is, it became no number or stayed within '
        f"{BETTER_THAN_CHANCE:g} standard errors of chance.\n"
    )
    return "\n".join(
        [
            markdown([f"{title}, %", *COLUMNS], accuracies),
            note,
            markdown(["Gradient variance, second layer over last convolution", *COLUMNS], growths),
            markdown(["Zero weights at the end, %", *COLUMNS], zeros),
        ]
    )


def _accuracy(row: pd.Series) -> str:
    if not row["converged"]:
        return "- (no number)" if row["diverged"] else "-"
    return percent(row["top1"], 1) + (f" ({row['converged']} of {row['seeds']})" if row["seeds"] > 1 else "")


def draw_gradients(gradients: pd.DataFrame, path: Path, title: str) -> None:
    """Draw the gradients' variance by depth: lines with markers measured, dashed and dotted predicted."""
    first = gradients[gradients["seed"] == gradients["seed"].min()]
    networks = list(dict.fromkeys(first["network"]))
    width_in = 3.6 * len(networks) + 0.8
    with panels(path, width_in, 3.9, columns=len(networks)) as (drawing, (row,)):
        for panel, network in zip(row, networks, strict=True):
            for index, (name, column) in enumerate(COLUMNS.items()):
                rows = first[(first["network"] == network) & (first["column"] == name)]
                colour = COLOURS[index]
                measured = rows[rows["variance"] > 0]
                panel.plot(measured["depth"], measured["variance"], color=colour, marker=".", label=name)
                panel.plot(rows["depth"], rows["predicted"], color=colour, linestyle="--", linewidth=1)
                if column.batchnorm:
                    panel.plot(rows["depth"], rows["centred"], color=colour, linestyle=":", linewidth=1)
            panel.set_yscale("log")
            panel.set_xlabel("layer")
            panel.set_title(f"{network}, {title}")
        row[0].set_ylabel("variance of the gradients before training")
        row[-1].plot([], [], color="black", linestyle="--", linewidth=1, label="predicted: (6), (13)")
        row[-1].plot([], [], color="black", linestyle=":", linewidth=1, label="(13) without the mean")
        legend_below(drawing, row[-1], 3)


def draw_curves(tests: pd.DataFrame, path: Path, title: str) -> None:
    """Draw test accuracy over the epochs, a panel per network."""
    networks = list(dict.fromkeys(tests["network"]))
    width_in = 3.4 * len(networks) + 0.8
    with panels(path, width_in, 3.2, columns=len(networks), sharey=True) as (drawing, (row,)):
        for panel, network in zip(row, networks, strict=True):
            for index, (name, column) in enumerate(COLUMNS.items()):
                rows = tests[(tests["network"] == network) & (tests["column"] == name)]
                # Networks that do not converge lie on one another.
                style = "-" if column.threshold is TernaryThreshold.TWN else "--"
                for number, (_, run) in enumerate(rows.groupby("seed")):
                    label = None if number else name
                    accuracies = 100 * run["test_top1"]
                    panel.plot(run["epoch"], accuracies, color=COLOURS[index], linestyle=style, label=label)
            panel.set_xlabel("epochs")
            panel.set_title(f"{network}, {title}")
            panel.set_ylim(0, 100)
        row[0].set_ylabel("test accuracy, %")
        legend_below(drawing, row[0])


if __name__ == "__main__":
    main(ternary_bn)

"""What few bits amid BatchNorm cost: "Low-Precision Batch-Normalized Activations" in small.

Figure 2 (fully connected networks), Table 3 (convolutional networks trained from scratch), Tables 5 and 6 (a
trained network retrofitted: raw, with its BatchNorm statistics recalibrated, and fine-tuned), and the bytes
that training keeps for the backward pass.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import low_precision_bn_networks
import numpy as np
import torch
import typer
from common.command import Out, Preset, Quick, main, names_in
from common.ledgers import open_ledger
from common.networks import Workload, workloads
from common.points import Key, recalibrated, still_missing
from low_precision_bn_results import (
    ALL,
    FINE_TUNED,
    FLOAT,
    KEYS,
    NOWHERE,
    RAW,
    RECALIBRATED,
    TRAINED,
    report,
)
from torch import nn

from sysmt.cli import options
from sysmt.cli.options import takes
from sysmt.errors import ConfigError, DivergedError
from sysmt.nn.data.labelled_images import ImageData
from sysmt.nn.low_bit.low_precision_batchnorm import convert_batchnorm, quantize_gradients, restore_batchnorm
from sysmt.nn.low_bit.packed_activations import saved_bytes
from sysmt.nn.networks.models import SmallResNet, build_model
from sysmt.nn.networks.training import evaluate, train
from sysmt.progress import Bar, progress_bar
from sysmt.quant.logscale import FORMATS
from sysmt.study.ledger import Ledger
from sysmt.study.workload import OpenWorkload

PARTS = ("figure2", "table3", "retrofit", "memory")
SHARED = ("resnet20",)

GRADIENTS = "L5, 8-bit gradients"
"""Section 2.5: also the gradients that reach a convolution are quantised."""

WHERE = (ALL, "all but the first", "from block 2")
SMALL_IMAGES = 16
"""Up to this side, in pixels, networks are so quick to train that more of them, and longer, is affordable."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much of each part.

    Attributes
    ----------
    widths : tuple of int
        Of Figure 2's networks.
    formats : tuple of str
        Of Figure 2 and Table 3.
    figure2_epochs, table3_epochs : int
    fine_tuning_epochs : dict of str to int
        By format; the float network is tuned like the first, to tell tuning's own gain.
    seeds : int
    training_images : int or None
        None for all.
    """

    widths: tuple[int, ...]
    formats: tuple[str, ...]
    figure2_epochs: int
    table3_epochs: int
    fine_tuning_epochs: dict[str, int]
    seeds: int
    training_images: int | None = None


EVERY = (FLOAT, *FORMATS)
ON_SMALL_IMAGES = Plan(tuple(2**n for n in range(11)), (*EVERY, GRADIENTS), 30, 15, {"L4": 10, "L5": 1}, 2)
ON_LARGER_IMAGES = Plan((4, 32, 256), (*EVERY, GRADIENTS), 8, 3, {"L4": 2, "L5": 1}, 1)
QUICK = Plan((4, 32), (FLOAT, "L2", "L4", "U8"), 3, 1, {"L4": 1, "L5": 1}, 1, 500)


@takes(*options.NETWORK, *options.MACHINE, "images", "recalibration_images")
def low_precision_bn(
    chosen: dict[str, Any],
    preset: Preset = None,
    parts: Annotated[
        str | None, typer.Option(help=f"Which of {', '.join(PARTS)}.", metavar="LIST", show_default="all")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            help="Seeds of initial weights and the order of images: 0, 1, ...", min=1, show_default="2, or 1"
        ),
    ] = None,
    training_images: Annotated[
        int | None, typer.Option(help="Training images to use.", min=1, show_default="all")
    ] = None,
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Train and retrofit networks with BatchNorm of 2 to 8 bits, and measure accuracy and saved bytes."""
    asked = names_in(parts, "parts", PARTS, PARTS)
    networks = workloads(chosen, preset, quick, SHARED)
    changes = {"seeds": seeds, "training_images": training_images}
    changes = {name: value for name, value in changes.items() if value is not None}
    settings = {"training_images": training_images or ("500" if quick else "all")}
    with open_ledger("low_precision_bn", networks, KEYS, out, preset, quick, **settings) as ledger:
        studies = [_Study(network, quick, changes, ledger) for network in networks]
        points = {part: [point for study in studies for point in study.points(part)] for part in asked}
        with progress_bar("low-precision BatchNorm", sum(map(len, points.values())), "points") as bar:
            for study in studies:
                for part in asked:
                    study.measure(part, bar)
        report(ledger, points)


class _Study:
    """One network to retrofit, and the images to train others on."""

    def __init__(self, network: Workload, quick: bool, changes: Mapping[str, Any], ledger: Ledger) -> None:
        self.network, self.ledger = network, ledger
        self.subject: OpenWorkload = network.open(ledger)
        self.data: ImageData = self.subject.data
        self._original = copy.deepcopy(self.subject.model.state_dict())
        size = self.data.preprocessing.image_size
        plan = QUICK if quick else ON_SMALL_IMAGES if size <= SMALL_IMAGES else ON_LARGER_IMAGES
        self.plan = dataclasses.replace(plan, **changes)
        facts = {"figure2_epochs": plan.figure2_epochs, "table3_epochs": plan.table3_epochs}
        facts |= {f"fine_tuning_epochs_{fmt}": epochs for fmt, epochs in plan.fine_tuning_epochs.items()}
        ledger.identify(network.name, facts)

    # -- which points --------------------------------------------------------------------------

    def points(self, part: str) -> list[Key]:
        """Return the keys of all points of one part, those that others are compared with first."""
        rows: dict[str, Callable[[], Iterator[tuple[Any, ...]]]] = {
            "figure2": self._figure2,
            "table3": self._table3,
            "retrofit": self._retrofit,
            "memory": self._memory,
        }
        return [dict(zip(KEYS, (part, *row), strict=True)) for row in rows[part]()]

    def _figure2(self) -> Iterator[tuple[Any, ...]]:
        formats = [fmt for fmt in self.plan.formats if fmt != GRADIENTS]  # which is about convolutions
        for seed, width, fmt in itertools.product(range(self.plan.seeds), self.plan.widths, formats):
            yield f"FC, {self.data.name}", fmt, width, ALL, TRAINED, seed

    def _table3(self) -> Iterator[tuple[Any, ...]]:
        for seed, network, fmt in itertools.product(
            range(self.plan.seeds), self._builders(), self.plan.formats
        ):
            yield network, fmt, 0, ALL, TRAINED, seed

    def _retrofit(self) -> Iterator[tuple[Any, ...]]:
        name, tuned = self.network.name, self.plan.fine_tuning_epochs
        yield name, FLOAT, 0, NOWHERE, RAW, 0
        for seed in range(self.plan.seeds):
            yield name, FLOAT, 0, NOWHERE, FINE_TUNED, seed
        for fmt, where in itertools.product(tuned, self._possible()):
            yield name, fmt, 0, where, RAW, 0
            for seed, state in itertools.product(range(self.plan.seeds), (RECALIBRATED, FINE_TUNED)):
                yield name, fmt, 0, where, state, seed

    def _memory(self) -> Iterator[tuple[Any, ...]]:
        for network, fmt in itertools.product(MEMORY_NETWORKS, FORMATS):
            yield network, fmt, 0, ALL, "random weights", 0

    def _possible(self) -> list[str]:
        """Return what `WHERE` names that this network has."""
        possible = []
        for where in WHERE:
            try:
                convert_batchnorm(copy.deepcopy(self.subject.model), "L4", where)
            except ConfigError:
                continue
            possible.append(where)
        return possible

    def _builders(self) -> dict[str, Callable[[], nn.Module]]:
        """Return Table 3's networks in small, by name."""
        p, classes = self.data.preprocessing, self.data.num_classes
        return {
            f"VGG(8), {self.data.name}": lambda: low_precision_bn_networks.vgg(
                8, classes, p.channels, p.image_size
            ),
            f"ResNet-8, {self.data.name}": lambda: SmallResNet((1, 1, 1), classes, p.channels, 8),
        }

    # -- measuring -----------------------------------------------------------------------------

    def measure(self, part: str, bar: Bar) -> None:
        """Measure what is missing of one part."""
        measures = {
            "figure2": self._train_fully_connected,
            "table3": self._train_convolutional,
            "retrofit": self._measure_retrofit,
            "memory": self._measure_memory,
        }
        for point in still_missing(self.points(part), self.ledger, bar):
            values, correct = measures[part](point)
            self.ledger.add(point | values, correct)
            bar.advance(1, f"{part} {point['network']} {point['format']}")

    def _train_fully_connected(self, point: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        """Figure 2: inputs in [-1, 1], no augmentation, batches of 100, learning rate 0.01, Nesterov 0.9."""
        p = self.data.preprocessing
        half = (0.5,) * p.channels
        data = dataclasses.replace(self.data, preprocessing=dataclasses.replace(p, mean=half, std=half))
        inputs = p.channels * p.image_size**2
        return self._train(
            lambda: low_precision_bn_networks.fully_connected(inputs, point["width"], data.num_classes),
            data, point, epochs=self.plan.figure2_epochs, lr=0.01, weight_decay=0.0, schedule="constant",
            batch_size=100, augment=False,
        )  # fmt: skip

    def _train_convolutional(self, point: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        return self._train(
            self._builders()[point["network"]], self.data, point, epochs=self.plan.table3_epochs, lr=0.1,
            weight_decay=1e-4, batch_size=64,
        )  # fmt: skip

    def _train(
        self, build: Callable[[], nn.Module], data: ImageData, point: Mapping[str, Any], **recipe: Any
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Train one network from scratch; the same seed gives all formats the same start and images."""
        with torch.random.fork_rng():
            torch.manual_seed(point["seed"])
            model = build()
        fmt = point["format"]
        if fmt != FLOAT:
            convert_batchnorm(model, fmt.partition(",")[0], point["where"])
        recipe |= {"images": self.plan.training_images, "seed": point["seed"], "progress": False}
        if fmt == GRADIENTS:
            with quantize_gradients(model):
                diverged = _diverges(model, data, **recipe)
        else:
            diverged = _diverges(model, data, **recipe)
        test = data.loader("test", images=self.network.config.images)
        learned = data.loader("train", images=recipe["images"], seed=point["seed"])
        evaluation = evaluate(model, test, progress=False)
        values = evaluation.to_record() | {"diverged": diverged, "epochs": recipe["epochs"]}
        values["train_top1"] = evaluate(model, learned, progress=False).top1
        return values, evaluation.correct

    def _measure_retrofit(self, point: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        """Tables 5 and 6."""
        model, config, diverged, epochs = self.subject.model, self.network.config, False, 0
        restore_batchnorm(model)
        model.load_state_dict(self._original)
        if point["format"] != FLOAT:
            convert_batchnorm(model, point["format"], point["where"])
        what = f"{point['format']} {point['where']} {point['state']}"
        if point["state"] == FINE_TUNED:
            by_format = self.plan.fine_tuning_epochs
            epochs = by_format.get(point["format"], max(by_format.values()))
            diverged = _diverges(
                model, self.data, epochs=epochs, lr=0.01, weight_decay=1e-5, batch_size=config.batch_size,
                images=self.plan.training_images, seed=point["seed"],
            )  # fmt: skip
        again, images = point["state"] == RECALIBRATED, config.recalibration_images
        with recalibrated(again, self.subject, "ema", images, point["seed"]):
            evaluation = self.subject.evaluate(what)
        restore_batchnorm(model)
        model.load_state_dict(self._original)
        return evaluation.to_record() | {"diverged": diverged, "epochs": epochs}, evaluation.correct

    def _measure_memory(self, point: Mapping[str, Any]) -> tuple[dict[str, Any], None]:
        """Count the bytes that a training step of 16 images of 32 × 32 keeps for its backward pass."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = MEMORY_NETWORKS[point["network"]]().train()
            x = torch.rand(16, 3, 32, 32)
        values = {"saved_bytes_float": saved_bytes(model, x, recompute=False)}
        convert_batchnorm(model, point["format"])
        values["saved_bytes_layers_alone"] = saved_bytes(model, x, recompute=False)
        values["saved_bytes_recomputed"] = saved_bytes(model, x)
        return values, None


def _diverges(model: nn.Module, data: ImageData, epochs: int, **recipe: Any) -> bool:
    """Train, and say whether it went wrong: for some formats that is a result."""
    try:
        train(model, data, epochs, **recipe)
    except DivergedError:
        return True
    return False


class _OneLayer(nn.Module):
    """A BatchNorm layer behind something that autograd keeps nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(x + 1)  # type: ignore[no-any-return]


MEMORY_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "one BatchNorm layer": _OneLayer,
    "ResNet-20": lambda: build_model("resnet20"),
    "ResNet-20, pre-activated": lambda: low_precision_bn_networks.pre_activated_resnet(3),
    "VGG(32)": lambda: low_precision_bn_networks.vgg(32, 10, 3, 32),
}


if __name__ == "__main__":
    main(low_precision_bn)

"""What pruning does to collisions: sparsity against collision rate, utilization and accuracy at 2T and 4T.

Weights are pruned by magnitude, all layers together: in one step without training, and, where there are
training images, step by step with the entire network retrained after each step, as the main paper did for
its 40 % ResNet-18 (Figure 1a). Each network is measured without and with BatchNorm recalibration.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import experiment
import pandas as pd
import torch
import typer
from experiment import Out, Preset, Quick, Workload, markdown, percent
from matplotlib.axes import Axes
from torch import nn

from sysmt.cli.options import takes
from sysmt.config import RECALIBRATION_MODES
from sysmt.errors import ConfigError
from sysmt.nn.array.simulation import Simulation
from sysmt.nn.networks.checkpoints import load_weights, save_weights
from sysmt.nn.networks.pruning import make_permanent, prune_model, sparsity_report
from sysmt.nn.networks.training import train
from sysmt.progress import Bar, progress_bar
from sysmt.study.evaluate import array_facts, paired_difference
from sysmt.study.ledger import Ledger
from sysmt.study.plots.style import COLOURS, FLOAT_GREY, MARKERS, figure

KEYS = ("network", "retrained", "sparsity", "setting", "recalibrated")
THREADS = {"FP32": 0, "A8W8": 1, "2T": 2, "4T": 4}
SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
QUICK_SPARSITIES = (0.0, 0.4, 0.8)
SCHEDULE = (0.1, 0.2, 0.4)
SHARED = ("resnet20",)
RETRAINING_IMAGES, MOST_EPOCHS = 50_000, 5
"""Retraining sees about so many images after each step, in so many epochs at most."""

TOO_MANY_IMAGES = 100_000
"""From this size on a training set is not retrained on unless ``--epochs`` says so: a CPU would take days."""


@takes(*experiment.OPTIONS)
def pruning_collisions(
    chosen: dict[str, Any],
    preset: Preset = None,
    sparsities: Annotated[
        str | None,
        typer.Option(
            help="Shares of zero weights, in [0, 1), without retraining.",
            metavar="LIST",
            show_default="0, 0.1 .. 0.8",
        ),
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="Sparsities to reach one after the other with retraining.", metavar="LIST")
    ] = ",".join(map(str, SCHEDULE)),
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Epochs of retraining after each step; 0: no retraining.",
            min=0,
            show_default=f"by the number of training images, at most {MOST_EPOCHS}",
        ),
    ] = None,
    lr: Annotated[float, typer.Option(help="Largest learning rate of retraining.")] = 0.01,
    mode: Annotated[
        str, typer.Option(help=f"Recalibration: {', '.join(RECALIBRATION_MODES)}.", metavar="MODE")
    ] = "ema",
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Measure collisions, utilization and accuracy of networks pruned to 0 .. 80 %."""
    networks = experiment.workloads(chosen, preset, quick, SHARED, recalibration_images=4096)
    plan = {
        False: _parse(sparsities, "sparsities") if sparsities else QUICK_SPARSITIES if quick else SPARSITIES,
        True: _parse(schedule, "schedule") if epochs != 0 else (),
    }
    settings = {
        "schedule": list(plan[True]),
        "epochs": "auto" if epochs is None else epochs,
        "lr": lr,
        "mode": mode,
    }
    name = "pruning_collisions"
    with experiment.open_ledger(name, networks, KEYS, out, preset, quick, **settings) as ledger:
        total = len(networks) * sum(map(len, plan.values())) * len(THREADS) * 2
        with progress_bar("pruning", total, "points") as bar:
            for network in networks:
                study = _Study(network, mode, ledger, bar)
                for sparsity in plan[False]:
                    study.measure(False, sparsity)
                study.retrain(plan[True], epochs, lr)
        points = ledger.points()
        # The directory may hold other sparsities from before, and not all points of them.
        asked = [(flag, sparsity) for flag, shares in plan.items() for sparsity in shares]
        points = points[[pair in asked for pair in zip(points["retrained"], points["sparsity"], strict=True)]]
        layout = "\n".join(layout_of(points, network.name) for network in networks)
        ledger.write_text("pruning_collisions.md", layout)
        for index, network in enumerate(networks):
            file = "pruning_collisions.png" if not index else f"pruning_collisions-{index + 1}.png"
            draw(points[points["network"] == network.name], ledger.path / file, network.name)
        print(layout)


def _parse(text: str, name: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{name}={text!r} is no list of shares, such as 0.1,0.2,0.4") from None
    if list(shares) != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] < 1:
        raise ConfigError(f"{name}={text!r} must ascend and lie in [0, 1)")
    return shares


class _Study:
    """One network, pruned again and again."""

    def __init__(self, network: Workload, mode: str, ledger: Ledger, bar: Bar) -> None:
        self.network, self.mode, self.ledger, self.bar = network, mode, ledger, bar
        self.subject = network.open(ledger)
        self._unpruned = copy.deepcopy(self.subject.model.state_dict())

    def points(self, retrained: bool, sparsity: float) -> list[dict[str, Any]]:
        """Return the keys of all points of one pruned network."""
        return [
            dict(zip(KEYS, (self.network.name, retrained, sparsity, setting, recalibrated), strict=True))
            for setting in THREADS
            for recalibrated in (False, True)
        ]

    def measure(self, retrained: bool, sparsity: float, state: Mapping[str, Any] | None = None) -> None:
        """Measure what is missing of one pruned network: `state`, or the original one pruned in one step."""
        points = self.points(retrained, sparsity)
        missing = [point for point in points if not self.ledger.has(**point)]
        self.bar.advance(len(points) - len(missing))
        if not missing:
            return
        model = self.subject.model
        model.load_state_dict(self._unpruned if state is None else state)
        if state is None and sparsity:
            prune_model(model, sparsity)
            make_permanent(model)
        for point in missing:
            if point["setting"] == "FP32":
                self._add(point, None)
        array_points = [point for point in missing if point["setting"] != "FP32"]
        if not array_points:
            return
        with self.subject.on_array(self.network.config.seed) as sim:
            for point in array_points:
                sim.set_threads(THREADS[point["setting"]])
                self._add(point, sim)

    def _add(self, point: dict[str, Any], sim: Simulation | None) -> None:
        config = self.network.config
        what = f"{point['sparsity']:.0%}{' retrained' if point['retrained'] else ''} {point['setting']}"
        if point["recalibrated"]:
            with self.subject.recalibrated(self.mode, config.recalibration_images, config.seed):
                evaluation = self._evaluate(what, sim)
        else:
            evaluation = self._evaluate(what, sim)
        values = {**point, "threads": THREADS[point["setting"]], **evaluation.to_record()}
        values["zero_weights"] = _zero_share(self.subject.model, sim)
        reference = self.points(False, 0.0)[0]
        if self.ledger.has(**reference):
            compared = paired_difference(evaluation.correct, self.ledger.correct(**reference))
            values["difference"], values["difference_se"] = compared
        values |= array_facts(sim) if sim else {}
        self.ledger.add(values, evaluation.correct)
        self.bar.advance(1, f"{what}: {percent(evaluation.top1)} %")

    def _evaluate(self, what: str, sim: Simulation | None) -> Any:
        if sim:
            sim.reset()
        return self.subject.evaluate(what)

    def retrain(self, schedule: Sequence[float], epochs: int | None, lr: float) -> None:
        """Prune and retrain step by step, measuring each step; resumes within a step."""
        model, config = self.subject.model, self.network.config
        epochs = default_epochs(self.subject.data.images("train")) if epochs is None else epochs
        if not epochs:
            return
        state = self._unpruned
        for step, sparsity in enumerate(schedule):
            # Not prune_and_retrain: each step's own checkpoint lets a killed training go on.
            weights = self.ledger.path / f"{_file_name(self.network.name)}-pruned-{100 * sparsity:.0f}.pt"
            model.load_state_dict(state)
            if not weights.is_file():
                training = weights.with_name(f"{weights.stem}-training.pt")
                model.to(memory_format=torch.channels_last)  # trains a third faster on a CPU
                prune_model(model, sparsity)
                train(
                    model,
                    self.subject.data,
                    epochs,
                    lr=lr,
                    batch_size=config.batch_size,
                    seed=config.seed + step,
                    checkpoint=training,
                )
                make_permanent(model)
                model.to(memory_format=torch.contiguous_format)
                save_weights(model, weights, {"model": config.model, "sparsity": sparsity})
                training.unlink()
            load_weights(model, weights)
            state = copy.deepcopy(model.state_dict())
            self.measure(True, sparsity, state)


def default_epochs(images: int) -> int:
    """Return how many epochs a training set of this size is worth; 0 where it is none, or too large."""
    if not 0 < images < TOO_MANY_IMAGES:
        return 0
    return max(1, min(MOST_EPOCHS, RETRAINING_IMAGES // images))


def _zero_share(model: nn.Module, sim: Simulation | None) -> float | None:
    """Share of zeros among the float weights of the simulated layers."""
    if sim is None:
        return None
    report = sparsity_report(model).set_index("name").loc[[layer.name for layer in sim.simulated()]]
    return float(report["zeros"].sum() / report["weights"].sum())


def _file_name(name: str) -> str:
    return "".join(sign if sign.isalnum() else "-" for sign in name.lower())


# -- the results -------------------------------------------------------------------------------


def layout_of(points: pd.DataFrame, network: str) -> str:
    """Lay out one network's points: sparsity down, settings across."""
    here = points[points["network"] == network]
    indexed = here.set_index(list(KEYS[1:]))
    header = [network, "FP32 w/o", "FP32 w/"]
    for setting in ("2T", "4T"):
        header += [f"{setting} collisions", "utilization", f"{setting} w/o", f"{setting} w/"]
    rows = []
    for (retrained, sparsity), _ in here.groupby(["retrained", "sparsity"], sort=True):
        name = f"{sparsity:.0%} pruned{', retrained' if retrained else ''}" if sparsity else "unpruned"
        cells = [name, *(_cell(indexed.loc[(retrained, sparsity, "FP32", again)]) for again in (False, True))]
        for setting in ("2T", "4T"):
            plain, again = (indexed.loc[(retrained, sparsity, setting, flag)] for flag in (False, True))
            cells += [percent(plain["collision_rate"], 1), percent(plain["utilization"], 1)]
            cells += [_cell(plain), _cell(again)]
        rows.append(cells)
    note = (
        f"All in %; {int(here['images'].iloc[0]):,} test images. w/o, w/: without and with BatchNorm "
        "recalibration. ±: one standard error of the difference to the unpruned float network, paired by "
        "image.\n"
    )
    return f"{markdown(header, rows)}\n{note}"


def _cell(point: pd.Series) -> str:
    error = point.get("difference_se", float("nan"))
    return percent(point["top1"]) + (f" ± {100 * error:.2f}" if error > 0 else "")


def draw(points: pd.DataFrame, path: Path, title: str) -> None:
    """Draw collisions and utilization against sparsity, and accuracy at 2T and at 4T beside them."""
    with figure(path, width_in=10.5, height_in=3.8) as (drawing, axes):
        axes.remove()
        slots, *accuracies = drawing.subplots(1, 3)
        plain = points[~points["recalibrated"]]
        for index, setting in enumerate(("2T", "4T")):
            rows = plain[plain["setting"] == setting]
            _lines(slots, rows, "utilization", COLOURS[2 + index], MARKERS[2], f"{setting}: in use", ":")
            _lines(slots, rows, "collision_rate", COLOURS[2 + index], MARKERS[3], f"{setting}: collisions")
        slots.set_ylim(0, 100)
        slots.set_ylabel("slots, %")
        slots.set_title(title)
        slots.legend(loc="upper right", fontsize=7)
        highest, lowest = 100 * points["top1"].max(), 100 * points["top1"].min()
        for setting, panel in zip(("2T", "4T"), accuracies, strict=True):
            _lines(panel, plain[plain["setting"] == "FP32"], "top1", FLOAT_GREY, "X", "float", "--")
            for again in (False, True):
                rows = points[(points["setting"] == setting) & (points["recalibrated"] == again)]
                label = "BatchNorm recalibrated" if again else "as calibrated"
                _lines(panel, rows, "top1", COLOURS[again], MARKERS[again], label)
            # Pruned in one step, a network falls to chance at last; what matters is at the top.
            panel.set_ylim(max(lowest - 1, highest - 20), highest + 1)
            panel.set_title(f"{setting}; white: retrained" if points["retrained"].any() else setting)
        accuracies[0].set_ylabel("top-1 accuracy, %")
        accuracies[0].legend(loc="lower left", fontsize=7)
        for panel in (slots, *accuracies):
            panel.set_xlabel("pruned weights, %")


def _lines(
    axes: Axes, points: pd.DataFrame, column: str, colour: str, marker: str, label: str, line: str = "-"
) -> None:
    """Draw a line for pruning in one step, and white markers for pruning with retraining."""
    for retrained in (False, True):
        rows = points[points["retrained"] == retrained].sort_values("sparsity")
        axes.plot(
            100 * rows["sparsity"],
            100 * rows[column],
            color=colour,
            marker=marker,
            markerfacecolor="white" if retrained else colour,
            linestyle="none" if retrained else line,
            label=None if retrained else label,
        )


if __name__ == "__main__":
    experiment.main(pruning_collisions)

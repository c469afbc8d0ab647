"""Where low precision meets the array: collisions, errors and recalibration of networks on coarse grids.

Small networks with ternary weights ("Understanding BatchNorm in Ternary Training"), 4-bit uniform or
log-scale activations (L4 of "Low-Precision Batch-Normalized Activations"), or both, run with squeezed
threads, with BatchNorm statistics of the population, of the final batch alone ("Final Sample Batch
Normalization"), or recalibrated under the array's noise ("Post-Training BatchNorm Recalibration").

What a collision costs depends on how a grid lies in the operands' 8 bits. With the step of the grid as one
code ("grid"), ternary weights are -1, 0, +1 and 4-bit activations 0 .. 15: narrow, so nothing is cut off
them. Log-scale activations are 0 and the powers of two from 1 to 128: narrow up to 8, and from 16 on
multiples of 16, which rounding to the upper four bits leaves as they are. Stretched to the whole range, as
min-max calibration does ("min-max"), the same values are ±127, multiples of 17, and 255 halved again and
again: wide, and changed by rounding. And narrowness only spares the operand that a policy reduces: in a
two-way collision S+A reduces activations whatever the weights are, S+Aw not if the weight is narrow.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from common.command import OPTIONS, Out, Preset, Quick, main, names_in
from common.ledgers import open_ledger, slug
from common.networks import Workload, workloads
from common.panels import markers, panels
from common.points import Key, compared, grid, measure_float, recalibrated, still_missing
from common.tables import give_or_take, markdown, percent, publish, signed
from matplotlib.axes import Axes
from torch import Tensor, nn

from sysmt.cli.options import takes
from sysmt.nn.array.simulation import Simulation
from sysmt.nn.batchnorm.recalibration import load_statistics, recalibrate_batchnorm, save_statistics
from sysmt.nn.low_bit.straight_through import (
    ActivationQuantizer,
    TernaryWeight,
    bake_weights,
    quantize_network,
)
from sysmt.nn.networks.checkpoints import load_weights, save_weights
from sysmt.nn.networks.training import train
from sysmt.progress import Bar, progress_bar
from sysmt.quant.logscale import approximate
from sysmt.quant.uniform import ActivationRange, quantize_weights, weight_scales
from sysmt.study.evaluate import array_facts
from sysmt.study.ledger import Ledger
from sysmt.study.plots.style import COLOURS, FLOAT_GREY, MARKERS

KEYS = ("network", "scheme", "codes", "policy", "threads", "statistics")
FLOAT, GRID, MIN_MAX = "float", "grid", "min-max"
POLICIES = ("S+A", "S+Aw")
STATISTICS = ("population", "final", "recalibrated")
MODE = "cumulative"
SHARED = ("resnet20",)
FINE_TUNING_IMAGES, MOST_EPOCHS = 20_000, 15
"""Fine-tuning sees about so many images, in so many epochs at most."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the simulated layers of a network are quantised beyond 8 bits."""

    ternary: bool = False
    activations: str = ""

    @property
    def codes(self) -> tuple[str, ...]:
        """Ways in which its values can lie in 8 bits, the one that most is measured with first."""
        return (GRID, MIN_MAX) if self.ternary or self.activations else (MIN_MAX,)


SCHEMES = {
    "8-bit": Scheme(),
    "ternary": Scheme(ternary=True),
    "4-bit": Scheme(activations="uniform"),
    "log": Scheme(activations="log"),
    "ternary+4-bit": Scheme(True, "uniform"),
    "ternary+log": Scheme(True, "log"),
}


@takes(*OPTIONS)
def low_bits_on_the_array(
    chosen: Key,
    preset: Preset = None,
    schemes: Annotated[
        str | None,
        typer.Option(help="Which of them to measure.", metavar="LIST", show_default=",".join(SCHEMES)),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Epochs of fine-tuning for each scheme.",
            min=1,
            show_default=f"by the number of training images, at most {MOST_EPOCHS}",
        ),
    ] = None,
    lr: Annotated[float, typer.Option(help="Largest learning rate of fine-tuning.")] = 0.05,
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Measure collisions, errors and accuracy of networks with ternary weights and coarse activations."""
    networks = workloads(chosen, preset, quick, SHARED)
    wanted = names_in(schemes, "schemes", SCHEMES, SCHEMES)
    epochs = 2 if quick and epochs is None else epochs
    settings = {"epochs": "auto" if epochs is None else epochs, "lr": lr, "mode": MODE}
    name = "low_bits_on_the_array"
    with open_ledger(name, networks, KEYS, out, preset, quick, **settings) as ledger:
        total = sum(len(points_of("", name)) for name in wanted)
        with progress_bar("low bits on the array", len(networks) * total, "points") as bar:
            for network in networks:
                _Study(network, epochs, lr, ledger, bar).run(wanted)
        tables = [summarise(ledger, network.name, wanted) for network in networks]
        table = pd.concat(tables, ignore_index=True)
        ledger.write(f"{name}.csv", table)
        publish(ledger, name, networks, table, layout_of, draw)


def points_of(network: str, scheme: str) -> list[Key]:
    """Return the keys of all points of one scheme: in float, at one thread, then squeezed."""
    first, *others = SCHEMES[scheme].codes
    one = ([network], [scheme])
    return [
        *grid(KEYS, *one, [FLOAT], [FLOAT], [0], STATISTICS[:1]),
        *grid(KEYS, *one, [first], POLICIES[:1], [1], STATISTICS),
        *grid(KEYS, *one, [first], POLICIES, (2, 4), STATISTICS),
        *grid(KEYS, *one, others, POLICIES, (2, 4), STATISTICS[:1]),
    ]


# -- quantising --------------------------------------------------------------------------------


class LogQuantizer:
    """Puts what a layer reads on L4's levels, so that the largest is 128 codes; zeros stay zeros.

    L4 has no zero: sign(0) is +1, and it would fill every slot that ReLU emptied. The gradient passes
    straight through. A forward pre-hook, as `ActivationQuantizer`.

    Parameters
    ----------
    limit : float
        Largest activation; values from half an octave below it on become the largest level.
    """

    def __init__(self, limit: float) -> None:
        self.unit = 1.36 * limit / 2**5  # L4 rounds up from 2^k / 1.36 on; 2^5 / 1.36 would be the next level
        self.largest = 2**4 * self.unit

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Quantise a layer's first input, which is not negative."""
        x = inputs[0]
        with torch.no_grad():
            levels = approximate(x / self.unit, "L4") * self.unit
            levels = torch.where(x > 0, levels, torch.zeros_like(x))
        return (x + (levels - x).detach() if torch.is_grad_enabled() else levels, *inputs[1:])


def _quantizer(kind: str, limit: float) -> ActivationQuantizer | LogQuantizer:
    return ActivationQuantizer(4, limit) if kind == "uniform" else LogQuantizer(limit)


def _range(quantizer: ActivationQuantizer | LogQuantizer, codes: str) -> ActivationRange:
    """Return the scale that makes the step of the grid one code, or the largest value 255."""
    if isinstance(quantizer, LogQuantizer):
        return ActivationRange(quantizer.largest / (128 if codes == GRID else 255))
    return ActivationRange(quantizer.limit / (15 if codes == GRID else 255))


def _make_weights_narrow(sim: Simulation) -> None:
    """Give ternary weights the codes -1, 0, +1 instead of ±127, with their magnitude as the scale.

    By default the front end makes the largest weight of each channel ±127.
    """
    scales = {}
    for layer in sim.simulated():
        weight = layer.module.weight.detach().numpy()
        largest = weight_scales(weight)
        if not np.isin(quantize_weights(weight, largest), (-127, 0, 127)).all():
            raise ValueError(f"the weights of layer {layer.name!r} are not ternary")
        scales[layer.name] = (127 * largest).astype(np.float32)
    sim.set_weight_scales(scales)


# -- the measurements --------------------------------------------------------------------------


class _Study:
    """One network, fine-tuned and measured scheme by scheme."""

    def __init__(self, network: Workload, epochs: int | None, lr: float, ledger: Ledger, bar: Bar) -> None:
        self.network, self.lr, self.ledger, self.bar = network, lr, ledger, bar
        self.subject = network.open(ledger)
        self.model, self.config = self.subject.model, network.config
        images = self.subject.data.images("train")
        self.epochs = epochs or max(1, min(MOST_EPOCHS, FINE_TUNING_IMAGES // images))
        self._float_state = copy.deepcopy(self.model.state_dict())

    def run(self, schemes: Sequence[str]) -> None:
        """Measure what is missing of some schemes."""
        for name in schemes:
            missing = still_missing(points_of(self.network.name, name), self.ledger, self.bar)
            if missing:
                self._measure(name, SCHEMES[name], missing)

    def _measure(self, name: str, scheme: Scheme, missing: list[Key]) -> None:
        with self._quantized(name, scheme) as quantizers:
            measure_float(missing, self.subject, self.ledger, self.bar, f"{name} float")
            population = save_statistics(self.model)
            final = self._final_statistics()
            with self.subject.on_array(self.config.seed, errors=True) as sim:
                for (codes, policy), points in itertools.groupby(
                    missing, key=lambda point: (point["codes"], point["policy"])
                ):
                    sim.reconfigure(policy=policy)
                    sim.set_ranges({key: _range(one, codes) for key, one in quantizers.items()})
                    if scheme.ternary and codes == GRID:
                        _make_weights_narrow(sim)
                    else:
                        sim.set_weight_scales({layer.name: None for layer in sim.simulated()})
                    for point in points:
                        sim.set_threads(point["threads"])
                        load_statistics(self.model, final if point["statistics"] == "final" else population)
                        self._measure_point(point, sim)
                        load_statistics(self.model, population)

    def _measure_point(self, point: Key, sim: Simulation) -> None:
        what = f"{point['scheme']} {point['codes']} {point['policy']} {point['threads']}T"
        again = point["statistics"] == "recalibrated"
        images, seed = self.config.recalibration_images, self.config.seed
        sim.errors = False  # recalibration need not pay for them
        with recalibrated(again, self.subject, MODE, images, seed):
            sim.errors = True
            sim.reset()
            evaluation = self.subject.evaluate(what)
        layers = sim.report()
        layers = layers[layers["threads"] > 0]
        reduced = layers["reduced_activations"].sum() + layers["reduced_weights"].sum()
        weights = [layer.weight_codes() for layer in sim.simulated()]
        values = {
            **point,
            **evaluation.to_record(),
            "zero_weights": sum(int((q == 0).sum()) for q in weights) / sum(q.size for q in weights),
            "reduced_per_mac": reduced / layers["macs"].sum(),
            # Layers without any error have an infinite ratio, which a median can stand.
            "sqnr_db": layers["sqnr_db"].median(),
            "mse": layers["mse"].mean(),
            **array_facts(sim),
        }
        self.ledger.add(values, evaluation.correct, {"layers": layers.drop(columns="threads")})
        self.bar.advance(1, f"{what}: {percent(evaluation.top1)} %")

    def _final_statistics(self) -> dict[str, Tensor]:
        """Return the statistics of one training batch alone, off the array."""
        population = save_statistics(self.model)
        loader = self.subject.training_images(self.config.batch_size, self.config.seed)
        recalibrate_batchnorm(self.model, loader, "final", images=loader.images)
        final = save_statistics(self.model)
        load_statistics(self.model, population)
        return final

    @contextlib.contextmanager
    def _quantized(
        self, name: str, scheme: Scheme
    ) -> Iterator[dict[str, ActivationQuantizer | LogQuantizer]]:
        """Make the network one of `scheme`, trained, for a while; yield what quantises each layer's input."""
        self.model.load_state_dict(self._float_state)
        limits = self._limits()
        quantizers = {}
        if scheme.activations:
            quantizers = {key: _quantizer(scheme.activations, limit) for key, limit in limits.items()}
        modules = dict(self.model.named_modules())
        with contextlib.ExitStack() as stack:
            for key, one in quantizers.items():
                stack.callback(modules[key].register_forward_pre_hook(one).remove)
            if scheme.ternary or scheme.activations:
                self._fine_tune(name, scheme, set(limits))
            yield quantizers
        self.model.load_state_dict(self._float_state)

    def _limits(self) -> dict[str, float]:
        """Return the mean over calibration images of each simulated layer's largest input."""
        with self.subject.on_array(self.config.seed) as sim:
            return {name: found.limit * found.scale for name, found in sim.ranges().items()}

    def _fine_tune(self, name: str, scheme: Scheme, simulated: set[str]) -> None:
        weights = self.ledger.path / f"{slug(f'{self.network.name} {name}')}.pt"
        if not weights.is_file():
            training = weights.with_name(f"{weights.stem}-training.pt")
            if scheme.ternary:
                layers = [
                    key
                    for key, module in self.model.named_modules()
                    if isinstance(module, nn.Conv2d | nn.Linear) and key not in simulated
                ]
                quantize_network(self.model, TernaryWeight(scaled=True), exclude=layers)
            recipe: dict[str, Any] = {"lr": self.lr, "weight_decay": 0.0, "batch_size": 64}
            recipe["seed"] = self.config.seed
            train(self.model, self.subject.data, self.epochs, checkpoint=training, **recipe)
            bake_weights(self.model)
            save_weights(self.model, weights, {"model": self.config.model, "scheme": name})
            training.unlink()
        load_weights(self.model, weights)


# -- the results -------------------------------------------------------------------------------


def summarise(ledger: Ledger, network: str, schemes: Sequence[str]) -> pd.DataFrame:
    """Compare the points of some schemes of one network with those that they depart from.

    Returns
    -------
    DataFrame
        The points, with ``drop`` (top-1 against the same scheme at one thread and the same statistics) and
        ``won_back`` (recalibrated against population statistics at the same threads), their standard errors
        ``drop_se`` and ``won_back_se``, paired by image.
    """
    rows = []
    points = ledger.points()
    points = points[(points["network"] == network) & points["scheme"].isin(schemes)]
    for row in points.to_dict("records"):
        point = {key: row[key] for key in KEYS}
        here = ledger.correct(**point)
        if row["threads"] > 1:
            one = point | {"codes": SCHEMES[row["scheme"]].codes[0], "policy": POLICIES[0], "threads": 1}
            row |= compared(here, ledger.correct(**one), "drop")
        if row["statistics"] == "recalibrated":
            before = ledger.correct(**point | {"statistics": "population"})
            row |= compared(here, before, "won_back")
        rows.append(row)
    return pd.DataFrame(rows)


def layout_of(table: pd.DataFrame, network: str) -> str:
    """Lay out one network's points: scheme, codes, policy and threads down."""
    here = table[table["network"] == network].set_index(list(KEYS[1:]), drop=False)
    header = [network, "zero weights", "collisions", "reduced", "SQNR, dB", "MSE"]
    header += ["population", "against 1T", "final", "recalibrated", "won back"]
    rows = []
    schemes = _schemes(here)
    for scheme in schemes:
        kind = SCHEMES[scheme]
        runs = [(kind.codes[0], POLICIES[0], 1)]
        runs += itertools.product(kind.codes, POLICIES, (2, 4))
        for codes, policy, threads in runs:
            plain = here.loc[(scheme, codes, policy, threads, "population")]
            row = [f"{scheme}, {codes}, {policy}, {threads}T" if threads > 1 else f"{scheme}, 1T"]
            row += [percent(plain["zero_weights"], 1), percent(plain["collision_rate"], 1)]
            row += [percent(plain["reduced_per_mac"], 1), _decibels(plain["sqnr_db"]), f"{plain['mse']:.1e}"]
            row += [percent(plain["top1"]), _difference(plain["drop"], plain["drop_se"])]
            if (scheme, codes, policy, threads, "final") in here.index:
                final, again = (
                    here.loc[(scheme, codes, policy, threads, statistics)] for statistics in STATISTICS[1:]
                )
                row += [percent(final["top1"]), percent(again["top1"])]
                row.append(_difference(again["won_back"], again["won_back_se"]))
            else:
                row += ["", "", ""]
            rows.append(row)
    floats = ", ".join(
        f"{scheme} {percent(here.loc[(scheme, FLOAT, FLOAT, 0, 'population'), 'top1'])}" for scheme in schemes
    )
    images = int(here["images"].iloc[0])
    note = (
        f"Top-1 in %, {images:,} test images; off the array: {floats}. Collisions: % of slots. Reduced: "
        "operands per 100 MACs. SQNR and MSE: against one thread on the same input, median and mean over the "
        "layers. Won back: recalibrated against population statistics. ±: one standard error, paired by "
        "image.\n"
    )
    return f"{markdown(header, rows)}\n{note}"


def _schemes(table: pd.DataFrame) -> list[str]:
    return [name for name in SCHEMES if name in set(table["scheme"])]


def _decibels(value: float) -> str:
    return "exact" if math.isinf(value) else f"{value:.1f}"


def _difference(value: float, error: float) -> str:
    return "" if math.isnan(value) else give_or_take(signed(value), error)


def draw(table: pd.DataFrame, path: Path, title: str) -> None:
    """Draw collisions, SQNR and accuracy by scheme, side by side."""
    with panels(path, 12.0, 4.2, columns=3) as (_, ((left, middle, right),)):
        names = _schemes(table)
        first = {name: SCHEMES[name].codes[0] for name in names}
        best = table[[row.codes == first.get(row.scheme) for row in table.itertuples()]]
        plain = best[(best["statistics"] == "population") & (best["policy"] == POLICIES[0])]
        _collisions(left, plain, names)
        left.set_title(title)
        _errors(middle, table[table["statistics"] == "population"], names)
        _accuracy(right, best[best["policy"] == POLICIES[0]], names)
        for panel in (left, middle, right):
            panel.set_xticks(range(len(names)), [name.replace("+", " +\n") for name in names], fontsize=7)
            panel.set_xlim(-0.5, len(names) - 0.5)
            panel.grid(axis="x", visible=False)


def _in_order(table: pd.DataFrame, names: Sequence[str], column: str, factor: float = 1.0) -> np.ndarray:
    by_scheme = table.set_index("scheme")[column]
    return factor * by_scheme.reindex(list(names)).to_numpy(float)


def _collisions(axes: Axes, plain: pd.DataFrame, names: Sequence[str]) -> None:
    """Draw slots with a collision, and operands that are reduced, per slot and per MAC."""
    for index, threads in enumerate((2, 4)):
        rows = plain[plain["threads"] == threads]
        places = np.arange(len(names)) + 0.4 * (index - 0.5)
        heights = _in_order(rows, names, "collision_rate", 100)
        axes.bar(places, heights, 0.36, color=COLOURS[index], label=f"{threads}T: collisions")
        heights = _in_order(rows, names, "reduced_per_mac", 100)
        axes.bar(places, heights, 0.16, color="black", label="reduced operands, per MAC" if index else None)
    axes.set_ylabel("slots, %")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(fontsize=7)


def _errors(axes: Axes, plain: pd.DataFrame, names: Sequence[str]) -> None:
    """Draw SQNR against one thread, of all codes and policies; what is exact stands at the top."""
    values = plain.loc[(plain["threads"] > 1) & np.isfinite(plain["sqnr_db"]), "sqnr_db"]
    top = 5 * math.ceil(max([20.0, *values]) / 5) + 5
    runs = list(itertools.product((MIN_MAX, GRID), POLICIES, (2, 4)))
    for codes, policy, threads in runs:
        rows = plain[(plain["codes"] == codes) & (plain["policy"] == policy) & (plain["threads"] == threads)]
        index, other = (2, 4).index(threads), POLICIES.index(policy)
        colour = COLOURS[index]
        axes.plot(
            np.arange(len(names)) + 0.3 * (index - 0.5) + 0.12 * (other - 0.5),
            np.minimum(_in_order(rows, names, "sqnr_db"), top),
            color=colour,
            marker=MARKERS[other],
            markerfacecolor=colour if codes == GRID else "white",
            linestyle="none",
            label=f"{threads}T {policy}" if codes == GRID else None,
        )
    ticks = [tick for tick in axes.get_yticks() if 0 <= tick < top]
    axes.set_yticks([*ticks, top], [*(f"{tick:g}" for tick in ticks), "exact"])
    axes.set_ylabel("SQNR against one thread, dB")
    axes.set_title("filled: step of the grid = one code; white: min-max", fontsize=8)
    axes.legend(fontsize=7)


def _accuracy(axes: Axes, best: pd.DataFrame, names: Sequence[str]) -> None:
    """Draw top-1 of each kind of statistics, at one, two and four threads."""
    floats = [
        float(value)
        for value in _in_order(
            best[(best["threads"] == 1) & (best["statistics"] == "population")], names, "top1"
        )
    ]
    for place, value in enumerate(floats):
        axes.plot([place - 0.45, place + 0.45], [100 * value] * 2, color=FLOAT_GREY, linewidth=1)
    for (index, kind), (shift, threads) in itertools.product(enumerate(STATISTICS), enumerate((2, 4))):
        rows = best[(best["threads"] == threads) & (best["statistics"] == kind)]
        places = np.arange(len(names)) + 0.4 * (shift - 0.5) + 0.11 * (index - 1)
        top1, errors = (_in_order(rows, names, column) for column in ("top1", "drop_se"))
        label = kind if not shift else None
        markers(axes, places, top1, errors, index, color=COLOURS[2 + index], label=label)
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_title("left: 2T, right: 4T; line: 1T, population", fontsize=8)
    axes.legend(fontsize=7)


if __name__ == "__main__":
    main(low_bits_on_the_array)

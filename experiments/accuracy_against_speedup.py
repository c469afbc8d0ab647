"""Figure 1 of "Post-Training BatchNorm Recalibration": accuracy against speedup, with it and without.

Each dot is a network in which some layers run fewer threads than 4. The paper's panels are ResNet-18
(4T with some 2T, and pruned by 40 %), ResNet-50 (4T with some 2T) and GoogLeNet (4T with some 1T) on
ImageNet; here they are the networks at hand, ``--preset shared``, or any that the options name.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from common.command import OPTIONS, Out, Preset, Quick, main
from common.ledgers import open_studies, teller
from common.networks import Workload, workloads
from common.tables import markdown, percent

from sysmt.cli.app import say
from sysmt.cli.options import takes
from sysmt.config import THREADS_OF, RecalibrationMode
from sysmt.nn.networks.checkpoints import save_weights
from sysmt.nn.networks.pruning import make_permanent, prune_model
from sysmt.nn.networks.training import train
from sysmt.progress import Bar, progress_bar
from sysmt.study.knapsack import harms_of, knapsack_maps
from sysmt.study.plots.study import plot_accuracy_speedup
from sysmt.study.search import SearchConfig, front_table, measure_sensitivities
from sysmt.study.store import Point, Store
from sysmt.study.sweep import Bench
from sysmt.study.thread_maps import greedy_maps, layer_errors, random_maps, uniform
from sysmt.study.worker import Worker
from sysmt.study.workload import open_workload

SHARED = ("resnet20", "resnet32")
RETRAINING_LR = 0.005


@takes(*(name for name in OPTIONS if name not in ("policy", "prune")))
def accuracy_against_speedup(
    chosen: dict[str, Any],
    preset: Preset = None,
    quick: Quick = False,
    out: Out = None,
    dots: Annotated[int, typer.Option(help="Thread maps of each panel; each is a dot twice.")] = 24,
    sparsity: Annotated[
        float, typer.Option(help="The first network once more, with this share of weights pruned; 0: not.")
    ] = 0.4,
    retrain: Annotated[int, typer.Option(help="Epochs of training after pruning, with the masks on.")] = 2,
) -> None:
    """Draw accuracy against speedup for several networks, with and without recalibration."""
    dots = 8 if quick else dots
    networks = workloads(chosen, preset, quick, SHARED)
    path = open_studies("accuracy_against_speedup", out, quick)
    for network in networks:
        network.prepare()
    if sparsity:
        networks.append(pruned(networks[0], sparsity, retrain, path))
    tables = []
    with progress_bar("points of all panels", len(networks) * dots * 2, "points") as bar:
        for panel, network in zip("abcdefgh", networks, strict=False):
            table = measure(network, dots, path / "study.db", bar)
            tables.append(table.assign(network=network.name))
            plot_accuracy_speedup(
                table, path / f"accuracy_against_speedup_{panel}.png", f"({panel}) {network.name}"
            )
    points = pd.concat(tables)
    points.to_csv(path / "points.csv", index=False)
    text = layout_of(points)
    (path / "accuracy_against_speedup.md").write_text(text)
    print(text)
    say(f"results are in {path}")


def pruned(network: Workload, sparsity: float, epochs: int, path: Path) -> Workload:
    """Prune a network as the paper does, by magnitude, and retrain what is left; done only once."""
    name = f"{network.key}-pruned-{100 * sparsity:.0f}-retrained-{epochs}.pt"
    if not (path / name).is_file():
        model, data = open_workload(network.config)
        prune_model(model, sparsity)
        if epochs:
            train(model, data, epochs, lr=RETRAINING_LR, seed=network.config.seed)
        make_permanent(model)
        save_weights(model, path / name, {"sparsity": sparsity, "epochs": epochs})
    config = dataclasses.replace(network.config, weights=str(path / name))
    return Workload(f"{network.name}, {100 * sparsity:.0f} % pruned", config)


def measure(network: Workload, dots: int, storage: Path, bar: Bar) -> pd.DataFrame:
    """Measure one panel's thread maps, as they are and recalibrated."""
    bench = Bench(network.config)
    store = Store(storage, network.name, facts=bench.facts(), layers=bench.layers)
    maps = store.noted("maps") or choose_maps(bench, dots)
    store.note("maps", maps)
    for mode in (RecalibrationMode.NONE.value, "ema"):
        store.enqueue([Point(threads, recalibrate=mode) for threads in maps], mode)
    Worker(store, bench.measure, network.config.seed).work(teller(bar, network.name))
    return store.table()


def choose_maps(bench: Bench, dots: int) -> list[dict[str, int]]:
    """Take uniform threads, and good, plausible and random choices of layers to decelerate."""
    config = SearchConfig(seed=bench.config.seed)
    harms, macs = harms_of(measure_sensitivities(bench, config).table)
    loader = bench.job.data.loader("train", images=config.sensitivity_images, batch_size=64, augment=True)
    errors = layer_errors(bench.job.sim, loader, min(config.sensitivity_images, loader.images))
    share = max(1, (dots - 3) // 3)
    maps = [*uniform(bench.layers, (1, 2, 4)), *knapsack_maps(harms, macs, share)]
    maps += greedy_maps(errors, share) + random_maps(bench.layers, dots, config.seed)
    return list({tuple(one.values()): one for one in maps}.values())[:dots]


def layout_of(points: pd.DataFrame) -> str:
    """Lay out what recalibration gives, and the fronts."""
    rows = []
    for network, every in points.groupby("network", sort=False):
        table = every.dropna(axis=1, how="all")  # without the other networks' layers
        layers = [name for name in table.columns if name.startswith(THREADS_OF)]
        both = table.pivot_table(index=layers, columns="recalibrate", values="top1").dropna()
        gain = both["ema"] - both[RecalibrationMode.NONE]
        fast = table[(table["speedup"] > 3) & (table["recalibrate"] == "ema")]
        front = front_table(table)
        at_3x = front[front["speedup"] >= 3].iloc[-1]
        rows.append(
            [
                str(network),
                percent(table["float_top1"].iloc[0]),
                f"{100 * gain.mean():+.2f}",
                f"{100 * gain.loc[both.index.isin(fast.set_index(layers).index)].mean():+.2f}",
                f"{percent(at_3x['top1'])} at {at_3x['speedup']:.2f}x, {at_3x['recalibrate']}",
            ]
        )
    header = ["network", "float %", "recalibration, points", "above 3x", "front at 3x"]
    return markdown(header, rows)


if __name__ == "__main__":
    main(accuracy_against_speedup)

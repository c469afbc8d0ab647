"""The search for threads per layer against random, greedy and uniform choices, with as many evaluated points.

The paper leaves open "which layers are best to decelerate, and how much". Every method gets the same
number of points on the same images, several times with other calibration images, draws and
refinements. Half of the test images, others in each repetition, are held out: a method picks its front
by the accuracy on the first half, and what counts is the hypervolume of the picked points' speedup
and their accuracy on the second.
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
from common.tables import give_or_take, markdown, percent, signed

from sysmt.cli.app import say
from sysmt.cli.options import takes
from sysmt.config import THREADS_OF
from sysmt.progress import Bar, progress_bar
from sysmt.study.pareto import Reference, held_out_hypervolume, hypervolume, share_covered
from sysmt.study.plots.study import plot_accuracy_speedup, plot_hypervolume, plot_sensitivities, plot_threads
from sysmt.study.search import BASELINES, SEARCH, SearchConfig, choose, front_table, run_baselines, run_search
from sysmt.study.store import Store
from sysmt.study.sweep import Bench
from sysmt.study.thread_maps import uniform, write_threads_map
from sysmt.study.worker import Worker

SHARED = ("resnet20", "resnet32")
TARGET_SPEEDUP = 3.0


@takes(*(name for name in OPTIONS if name not in ("policy", "seed")))
def search_vs_baselines(
    chosen: dict[str, Any],
    preset: Preset = None,
    quick: Quick = False,
    out: Out = None,
    evaluations: Annotated[int, typer.Option(help="Evaluated points of each method and seed.")] = 40,
    seeds: Annotated[int, typer.Option(help="How often the comparison is made.")] = 3,
    recalibrate: Annotated[
        str, typer.Option(help="Recalibrate every point: ema, cumulative or final; none for not.")
    ] = "none",
    below: Annotated[
        float, typer.Option(help="Lower edge of the hypervolume: points below float accuracy.")
    ] = 2.0,
    held_out: Annotated[
        float, typer.Option(help="Share of the test images that pick no points, but judge them.")
    ] = 0.5,
) -> None:
    """Compare the search's hypervolume with random, greedy and uniform thread maps; find a 3x network."""
    networks = workloads(chosen, preset, quick, SHARED)
    evaluations, seeds = (12, 1) if quick else (evaluations, seeds)
    path = open_studies("search_vs_baselines", out, quick)
    texts, curves, targets = [], [], []
    total = len(networks) * seeds * (3 * evaluations + 3)
    with progress_bar("points of all methods", total, "points") as bar:
        for network in networks:
            network.prepare()
            runs = []
            for seed in range(seeds):
                config = SearchConfig(
                    evaluations=evaluations,
                    seeds=max(4, evaluations * 3 // 5),
                    recalibrate=recalibrate,
                    seed=seed,
                )
                runs.append(compare(network, config, held_out, path, bar))
            curve, text = hypervolumes(network, runs, below / 100)
            curves.append(curve)
            found = target_networks(network, runs, path)
            targets.append(found)
            texts += [text, layout_of(found)]
            draw(network, runs[0], curve, path)
    pd.concat(curves).to_csv(path / "hypervolume.csv", index=False)
    pd.concat(targets).to_csv(path / "targets.csv", index=False)
    (path / "summary.md").write_text("\n".join(texts))
    print("\n".join(texts))
    say(f"results are in {path}")


@dataclasses.dataclass
class Run:
    """One seed's comparison: its bench, study and tables of points by method."""

    config: SearchConfig
    bench: Bench
    store: Store
    points: dict[str, pd.DataFrame]
    sensitivities: pd.DataFrame


def compare(network: Workload, config: SearchConfig, held_out: float, path: Path, bar: Bar) -> Run:
    """Let every method evaluate its points, in one study for each seed."""
    bench = Bench(dataclasses.replace(network.config, seed=config.seed), held_out)
    name = f"{network.key}, seed {config.seed}, recalibrate {config.recalibrate}"
    store = Store(path / "study.db", name, facts=bench.facts(), layers=bench.layers)
    on_point = teller(bar, name)
    sensitivities = run_search(bench, store, config, on_point)
    run_baselines(bench, store, config, BASELINES, on_point)
    points = {method: store.table(method) for method in (SEARCH, *BASELINES)}
    file = path / f"points-{network.key}-{config.seed}.csv"
    pd.concat([table.assign(of=method) for method, table in points.items()]).to_csv(file, index=False)
    return Run(config, bench, store, points, sensitivities)


def hypervolumes(network: Workload, runs: list[Run], below: float) -> tuple[pd.DataFrame, str]:
    """Return hypervolume by number of evaluations, and the table of its final values."""
    rows = []
    for run in runs:
        for method, table in run.points.items():
            for number in range(1, len(table) + 1):
                about = {"network": network.name, "method": method, "seed": run.config.seed}
                rows.append(about | {"evaluations": number} | volumes(run.bench, table[:number], below))
    curve = pd.DataFrame(rows)
    last = curve.groupby(["method", "seed"])[["hypervolume", "seen_hypervolume"]].last()
    cells = []
    for method in (SEARCH, *BASELINES):
        values, seen = (last.loc[method][name] for name in ("hypervolume", "seen_hypervolume"))
        cells.append(
            [
                method,
                f"{len(runs[0].points[method])}",
                f"{values.mean():.3f}",
                " ".join(f"{value:.3f}" for value in values),
                " ".join(f"{value:.3f}" for value in seen),
                "-" if method == SEARCH else " ".join(percent(covered(run, method), 0) for run in runs),
            ]
        )
    header = ["method", "points", "held out", "by seed", "images that picked", "% matched or beaten"]
    title = (
        f"{network.name}: hypervolume from 1x and {100 * below:.0f} points below float "
        f"(1 = 4x at float accuracy), recalibration: {runs[0].config.recalibrate}; last, the share of a "
        "method's points that the searched front matches or beats, on the images that picked it\n\n"
    )
    return curve, title + markdown(header, cells)


def volumes(bench: Bench, points: pd.DataFrame, below: float) -> dict[str, float]:
    """Return the hypervolume of points on the images that were held out, and on those that picked them."""
    seen = Reference(1.0, bench.float_top1 - below, 4.0, bench.float_top1)
    best = {"seen_hypervolume": hypervolume(points["speedup"], points["top1"], seen)}
    if not bench.held_out:
        return {"hypervolume": best["seen_hypervolume"]} | best
    judge = Reference(1.0, bench.float_held_out_top1 - below, 4.0, bench.float_held_out_top1)
    judged = held_out_hypervolume(points["speedup"], points["top1"], points["held_out_top1"], judge)
    return {"hypervolume": judged} | best


def covered(run: Run, method: str) -> float:
    """Return the share of a method's points that the searched front matches or beats."""
    front, points = front_table(run.points[SEARCH]), run.points[method]
    return share_covered(front["speedup"], front["top1"], points["speedup"], points["top1"])


def target_networks(network: Workload, runs: list[Run], path: Path) -> pd.DataFrame:
    """Pick each seed's best network at 3x; measure it and the uniform ones with recalibration as well.

    Accuracies are those of the images that did not pick.
    """
    rows = []
    for run in runs:
        best = choose(run.points[SEARCH], target_speedup=TARGET_SPEEDUP)
        picked = {name: int(best[f"{THREADS_OF}{name}"]) for name in run.bench.layers}
        write_threads_map(path / f"threads-{network.key}-3x-{run.config.seed}.toml", picked)
        named = {f"searched, {TARGET_SPEEDUP:g}x": picked}
        named |= {
            f"{count}T": threads for count, threads in zip((1, 2, 4), uniform(picked, (1, 2, 4)), strict=True)
        }
        for mode in dict.fromkeys((run.config.recalibrate, "ema")):
            wanted = {
                name: dataclasses.replace(run.config.point(threads), recalibrate=mode)
                for name, threads in named.items()
            }
            run.store.enqueue(wanted.values(), f"target {mode}")
            Worker(run.store, run.bench.measure, run.config.seed).work()
            for name, point in wanted.items():
                measured = run.store.measured(point)
                assert measured is not None
                kind = "held_out" if run.bench.held_out else "top1"
                top1 = "held_out_top1" if run.bench.held_out else "top1"
                kept = {"speedup": "speedup", "speedup_cycles": "speedup_cycles", "loss": "loss"}
                kept |= {"top1": top1, "top1_difference": f"{kind}_difference"}
                kept |= {"top1_difference_se": f"{kind}_difference_se"}
                about = {
                    "network": network.name,
                    "seed": run.config.seed,
                    "setting": name,
                    "recalibrate": mode,
                }
                rows.append(about | {name: measured[key] for name, key in kept.items()})
    return pd.DataFrame(rows)


def layout_of(found: pd.DataFrame) -> str:
    """Lay out the table of networks at the target speedup."""
    cells = [
        [
            row["setting"],
            str(row["seed"]),
            row["recalibrate"],
            f"{row['speedup']:.2f}x",
            percent(row["top1"]),
            give_or_take(signed(row["top1_difference"]), row["top1_difference_se"]),
            f"{row['loss']:.4f}",
        ]
        for row in found.to_dict("records")
    ]
    return markdown(["threads", "seed", "recalibrated", "speedup", "top-1 %", "vs float", "loss"], cells)


def draw(network: Workload, run: Run, curve: pd.DataFrame, path: Path) -> None:
    """Draw the plots of one network, points and maps of the first seed."""
    model = network.key
    plot_hypervolume(curve, path / f"hypervolume-{model}.png", network.name)
    tables = [table.assign(method=method) for method, table in run.points.items()]
    plot_accuracy_speedup(pd.concat(tables), path / f"front-{model}.png", network.name)
    plot_threads(front_table(run.points[SEARCH]), path / f"threads-{model}.png", network.name)
    plot_sensitivities(run.sensitivities, path / f"sensitivities-{model}.png", network.name)


if __name__ == "__main__":
    main(search_vs_baselines)

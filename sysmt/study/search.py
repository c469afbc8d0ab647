"""Threads for each layer: the paper's open question as an integer program, and a search around its answers.

"Which layers are best to decelerate, and how much ... is still an open question" (Shomron & Weiser,
Post-Training BatchNorm Recalibration, section 3). The harm of each layer's thread count, measured one
layer at a time, is taken to add up; then the best network of a given speedup is a multiple-choice
knapsack, which HiGHS solves exactly. These networks, evaluated, are the first generation of NSGA-II.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import Bounds, LinearConstraint, milp

from sysmt.config import THREAD_COUNTS, Policy, parse_count, parse_name
from sysmt.errors import ConfigError
from sysmt.nn.array.simulation import Simulation
from sysmt.study.pareto import pareto_front
from sysmt.study.sensitivity import Sensitivities, sensitivities
from sysmt.study.store import Point, Store
from sysmt.study.sweep import Bench, uniform
from sysmt.study.thread_maps import measure_errors
from sysmt.study.worker import Worker

__all__ = [
    "BASELINES",
    "SEARCH",
    "SearchConfig",
    "choose",
    "front_table",
    "greedy_maps",
    "knapsack",
    "knapsack_maps",
    "map_speedup",
    "random_maps",
    "run_baselines",
    "run_search",
]

SEARCH = "search"
"""The search's own method name in a study."""

BASELINES = ("uniform", "random", "greedy")
"""What `sysmt search --baselines` compares with, with as many evaluated points each."""


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How a search goes about it.

    Attributes
    ----------
    evaluations : int
        Points to evaluate in all.
    seeds : int
        Of these, at most so many come from uniform threads and the integer program; the others refine them.
    sensitivity_images : int
        Training images (unlabelled) for the sensitivities.
    policy : Policy
    sparsity : float
        Share of weights set to zero first, in [0, 1).
    recalibrate : str
        Recalibration mode, or "none".
    seed : int
        Of the refinement and of random baselines.
    """

    evaluations: int = 48
    seeds: int = 28
    sensitivity_images: int = 256
    policy: Policy = Policy.SA
    sparsity: float = 0.0
    recalibrate: str = "ema"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("evaluations", "sensitivity_images"):
            object.__setattr__(self, name, parse_count(getattr(self, name), name))
        object.__setattr__(self, "seeds", parse_count(self.seeds, "seeds", minimum=4))
        object.__setattr__(self, "policy", parse_name(Policy, self.policy, "policy"))
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity={self.sparsity} is out of range; it must be in [0, 1)")

    def point(self, threads: Mapping[str, int]) -> Point:
        """Return a thread map as a point of this search."""
        return Point(threads, self.policy.value, self.sparsity, self.recalibrate)


# -- the integer program -----------------------------------------------------------------------


def map_speedup(threads: Mapping[str, int], macs: Mapping[str, int]) -> float:
    """Return the MAC-weighted speedup of a thread map, over the layers of `macs` (per image)."""
    return sum(macs.values()) / sum(count / threads[layer] for layer, count in macs.items())


def knapsack(
    costs: Mapping[str, Mapping[int, float]], macs: Mapping[str, int], speedup: float
) -> dict[str, int]:
    """Choose the threads of each layer that cost least in all, at a given MAC-weighted speedup or more.

    Parameters
    ----------
    costs : mapping of str to mapping of int to float
        For each layer, what each thread count costs; any additive measure of harm.
    macs : mapping of str to int
        Multiply-accumulates of each layer.
    speedup : float
        At least 1, at most the largest that the thread counts allow.

    Returns
    -------
    dict of str to int
        An exact optimum (multiple-choice knapsack, solved by HiGHS).

    Raises
    ------
    ConfigError
        If the speedup cannot be reached.
    """
    choices = [(layer, count) for layer, options in costs.items() for count in options]
    harm = np.array([costs[layer][count] for layer, count in choices], np.float64)
    time = np.array([macs[layer] / count for layer, count in choices], np.float64)
    one_each = np.array([[float(layer == name) for layer, _ in choices] for name in costs])
    # In units near 1, so that the solver's tolerances are far below any difference that matters.
    harm /= max(float(np.abs(harm).max(initial=0.0)), 1e-300)
    budget = sum(macs.values()) / speedup
    found = milp(
        harm,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(time[None, :] / budget, -np.inf, 1 + 1e-9),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        largest = max(count for _, count in choices)
        raise ConfigError(
            f"speedup={speedup:.4g} cannot be reached; with {largest} threads, {largest}x is most"
        )
    return {layer: count for (layer, count), taken in zip(choices, found.x, strict=True) if taken > 0.5}


def knapsack_maps(
    harms: Sequence[Mapping[str, Mapping[int, float]]], macs: Mapping[str, int], wanted: int
) -> list[dict[str, int]]:
    """Solve the knapsack for a range of speedups, under several measures of harm.

    Parameters
    ----------
    harms : sequence of mappings
        Each as the `costs` of `knapsack`.
    macs : mapping of str to int
    wanted : int
        At most so many different maps, fastest first. Their speedups are spread from the largest
        possible down to half of it: slower networks hardly lose accuracy (uniform 2T covers them).
    """
    most = map_speedup({layer: max(options) for layer, options in harms[0].items()}, macs)
    targets = np.linspace(most, most / 2, wanted + 1)[:-1]
    maps = [knapsack(harm, macs, float(target)) for target in targets for harm in harms]
    distinct = {tuple(one.values()): one for one in maps}.values()
    return _spread(sorted(distinct, key=lambda one: -map_speedup(one, macs)), wanted)


def _spread(maps: Sequence[dict[str, int]], wanted: int) -> list[dict[str, int]]:
    """Take so many of a list, evenly."""
    taken = np.unique(np.linspace(0, len(maps) - 1, min(wanted, len(maps))).round().astype(int))
    return [maps[index] for index in taken]


# -- baselines ---------------------------------------------------------------------------------


def random_maps(layers: Sequence[str], wanted: int, seed: int) -> list[dict[str, int]]:
    """Draw thread maps whose speedups spread over the whole range.

    Each map first draws how common 1, 2 and 4 threads are in it, uniformly from all mixtures; layers
    drawn independently at even odds would all come out near the same speedup.
    """
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(wanted):
        mixture = rng.dirichlet(np.ones(len(THREAD_COUNTS)))
        drawn = rng.choice(THREAD_COUNTS, size=len(layers), p=mixture)
        maps.append({layer: int(count) for layer, count in zip(layers, drawn, strict=True)})
    return maps


def greedy_maps(errors: Mapping[str, float], wanted: int) -> list[dict[str, int]]:
    """Lower the layers of the highest MSE first, one after the other: the papers' throttling.

    Parameters
    ----------
    errors : mapping of str to float
        Each layer's MSE at the most threads.
    wanted : int
        How many maps, evenly taken from all steps of 4 to 2 threads, 4 to 1, and 2 to 1.
    """
    worst = sorted(errors, key=lambda layer: -errors[layer])
    steps = {}
    for low, high in ((2, 4), (1, 4), (1, 2)):
        for lowered in range(len(worst) + 1):
            one = {layer: (low if layer in worst[:lowered] else high) for layer in errors}
            steps[tuple(one.values())] = one
    return _spread(list(steps.values()), wanted)


def layer_errors(sim: Simulation, loader: Iterable[Any], images: int) -> dict[str, float]:
    """Measure each layer's MSE against T = 1 with 4 threads everywhere; thread counts are restored."""
    before = sim.threads()
    try:
        sim.set_threads(max(THREAD_COUNTS))
        measure_errors(sim, loader, images)
        return {layer.name: layer.counts.mse for layer in sim.simulated()}
    finally:
        sim.set_threads(before)


# -- the search --------------------------------------------------------------------------------


def measure_sensitivities(bench: Bench, config: SearchConfig) -> Sensitivities:
    """Measure the layers' sensitivities on training images, under the search's policy and sparsity."""
    job = bench.select(config.sparsity)
    if job.sim.config.policy != config.policy:
        job.sim.reconfigure(policy=config.policy)
    return sensitivities(job.sim, _few_training_images(bench, config), _image_count(bench, config))


def run_search(
    bench: Bench,
    store: Store,
    config: SearchConfig,
    on_point: Callable[[Point, Mapping[str, Any]], None] | None = None,
) -> pd.DataFrame:
    """Search: sensitivities, integer program, evaluation, refinement. Goes on where it was interrupted.

    Parameters
    ----------
    bench : Bench
    store : Store
        A study of that bench. Sensitivities that it has already are used again.
    config : SearchConfig
    on_point : callable, optional
        Called after each evaluated point.

    Returns
    -------
    DataFrame
        The sensitivities, as `Sensitivities.table`.
    """
    kept = store.noted("sensitivities")
    if kept is None:
        measured = measure_sensitivities(bench, config)
        kept = {"table": measured.table.to_dict("list"), "seconds": measured.seconds}
        store.note("sensitivities", kept)
    table = pd.DataFrame(kept["table"])
    harms, macs = harms_of(table)
    maps = [*uniform(bench.layers, reversed(THREAD_COUNTS))]
    maps += knapsack_maps(harms, macs, max(1, min(config.seeds, config.evaluations) - len(maps)))
    seeds = list({config.point(one).key: config.point(one) for one in maps}.values())[: config.evaluations]
    store.enqueue(seeds, SEARCH, even_finished=store.noted("plan") is None)
    store.plan_search(config.evaluations, max(2, len(seeds)), seeds[0], SEARCH)
    Worker(store, bench.measure, config.seed).work(on_point)
    return table


def harms_of(table: pd.DataFrame) -> tuple[list[dict[str, dict[int, float]]], dict[str, int]]:
    """Turn a sensitivity table into measures of harm by layer and thread count, and each layer's MACs.

    The divergence of the output sees what the rest of the network makes of a layer's noise, but on a
    few hundred images of which most are classified with confidence; the layer's own squared error is
    known far better, but not where it matters. On CIFAR-10 ResNets neither was best at all
    speedups, so both are used, and their sum, each scaled by its total at the most threads.
    """
    most = table["threads"].max()
    harms = []
    for columns in (["kl"], ["mse"], ["kl", "mse"]):
        totals = table[table["threads"] == most][columns].sum().clip(lower=1e-300)
        share = (table[columns] / totals).sum(axis=1)
        harm = {str(layer): {1: 0.0} for layer in dict.fromkeys(table["layer"])}
        for layer, threads, value in zip(table["layer"], table["threads"], share, strict=True):
            harm[layer][int(threads)] = float(value)
        harms.append(harm)
    return harms, {str(row["layer"]): int(row["macs"]) for row in table.to_dict("records")}


def run_baselines(
    bench: Bench,
    store: Store,
    config: SearchConfig,
    methods: Iterable[str] = BASELINES,
    on_point: Callable[[Point, Mapping[str, Any]], None] | None = None,
) -> None:
    """Evaluate as many points by other methods, in the same study, under the same conditions."""
    for method in methods:
        store.enqueue([config.point(one) for one in _baseline(method, bench, config)], method)
    Worker(store, bench.measure, config.seed).work(on_point)


def _baseline(method: str, bench: Bench, config: SearchConfig) -> Iterator[dict[str, int]]:
    if method == "uniform":
        yield from uniform(bench.layers, THREAD_COUNTS)
    elif method == "random":
        yield from random_maps(bench.layers, config.evaluations, config.seed)
    elif method == "greedy":
        job = bench.select(config.sparsity)
        loader, images = _few_training_images(bench, config), _image_count(bench, config)
        yield from greedy_maps(layer_errors(job.sim, loader, images), config.evaluations)
    else:
        raise ConfigError(f"baseline={method!r} is unknown; allowed: {', '.join(BASELINES)}")


def _few_training_images(bench: Bench, config: SearchConfig) -> Iterable[Any]:
    return bench.job.data.loader(
        "train", images=_image_count(bench, config), batch_size=64, augment=True, seed=bench.config.seed
    )


def _image_count(bench: Bench, config: SearchConfig) -> int:
    return min(config.sensitivity_images, bench.job.data.images("train"))


# -- what came out -----------------------------------------------------------------------------


def front_table(points: pd.DataFrame) -> pd.DataFrame:
    """Return the Pareto-optimal points of a study's table, fastest first."""
    front = points[pareto_front(points["speedup"], points["top1"])]
    return front.sort_values("speedup", ascending=False, ignore_index=True)


def choose(
    points: pd.DataFrame, *, target_speedup: float | None = None, max_drop: float | None = None
) -> dict[str, Any]:
    """Pick one point: the most accurate at a speedup, or the fastest within a drop in accuracy.

    Parameters
    ----------
    points : DataFrame
        As `Store.table` returns it.
    target_speedup : float, optional
        MAC-weighted; the point is at least so fast.
    max_drop : float, optional
        Largest drop of top-1 below the float network, in percentage points. One of the two.

    Raises
    ------
    ConfigError
        If no point qualifies: the message says what there is.
    """
    if (target_speedup is None) == (max_drop is None):
        raise ConfigError("choose by target_speedup or by max_drop, one of them")
    if target_speedup is not None:
        good, fastest = points[points["speedup"] >= target_speedup - 1e-9], points["speedup"].max()
        if not len(good):
            raise ConfigError(
                f"no evaluated point reaches {target_speedup:.4g}x; the fastest has {fastest:.4g}x"
            )
        best = good.sort_values(["top1", "speedup"], ascending=False).iloc[0]
    else:
        assert max_drop is not None
        drops = -100 * points["top1_difference"]
        good = points[drops <= max_drop + 1e-9]
        if not len(good):
            raise ConfigError(
                f"every evaluated point drops more than {max_drop} points; the least is {drops.min():.2f}"
            )
        best = good.sort_values(["speedup", "top1"], ascending=False).iloc[0]
    return {str(key): value for key, value in best.to_dict().items()}

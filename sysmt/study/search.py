"""Threads for each layer: the paper's open question as an integer program, and a search around its answers.

The sensitivities of single layers give the integer program (`sysmt.study.knapsack`); the networks that it
finds, evaluated, are the first generation of NSGA-II.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from sysmt.config import THREAD_COUNTS, Policy, RecalibrationMode, parse_count, parse_name
from sysmt.errors import ConfigError
from sysmt.study.knapsack import harms_of, knapsack_maps
from sysmt.study.pareto import pareto_front
from sysmt.study.sensitivity import Sensitivities, sensitivities
from sysmt.study.store import Point, Store
from sysmt.study.sweep import Bench
from sysmt.study.thread_maps import greedy_maps, layer_errors, random_maps, uniform
from sysmt.study.worker import Worker

__all__ = [
    "BASELINES",
    "SEARCH",
    "SearchConfig",
    "choose",
    "front_table",
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
    recalibrate : RecalibrationMode
    seed : int
        Of the refinement and of random baselines.
    """

    evaluations: int = 48
    seeds: int = 28
    sensitivity_images: int = 256
    policy: Policy = Policy.SA
    sparsity: float = 0.0
    recalibrate: RecalibrationMode = RecalibrationMode.EMA
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("evaluations", "sensitivity_images"):
            object.__setattr__(self, name, parse_count(getattr(self, name), name))
        object.__setattr__(self, "seeds", parse_count(self.seeds, "seeds", minimum=4))
        object.__setattr__(self, "policy", parse_name(Policy, self.policy, "policy"))
        mode = parse_name(RecalibrationMode, self.recalibrate, "recalibrate")
        object.__setattr__(self, "recalibrate", mode)
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity={self.sparsity} is out of range; it must be in [0, 1)")

    def point(self, threads: Mapping[str, int]) -> Point:
        """Return a thread map as a point of this search."""
        return Point(threads, self.policy.value, self.sparsity, self.recalibrate.value)


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

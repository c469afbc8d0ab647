"""Threads for each layer as an integer program: least harm at a given speedup, solved exactly.

"Which layers are best to decelerate, and how much ... is still an open question" (Shomron & Weiser,
Post-Training BatchNorm Recalibration, section 3). The harm of each layer's thread count, measured one
layer at a time, is taken to add up; then the best network of a given speedup is a multiple-choice
knapsack, which HiGHS solves exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.optimize import Bounds, LinearConstraint, milp

from sysmt.errors import ConfigError
from sysmt.study.thread_maps import map_speedup, spread

__all__ = ["harms_of", "knapsack", "knapsack_maps"]


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
    return spread(sorted(distinct, key=lambda one: -map_speedup(one, macs)), wanted)

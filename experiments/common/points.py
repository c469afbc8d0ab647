"""The points of an experiment: which there are, which are still missing, and how they compare."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sysmt.nn.batchnorm.recalibration import RecalibrationReport
from sysmt.progress import Bar
from sysmt.study.evaluate import paired_difference
from sysmt.study.ledger import Ledger
from sysmt.study.workload import OpenWorkload

Key = dict[str, Any]
"""What tells a point from all others: a value for each of the experiment's keys."""


def grid(keys: Sequence[str], *axes: Iterable[Any]) -> list[Key]:
    """Return a point for every choice of a value from each axis; the last axis varies fastest."""
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*axes)]


def still_missing(points: Sequence[Key], ledger: Ledger, bar: Bar) -> list[Key]:
    """Return the points that are not in the ledger, and advance the bar by those that are."""
    missing = [point for point in points if not ledger.has(**point)]
    bar.advance(len(points) - len(missing))
    return missing


def measure_float(
    missing: list[Key], subject: OpenWorkload, ledger: Ledger, bar: Bar, what: str = "float"
) -> None:
    """Measure the network in float, if its point (0 threads) is the first of `missing`, and take that off."""
    if missing and missing[0]["threads"] == 0:
        evaluation = subject.evaluate(what)
        ledger.add(missing.pop(0) | evaluation.to_record(), evaluation.correct)
        bar.advance(1)


def recalibrated(
    again: bool, subject: OpenWorkload, mode: str, images: int, seed: int
) -> contextlib.AbstractContextManager[RecalibrationReport | None]:
    """Recalibrate the network's BatchNorm for a while, or leave it as it is."""
    return subject.recalibrated(mode, images, seed) if again else contextlib.nullcontext()


def those_of(points: Iterable[Key], table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a table that belong to some points; a ledger may hold others."""
    asked = pd.DataFrame(points).drop_duplicates()
    return table.merge(asked, on=list(asked))


def mean_correct(points: Iterable[Mapping[Any, Any]], ledger: Ledger) -> np.ndarray:
    """Return the mean over points, image by image, of whether the image was classified correctly."""
    return np.mean([ledger.correct(**key) for key in points], axis=0, dtype=np.float64)


def compared(ours: np.ndarray, theirs: np.ndarray, name: str = "difference") -> dict[str, float]:
    """Return the difference in accuracy and its standard error, paired by image, as columns of that name."""
    difference, standard_error = paired_difference(ours, theirs)
    return {name: difference, f"{name}_se": standard_error}


def joined_seeds(
    group: pd.DataFrame, keys: Sequence[str], ledger: Ledger, theirs: np.ndarray
) -> dict[str, Any]:
    """Join the points of one setting that differ in their seeds.

    Returns
    -------
    dict
        ``seeds``, ``images``; ``top1``, mean over the seeds, and ``top1_seed_sd``; ``difference`` to `theirs`
        and ``difference_se``, paired by image, each image counting with its mean over the seeds.
    """
    ours = mean_correct(group[list(keys)].to_dict("records"), ledger)
    return {
        "seeds": len(group),
        "images": len(ours),
        "top1": group["top1"].mean(),
        "top1_seed_sd": group["top1"].std(ddof=1),
        **compared(ours, theirs),
    }

"""Pareto fronts of speedup and accuracy: which points lie on one, and how much it dominates."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from sysmt.errors import ConfigError

__all__ = [
    "Reference",
    "accuracy_at",
    "held_out_hypervolume",
    "hypervolume",
    "hypervolume_curve",
    "pareto_front",
    "share_covered",
]


@dataclasses.dataclass(frozen=True)
class Reference:
    """The rectangle that hypervolumes are measured in.

    Attributes
    ----------
    speedup : float
        Left edge; points that are not faster do not count.
    accuracy : float
        Lower edge, in [0, 1]; points that are not above it do not count.
    best_speedup, best_accuracy : float
        The opposite corner, such as 4x at the float network's accuracy. A front through it has
        hypervolume 1; one that passes above it has more.
    """

    speedup: float
    accuracy: float
    best_speedup: float
    best_accuracy: float

    def __post_init__(self) -> None:
        if not (self.best_speedup > self.speedup and self.best_accuracy > self.accuracy):
            raise ConfigError(f"{self} is no rectangle: the best corner must be above and right of the other")


def pareto_front(speedup: ArrayLike, accuracy: ArrayLike) -> np.ndarray:
    """Mark the points that no other point beats in one objective without losing in the other.

    Parameters
    ----------
    speedup, accuracy : array_like (points,)
        Larger is better, both.

    Returns
    -------
    bool ndarray (points,)
        Of equal points, only the first is marked.
    """
    x, y = _columns(speedup, accuracy)
    front = np.zeros(x.size, bool)
    best = -np.inf
    for index in np.lexsort((np.arange(x.size), -y, -x)):  # fastest first, of these the most accurate
        if y[index] > best:
            front[index] = True
            best = y[index]
    return front


def hypervolume(speedup: ArrayLike, accuracy: ArrayLike, reference: Reference) -> float:
    """Return the area that points dominate, as a share of the reference rectangle.

    Parameters
    ----------
    speedup, accuracy : array_like (points,)
    reference : Reference

    Returns
    -------
    float
        At least 0; 0 for no points.
    """
    x, y = _columns(speedup, accuracy)
    width = np.maximum(x - reference.speedup, 0) / (reference.best_speedup - reference.speedup)
    height = np.maximum(y - reference.accuracy, 0) / (reference.best_accuracy - reference.accuracy)
    area = reached = 0.0
    for index in np.lexsort((-height, -width)):
        if height[index] > reached:
            area += width[index] * (height[index] - reached)
            reached = height[index]
    return float(area)


def hypervolume_curve(speedup: ArrayLike, accuracy: ArrayLike, reference: Reference) -> np.ndarray:
    """Return the hypervolume after each point, in the order given: float64 (points,)."""
    x, y = _columns(speedup, accuracy)
    return np.array([hypervolume(x[:count], y[:count], reference) for count in range(1, x.size + 1)])


def held_out_hypervolume(
    speedup: ArrayLike, accuracy: ArrayLike, held_out_accuracy: ArrayLike, reference: Reference
) -> float:
    """Return the area under the points that one set of images picks, at their accuracy on others.

    The largest of many noisy accuracies is too large. Here each speedup's point is picked by
    `accuracy`, and counts with `held_out_accuracy`, whether another point would have been better or not.

    Parameters
    ----------
    speedup, accuracy, held_out_accuracy : array_like (points,)
    reference : Reference
        Its accuracies are those of the held-out images.

    Returns
    -------
    float
        At least 0; equal to `hypervolume` if both accuracies are the same.
    """
    x, y = _columns(speedup, accuracy)
    _, held_out = _columns(speedup, held_out_accuracy)
    picked = np.flatnonzero(pareto_front(x, y))
    picked = picked[np.argsort(x[picked])]
    width = np.diff(np.maximum(x[picked], reference.speedup), prepend=reference.speedup)
    height = np.maximum(held_out[picked] - reference.accuracy, 0)
    rectangle = (reference.best_speedup - reference.speedup) * (reference.best_accuracy - reference.accuracy)
    return float(np.sum(width * height) / rectangle)


def accuracy_at(speedup: ArrayLike, accuracy: ArrayLike, wanted: ArrayLike) -> np.ndarray:
    """Return the best accuracy among the points at least as fast as wanted; -inf where there is none.

    Parameters
    ----------
    speedup, accuracy : array_like (points,)
    wanted : array_like (n,)

    Returns
    -------
    float64 ndarray (n,)
    """
    x, y = _columns(speedup, accuracy)
    # The slack is for speedups that differ in the last bit alone.
    return np.array([np.max(y[x >= at - 1e-9], initial=-np.inf) for at in np.atleast_1d(wanted)])


def share_covered(
    speedup: ArrayLike, accuracy: ArrayLike, others_speedup: ArrayLike, others_accuracy: ArrayLike
) -> float:
    """Return the share of other points that these points match or beat in both objectives, in [0, 1]."""
    x, y = _columns(others_speedup, others_accuracy)
    return float(np.mean(accuracy_at(speedup, accuracy, x) >= y)) if x.size else 1.0


def _columns(speedup: ArrayLike, accuracy: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(speedup, np.float64).ravel(), np.asarray(accuracy, np.float64).ravel()
    if x.size != y.size:
        raise ConfigError(f"{x.size} speedups and {y.size} accuracies are no points")
    return x, y

"""Fronts and hypervolumes against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysmt.errors import ConfigError
from sysmt.study.pareto import (
    Reference,
    accuracy_at,
    held_out_hypervolume,
    hypervolume,
    hypervolume_curve,
    pareto_front,
    share_covered,
)

SQUARE = Reference(1.0, 0.0, 2.0, 1.0)
# A coarse grid, so that ties and equal points are common.
points = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=12).map(
    lambda pairs: (np.array([1 + x / 8 for x, _ in pairs]), np.array([y / 8 for _, y in pairs]))
)


def dominates(a, b):
    return a[0] >= b[0] and a[1] >= b[1] and a != b


@given(points)
def test_front_is_what_nothing_dominates(columns):
    x, y = columns
    pairs = list(zip(x, y, strict=True))
    marked = pareto_front(x, y)
    for index, pair in enumerate(pairs):
        free = not any(dominates(other, pair) for other in pairs)
        assert marked[index] == (free and pairs.index(pair) == index)


@given(points)
def test_hypervolume_counts_the_cells_below_the_points(columns):
    x, y = columns
    left, low = np.meshgrid(np.arange(8) / 8, np.arange(8) / 8)
    covered = np.zeros_like(left, bool)
    for a, b in zip(x, y, strict=True):
        covered |= (left + 1 / 8 <= a - 1 + 1e-12) & (low + 1 / 8 <= b + 1e-12)
    assert hypervolume(x, y, SQUARE) == pytest.approx(covered.mean())


@given(points)
def test_hypervolume_never_falls_with_more_points(columns):
    curve = hypervolume_curve(*columns, SQUARE)
    assert (np.diff(curve) >= 0).all()
    assert len(curve) == len(columns[0])


def test_hypervolume_by_hand():
    reference = Reference(1.0, 0.90, 4.0, 0.92)
    assert hypervolume([4.0], [0.92], reference) == pytest.approx(1.0)
    assert hypervolume([2.5], [0.91], reference) == pytest.approx(0.25)
    assert hypervolume([2.5, 4.0], [0.92, 0.91], reference) == pytest.approx(0.75)
    assert hypervolume([0.5, 4.0], [0.99, 0.89], reference) == 0.0
    assert hypervolume([], [], reference) == 0.0
    assert hypervolume([4.0], [0.93], reference) == pytest.approx(1.5)


def test_held_out_hypervolume_by_hand():
    reference = Reference(1.0, 0.90, 4.0, 0.92)
    speedup, seen = [4.0, 2.5, 2.5, 1.5], [0.91, 0.92, 0.915, 0.90]
    # 2.5x to 4x at 0.905 (picked by 0.91), 1x to 2.5x at 0.91 (picked by 0.92); the others are not picked.
    judged = held_out_hypervolume(speedup, seen, [0.905, 0.91, 0.95, 0.99], reference)
    assert judged == pytest.approx((1.5 * 0.005 + 1.5 * 0.01) / (3 * 0.02))
    assert held_out_hypervolume([4.0], [0.92], [0.80], reference) == 0.0
    assert held_out_hypervolume([0.5, 4.0], [0.99, 0.92], [0.99, 0.91], reference) == pytest.approx(0.5)


@given(points)
def test_held_out_hypervolume_without_luck_is_the_hypervolume(columns):
    held_out = held_out_hypervolume(*columns, columns[1], SQUARE)
    assert held_out == pytest.approx(hypervolume(*columns, SQUARE), abs=1e-12)


def test_accuracy_at_a_speedup_is_the_best_of_the_faster_points():
    best = accuracy_at([1.0, 2.0, 4.0], [0.9, 0.7, 0.8], [1.0, 1.5, 2.0, 4.0, 4.1])
    assert list(best) == [0.9, 0.8, 0.8, 0.8, -np.inf]


def test_share_covered():
    assert share_covered([2.0, 3.0], [0.9, 0.8], [2.0, 2.5, 3.0, 3.5], [0.9, 0.81, 0.8, 0.1]) == 0.5
    assert share_covered([2.0], [0.9], [], []) == 1.0


def test_wrong_input_is_refused():
    with pytest.raises(ConfigError, match="no rectangle"):
        Reference(1.0, 0.9, 1.0, 1.0)
    with pytest.raises(ConfigError, match="2 speedups and 1 accuracies"):
        pareto_front([1, 2], [1])

"""Timing for the benchmarks: candidates take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

__all__ = ["take_turns"]


def take_turns(
    candidates: Mapping[str, Callable[[], object]], rounds: int = 7, one_thread: bool = True
) -> dict[str, float]:
    """Time candidates in turns.

    Parameters
    ----------
    candidates : mapping of str to callable
        What to time, by name; each is called once beforehand.
    rounds : int
        Turns of each.
    one_thread : bool
        Whether all work is done by the calling thread. Then its CPU time is taken, which others on
        the machine disturb less than the wall clock.

    Returns
    -------
    dict of str to float
        Median seconds a call. Quick candidates are repeated within a turn, for the clock's sake.
    """
    now = time.thread_time if one_thread else time.perf_counter
    repeats = {}
    for name, run in candidates.items():
        run()
        start = now()
        run()
        repeats[name] = max(1, min(50, int(0.01 / (now() - start + 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = now()
            for _ in range(repeats[name]):
                run()
            seconds[name].append((now() - start) / repeats[name])
    return {name: float(np.median(times)) for name, times in seconds.items()}

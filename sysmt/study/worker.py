"""The worker: takes points from a study, gives signs of life while it evaluates them, and finishes them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import NSGAIISampler, PartialFixedSampler, RandomSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from sysmt.config import THREAD_COUNTS, THREADS_OF, Policy, RecalibrationMode
from sysmt.study.storage import one_at_a_time, quiet
from sysmt.study.store import (
    COPY,
    ERROR,
    INTERRUPTED,
    MEASURED,
    PENDING,
    POINT,
    SAMPLED,
    WORKER,
    Point,
    Store,
    evaluated,
    given_up,
    key_of,
    plain,
)

__all__ = ["Measure", "Worker"]

MAX_COPIES = 100
"""So many proposals in a row that were evaluated before end a search."""

Measure = Callable[[Point], Mapping[str, Any]]
"""Evaluates a point: plain values by name, ``speedup`` and ``top1`` among them."""


class Worker:
    """Evaluates the points of a study, beside any number of other workers.

    Parameters
    ----------
    store : Store
    measure : callable
        Evaluates one point. An exception ends the work, and leaves the point to the next run; Ctrl-C
        does the same.
    seed : int
        Of the sampler, together with the number of trials there are. Workers need different ones.
    """

    def __init__(self, store: Store, measure: Measure, seed: int = 0) -> None:
        self.store, self.measure, self.seed = store, measure, seed
        self._orphans: dict[int, float] = {}
        self._next_reclaim = 0.0

    def work(self, on_point: Callable[[Point, Mapping[str, Any]], None] | None = None) -> int:
        """Evaluate points until none is waiting, running elsewhere, or to be sampled.

        Parameters
        ----------
        on_point : callable, optional
            Called after each point with what it measured.

        Returns
        -------
        int
            How many points were evaluated here.
        """
        done = idle = copies = 0
        with quiet():
            while copies < MAX_COPIES:
                with self.store.errors():
                    trial, may_sample = self._take()
                    if trial is None:
                        self.reclaim()
                        counts = self.store.counts()
                        if not counts["waiting"] and not counts["running"]:
                            return done
                if trial is None:
                    idle += 1
                    time.sleep(min(1.0, 0.1 * idle))  # should those at work die, their points come here
                    continue
                idle, copies = 0, copies + (POINT not in trial.user_attrs)
                result = self._evaluate(trial, may_sample)
                if result is not None:
                    done, copies = done + 1, 0
                    if on_point is not None:
                        on_point(*result)
        warnings.warn("the search finds no new points any more", stacklevel=2)
        return done

    def _take(self) -> tuple[Trial | None, bool]:
        """Take a trial from the queue or, if the plan allows it, from the sampler."""
        if time.monotonic() >= self._next_reclaim:
            self.reclaim()
        trials, plan = self.store.trials(), self.store.noted("plan")
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        running = any(trial.state == TrialState.RUNNING for trial in trials)
        may_sample = (
            plan is not None and self._lacks(plan, trials) and not (running and self._seeding(plan, trials))
        )
        if not waiting and not may_sample:
            return None, False
        genetic = self._genetic(plan, trials, waiting)
        if plan is None or genetic is None:
            # Never asked for anything: what is in the queue sets every parameter.
            self.store.study.sampler = RandomSampler(seed=self.seed)
            return self._ask(), may_sample
        self.store.study.sampler = PartialFixedSampler(plan["fixed"], genetic)
        trial = self._ask()
        if POINT in trial.user_attrs:
            # Optuna gives generations to the points that it samples; those of the queue are parents, too.
            genetic.get_trial_generation(self.store.study, self.store.storage.get_trial(self._id(trial)))
        return trial, may_sample

    def _ask(self) -> Trial:
        with one_at_a_time(self.store.url):
            return self.store.study.ask()

    def _evaluate(self, trial: Trial, may_sample: bool) -> tuple[Point, dict[str, Any]] | None:
        """Evaluate a trial and finish it, whatever happens; None if there was nothing new to evaluate."""
        with self._heartbeat(trial):
            try:
                with self.store.errors():
                    if POINT not in trial.user_attrs and not may_sample:
                        self._tell(trial, TrialState.PRUNED)  # another worker was faster at the last point
                        return None
                    point = self._point_of(trial)
                    if self._is_elsewhere(trial, point):
                        return None
                start = time.monotonic()
                try:
                    measured = {key: plain(value) for key, value in self.measure(point).items()}
                except Exception as error:
                    trial.set_user_attr(ERROR, f"{type(error).__name__}: {error}")
                    raise
                measured["evaluation_seconds"] = time.monotonic() - start
                with self.store.errors():
                    self._finish(trial, point, measured)
                return point, measured
            except BaseException as error:
                with contextlib.suppress(Exception):
                    if isinstance(error, KeyboardInterrupt):
                        trial.set_user_attr(INTERRUPTED, True)
                    self._tell(trial, TrialState.FAIL)
                raise

    def _is_elsewhere(self, trial: Trial, point: Point) -> bool:
        """Finish a trial whose point is finished, or in progress elsewhere; return whether it was so.

        Two commands may have asked for the same point at once; the earlier trial is the one that counts.
        """
        trials = self.store.trials()
        twin = evaluated(trials).get(point.key)
        if twin is not None:
            trial.set_user_attr(COPY, twin.number)
            self._tell(trial, TrialState.COMPLETE, twin.values)
            return True
        running = (other for other in trials if other.state == TrialState.RUNNING)
        if any(other.number < trial.number and key_of(other) == point.key for other in running):
            self._tell(trial, TrialState.PRUNED)
            return True
        return False

    def _point_of(self, trial: Trial) -> Point:
        """Read a trial's point, from the queue or from the sampler."""
        if POINT not in trial.user_attrs:
            trial.set_user_attr(SAMPLED, self.store.noted("plan")["method"])
        values: dict[str, Any] = {}
        for name, choices in self._choices().items():
            values[name] = trial.suggest_categorical(name, choices)
        values["sparsity"] = trial.suggest_float("sparsity", 0.0, 1.0)
        point = Point.from_params(values)
        trial.set_user_attr(POINT, point.key)
        return point

    def _finish(self, trial: Trial, point: Point, measured: dict[str, Any]) -> None:
        values = [measured["speedup"], measured["top1"]]
        try:
            trial.set_user_attr(MEASURED, measured)
            self._tell(trial, TrialState.COMPLETE, values)
        except optuna.exceptions.UpdateFinishedTrialError:
            # This machine slept so long that its point went back into the queue; its result is good.
            late = optuna.create_trial(
                values=values,
                params=point.to_params(),
                distributions=self._distributions(),
                user_attrs={POINT: point.key, MEASURED: measured},
            )
            self.store.study.add_trial(late)

    def _tell(self, trial: Trial, state: TrialState, values: Sequence[float] | None = None) -> None:
        self.store.study.tell(trial, values, state, skip_if_finished=True)

    @contextlib.contextmanager
    def _heartbeat(self, trial: Trial) -> Iterator[None]:
        """Give signs of life for a trial, the first before anything else, and say who works on it."""
        with self.store.errors():
            trial_id = self._id(trial)
            self.store.storage.record_heartbeat(trial_id)
            trial.set_user_attr(WORKER, f"{socket.gethostname()}:{os.getpid()}")
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self.store.heartbeat_s):
                with contextlib.suppress(Exception):  # the database may be away for a moment
                    self.store.storage.record_heartbeat(trial_id)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def reclaim(self) -> None:
        """Give the points of dead workers back to the queue."""
        self._next_reclaim = time.monotonic() + self.store.heartbeat_s
        optuna.storages.fail_stale_trials(self.store.study)
        now = time.monotonic()
        trials = self.store.trials()
        # A worker killed in the instant between taking a trial and its first heartbeat leaves no sign at all.
        orphans = {t.number for t in trials if t.state == TrialState.RUNNING and WORKER not in t.user_attrs}
        self._orphans = {number: self._orphans.get(number, now) for number in orphans}
        for number, since in self._orphans.items():
            if now - since > self.store.grace_s:
                self.store.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        trials = self.store.trials()
        alive = {*evaluated(trials), *(key_of(t) for t in trials if t.state in PENDING), *given_up(trials)}
        for trial in trials:
            key = key_of(trial)
            if trial.state == TrialState.FAIL and key is not None and key not in alive:
                if ERROR in trial.user_attrs:
                    continue  # its own error, which was raised where it happened
                alive.add(key)
                self.store.requeue(trial)

    def _lacks(self, plan: Mapping[str, Any], trials: Sequence[FrozenTrial]) -> bool:
        """Whether a search has fewer points than planned, those in progress counted."""
        done, mine = evaluated(trials), self.store.methods(trials).get(plan["method"], [])
        pending = sum(trial.state in PENDING for trial in trials)
        return sum(key in done for key in mine) + pending < int(plan["evaluations"])

    def _seeding(self, plan: Mapping[str, Any], trials: Sequence[FrozenTrial]) -> bool:
        """Whether the first generation is incomplete; NSGA-II would fill it with random points."""
        done, mine = evaluated(trials), self.store.methods(trials).get(plan["method"], [])
        return sum(key in done for key in mine) < int(plan["population"])

    def _genetic(
        self,
        plan: Mapping[str, Any] | None,
        trials: Sequence[FrozenTrial],
        waiting: Sequence[FrozenTrial],
    ) -> NSGAIISampler | None:
        """Return the sampler if the next trial is the plan's; others are no parents, and have none."""
        if plan is None or (waiting and key_of(waiting[0]) not in self.store.methods(trials)[plan["method"]]):
            return None
        # Workers must not draw the same children, nor one worker the same ones again; but a search that was
        # killed draws what it would have drawn, so trials that failed do not count.
        number = sum(trial.state != TrialState.FAIL for trial in trials)
        draw = hashlib.sha256(f"{self.seed} {number}".encode()).digest()
        return NSGAIISampler(population_size=plan["population"], seed=int.from_bytes(draw[:4], "big"))

    def _id(self, trial: Trial) -> int:
        """Key of a trial in the storage, where its number is the study's."""
        study_id = self.store.storage.get_study_id_from_name(self.store.name)
        return self.store.storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)

    def _choices(self) -> dict[str, Sequence[Any]]:
        """What each categorical parameter can be, the same in all trials as Optuna wants it."""
        return {f"{THREADS_OF}{name}": THREAD_COUNTS for name in self.store.layers} | {
            "policy": [policy.value for policy in Policy],
            "recalibrate": [mode.value for mode in RecalibrationMode],
        }

    def _distributions(self) -> dict[str, BaseDistribution]:
        found: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(choices) for name, choices in self._choices().items()
        }
        return found | {"sparsity": FloatDistribution(0.0, 1.0)}

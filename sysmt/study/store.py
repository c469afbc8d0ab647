"""Studies that outlive their processes: every evaluated point is a trial in an Optuna storage.

A study holds a queue and, while a search runs, a sampler that proposes points beyond it. Any number
of workers, on any number of machines that reach the storage, take points from it; a heartbeat tells
whether a worker still lives, and the points of the dead go back into the queue.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from sysmt.config import THREADS_OF, Policy, RecalibrationMode
from sysmt.errors import ConfigError
from sysmt.study.run_directory import without_password
from sysmt.study.storage import (
    one_at_a_time,
    open_storage,
    quiet,
    storage_errors,
    storage_url,
)
from sysmt.study.thread_maps import columns_of, threads_of

__all__ = ["Point", "Store"]

HEARTBEAT_S = 10
"""Seconds between two signs of life of a worker."""

GRACE_S = 40
"""Seconds without one after which its point goes back into the queue."""

MAX_FAILURES = 3
"""A point that ended so many workers is left alone."""

HALF_MADE_S = 5.0
"""After so many seconds a study that is still not whole counts as left by a process that was killed."""

METRICS = ("speedup", "top1")

POINT, MEASURED, WORKER, COPY = "point", "measured", "worker", "copy of trial"
ERROR, INTERRUPTED, SAMPLED, RETRIED = "error", "interrupted", "sampled for", "retried"
PENDING = (TrialState.WAITING, TrialState.RUNNING)


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of a network, as a study evaluates it.

    Attributes
    ----------
    threads : mapping of str to int
        Threads of every simulated layer.
    policy : str
        A `Policy`'s name.
    sparsity : float
        Share of weights set to zero first, in [0, 1).
    recalibrate : str
        A `RecalibrationMode`'s name.
    """

    threads: Mapping[str, int]
    policy: str = Policy.SA.value
    sparsity: float = 0.0
    recalibrate: str = RecalibrationMode.NONE.value

    @property
    def key(self) -> str:
        """Equal for equal points: the hash of their values."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_params(self) -> dict[str, Any]:
        """Return the parameters of an Optuna trial."""
        rest = {"policy": self.policy, "sparsity": self.sparsity, "recalibrate": self.recalibrate}
        return columns_of(self.threads) | rest

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Point:
        """Make a point from the parameters of an Optuna trial."""
        return cls(threads_of(params), params["policy"], params["sparsity"], params["recalibrate"])


class Store:
    """One study in a storage.

    Parameters
    ----------
    storage : str or Path
        A SQLite file, the directory of one, or a database's URL as Optuna takes it.
    name : str, optional
        The study; without it, the only one in the storage.
    facts : mapping, optional
        What all points share and what must be equal to join: model, hashes of weights and data, array,
        images, seed ... Needed to make a study; checked where it exists.
    layers : sequence of str
        Simulated layers, needed to make a study.
    notes : mapping, optional
        Plain values to keep with a new study, such as the configuration.
    heartbeat_s, grace_s : int
        Seconds between signs of life, and without one until a worker counts as dead.

    Attributes
    ----------
    url, shown_url : str
        Of the storage; the second without a password.
    name : str
    layers : list of str

    Raises
    ------
    ConfigError
        If the study is missing, ambiguous, or another network's, another data set's or another array's.
    OutputError
        If the storage cannot be reached.
    """

    def __init__(
        self,
        storage: str | Path,
        name: str | None = None,
        *,
        facts: Mapping[str, Any] | None = None,
        layers: Sequence[str] = (),
        notes: Mapping[str, Any] | None = None,
        heartbeat_s: int = HEARTBEAT_S,
        grace_s: int = GRACE_S,
    ) -> None:
        self.url = storage_url(storage)
        self.shown_url = where = without_password(self.url)
        self.heartbeat_s, self.grace_s = heartbeat_s, grace_s
        with quiet(), storage_errors(self.url):
            self.storage = open_storage(self.url, heartbeat_s, grace_s, make=bool(layers))
            known = optuna.get_all_study_names(self.storage)
            if name is None and len(known) != 1:
                listed = ", ".join(known) or "none"
                raise ConfigError(f"{where} has {len(known)} studies ({listed}); name one of them")
            self.name = name if name is not None else known[0]
            if self.name not in known and not layers:
                raise ConfigError(f"{where} has no study {self.name!r}; it has {', '.join(known) or 'none'}")
            self.study, is_new = self._make_or_load(make=bool(layers))
            if not is_new and not self._is_whole(wait=bool(layers)):
                if not layers:
                    raise ConfigError(f"{where} has a study {self.name!r}, but it is not finished being made")
                is_new = True
            if is_new:
                self.study.set_metric_names(list(METRICS))
                for key, value in {"layers": list(layers), "notes": dict(notes or {})}.items():
                    self.study.set_user_attr(key, value)
                self.study.set_user_attr("facts", dict(facts or {}))  # last: the study is whole with it
            elif facts is not None:
                self._check(facts, layers)
            self.layers: list[str] = self.study.user_attrs["layers"]

    def _make_or_load(self, make: bool) -> tuple[optuna.Study, bool]:
        """Return the study, and whether this very call made it: of several at once, one does."""
        if make:
            with contextlib.suppress(optuna.exceptions.DuplicatedStudyError):
                study = optuna.create_study(
                    storage=self.storage, study_name=self.name, directions=["maximize", "maximize"]
                )
                return study, True
        return optuna.load_study(storage=self.storage, study_name=self.name), False

    def _is_whole(self, wait: bool) -> bool:
        """Whether an existing study of ours has all that belongs to it.

        Another process may be making it right now; one that was killed meanwhile leaves it half made.

        Raises
        ------
        ConfigError
            If it is somebody else's.
        """
        patience = time.monotonic() + (HALF_MADE_S if wait else 0.0)
        while True:
            attributes = self.study.user_attrs
            whole = {"facts", "layers", "notes"} <= attributes.keys()
            ours = (
                [direction.name for direction in self.study.directions] == ["MAXIMIZE", "MAXIMIZE"]
                and self.study.metric_names in (None, list(METRICS))
                and isinstance(attributes.get("layers", []), list)
                and all(isinstance(attributes.get(key, {}), dict) for key in ("facts", "notes"))
            )
            untouched = attributes.keys() <= {"layers", "notes"} and not self.trials()
            if not ours or not (whole or untouched):
                raise ConfigError(
                    f"{self.shown_url} has a study {self.name!r}, but not one of sysmt's; name another study"
                )
            if whole or time.monotonic() >= patience:
                return whole
            time.sleep(0.05)

    def _check(self, facts: Mapping[str, Any], layers: Sequence[str]) -> None:
        """Refuse what is not the study's: its points would not be comparable."""
        kept, where = self.study.user_attrs["facts"], without_password(self.url)
        for key in sorted({*kept, *facts}):
            if kept.get(key) != facts.get(key):
                raise ConfigError(
                    f"study {self.name!r} in {where} has {key}={kept.get(key)!r}, not {facts.get(key)!r}; "
                    "its points cannot be compared with such: name another study"
                )
        if layers and list(layers) != self.study.user_attrs["layers"]:
            raise ConfigError(f"study {self.name!r} in {where} simulates other layers; name another study")

    # -- what a study knows --------------------------------------------------------------------

    @property
    def facts(self) -> dict[str, Any]:
        """What all points share."""
        return dict(self.study.user_attrs["facts"])

    @property
    def notes(self) -> dict[str, Any]:
        """What the study was made with."""
        return dict(self.study.user_attrs["notes"])

    def note(self, key: str, value: Any) -> None:
        """Keep a plain value with the study."""
        self.study.set_user_attr(f"note {key}", value)

    def noted(self, key: str) -> Any:
        """Return a value that `note` kept, or None."""
        return self.study.user_attrs.get(f"note {key}")

    def counts(self) -> Counter[str]:
        """Return how many points are ``complete``, ``waiting``, ``running`` or given up (``failed``)."""
        trials = self.trials()
        found = Counter({"complete": len(evaluated(trials))})
        found["waiting"] = sum(trial.state == TrialState.WAITING for trial in trials)
        found["running"] = sum(trial.state == TrialState.RUNNING for trial in trials)
        found["failed"] = len(given_up(trials))
        return found

    def measured(self, point: Point) -> dict[str, Any] | None:
        """Return what a finished point measured, or None."""
        trial = evaluated(self.trials()).get(point.key)
        return None if trial is None else dict(trial.user_attrs[MEASURED])

    def table(self, method: str | None = None) -> pd.DataFrame:
        """Return the finished points, in the order in which they were asked for.

        Parameters
        ----------
        method : str, optional
            Only what was enqueued, or sampled, under this name.

        Returns
        -------
        DataFrame
            ``point`` (its key), ``trial``, ``method`` (the first that asked for it), policy, sparsity,
            recalibrate, what was measured, and ``threads of <layer>`` for each layer.
        """
        trials = self.trials()
        done, methods = evaluated(trials), self.methods(trials)
        first = {key: name for name in reversed(methods) for key in methods[name]}
        keys = [key for key in methods.get(method, []) if key in done] if method is not None else list(done)
        rows = []
        for key in keys:
            params = dict(sorted(done[key].params.items(), key=lambda pair: self._place(pair[0])))
            layers = {name: params.pop(name) for name in list(params) if name.startswith(THREADS_OF)}
            about = {"point": key, "trial": done[key].number, "method": first.get(key, "")}
            rows.append(about | params | done[key].user_attrs[MEASURED] | layers)
        return pd.DataFrame(rows)

    def left_out(self, method: str | None = None) -> pd.DataFrame:
        """Return the points that were given up or ended in an error, and that nobody works on.

        Parameters
        ----------
        method : str, optional
            As in `table`.

        Returns
        -------
        DataFrame
            As `table`, but for ``reason`` instead of what would have been measured.
        """
        trials = self.trials()
        methods = self.methods(trials)
        first = {key: name for name in reversed(methods) for key in methods[name]}
        settled = {*evaluated(trials), *(key_of(trial) for trial in trials if trial.state in PENDING)}
        lost = given_up(trials)
        rows = {}
        for trial in trials:
            key = key_of(trial)
            if key is None or key in settled or trial.state != TrialState.FAIL:
                continue
            if key not in lost and ERROR not in trial.user_attrs:
                continue
            if method is not None and key not in methods.get(method, []):
                continue
            params = trial.system_attrs.get("fixed_params") or trial.params
            point = Point.from_params(params)
            rows[key] = {
                "point": key,
                "trial": trial.number,
                "method": first.get(key, ""),
                "policy": point.policy,
                "sparsity": point.sparsity,
                "recalibrate": point.recalibrate,
                "reason": trial.user_attrs.get(ERROR, f"it ended {MAX_FAILURES} workers"),
                **columns_of({name: point.threads[name] for name in self.layers}),
            }
        return pd.DataFrame(rows.values())

    def _place(self, parameter: str) -> int:
        name = parameter.removeprefix(THREADS_OF)
        return self.layers.index(name) if name in self.layers else -1

    def methods(self, trials: Iterable[FrozenTrial]) -> dict[str, list[str]]:
        """Keys of points by the method that wanted them: enqueued ones are listed, sampled ones say so."""
        methods = {name: list(keys) for name, keys in (self.noted("methods") or {}).items()}
        for trial in trials:
            sampled = trial.user_attrs.get(SAMPLED)
            if sampled is not None and POINT in trial.user_attrs:
                keys = methods.setdefault(sampled, [])
                if trial.user_attrs[POINT] not in keys:
                    keys.append(trial.user_attrs[POINT])
        return methods

    def errors(self) -> AbstractContextManager[None]:
        """Turn the database's failures inside the block into `OutputError`."""
        return storage_errors(self.url)

    def trials(self) -> list[FrozenTrial]:
        """Return all trials, in every state; not to be changed."""
        with self.errors():
            return self.study.get_trials(deepcopy=False)

    # -- the queue -----------------------------------------------------------------------------

    def enqueue(self, points: Iterable[Point], method: str = "", *, even_finished: bool = False) -> int:
        """Put points into the queue, but for those that are finished, waiting, running or given up.

        Parameters
        ----------
        points : iterable of Point
        method : str
            Who wants them; `table` can be asked for one method's points.
        even_finished : bool
            Also put finished points there: they are not evaluated again, but copied, and so become
            members of a search's population.

        Returns
        -------
        int
            How many were new.
        """
        points = list(points)
        for point in points:
            if sorted(point.threads) != sorted(self.layers):
                odd = set(point.threads) ^ set(self.layers)
                raise ConfigError(
                    f"a point must set the threads of every simulated layer; look at {min(odd)!r}"
                )
        with one_at_a_time(self.url):
            return self._enqueue(points, method, even_finished)

    def _enqueue(self, points: list[Point], method: str, even_finished: bool) -> int:
        trials = self.trials()
        known = {key_of(trial) for trial in trials if trial.state in PENDING}
        known |= given_up(trials) if even_finished else {*evaluated(trials), *given_up(trials)}
        new = 0
        with quiet(), self.errors():
            listed = self.noted("methods") or {}
            keys = listed.setdefault(method, [])
            keys += [key for key in dict.fromkeys(point.key for point in points) if key not in keys]
            self.note("methods", listed)
            for point in points:
                if point.key not in known:
                    known.add(point.key)
                    new += 1
                    self.study.enqueue_trial(point.to_params(), user_attrs={POINT: point.key})
        return new

    def retry_given_up(self) -> int:
        """Put the points that were given up into the queue again; return how many those are."""
        trials = self.trials()
        lost = given_up(trials) - {key_of(trial) for trial in trials if trial.state in PENDING}
        last = {key_of(trial): trial for trial in trials if key_of(trial) in lost}
        with quiet(), self.errors():
            for trial in last.values():
                self.requeue(trial, {RETRIED: True})
        return len(last)

    def requeue(self, trial: FrozenTrial, marks: Mapping[str, Any] | None = None) -> None:
        """Put the point of a trial that failed into the queue again."""
        params = trial.system_attrs.get("fixed_params") or trial.params
        kept = {key: value for key, value in trial.user_attrs.items() if key in (POINT, SAMPLED)}
        self.study.enqueue_trial(params, user_attrs=kept | dict(marks or {}))

    def plan_search(self, evaluations: int, population: int, fixed: Point, method: str) -> None:
        """Let workers sample points by NSGA-II once the queue is empty.

        Parameters
        ----------
        evaluations : int
            Sample until the method has so many finished points, enqueued ones included.
        population : int
            Size of a generation; the first is made of the points that are enqueued first.
        fixed : Point
            Policy, sparsity and recalibration of all sampled points.
        method : str
            Name under which sampled points appear.
        """
        values = {k: v for k, v in fixed.to_params().items() if not k.startswith(THREADS_OF)}
        plan = {"evaluations": evaluations, "population": population, "fixed": values, "method": method}
        self.note("plan", plan)


def key_of(trial: FrozenTrial | None) -> str | None:
    """Key of a trial's point, None where it has none yet."""
    return None if trial is None else trial.user_attrs.get(POINT)


def evaluated(trials: Iterable[FrozenTrial]) -> dict[str, FrozenTrial]:
    """Finished trials by their point's key, the first of each; copies left out."""
    found: dict[str, FrozenTrial] = {}
    for trial in trials:
        if trial.state == TrialState.COMPLETE and MEASURED in trial.user_attrs:
            found.setdefault(trial.user_attrs[POINT], trial)
    return found


def given_up(trials: Iterable[FrozenTrial]) -> set[str]:
    """Keys of unfinished points that ended `MAX_FAILURES` workers since they were last retried."""
    trials = list(trials)
    failures: Counter[str] = Counter()
    for trial in trials:
        key = key_of(trial)
        if key is None:
            continue
        if RETRIED in trial.user_attrs:
            failures[key] = 0
        failures[key] += trial.state == TrialState.FAIL and not {ERROR, INTERRUPTED} & trial.user_attrs.keys()
    done = evaluated(trials)
    return {key for key, count in failures.items() if count >= MAX_FAILURES and key not in done}


def plain(value: Any) -> Any:
    """Turn numpy's numbers into Python's, and NaN, which JSON lacks, into None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value

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
import os
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import sqlalchemy.exc
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, PartialFixedSampler, RandomSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from sysmt.config import THREAD_COUNTS, Policy
from sysmt.errors import ConfigError, OutputError
from sysmt.study.run_config import RECALIBRATION_MODES

__all__ = ["NOT_RECALIBRATED", "Measure", "Point", "Store", "storage_url"]

NOT_RECALIBRATED = "none"
"""Stands for "BatchNorm as it is" among the recalibration modes."""

HEARTBEAT_S = 10
"""Seconds between two signs of life of a worker."""

GRACE_S = 40
"""Seconds without one after which its point goes back into the queue."""

MAX_FAILURES = 3
"""A point that ended so many workers is left alone."""

_LAYER = "threads of "
_POINT, _MEASURED, _WORKER, _ERROR, _COPY = "point", "measured", "worker", "error", "copy_of_trial"
_PENDING = (TrialState.WAITING, TrialState.RUNNING)

Measure = Callable[["Point"], Mapping[str, Any]]
"""Evaluates a point: plain values by name, ``speedup`` and ``top1`` among them."""


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
        A recalibration mode, or `NOT_RECALIBRATED`.
    """

    threads: Mapping[str, int]
    policy: str = Policy.SA.value
    sparsity: float = 0.0
    recalibrate: str = NOT_RECALIBRATED

    @property
    def key(self) -> str:
        """Equal for equal points: the hash of their values."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_params(self) -> dict[str, Any]:
        """Return the parameters of an Optuna trial."""
        rest = {"policy": self.policy, "sparsity": self.sparsity, "recalibrate": self.recalibrate}
        return {f"{_LAYER}{name}": count for name, count in self.threads.items()} | rest

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Point:
        """Make a point from the parameters of an Optuna trial."""
        threads = {
            name.removeprefix(_LAYER): int(count)
            for name, count in params.items()
            if name.startswith(_LAYER)
        }
        return cls(threads, params["policy"], params["sparsity"], params["recalibrate"])


def storage_url(storage: str | Path) -> str:
    """Turn a path into the URL of the SQLite file there; URLs stay as they are."""
    if "://" in str(storage):
        return str(storage)
    path = Path(storage).expanduser()
    return f"sqlite:///{(path / 'study.db' if path.is_dir() else path).absolute()}"


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
        self._grace_s = grace_s
        self._orphans: dict[int, float] = {}
        with _quiet(), _storage_errors(self.url):
            self._storage = _open_storage(self.url, heartbeat_s, grace_s, make=bool(layers))
            known = optuna.get_all_study_names(self._storage)
            if name is None and len(known) != 1:
                listed = ", ".join(known) or "none"
                raise ConfigError(f"{self.url} has {len(known)} studies ({listed}); name one of them")
            self.name = name if name is not None else known[0]
            if self.name not in known and not layers:
                raise ConfigError(f"{self.url} has no study {self.name!r}; it has {', '.join(known) or 'none'}")
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=self.name,
                directions=["maximize", "maximize"],
                load_if_exists=True,
            )
            if "facts" not in self._study.user_attrs:
                self._study.set_metric_names(["speedup", "top1"])
                for key, value in {"layers": list(layers), "notes": dict(notes or {})}.items():
                    self._study.set_user_attr(key, value)
                self._study.set_user_attr("facts", dict(facts or {}))  # last: the study is whole with it
            elif facts is not None:
                self._check(facts, layers)
            self.layers: list[str] = self._study.user_attrs["layers"]
        self.heartbeat_s = heartbeat_s

    def _check(self, facts: Mapping[str, Any], layers: Sequence[str]) -> None:
        """Refuse what is not the study's: its points would not be comparable."""
        kept = self._study.user_attrs["facts"]
        for key in sorted({*kept, *facts}):
            if kept.get(key) != facts.get(key):
                raise ConfigError(
                    f"study {self.name!r} in {self.url} has {key}={kept.get(key)!r}, not {facts.get(key)!r}; "
                    "its points cannot be compared with such: name another study"
                )
        if layers and list(layers) != self._study.user_attrs["layers"]:
            raise ConfigError(f"study {self.name!r} in {self.url} simulates other layers; name another study")

    # -- what a study knows --------------------------------------------------------------------

    @property
    def facts(self) -> dict[str, Any]:
        """What all points share."""
        return dict(self._study.user_attrs["facts"])

    @property
    def notes(self) -> dict[str, Any]:
        """What the study was made with."""
        return dict(self._study.user_attrs["notes"])

    def note(self, key: str, value: Any) -> None:
        """Keep a plain value with the study."""
        self._study.set_user_attr(f"note {key}", value)

    def noted(self, key: str) -> Any:
        """Return a value that `note` kept, or None."""
        return self._study.user_attrs.get(f"note {key}")

    def counts(self) -> Counter[str]:
        """Return how many points are ``complete``, ``waiting``, ``running`` or given up (``failed``)."""
        trials = self._trials()
        found = Counter({"complete": len(_evaluated(trials))})
        found["waiting"] = sum(trial.state == TrialState.WAITING for trial in trials)
        found["running"] = sum(trial.state == TrialState.RUNNING for trial in trials)
        found["failed"] = len(_given_up(trials))
        return found

    def measured(self, point: Point) -> dict[str, Any] | None:
        """Return what a finished point measured, or None."""
        trial = _evaluated(self._trials()).get(point.key)
        return None if trial is None else dict(trial.user_attrs[_MEASURED])

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
        done = _evaluated(self._trials())
        methods = self._methods()
        first = {key: name for name in reversed(methods) for key in methods[name]}
        keys = [key for key in methods.get(method, []) if key in done] if method is not None else list(done)
        rows = []
        for key in keys:
            params = dict(sorted(done[key].params.items(), key=lambda pair: self._place(pair[0])))
            layers = {name: params.pop(name) for name in list(params) if name.startswith(_LAYER)}
            about = {"point": key, "trial": done[key].number, "method": first.get(key, "")}
            rows.append(about | params | done[key].user_attrs[_MEASURED] | layers)
        return pd.DataFrame(rows)

    def _place(self, parameter: str) -> int:
        name = parameter.removeprefix(_LAYER)
        return self.layers.index(name) if name in self.layers else -1

    def _methods(self) -> dict[str, list[str]]:
        """Keys of points by the method that wanted them: enqueued ones are listed, sampled ones say so."""
        methods = {name: list(keys) for name, keys in (self.noted("methods") or {}).items()}
        for trial in self._trials():
            sampled = trial.user_attrs.get("sampled for")
            if sampled is not None and _POINT in trial.user_attrs:
                keys = methods.setdefault(sampled, [])
                if trial.user_attrs[_POINT] not in keys:
                    keys.append(trial.user_attrs[_POINT])
        return methods

    def _trials(self) -> list[FrozenTrial]:
        with _storage_errors(self.url):
            return self._study.get_trials(deepcopy=False)

    # -- the queue -----------------------------------------------------------------------------

    def enqueue(self, points: Iterable[Point], method: str = "") -> int:
        """Put points into the queue, but for those that are finished, waiting or running already.

        Parameters
        ----------
        points : iterable of Point
        method : str
            Who wants them; `table` can be asked for one method's points.

        Returns
        -------
        int
            How many were new.
        """
        points = list(points)
        for point in points:
            if sorted(point.threads) != sorted(self.layers):
                odd = set(point.threads) ^ set(self.layers)
                raise ConfigError(f"a point must set the threads of every simulated layer; look at {min(odd)!r}")
        trials = self._trials()
        known = {*_evaluated(trials), *(_key(t) for t in trials if t.state in _PENDING)}
        new = 0
        with _quiet(), _storage_errors(self.url):
            listed = self.noted("methods") or {}
            keys = listed.setdefault(method, [])
            keys += [key for key in dict.fromkeys(point.key for point in points) if key not in keys]
            self.note("methods", listed)
            for point in points:
                if point.key not in known:
                    known.add(point.key)
                    new += 1
                    self._study.enqueue_trial(point.to_params(), user_attrs={_POINT: point.key})
        return new

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
        values = {k: v for k, v in fixed.to_params().items() if not k.startswith(_LAYER)}
        plan = {"evaluations": evaluations, "population": population, "fixed": values, "method": method}
        self.note("plan", plan)

    # -- work ----------------------------------------------------------------------------------

    def work(
        self,
        measure: Measure,
        *,
        seed: int = 0,
        on_point: Callable[[Point, Mapping[str, Any]], None] | None = None,
    ) -> int:
        """Evaluate points until none is waiting, running elsewhere, or to be sampled.

        Parameters
        ----------
        measure : callable
            Evaluates one point. An exception ends the work, and leaves the point to the next run;
            Ctrl-C does the same.
        seed : int
            Of the sampler, together with the number of points there are; workers' differ.
        on_point : callable, optional
            Called after each point with what it measured.

        Returns
        -------
        int
            How many points were evaluated here.
        """
        done = idle = copies = 0
        with _quiet():
            while True:
                with _storage_errors(self.url):
                    self.reclaim()
                    counts, wanted = self.counts(), self._wanted()
                    if not counts["waiting"] and not wanted:
                        if not counts["running"]:
                            return done
                        idle += 1
                        time.sleep(min(1.0, 0.1 * idle))  # others are at work; if they die, their points come here
                        continue
                    if not counts["waiting"] and copies > 50:
                        warnings.warn("the search finds no new points any more", stacklevel=2)
                        return done
                    self._study.sampler = self._sampler(seed, wanted)
                    outcome = _Task(self, measure, wanted)
                    # Optuna's loop keeps the heartbeat going while the task runs.
                    self._study.optimize(outcome, n_trials=1)
                if outcome.measured is not None and outcome.point is not None:
                    done, idle, copies = done + 1, 0, 0
                    if on_point is not None:
                        on_point(outcome.point, outcome.measured)
                else:
                    copies += 1

    def reclaim(self) -> None:
        """Give the points of dead workers back to the queue."""
        optuna.storages.fail_stale_trials(self._study)
        now = time.monotonic()
        trials = self._trials()
        # A worker killed in the instant between taking a trial and its first heartbeat leaves no sign at all.
        orphans = {t.number for t in trials if t.state == TrialState.RUNNING and _WORKER not in t.user_attrs}
        self._orphans = {number: self._orphans.get(number, now) for number in orphans}
        for number, since in self._orphans.items():
            if now - since > self._grace_s:
                self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        trials = self._trials()
        alive = {*_evaluated(trials), *(_key(t) for t in trials if t.state in _PENDING), *_given_up(trials)}
        for trial in trials:
            key = _key(trial)
            if trial.state == TrialState.FAIL and key is not None and key not in alive:
                if _ERROR in trial.user_attrs:
                    continue  # its own error, which was raised where it happened
                alive.add(key)
                params = trial.system_attrs.get("fixed_params", trial.params)
                kept = {k: v for k, v in trial.user_attrs.items() if k in (_POINT, "sampled for")}
                self._study.enqueue_trial(params, user_attrs=kept)

    def _wanted(self) -> int:
        """Count the points that the plan still lacks, those in progress taken off."""
        plan = self.noted("plan")
        if plan is None:
            return 0
        trials = self._trials()
        done = _evaluated(trials)
        mine = self._methods().get(plan["method"], [])
        pending = sum(trial.state in _PENDING for trial in trials)
        return max(0, int(plan["evaluations"]) - sum(key in done for key in mine) - pending)

    def _sampler(self, seed: int, wanted: int) -> BaseSampler:
        plan = self.noted("plan")
        if plan is None or (not wanted and not self._counts_for(plan)):
            return RandomSampler(seed=seed)  # never asked: whatever is in the queue sets every parameter
        draw = [seed, len(self._trials())]
        digest = hashlib.sha256(json.dumps(draw).encode()).digest()
        genetic = NSGAIISampler(
            population_size=plan["population"], seed=int.from_bytes(digest[:4], "big"), mutation_prob=None
        )
        return PartialFixedSampler(plan["fixed"], genetic)

    def _counts_for(self, plan: Mapping[str, Any]) -> bool:
        """Whether the next waiting point belongs to the plan, and so to the sampler's population."""
        mine = set(self._methods().get(plan["method"], []))
        waiting = (trial for trial in self._trials() if trial.state == TrialState.WAITING)
        return _key(next(waiting, None)) in mine

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return what each parameter can be, the same in all trials as Optuna wants it."""
        recalibrate = (NOT_RECALIBRATED, *RECALIBRATION_MODES)
        return {f"{_LAYER}{name}": CategoricalDistribution(THREAD_COUNTS) for name in self.layers} | {
            "policy": CategoricalDistribution([policy.value for policy in Policy]),
            "sparsity": FloatDistribution(0.0, 1.0),
            "recalibrate": CategoricalDistribution(recalibrate),
        }

    def suggest(self, trial: Trial) -> Point:
        """Read a trial's point, from the queue or from the sampler."""
        values: dict[str, Any] = {}
        for name, distribution in self.distributions().items():
            if isinstance(distribution, CategoricalDistribution):
                values[name] = trial.suggest_categorical(name, distribution.choices)
            else:
                values[name] = trial.suggest_float(name, 0.0, 1.0)
        return Point.from_params(values)

    def beat(self, trial: Trial) -> None:
        """Give the first sign of life for a trial, and say who works on it."""
        study_id = self._storage.get_study_id_from_name(self.name)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
        self._storage.record_heartbeat(trial_id)
        trial.set_user_attr(_WORKER, f"{socket.gethostname()}:{os.getpid()}")


class _Task:
    """Evaluates one trial; remembers what came of it."""

    def __init__(self, store: Store, measure: Measure, may_sample: int) -> None:
        self.store, self.measure, self.may_sample = store, measure, may_sample
        self.point: Point | None = None
        self.measured: Mapping[str, Any] | None = None

    def __call__(self, trial: Trial) -> tuple[float, float]:
        store = self.store
        store.beat(trial)
        if _POINT not in trial.user_attrs:
            if not self.may_sample:
                raise optuna.TrialPruned  # another worker took the last waiting point
            trial.set_user_attr("sampled for", store.noted("plan")["method"])
        self.point = store.suggest(trial)
        trial.set_user_attr(_POINT, self.point.key)
        twin = _evaluated(store._trials()).get(self.point.key)
        if twin is not None:
            trial.set_user_attr(_COPY, twin.number)
            return twin.values[0], twin.values[1]
        start = time.monotonic()
        try:
            measured = dict(self.measure(self.point))
        except Exception as error:
            trial.set_user_attr(_ERROR, f"{type(error).__name__}: {error}")
            raise
        measured = {k: _plain(v) for k, v in measured.items()}
        measured["evaluation_seconds"] = time.monotonic() - start
        trial.set_user_attr(_MEASURED, measured)
        self.measured = measured
        return measured["speedup"], measured["top1"]


def _key(trial: FrozenTrial | None) -> str | None:
    return None if trial is None else trial.user_attrs.get(_POINT)


def _evaluated(trials: Iterable[FrozenTrial]) -> dict[str, FrozenTrial]:
    """Finished trials by their point's key, the first of each; copies left out."""
    found: dict[str, FrozenTrial] = {}
    for trial in trials:
        if trial.state == TrialState.COMPLETE and _MEASURED in trial.user_attrs:
            found.setdefault(trial.user_attrs[_POINT], trial)
    return found


def _given_up(trials: Iterable[FrozenTrial]) -> set[str]:
    """Keys of points that ended `MAX_FAILURES` workers, and were finished by none."""
    trials = list(trials)
    failures = Counter(_key(t) for t in trials if t.state == TrialState.FAIL and _ERROR not in t.user_attrs)
    done = _evaluated(trials)
    return {key for key, count in failures.items() if key and count >= MAX_FAILURES and key not in done}


def _plain(value: Any) -> Any:
    """JSON has no NaN, and PostgreSQL takes none: None stands for it."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_storage(url: str, heartbeat_s: int, grace_s: int, make: bool) -> optuna.storages.RDBStorage:
    options: dict[str, Any] = {}
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///"))
        if not make and not path.is_file():
            raise ConfigError(f"{path} is missing; the storage of a study is needed")
        path.parent.mkdir(parents=True, exist_ok=True)
        options["connect_args"] = {"timeout": 60}  # workers take turns at the file
    return optuna.storages.RDBStorage(
        url, engine_kwargs=options, heartbeat_interval=heartbeat_s, grace_period=grace_s
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's log and its notes on experimental features from the user's terminal."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _storage_errors(url: str) -> Iterator[None]:
    """Turn a database's failures into one of our own errors."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise OutputError(f"the storage {_without_password(url)} cannot be used: {reason}") from error
    except ImportError as error:
        raise OutputError(f"the storage {_without_password(url)} needs a driver: {error}") from error


def _without_password(url: str) -> str:
    with contextlib.suppress(sqlalchemy.exc.ArgumentError):
        return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    return url

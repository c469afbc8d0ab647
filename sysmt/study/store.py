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
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import sqlalchemy.exc
from optuna.trial import FrozenTrial, TrialState

from sysmt.config import Policy
from sysmt.errors import ConfigError, OutputError, SysmtError

__all__ = ["NOT_RECALIBRATED", "Point", "Store", "storage_url"]

NOT_RECALIBRATED = "none"
"""Stands for "BatchNorm as it is" among the recalibration modes."""

HEARTBEAT_S = 10
"""Seconds between two signs of life of a worker."""

GRACE_S = 40
"""Seconds without one after which its point goes back into the queue."""

MAX_FAILURES = 3
"""A point that ended so many workers is left alone."""

LAYER = "threads of "
POINT, MEASURED, WORKER, COPY = "point", "measured", "worker", "copy of trial"
ERROR, INTERRUPTED, SAMPLED = "error", "interrupted", "sampled for"
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
        return {f"{LAYER}{name}": count for name, count in self.threads.items()} | rest

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Point:
        """Make a point from the parameters of an Optuna trial."""
        threads = {
            name.removeprefix(LAYER): int(count) for name, count in params.items() if name.startswith(LAYER)
        }
        return cls(threads, params["policy"], params["sparsity"], params["recalibrate"])


def storage_url(storage: str | Path) -> str:
    """Turn a path into the URL of the SQLite file there; of URLs, PostgreSQL's gets its current driver."""
    if "://" in str(storage):
        return re.sub("^postgres(ql)?://", "postgresql+psycopg://", str(storage))
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
        self.shown_url = where = _without_password(self.url)
        self.heartbeat_s, self.grace_s = heartbeat_s, grace_s
        with quiet(), storage_errors(self.url):
            self.storage = _open_storage(self.url, heartbeat_s, grace_s, make=bool(layers))
            known = optuna.get_all_study_names(self.storage)
            if name is None and len(known) != 1:
                listed = ", ".join(known) or "none"
                raise ConfigError(f"{where} has {len(known)} studies ({listed}); name one of them")
            self.name = name if name is not None else known[0]
            if self.name not in known and not layers:
                raise ConfigError(f"{where} has no study {self.name!r}; it has {', '.join(known) or 'none'}")
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=self.name,
                directions=["maximize", "maximize"],
                load_if_exists=True,
            )
            if "facts" not in self.study.user_attrs and not layers:
                raise ConfigError(f"{where} has a study {self.name!r}, but not one of sysmt's")
            if "facts" not in self.study.user_attrs:
                self.study.set_metric_names(["speedup", "top1"])
                for key, value in {"layers": list(layers), "notes": dict(notes or {})}.items():
                    self.study.set_user_attr(key, value)
                self.study.set_user_attr("facts", dict(facts or {}))  # last: the study is whole with it
            elif facts is not None:
                self._check(facts, layers)
            self.layers: list[str] = self.study.user_attrs["layers"]

    def _check(self, facts: Mapping[str, Any], layers: Sequence[str]) -> None:
        """Refuse what is not the study's: its points would not be comparable."""
        kept, where = self.study.user_attrs["facts"], _without_password(self.url)
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
            layers = {name: params.pop(name) for name in list(params) if name.startswith(LAYER)}
            about = {"point": key, "trial": done[key].number, "method": first.get(key, "")}
            rows.append(about | params | done[key].user_attrs[MEASURED] | layers)
        return pd.DataFrame(rows)

    def _place(self, parameter: str) -> int:
        name = parameter.removeprefix(LAYER)
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
        """Put points into the queue, but for those that are finished, waiting or running already.

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
        trials = self.trials()
        known = {key_of(trial) for trial in trials if trial.state in PENDING}
        known |= set() if even_finished else set(evaluated(trials))
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
        values = {k: v for k, v in fixed.to_params().items() if not k.startswith(LAYER)}
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
    """Keys of points that ended `MAX_FAILURES` workers, and were finished by none."""
    trials = list(trials)
    failures = Counter(
        key_of(trial)
        for trial in trials
        if trial.state == TrialState.FAIL and not {ERROR, INTERRUPTED} & trial.user_attrs.keys()
    )
    done = evaluated(trials)
    return {key for key, count in failures.items() if key and count >= MAX_FAILURES and key not in done}


def plain(value: Any) -> Any:
    """Turn numpy's numbers into Python's, and NaN, which JSON lacks, into None."""
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
        sqlalchemy.event.listen(sqlalchemy.pool.Pool, "connect", _tune_sqlite)
    try:
        return optuna.storages.RDBStorage(
            url, engine_kwargs=options, heartbeat_interval=heartbeat_s, grace_period=grace_s
        )
    finally:
        if options:
            sqlalchemy.event.remove(sqlalchemy.pool.Pool, "connect", _tune_sqlite)


def _tune_sqlite(connection: Any, _record: Any) -> None:
    """Write ahead, and wait for the disk now and then only: kill -9 still loses nothing that was written."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's log and its notes on experimental features from the user's terminal."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", "Heartbeat of storage")  # `Worker` keeps it going itself
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn a database's failures into one of our own errors."""
    try:
        yield
    except SysmtError:
        raise
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise OutputError(f"the storage {_without_password(url)} cannot be used: {reason}") from error
    except ImportError as error:
        raise OutputError(f"the storage {_without_password(url)} needs a driver: {error}") from error


def _without_password(url: str) -> str:
    with contextlib.suppress(sqlalchemy.exc.ArgumentError):
        return sqlalchemy.engine.make_url(url).render_as_string(hide_password=True)
    return url

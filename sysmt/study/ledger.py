"""The ledger of an experiment: each point is on disk once it is measured, a restart goes on with the next.

For experiments, whose points are fixed beforehand and which one process works off, into plain CSV. Studies
that choose their points, or that many workers share, use `sysmt.study.store`.
"""

from __future__ import annotations

import datetime
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
import tomli_w

from sysmt.errors import OutputError
from sysmt.files import read_csv, read_toml
from sysmt.study.run_directory import RunDirectory, command_line, provenance

__all__ = ["Ledger"]

_POINTS = "points.csv"
_CORRECT = "correct.npz"
_CONFIG = "config.toml"
_HEAD = """\
[settings] and [subjects.*.facts] decide whether a directory can be gone on with; the rest is for the
record."""


class Ledger:
    """An experiment's directory: its settings in config.toml, a row per finished point in points.csv.

    A directory that holds points of the same experiment with the same settings is gone on with; any
    other is refused. Use it as a context manager: it notes at the end how the experiment went.

    Parameters
    ----------
    path : str or Path
        Missing, empty, or a directory that such an experiment wrote.
    experiment : str
        Its name.
    settings : mapping
        Every choice that its points depend on; plain values, as TOML has them.
    keys : sequence of str
        Columns whose values together tell one point from all others.

    Attributes
    ----------
    path : Path

    Raises
    ------
    OutputError
        If the directory belongs to other settings, another experiment or a process that is writing
        to it now, or cannot be written.
    """

    def __init__(
        self, path: str | Path, experiment: str, settings: Mapping[str, Any], keys: Iterable[str]
    ) -> None:
        self._keys = tuple(keys)
        asked = tomllib.loads(tomli_w.dumps({"experiment": experiment, "settings": settings}))
        earlier: dict[str, Any] = {}

        def resumes(directory: Path) -> bool:
            if (directory / _CONFIG).is_file():
                earlier.update(read_toml(directory / _CONFIG))
                _check_same(asked, earlier, path)
            return bool(earlier)

        self._directory = RunDirectory(path, resumes=resumes)
        self.path = self._directory.path
        self._record: dict[str, Any] = earlier | asked
        self._record["made_by"] = provenance() | {"command": command_line("python", sys.argv)}
        spent = earlier.get("outcome", {})
        # Each clock minus what earlier runs took: a difference to now then counts all of them.
        self._start = time.monotonic() - float(spent.get("seconds", 0.0))
        self._cpu_start = time.process_time() - float(spent.get("cpu_seconds", 0.0))
        self._added = False
        self._rows: list[dict[str, Any]] = []
        self._tables: dict[str, pd.DataFrame] = {}
        self._correct: dict[str, np.ndarray] = {}
        if (self.path / _POINTS).is_file():
            self._read_points()

    def _read_points(self) -> None:
        table = read_csv(self.path / _POINTS, self._keys)
        self._rows = _records(table)
        if (self.path / _CORRECT).is_file():
            with np.load(self.path / _CORRECT) as content:
                self._correct = {name: content[name] for name in content.files}

    # -- points --------------------------------------------------------------------------------

    def has(self, **key: Any) -> bool:
        """Whether the point with this key is finished."""
        name = self._name(key)
        return any(self._name(row) == name for row in self._rows)

    def add(
        self,
        values: Mapping[str, Any],
        correct: np.ndarray | None = None,
        tables: Mapping[str, pd.DataFrame] | None = None,
    ) -> None:
        """Write a finished point.

        Parameters
        ----------
        values : mapping
            The key's columns and what was measured.
        correct : bool ndarray (images,), optional
            For each test image, whether it was classified correctly; `correct` gives it back.
        tables : mapping of str to DataFrame, optional
            Further rows for NAME.csv, such as one per layer; the key's columns are put before them.
        """
        # Nothing is written before the first point: a run that is refused leaves no trace. points.csv
        # comes last: a point is finished once everything that belongs to it is on disk.
        self._added = True
        self._write_config("running")
        for name, table in (tables or {}).items():
            old = self._table(name)
            new = table.assign(**{key: values[key] for key in self._keys})
            new = new[[*self._keys, *(column for column in new if column not in self._keys)]]
            self._tables[name] = new if old.empty else pd.concat([old, new], ignore_index=True)
            self._directory.write_csv(f"{name}.csv", self._tables[name])
        if correct is not None:
            self._correct[self._name(values)] = np.packbits(correct)
            with self._directory.file(_CORRECT) as temporary:
                np.savez(temporary, **self._correct)  # type: ignore[arg-type]
        self._rows.append(dict(values))
        self._directory.write_csv(_POINTS, self.points())

    def points(self) -> pd.DataFrame:
        """Return the finished points, in the order in which they were measured."""
        return pd.DataFrame(self._rows)

    def correct(self, **key: Any) -> np.ndarray:
        """Return which images a finished point classified correctly: bool (images,)."""
        name = self._name(key)
        images = next(int(row["images"]) for row in self._rows if self._name(row) == name)
        return np.unpackbits(self._correct[name], count=images).astype(bool)

    def _table(self, name: str) -> pd.DataFrame:
        """Return NAME.csv as it is, without the rows of a point that was killed before its end."""
        if name not in self._tables:
            path = self.path / f"{name}.csv"
            table = read_csv(path, self._keys) if path.is_file() else pd.DataFrame()
            finished = {self._name(row) for row in self._rows}
            keep = [self._name(row) in finished for row in _records(table)]
            self._tables[name] = table[keep].reset_index(drop=True) if keep else table
        return self._tables[name]

    def _name(self, key: Mapping[str, Any]) -> str:
        return " | ".join(str(key[column]) for column in self._keys)

    # -- results -------------------------------------------------------------------------------

    def identify(self, what: str, facts: Mapping[str, Any], remarks: Mapping[str, Any] | None = None) -> None:
        """Note what the points of `what` depend on, and refuse if they depended on something else.

        Unlike the settings, this leaves an experiment open: another network can join it later.

        Parameters
        ----------
        what : str
            Such as a network's name.
        facts : mapping
            Plain values, such as hashes of weights and images; more can be added later.
        remarks : mapping, optional
            Written beside them without being compared, such as paths.

        Raises
        ------
        OutputError
            If a fact is not what it was.
        """
        subjects = self._record.setdefault("subjects", {})
        known = subjects.setdefault(what, {}).setdefault("facts", {})
        asked = tomllib.loads(tomli_w.dumps(dict(facts)))
        for name, value in asked.items():
            if known.setdefault(name, value) != value:
                raise OutputError(
                    f"{self.path} holds points of {what} with {name} = {known[name]!r}, now it is {value!r}; "
                    "name another directory, or delete this one"
                )
        subjects[what].setdefault("remarks", {}).update(remarks or {})

    def write(self, name: str, table: pd.DataFrame) -> Path:
        """Write a table that follows from the points, whole."""
        return self._directory.write_csv(name, table)

    def write_text(self, name: str, text: str) -> Path:
        """Write a text that follows from the points, whole."""
        with self._directory.file(name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return self.path / name

    @property
    def seconds(self) -> float:
        """Time spent on this experiment so far, earlier runs included."""
        return time.monotonic() - self._start

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all threads, likewise."""
        return time.process_time() - self._cpu_start

    def _write_config(self, status: str) -> None:
        self._record["outcome"] = {
            "status": status,
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "points": len(self._rows),
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        self._directory.write_toml(_CONFIG, self._record, comment=_HEAD)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is None:
            status = "complete"
        else:
            interrupted = isinstance(value, KeyboardInterrupt)
            status = "interrupted" if interrupted else f"failed: {value or type(value).__name__}"
        if value is None or self._added:
            self._write_config(status)
        self._directory.close()


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _check_same(asked: Mapping[str, Any], earlier: Mapping[str, Any], path: str | Path) -> None:
    """Raise unless a directory's experiment and settings are those asked for."""
    if earlier.get("experiment") != asked["experiment"]:
        raise OutputError(
            f"{path} holds the experiment {earlier.get('experiment')!r}, not {asked['experiment']!r}; "
            "name another directory"
        )
    old, new = earlier.get("settings", {}), asked["settings"]
    for name in {**old, **new}:
        if new.get(name) != old.get(name):
            raise OutputError(
                f"{path} holds points with {name} = {old.get(name)!r}, now it is {new.get(name)!r}; "
                "name another directory, or delete this one"
            )

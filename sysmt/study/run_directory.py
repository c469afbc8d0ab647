"""A run's own directory: made and proven writable before the run, every file in it whole or absent."""

from __future__ import annotations

import contextlib
import datetime
import errno
import importlib.metadata
import itertools
import json
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w

import sysmt
from sysmt.errors import OutputError
from sysmt.files import DirectoryLock, is_left_over, remove_left_overs, written_whole

__all__ = [
    "DEFAULT_PARENT",
    "RunDirectory",
    "check_writable",
    "export_table",
    "command_line",
    "processor_name",
    "provenance",
    "without_password",
]

DEFAULT_PARENT = Path("results")
"""Where runs go that name no directory."""


class RunDirectory:
    """Where one run keeps its results; no other process can write there until `close`.

    Parameters
    ----------
    path : str or Path, optional
        An empty or missing directory. By default ``results/<name>-<n>`` with the first free n.
    name : str
        Kind of run, for the default path; signs that a file name should not have become ``_``.
    overwrite : bool
        Allow a directory that has files. Those of an earlier run, `stale`, are removed first, so that
        old and new results never stand side by side.
    stale : iterable of str
        Patterns of the files that such a run writes, such as ``"*.png"``.
    shared : bool
        Write beside the process that has the directory; nothing in it is removed.
    resumes : callable, optional
        Looks at the directory and says whether this run goes on with what is there; then its files stay.

    Attributes
    ----------
    path : Path
    resumed : bool
        What `resumes` said.

    Raises
    ------
    InUseError
        If another process is writing there.
    OutputError
        If the directory cannot be made or written, or has files and `overwrite` is False.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        name: str = "run",
        overwrite: bool = False,
        stale: Iterable[str] = (),
        shared: bool = False,
        resumes: Callable[[Path], bool] | None = None,
    ) -> None:
        self._made: list[Path] = []
        self._lock: DirectoryLock | None = None
        self.resumed = False
        if not _is_text(str(path)):  # config.toml and the study could not say where they are
            raise OutputError(f"{str(path)!r} is no text in UTF-8; name another directory")
        try:
            self.path = self._next_free(name) if path is None else self._existing(Path(path))
            if shared:
                self.resumed = True
                return
            self._lock = DirectoryLock(self.path)
            self.resumed = resumes is not None and resumes(self.path)
            if not (overwrite or self.resumed) and not all(map(is_left_over, self.path.iterdir())):
                raise OutputError(f"{path} is not empty; name another directory or allow --overwrite")
            with tempfile.TemporaryFile(dir=self.path) as probe:
                probe.write(b"writable")
            remove_left_overs(self.path)
            for pattern in () if self.resumed else stale:
                for old in self.path.glob(pattern):
                    old.unlink()
        except OSError as error:
            self.close()
            if isinstance(error, OutputError):
                raise
            where = path if path is not None else DEFAULT_PARENT
            raise OutputError(f"{where} cannot be written: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

    def _existing(self, path: Path) -> Path:
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; results need a directory of their own")
        self._make(path)
        return path

    def _next_free(self, name: str) -> Path:
        plain = "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in name)
        self._make(DEFAULT_PARENT)
        for number in itertools.count(1):
            path = DEFAULT_PARENT / f"{plain}-{number}"
            try:
                path.mkdir()  # of two runs that start together, only one can make it
            except FileExistsError:
                continue
            self._made.append(path)
            return path
        raise AssertionError("numbers do not end")

    def _make(self, path: Path) -> None:
        missing = [place for place in (path, *path.parents) if not place.exists()]
        path.mkdir(parents=True, exist_ok=True)
        self._made += reversed(missing)

    def close(self) -> None:
        """Let other processes write here; it can be called twice."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove_if_empty()

    def remove_if_empty(self) -> None:
        """Close, and take back the directories made for a run that failed before it had results."""
        self.close()
        for made in reversed(self._made):
            try:
                made.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                    raise OutputError(f"{made} cannot be removed: {error.strerror}") from error
                return

    def file(self, name: str) -> AbstractContextManager[Path]:
        """Hand out a temporary path that becomes file `name` once the block ends without an exception."""
        return written_whole(self.path / name)

    def write_csv(self, name: str, table: pd.DataFrame) -> Path:
        """Write a table, without its index; floats in full, so that reading gives the same values."""
        with self.file(name) as temporary:
            table.to_csv(temporary, index=False)
        return self.path / name

    def write_toml(self, name: str, record: Mapping[str, Any], comment: str = "") -> Path:
        """Write nested plain values; None has no form in TOML and is left out."""
        lead = "".join(f"# {line}\n" for line in comment.splitlines())
        with self.file(name) as temporary:
            temporary.write_text(lead + tomli_w.dumps(_without_none(record)), encoding="utf-8")
        return self.path / name

    def write_json(self, name: str, record: Mapping[str, Any]) -> Path:
        """Write nested plain values, indented."""
        with self.file(name) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return self.path / name


def _without_none(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in record.items()
        if value is not None
    }


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_writable(path: str | Path) -> None:
    """Raise `OutputError` unless a file could be written at `path`, before long work is done for it."""
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a directory; a file name is needed")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(b"writable")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def export_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table where the user wants it: whole or not at all, or straight into a device such as a pipe.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    path = Path(path)
    if not path.exists() or path.is_file():
        with written_whole(path) as temporary:
            table.to_csv(temporary, index=False)
        return
    try:
        table.to_csv(path, index=False)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def provenance() -> dict[str, Any]:
    """What made a result: version, kernel path, versions of libraries, processor, command and time."""
    packages = ("numpy", "torch", "torchvision", "pandas")
    return {
        "sysmt": sysmt.__version__,
        "kernel_path": sysmt.active_path(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "processor": processor_name(),
        "command": command_line("sysmt", sys.argv[1:]) if _from_command_line() else None,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def command_line(program: str, arguments: Iterable[str]) -> str:
    """Return a command as one would type it, to keep with its results; without passwords."""
    return shlex.join([program, *map(without_password, arguments)])


def without_password(text: str) -> str:
    """Return a text to keep or show: the password of a URL in it becomes ``***``."""
    return re.sub(r"(\w://[^:/@\s]*:)[^/\s]*@", r"\1***@", text)


def _from_command_line() -> bool:
    return Path(sys.argv[0]).name in ("sysmt", "__main__.py")


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def processor_name() -> str:
    """Model name of this machine's CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

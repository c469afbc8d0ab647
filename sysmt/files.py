"""Files: where sysmt keeps what it can make again, how all is written whole, and how tables are read."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import io
import os
import socket
import tempfile
import time
import tomllib
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sysmt.errors import ConfigError, InUseError, OutputError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Cell",
    "DirectoryLock",
    "Table",
    "cache_directory",
    "is_left_over",
    "read_csv",
    "read_table",
    "read_toml",
    "remove_left_overs",
    "written_whole",
]


def cache_directory() -> Path:
    """Return where sysmt keeps what it can make again: ``$SYSMT_CACHE``, or ``~/.cache/sysmt``."""
    return Path(os.environ.get("SYSMT_CACHE") or "~/.cache/sysmt").expanduser()


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Hand out a temporary path that replaces `path` at the end, or vanishes after an exception.

    A reader sees the old file or the new one, never a part of it, even after kill -9 or a power cut.

    Parameters
    ----------
    path : str or Path
        Its directory is made if it is missing.

    Yields
    ------
    Path
        An empty file in the same directory, with the same suffix.

    Raises
    ------
    OutputError
        If the directory or the file cannot be written, or `path` is something other than a file.
    """
    target = Path(path)
    if target.exists() and not target.is_file():  # a device or a directory must not be replaced
        raise OutputError(f"{target} cannot be written: it exists and is not a regular file")
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.stem}-", suffix=f".partial{target.suffix}"
        )
        os.close(handle)
        yield Path(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp made it private
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


# -- directories -------------------------------------------------------------------------------

_LOCK = ".sysmt-lock"

_LEFT_OVER_S = 60.0
"""A temporary file that nobody has written to for so long was left by a process that was killed."""


class DirectoryLock:
    """Keeps a directory for one process at a time, until `release` or the process's end, kill -9 included.

    The lock is the system's (``flock``); a hidden file in the directory carries it, and the name of the
    process that has it. On file systems without locks, everybody gets one.

    Parameters
    ----------
    directory : Path
        It must exist.

    Raises
    ------
    InUseError
        If another process has it.
    OSError
        If the directory cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / _LOCK
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(handle, 500).decode(errors="replace").strip() or "just started"
                os.close(handle)
                raise InUseError(
                    f"{directory} is being written by another process ({holder}); wait for its end, or name "
                    "another directory"
                ) from None
            except OSError:
                pass
            # Whoever had the lock before may have removed the file between our two calls.
            if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
                break
            os.close(handle)
        try:
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()} on {socket.gethostname()}".encode())
        except OSError:  # a full disk, which the caller will notice
            pass
        self._release = weakref.finalize(self, _unlock, handle, path, os.getpid())

    def release(self) -> None:
        """Let go of the directory; it can be called twice."""
        self._release()


def _unlock(handle: int, path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child has the handle as well, but not the lock's care
        path.unlink(missing_ok=True)
    os.close(handle)


def is_left_over(path: Path) -> bool:
    """Whether a file is one of our own helpers: a lock, or what `written_whole` hands out."""
    return path.name == _LOCK or (path.name.startswith(".") and ".partial" in path.suffixes)


def remove_left_overs(directory: Path) -> None:
    """Remove what killed processes left of files that were to be written whole."""
    for path in directory.glob(".*.partial*"):
        with contextlib.suppress(OSError):
            if is_left_over(path) and time.time() - path.stat().st_mtime > _LEFT_OVER_S:
                path.unlink()


# -- reading -----------------------------------------------------------------------------------


def _read_text(path: str | Path) -> str:
    """Read a UTF-8 text, without its byte order mark; a `ConfigError` says what is wrong, and where."""
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise ConfigError(
            f"{path}, line {line}, column {column}: byte 0x{content[error.start]:02x} is not UTF-8; "
            "save the file as UTF-8"
        ) from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    ConfigError
        If it is missing, unreadable or no TOML; the message has line and column.
    """
    text = _read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in brackets
        raise ConfigError(f"{path} is no TOML: {error}") from error


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a CSV file, and where it stands.

    Attributes
    ----------
    text : str
        Without surrounding blanks.
    place : str
        File, line and column of its first character, both from 1.
    """

    text: str
    place: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A CSV file as it was written: every row has a cell for each column, no more and no less.

    Attributes
    ----------
    columns : list of str
        Each name once.
    rows : list of dict of str to Cell
    text : str
        The file.
    """

    columns: list[str]
    rows: list[dict[str, Cell]]
    text: str


def read_table(path: str | Path) -> Table:
    """Read a CSV file cell by cell; lines without any text are passed over.

    Raises
    ------
    ConfigError
        If it is missing, unreadable or empty, names a column twice or not at all, has an unclosed
        quotation mark, or a row of more or fewer cells than the header. The message has line and column.
    """
    text = _read_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines = io.StringIO(text, newline="").readlines()
    columns: list[str] | None = None
    rows: list[dict[str, Cell]] = []
    first = 1
    try:
        for cells in reader:
            places = [f"{path}, line {line}, column {column}" for line, column in _starts(lines, first)]
            first = reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            found = [Cell(cell.strip(), place) for cell, place in zip(cells, places, strict=False)]
            if columns is None:
                columns = _header(found)
                continue
            if len(found) != len(columns):
                odd = found[len(columns)] if len(found) > len(columns) else found[-1]
                fault = f"{odd.text!r} belongs to none" if len(found) > len(columns) else "cells are missing"
                raise ConfigError(
                    f"{odd.place}: the row has {len(found)} cells, but the header names {len(columns)} "
                    f"columns; {fault}"
                )
            rows.append(dict(zip(columns, found, strict=True)))
    except csv.Error as error:
        raise ConfigError(f"{path}, line {first}, column 1: this is no CSV: {error}") from error
    if columns is None:
        raise ConfigError(f"{path} is no table: it is empty")
    return Table(columns, rows, text)


def _header(cells: list[Cell]) -> list[str]:
    names: dict[str, Cell] = {}
    for cell in cells:
        if not cell.text:
            raise ConfigError(f"{cell.place}: a column has no name")
        if cell.text in names:
            raise ConfigError(f"{cell.place}: the column {cell.text!r} is there twice")
        names[cell.text] = cell
    return list(names)


def _starts(lines: list[str], first: int) -> Iterator[tuple[int, int]]:
    """Yield line and column where the cells of the row begin that starts at line `first`; both from 1."""
    yield first, 1
    quoted = False
    for number in range(first, len(lines) + 1):
        for place, sign in enumerate(lines[number - 1], 1):
            quoted ^= sign == '"'
            if sign == "," and not quoted:
                yield number, place + 1
        if not quoted:
            return


def read_csv(path: str | Path, needed: Iterable[str] = (), numbers: Iterable[str] = ()) -> pd.DataFrame:
    """Read a table that sysmt wrote; empty text stays empty text, floats are what they were.

    Parameters
    ----------
    path : str or Path
    needed : iterable of str
        Columns that it must have.
    numbers : iterable of str
        Columns, where they are there, that hold numbers (or nothing).

    Raises
    ------
    ConfigError
        If it is missing or unreadable, is no table (see `read_table`), lacks a column, or has text where
        a number belongs.
    """
    import pandas as pd  # what needs no table does not wait for it

    if not os.path.isfile(path):
        raise ConfigError(f"{path} is missing; a table that sysmt wrote is needed")
    read = read_table(path)
    needed = list(needed)
    lacking = [column for column in needed if column not in read.columns]
    if lacking:
        raise ConfigError(f"{path} lacks the column {lacking[0]!r}; it has {', '.join(read.columns)}")
    table = pd.read_csv(
        io.StringIO(read.text),
        index_col=False,
        keep_default_na=False,  # "None" and "NA" are names like any other
        na_values=["", "nan"],
        skipinitialspace=True,
    )
    for column in numbers:
        if column in table and not pd.api.types.is_numeric_dtype(table[column]):
            _refuse_text(read, column)
    text = table.select_dtypes(exclude="number").columns
    return table.fillna(dict.fromkeys(text, ""))


def _refuse_text(read: Table, column: str) -> None:
    for row in read.rows:
        cell = row[column]
        try:
            float(cell.text or "nan")
        except ValueError:
            raise ConfigError(f"{cell.place}: {column}={cell.text!r} must be a number") from None

"""Where studies are kept: SQLite files and databases behind a URL, opened by Optuna and kept quiet."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import random
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import optuna
import sqlalchemy.exc

from sysmt.errors import ConfigError, OutputError, SysmtError
from sysmt.study.run_directory import without_password

__all__ = ["one_at_a_time", "open_storage", "quiet", "storage_errors", "storage_url"]

OPEN_ATTEMPTS = 20
"""So often a storage is opened whose tables several processes are making at once."""


def storage_url(storage: str | Path) -> str:
    """Turn a path into the URL of the SQLite file there; of URLs, PostgreSQL's gets its current driver.

    Signs that have a meaning of their own in URLs are encoded, in paths as well as in passwords.
    """
    text = str(storage)
    if "://" in text:
        text = re.sub("^postgres(ql)?://", "postgresql+psycopg://", text)
        # A password may have any sign but a slash; whatever stands before the last @ belongs to it.
        return re.sub(
            r"^([\w+]+://[^:/@]*:)([^/]*)(@[^@/]*(?:/|$))",
            lambda found: found[1] + quote(unquote(found[2]), safe="") + found[3],
            text,
        )
    path = Path(storage).expanduser()
    path = (path / "study.db" if path.is_dir() else path).absolute()
    try:
        return f"sqlite:///{quote(str(path), safe='/ +')}"
    except UnicodeEncodeError as error:
        raise OutputError(f"{path!s} has a name that is not UTF-8; a study cannot be kept there") from error


def open_storage(url: str, heartbeat_s: int, grace_s: int, make: bool) -> optuna.storages.RDBStorage:
    """Open a database for studies, making Optuna's tables if `make` says so.

    Parameters
    ----------
    url : str
        As `storage_url` returns it.
    heartbeat_s, grace_s : int
        Seconds between signs of life of a worker, and without one until it counts as dead.
    make : bool
        False refuses a database that has no studies yet.

    Raises
    ------
    ConfigError
        If it is missing, has no studies, or is in memory.
    OutputError
        If its tables are those of another version of Optuna.
    """
    options: dict[str, Any] = {}
    parsed = sqlalchemy.engine.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if not parsed.database or ":memory:" in parsed.database or parsed.query.get("mode") == "memory":
            raise ConfigError(
                f"{url} is a database in memory, which ends with its process; name a file, such as study.db"
            )
        path = Path(parsed.database)
        if not make and not path.is_file():
            raise ConfigError(f"{path} is missing; the storage of a study is needed")
        path.parent.mkdir(parents=True, exist_ok=True)
        options["connect_args"] = {"timeout": 60}  # workers take turns at the file
        sqlalchemy.event.listen(sqlalchemy.pool.Pool, "connect", _write_ahead)
    try:
        if not make:
            _refuse_other_databases(url)
        for attempt in itertools.count(1):
            try:
                storage = optuna.storages.RDBStorage(
                    url, engine_kwargs=dict(options), heartbeat_interval=heartbeat_s, grace_period=grace_s
                )
                break
            except sqlalchemy.exc.DBAPIError as error:
                if attempt == OPEN_ATTEMPTS or not _is_race(error):
                    raise
                time.sleep(random.uniform(0.05, 0.3))
            except RuntimeError as error:  # Optuna's, for tables of another of its versions
                raise OutputError(f"the storage {without_password(url)} cannot be used: {error}") from error
    finally:
        if options:
            sqlalchemy.event.remove(sqlalchemy.pool.Pool, "connect", _write_ahead)
    if options:
        sqlalchemy.event.listen(storage.engine, "connect", _write_ahead)
    return storage


def _refuse_other_databases(url: str) -> None:
    """Raise unless a database has Optuna's tables already: whoever joins a study makes none."""
    engine = sqlalchemy.create_engine(url)
    try:
        if not sqlalchemy.inspect(engine).has_table("studies"):
            raise ConfigError(f"{without_password(url)} has no studies in it")
    finally:
        engine.dispose()


def _is_race(error: sqlalchemy.exc.DBAPIError) -> bool:
    """Whether an error while the tables are made tells of another process that makes them, too."""
    known = ("already exists", "database is locked", "database schema is locked")
    return isinstance(error, sqlalchemy.exc.IntegrityError) or any(word in str(error) for word in known)


def _write_ahead(connection: Any, _record: Any) -> None:
    """Write ahead, and wait for the disk now and then only: kill -9 still loses nothing that was written."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


@contextlib.contextmanager
def one_at_a_time(url: str) -> Iterator[None]:
    """Let one process at a time read and then write, where the database cannot: SQLite locks no single rows.

    The lock is on the directory, for SQLite has locks of its own on the file.
    """
    parsed = sqlalchemy.engine.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        yield
        return
    handle = os.open(Path(str(parsed.database)).parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


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
        raise OutputError(f"the storage {without_password(url)} cannot be used: {reason}") from error
    except ImportError as error:
        raise OutputError(f"the storage {without_password(url)} needs a driver: {error}") from error

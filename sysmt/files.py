"""Files: where sysmt keeps what it can make again, and how everything is written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sysmt.errors import OutputError

__all__ = ["cache_directory", "written_whole"]


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

"""Archives: .npz files and checkpoints, read with every entry compared with its checksum."""

from __future__ import annotations

import contextlib
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

__all__ = ["ARCHIVE_LIMIT_BYTES", "check_archive", "read_npz"]

ARCHIVE_LIMIT_BYTES = 16 << 30
"""What an archive may unpack to, unless it is packed a hundredfold: 1 GiB then, as such files are bombs."""

_END_RECORD = struct.Struct("<4s4H2LH")
"""The last 22 bytes of a zip archive without a comment; the fifth field is the number of entries."""

_MANY = 0xFFFF
"""What stands in that field if the number is written elsewhere."""

_BOMB_RATIO, _BOMB_BYTES = 100, 1 << 30


def check_archive(path: str | Path) -> None:
    """Compare every entry of a zip archive, such as a checkpoint of torch, with its checksum.

    Entries with a checksum of 0 have none: torch can be told to write them so.

    Raises
    ------
    zipfile.BadZipFile
        If an entry is damaged, or the archive unpacks to too much.
    """
    with _opened(path) as archive:
        _check_size(archive.infolist())
        for entry in archive.infolist():
            if entry.CRC:
                with _damage_named(entry.filename), archive.open(entry) as content:
                    while content.read(1 << 20):
                        pass


def read_npz(path: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """Read arrays without Python objects from an .npz file, each compared with its checksum.

    Parameters
    ----------
    path : str or Path
    wanted : callable
        Tells by its name whether an array is read; all are by default.

    Raises
    ------
    OSError
        If the file cannot be read.
    zipfile.BadZipFile
        If it is no .npz, damaged, or unpacks to too much; the message says which array.
    """
    if not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile("it is no zip archive of arrays, as numpy.savez writes them")
    arrays = {}
    with _opened(path) as archive:
        strange = [name for name in archive.namelist() if not name.endswith(".npy")]
        if strange:
            raise zipfile.BadZipFile(f"it has {strange[0]!r} in it; .npy entries are needed")
        entries = [entry for entry in archive.infolist() if wanted(entry.filename.removesuffix(".npy"))]
        _check_size(entries)
        for entry in entries:
            with _damage_named(entry.filename), archive.open(entry) as content:
                arrays[entry.filename.removesuffix(".npy")] = np.lib.format.read_array(
                    content, allow_pickle=False
                )
                if content.read(1):  # also reaches the end, where the checksum is compared
                    raise ValueError("it is longer than its header says")
    return arrays


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive and compare how many entries it has with how many it says it has.

    Python's `zipfile` reads as many as the directory's size lets it, and is content.
    """
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _END_RECORD.size))
        tail = file.read()
    with _damage_named("its directory"):
        archive = zipfile.ZipFile(path)
    with archive:
        if len(tail) == _END_RECORD.size and tail.startswith(b"PK\5\6"):
            said = _END_RECORD.unpack(tail)[4]
            if said not in (_MANY, len(archive.namelist())):
                raise zipfile.BadZipFile(f"it has {len(archive.namelist())} entries where it says {said}")
        yield archive


def _check_size(entries: list[zipfile.ZipInfo]) -> None:
    unpacked = sum(entry.file_size for entry in entries)
    packed = sum(entry.compress_size for entry in entries)
    bomb = unpacked > max(_BOMB_RATIO * packed, _BOMB_BYTES)
    if unpacked > ARCHIVE_LIMIT_BYTES or bomb:
        limit = _BOMB_BYTES if bomb else ARCHIVE_LIMIT_BYTES
        raise zipfile.BadZipFile(
            f"it unpacks to {unpacked / 2**30:.1f} GiB from {packed / 2**20:.1f} MiB; "
            f"at most {limit / 2**30:g} GiB are read"
            + (", or a hundred times the packed size" if bomb else "")
        )


@contextlib.contextmanager
def _damage_named(entry: str) -> Iterator[None]:
    """Turn what a damaged entry raises in zlib, zipfile and numpy into one error with its name."""
    try:
        yield
    except Exception as error:  # a damaged entry fails in as many ways as it has bytes
        reason = str(error) or type(error).__name__
        raise zipfile.BadZipFile(reason if entry in reason else f"{entry}: {reason}") from error

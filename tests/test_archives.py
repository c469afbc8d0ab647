"""Archives: every damaged bit is noticed or harmless, and bombs are not unpacked."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sysmt import archives
from sysmt.archives import check_archive, read_npz


def every_flip(path: Path, step: int, read: Callable[[Path], object], same: Callable[[object], bool]) -> int:
    """Flip a bit in every `step`-th byte; each file is refused or read as if nothing had happened."""
    whole, refused = path.read_bytes(), 0
    for at in range(0, len(whole), step):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            assert same(read(path)), f"a flip in byte {at} went unnoticed"
        except (OSError, zipfile.BadZipFile):
            refused += 1
    return refused


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_flipped_bit_of_an_npz_is_noticed_or_harmless(
    save: Callable[..., None], tmp_path: Path
) -> None:
    arrays = {"x": np.arange(300, dtype=np.float32), "y": np.arange(5), "none": np.zeros((0, 3))}
    path = tmp_path / "a.npz"
    save(path, **arrays)

    def same(found: object) -> bool:
        return found.keys() == arrays.keys() and all(np.array_equal(found[k], arrays[k]) for k in arrays)

    assert same(read_npz(path))
    assert every_flip(path, 1, read_npz, same) > path.stat().st_size // 3


def test_every_flipped_bit_of_a_checkpoints_values_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": torch.arange(1000.0)}, path)
    check_archive(path)
    values = path.read_bytes().find(np.arange(1000, dtype=np.float32).tobytes())
    whole = path.read_bytes()
    for at in range(values, values + 4000, 37):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(zipfile.BadZipFile, match="w/data/0"):
            check_archive(path)


def test_archives_without_checksums_are_taken(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(10.0)}, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    check_archive(tmp_path / "w.pt")


def test_an_archive_that_unpacks_to_too_much_is_refused_by_its_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros(4 << 20, np.uint8))
    np.savez(tmp_path / "large.npz", x=np.zeros(4 << 20, np.uint8))
    monkeypatch.setattr(archives, "_BOMB_BYTES", 1 << 20)
    for check in (read_npz, check_archive):
        with pytest.raises(zipfile.BadZipFile, match=r"unpacks to 0\.0 GiB from 0\.0 MiB; .*a hundred times"):
            check(tmp_path / "bomb.npz")
    assert read_npz(tmp_path / "large.npz")["x"].size == 4 << 20
    monkeypatch.setattr(archives, "ARCHIVE_LIMIT_BYTES", 1 << 21)
    with pytest.raises(zipfile.BadZipFile, match="at most 0.00195312 GiB are read"):
        read_npz(tmp_path / "large.npz")
    assert read_npz(tmp_path / "large.npz", lambda name: name != "x") == {}


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    with pytest.raises(zipfile.BadZipFile, match=r"no zip archive of arrays, as numpy\.savez"):
        read_npz(tmp_path / "a.npy")
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
    with pytest.raises(zipfile.BadZipFile, match="x.npy: .*allow_pickle"):
        read_npz(tmp_path / "objects.npz")

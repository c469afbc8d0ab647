import os
from pathlib import Path

import pytest

from sysmt.errors import OutputError
from sysmt.files import cache_directory, written_whole


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")

    def write_and_fail() -> None:
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.txt"]
    with pytest.raises(OutputError, match=r"result\.txt"), written_whole(path / "below"):
        pass


@pytest.mark.skipif(not Path("/dev/null").is_char_device(), reason="no /dev/null here")
def test_a_device_is_not_replaced() -> None:
    with pytest.raises(OutputError, match="not a regular file"), written_whole("/dev/null"):
        pass
    assert Path("/dev/null").is_char_device()


def test_cache_directory_follows_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYSMT_CACHE", "/elsewhere")
    assert cache_directory() == Path("/elsewhere")
    monkeypatch.delenv("SYSMT_CACHE")
    assert cache_directory() == Path.home() / ".cache" / "sysmt"

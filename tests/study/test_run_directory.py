"""A run's directory: its own, writable before it starts, and no half-written file in it."""

import os
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sysmt.errors import ConfigError, InUseError, OutputError
from sysmt.files import read_csv, read_toml
from sysmt.study.run_directory import (
    RunDirectory,
    check_writable,
    export_table,
    provenance,
    without_password,
)


def test_default_directories_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    Path("results/run-a_b-2").mkdir()
    found = [str(RunDirectory(name="run-a/b").path) for _ in range(3)]
    assert found == ["results/run-a_b-1", "results/run-a_b-3", "results/run-a_b-4"]


def test_a_directory_with_files_is_refused(tmp_path):
    (tmp_path / "theirs").write_text("kept")
    with pytest.raises(OutputError, match="is not empty"):
        RunDirectory(tmp_path)
    RunDirectory(tmp_path, overwrite=True, stale=("*.csv",))
    assert (tmp_path / "theirs").read_text() == "kept"


def test_overwriting_removes_what_an_earlier_run_left(tmp_path):
    for name in ("a.csv", "b.png", "c.txt"):
        (tmp_path / name).touch()
    RunDirectory(tmp_path, overwrite=True, stale=("*.csv", "b.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["c.txt"]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_cannot_be_is_named(tmp_path, place):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match=place):
        RunDirectory(tmp_path / place)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_or_read_only_disk_is_found_before_the_run(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        RunDirectory(tmp_path / "new")
    with pytest.raises(OutputError, match="Permission denied"):
        check_writable(tmp_path / "file.npz")


def test_files_are_whole_or_absent(tmp_path):
    directory = RunDirectory(tmp_path / "r")
    directory.write_json("kept.json", {"old": 1})

    def fail_half_way(name):
        with directory.file(name) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    for name in ("kept.json", "new.json"):
        with pytest.raises(ZeroDivisionError):
            fail_half_way(name)
    directory.close()
    assert [path.name for path in directory.path.iterdir()] == ["kept.json"]
    assert '"old": 1' in (directory.path / "kept.json").read_text()


def test_only_what_was_made_for_the_run_is_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    RunDirectory(tmp_path / "mine").remove_if_empty()
    assert (tmp_path / "mine").is_dir()
    RunDirectory(tmp_path / "deep/er").remove_if_empty()
    assert not (tmp_path / "deep").exists()
    kept = RunDirectory(tmp_path / "deep/er")
    kept.write_json("x.json", {})
    kept.remove_if_empty()
    assert (tmp_path / "deep/er/x.json").exists()


def test_one_process_at_a_time_has_a_directory(tmp_path):
    first = RunDirectory(tmp_path / "r")
    with pytest.raises(InUseError, match=rf"another process \({os.getpid()} on .*\)"):
        RunDirectory(tmp_path / "r")
    first.write_json("x.json", {})
    beside = RunDirectory(tmp_path / "r", shared=True, stale=("*.json",))
    assert beside.resumed
    first.close()
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["x.json"]
    second = RunDirectory(tmp_path / "r", resumes=lambda path: (path / "x.json").is_file(), stale=("*.json",))
    assert second.resumed
    assert (tmp_path / "r" / "x.json").is_file()


def test_the_directory_of_a_killed_process_is_free_and_counts_as_empty(tmp_path):
    code = (
        "import os, signal; from sysmt.study.run_directory import RunDirectory;"
        f"d = RunDirectory({str(tmp_path / 'r')!r}); open(d.path / '.x-1.partial.csv', 'w').close();"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    partial = tmp_path / "r" / ".x-1.partial.csv"
    with RunDirectory(tmp_path / "r"):
        assert partial.exists()  # young enough to be somebody's
    os.utime(partial, (0, 0))
    with RunDirectory(tmp_path / "r"):
        assert not partial.exists()
    assert not (tmp_path / "r").exists() or not any((tmp_path / "r").iterdir())


@given(st.lists(st.floats(allow_nan=True, allow_infinity=False), min_size=1))
def test_tables_come_back_bit_for_bit(tmp_path_factory, values):
    directory = RunDirectory(tmp_path_factory.mktemp("r"))
    path = directory.write_csv("t.csv", pd.DataFrame({"x": values, "text": "a,b"}))
    found = read_csv(path, ("x",))
    assert np.array_equal(found["x"].to_numpy(float), values, equal_nan=True)
    assert (found["text"] == "a,b").all()


def test_passwords_are_not_kept(monkeypatch):
    for url, shown in {
        "postgresql://rel:sEcret99@127.0.0.1:54399/studies": "postgresql://rel:***@127.0.0.1:54399/studies",
        "--storage=postgresql+psycopg://u:s@E:cret@host/x?a=b": "--storage=postgresql+psycopg://u:***@host/x?a=b",
        "postgresql://me@host/db": "postgresql://me@host/db",
        "sqlite:////tmp/a:b@c.db": "sqlite:////tmp/a:b@c.db",
    }.items():
        assert without_password(url) == shown
        monkeypatch.setattr("sys.argv", ["/bin/sysmt", "sweep", url])
        assert shlex.split(provenance()["command"]) == ["sysmt", "sweep", shown]


def test_toml_comes_back(tmp_path):
    record = {"a": {"text": 'quo"te', "list": [1, 2], "float": 0.1}, "b": 3}
    path = RunDirectory(tmp_path).write_toml("c.toml", record | {"none": None}, comment="two\nlines")
    assert path.read_text().startswith("# two\n# lines\n")
    assert read_toml(path) == tomllib.loads(path.read_text()) == record
    path.write_text("a = = 1")
    with pytest.raises(ConfigError, match="is no TOML"):
        read_toml(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux's")
def test_tables_go_where_they_can_or_say_why_not(tmp_path: Path) -> None:
    table = pd.DataFrame({"a": [1, 2]})
    export_table(table, tmp_path / "new" / "t.csv")
    assert (tmp_path / "new" / "t.csv").read_text() == "a\n1\n2\n"
    export_table(table, "/dev/null")
    with pytest.raises(OutputError, match="/dev/full cannot be written: No space left"):
        export_table(table, "/dev/full")


def test_a_directory_has_a_name_in_utf_8(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no text in UTF-8"):
        RunDirectory(tmp_path / "o\udcff")
    assert list(tmp_path.iterdir()) == []

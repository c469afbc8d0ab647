import os
from pathlib import Path

import numpy as np
import pytest

from sysmt.errors import ConfigError, OutputError
from sysmt.files import cache_directory, read_csv, read_table, read_toml, written_whole


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


# -- reading -----------------------------------------------------------------------------------


def test_tables_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="lacks the column 'c'; it has a, b"):
        read_csv(tmp_path / "t.csv", ("a", "c"))
    (tmp_path / "t.csv").write_text("")
    with pytest.raises(ConfigError, match="is no table"):
        read_csv(tmp_path / "t.csv")
    with pytest.raises(ConfigError, match="missing"):
        read_csv(tmp_path / "nothing.csv")


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a,b\n1,2\n3,4,5\n", "line 3, column 5", "3 cells, but the header names 2 columns; '5' belongs"),
        ("a,b\n1,2,3,4\n", "line 2, column 5", "4 cells, but the header names 2 columns; '3' belongs"),
        ("a,b,c\n1,2\n", "line 2, column 3", "2 cells, but the header names 3 columns; cells are missing"),
        ('a,b\n"x, y",2,3\n', "line 2, column 10", "'3' belongs to none"),
        ('a,b\n"x\ny",2\n1\n', "line 4, column 1", "cells are missing"),
        ("a,a\n1,2\n", "line 1, column 3", "'a' is there twice"),
        ("a,,b\n1,2,3\n", "line 1, column 3", "a column has no name"),
        ('a,b\n1,"2\n', "line 2, column 1", "no CSV"),
        ("", "", "is no table"),
    ],
)
def test_a_table_of_a_wrong_shape_is_refused_with_its_place(
    tmp_path: Path, text: str, where: str, what: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    for read in (read_table, read_csv):
        with pytest.raises(ConfigError, match=what) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert where in str(caught.value)


def test_cells_know_their_places(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbfa, b\r\n"1,\n2", x\r\n\r\n,,\r\n3,4\r\n'.replace(b",,", b","))
    table = read_table(path)
    assert table.columns == ["a", "b"]
    assert [[cell.text for cell in row.values()] for row in table.rows] == [["1,\n2", "x"], ["3", "4"]]
    assert table.rows[0]["b"].place == f"{path}, line 3, column 4"
    assert table.rows[1]["a"].place == f"{path}, line 6, column 1"


def test_text_where_a_number_belongs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("name,x\nNone,1\nNA,\n,o.5\n")
    with pytest.raises(ConfigError, match=r"line 4, column 2: x='o\.5' must be a number"):
        read_csv(path, ("x",), ("x", "y"))
    path.write_text("name,x\nNone,1\nNA,\n,0.1\n")
    table = read_csv(path, ("x",), ("x", "y"))
    assert list(table["name"]) == ["None", "NA", ""]
    assert np.array_equal(table["x"], [1, np.nan, 0.1], equal_nan=True)


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "9" * 5000, "a = 1\na = 2", "a = = 1"])
def test_what_is_no_toml_is_one_of_our_errors(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is no TOML"):
        read_toml(path)


def test_text_that_is_not_utf_8_is_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"a,b\n1,\xff\n")
    for read in (read_toml, read_csv, read_table):
        with pytest.raises(ConfigError, match="line 2, column 3: byte 0xff is not UTF-8"):
            read(path)
    for read in (read_toml, read_table):
        for name in ("a" * 300, "nul\0"):
            with pytest.raises(ConfigError, match="cannot be read"):
                read(name)

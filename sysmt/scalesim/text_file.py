"""Text files that other people wrote: read whole, and complained about by file, line and column."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from sysmt.errors import ConfigError

__all__ = ["LARGEST", "Field", "integer", "misplaced", "read_lines"]

LARGEST = 2**31 - 1
"""Largest number that a file may hold: beyond it no machine or layer makes sense."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A piece of text, and where it stands.

    Attributes
    ----------
    text : str
        Without surrounding blanks.
    path : str
        The file.
    line, column : int
        Of its first character, from 1.
    name : str
        Of the table column or the key that it is the value of; may be empty.
    """

    text: str
    path: str
    line: int
    column: int
    name: str = ""

    def error(self, message: str) -> ConfigError:
        """Return an exception that names the place, ready to be raised."""
        name = f" ({self.name})" if self.name else ""
        return misplaced(self.path, self.line, self.column, f"{message}{name}")


def misplaced(path: str | Path, line: int, column: int, message: str) -> ConfigError:
    """Return a `ConfigError` whose message names file, line and column (from 1)."""
    return ConfigError(f"{path}, line {line}, column {column}: {message}")


def read_lines(path: str | Path) -> list[str]:
    r"""Read a UTF-8 text file with Unix or Windows line ends; a byte order mark is dropped.

    Raises
    ------
    ConfigError
        If the file is missing or unreadable, is not UTF-8, or has a NUL character or a carriage return
        in the middle of a line.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise misplaced(
            path, line, column, f"byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    for number, line_text in enumerate(lines, 1):
        for sign, what in (
            ("\r", "a carriage return in the middle of a line; lines end in LF or CR LF"),
            ("\0", "a NUL character"),
        ):
            if sign in line_text:
                raise misplaced(path, number, line_text.index(sign) + 1, what)
    return lines


def integer(field: Field, minimum: int, maximum: int = LARGEST) -> int:
    """Read an integer from `minimum` to `maximum`; raise `ConfigError` naming the field's place otherwise."""
    if not re.fullmatch(r"[+-]?[0-9]+", field.text):
        given = repr(field.text) if field.text else "nothing"
        raise field.error(f"{given} is no integer; one of at least {minimum} is needed")
    digits = field.text.lstrip("+-0")
    if len(digits) > 20:  # also spares int() the numbers of thousands of digits that it refuses
        raise field.error(
            f"a number of {len(digits)} digits is out of range; {minimum} to {maximum:,} is allowed"
        )
    value = int(field.text)
    if value < minimum:
        raise field.error(f"{value} is too small; it must be at least {minimum}")
    if value > maximum:
        raise field.error(f"{value} is too large; it must be at most {maximum:,}")
    return value

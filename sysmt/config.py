"""What is simulated: the array, its threads and its squeezing policy, as validated frozen values."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, Literal, TypeVar

from sysmt.errors import ConfigError, nearest

__all__ = [
    "LARGEST_SIDE",
    "RECALIBRATION_MODES",
    "THREADS_OF",
    "THREAD_COUNTS",
    "ArrayConfig",
    "Drain",
    "Engine",
    "Policy",
    "RecalibrationMode",
    "Rounding",
]

THREAD_COUNTS = (1, 2, 4)

LARGEST_SIDE = 65_536
"""Most rows, and most columns, of an array."""

THREADS_OF = "threads of "
"""Before a layer's name: the column with its threads, in tables of points."""


class Policy(StrEnum):
    """Which operand a collision reduces, and what spares it (NB-SMT paper, arXiv 2004.09309, section 3).

    ``S``: zero operands free the multiplier. ``A`` / ``W``: the operand that a 2-way collision
    reduces, when it is wide. A lower-case letter: the other operand's narrowness spares it too.
    ``S`` alone reduces always, narrow operands included.
    """

    S = "S"
    A = "A"
    W = "W"
    AW = "Aw"
    WA = "aW"
    SA = "S+A"
    SW = "S+W"
    SAW = "S+Aw"
    SWA = "S+aW"

    @property
    def skips_zeros(self) -> bool:
        """Whether a pair with a zero operand leaves the multiplier to the other threads."""
        return self.value.startswith("S")

    @property
    def reduces_always(self) -> bool:
        """Whether a collision reduces narrow operands as well (policy ``S`` alone)."""
        return self is Policy.S

    @property
    def reduced_operand(self) -> Literal["activation", "weight"]:
        """The operand that a 2-way collision reduces."""
        return "weight" if "W" in self.value else "activation"

    @property
    def needs_both_wide(self) -> bool:
        """Whether a 2-way collision spares an operand when the *other* one is narrow."""
        return "w" in self.value or "a" in self.value


class Drain(StrEnum):
    """How accumulators leave the array between tiles; sets the cycles per tile."""

    SERIAL = "serial"
    OVERLAPPED = "overlapped"
    NONE = "none"


class Rounding(StrEnum):
    """How the low 4 bits of a reduced operand are dropped."""

    NEAREST_EVEN = "nearest-even"
    TRUNCATE = "truncate"


class Engine(StrEnum):
    """Which implementation of the same semantics computes a GEMM."""

    FAST = "fast"
    CYCLE = "cycle"
    REFERENCE = "reference"


class RecalibrationMode(StrEnum):
    """How the statistics of the batches become BatchNorm's running statistics; ``none`` leaves them alone."""

    NONE = "none"
    EMA = "ema"
    CUMULATIVE = "cumulative"
    FINAL = "final"


RECALIBRATION_MODES = tuple(mode for mode in RecalibrationMode if mode is not RecalibrationMode.NONE)
"""Those that recalibrate."""

_Name = TypeVar("_Name", bound=StrEnum)


def parse_name(kind: type[_Name], value: object, field: str) -> _Name:
    """Turn a string into a member of `kind`; raise `ConfigError` naming `field` and the allowed names."""
    try:
        return kind(str(value))
    except ValueError:
        allowed = [member.value for member in kind]
        hint = nearest(str(value), allowed)
        raise ConfigError(f"{field}={value!r} is unknown{hint}; allowed: {', '.join(allowed)}") from None


def parse_recalibration(value: object, field: str) -> RecalibrationMode:
    """Turn a name into a mode that recalibrates; raise `ConfigError`, for ``none`` as well."""
    if value in RECALIBRATION_MODES:
        return RecalibrationMode(str(value))
    hint = nearest(str(value), [mode.value for mode in RECALIBRATION_MODES])
    raise ConfigError(f"{field}={value!r} is unknown{hint}; allowed: {', '.join(RECALIBRATION_MODES)}")


def parse_count(value: object, field: str, minimum: int = 1, maximum: int | None = None) -> int:
    """Turn an integer-like value into an int from `minimum` to `maximum`; raise `ConfigError` otherwise."""
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(
            f"{field}={value!r} has type {type(value).__name__}; an integer of at least {minimum} is needed"
        ) from None
    if count < minimum:
        raise ConfigError(f"{field}={count} is too small; it must be at least {minimum}")
    if maximum is not None and count > maximum:
        raise ConfigError(f"{field}={count} is too large; it must be at most {maximum:,}")
    return count


def parse_number(
    value: object,
    field: str,
    what: str,
    allowed: Callable[[float], bool] = math.isfinite,
) -> float:
    """Turn a real number, numpy's and torch's scalars included, into a float; raise `ConfigError` otherwise.

    Parameters
    ----------
    value : object
        Not a truth value, although Python counts those among the integers, and no text.
    field : str
        Its name in messages.
    what : str
        What is allowed, for messages: "a number in (0, 1]".
    allowed : callable
        Whether a finite number is; NaN and infinities never are.
    """
    try:
        kind = str(getattr(value, "dtype", type(value).__name__))
        if isinstance(value, str | bytes | bytearray) or "bool" in kind or bool(getattr(value, "ndim", None)):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ConfigError(f"{field}={value!r} has type {type(value).__name__}; {what} is needed") from None
    if not (math.isfinite(number) and allowed(number)):
        raise ConfigError(f"{field}={value!r} is not possible; {what} is needed")
    return number


def parse_layer_names(given: object, field: str) -> set[str]:
    """Turn a name, or an iterable of names, into a set; raise `ConfigError` otherwise."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Iterable):
        raise ConfigError(f"{field}={given!r} has type {type(given).__name__}; names of layers are needed")
    found = list(names)
    for name in found:
        if not isinstance(name, str):
            raise ConfigError(f"{field} has {name!r} of type {type(name).__name__} in it; names are strings")
    return set(found)


def parse_threads(value: object, field: str = "threads") -> int:
    """Turn a thread count into 1, 2 or 4; raise `ConfigError` otherwise."""
    count = parse_count(value, field, minimum=0)
    if count not in THREAD_COUNTS:
        raise ConfigError(f"{field}={count} is not possible; a PE runs 1, 2 or 4 threads")
    return count


@dataclasses.dataclass(frozen=True)
class ArrayConfig:
    """One SySMT array: an output-stationary grid of PEs, each running `threads` threads.

    Attributes
    ----------
    rows : int
        PE rows R, 1 to 65,536. A tile holds R rows (m) of the output.
    cols : int
        PE columns C, 1 to 65,536. A tile holds C columns (n) of the output.
    threads : int
        Threads per PE T: 1, 2 or 4. K is cut into T contiguous chunks.
    policy : Policy
        What a collision reduces; a `Policy` or its name, such as ``"S+A"``.
    drain : Drain
        How accumulators leave the array; ``"serial"``, ``"overlapped"`` or ``"none"``.
    saturate : bool
        Hold the rounded value in 4 bits (activations at 240, weights at +112) instead of
        letting 248..255 become 256 and 120..127 become +128.
    rounding : Rounding
        ``"nearest-even"`` or ``"truncate"``.

    Raises
    ------
    ConfigError
        If a value is outside what is listed above.
    """

    rows: int = 16
    cols: int = 16
    threads: int = 2
    policy: Policy = Policy.SA
    drain: Drain = Drain.SERIAL
    saturate: bool = False
    rounding: Rounding = Rounding.NEAREST_EVEN

    def __post_init__(self) -> None:
        def put(field: str, value: object) -> None:
            object.__setattr__(self, field, value)

        put("rows", parse_count(self.rows, "rows", maximum=LARGEST_SIDE))
        put("cols", parse_count(self.cols, "cols", maximum=LARGEST_SIDE))
        put("threads", parse_threads(self.threads))
        put("policy", parse_name(Policy, self.policy, "policy"))
        put("drain", parse_name(Drain, self.drain, "drain"))
        put("rounding", parse_name(Rounding, self.rounding, "rounding"))
        if type(self.saturate).__name__ not in ("bool", "bool_"):  # numpy's counts, too
            raise ConfigError(f"saturate={self.saturate!r} must be True or False")
        put("saturate", bool(self.saturate))

    def replace(self, **changes: Any) -> ArrayConfig:
        """Return a copy with the named fields changed (and validated again)."""
        try:
            return dataclasses.replace(self, **changes)
        except TypeError:
            fields = [field.name for field in dataclasses.fields(self)]
            unknown = next(name for name in changes if name not in fields)
            raise ConfigError(
                f"ArrayConfig has no field {unknown!r}{nearest(unknown, fields)}; it has {', '.join(fields)}"
            ) from None

    def to_record(self) -> dict[str, int | str | bool]:
        """Return plain values, as they go into TOML and CSV files."""
        return {
            "rows": self.rows,
            "cols": self.cols,
            "threads": self.threads,
            "policy": self.policy.value,
            "drain": self.drain.value,
            "saturate": self.saturate,
            "rounding": self.rounding.value,
        }

"""The exceptions of sysmt: one base class, few subclasses.

Each message says what was given, what is allowed and where.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CalibrationError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "InUseError",
    "OperandError",
    "OutputError",
    "PathError",
    "SysmtError",
    "UnsupportedLayerError",
    "WeightsError",
]


EXIT_INCOMPLETE = 3
"""Exit code of a command whose result lacks points that were given up."""


class SysmtError(Exception):
    """Base class of everything that sysmt raises on purpose."""


class ConfigError(SysmtError, ValueError):
    """A configuration value, name or combination that the machine does not have."""


class OperandError(SysmtError, ValueError):
    """GEMM operands of a wrong dtype, rank, shape or size."""


class PathError(SysmtError, RuntimeError):
    """A kernel path that is unknown, or that this CPU or build does not offer."""


class UnsupportedLayerError(SysmtError, RuntimeError):
    """A layer (named in the message) that cannot be simulated as it is."""


class CalibrationError(SysmtError, RuntimeError):
    """A layer (named in the message) lacks activation ranges, or calibration cannot be done."""


class DataError(SysmtError, RuntimeError):
    """Images or labels that are missing, unreadable or of the wrong form."""


class DivergedError(ConfigError):
    """A training whose loss stopped being a number: the learning rate, or the network, is too wild."""


class WeightsError(SysmtError, RuntimeError):
    """A checkpoint that is missing, corrupt or made for another network."""


class OutputError(SysmtError, OSError):
    """A result that cannot be written where it was asked for."""


class InUseError(OutputError):
    """A directory that another process is writing to; the message says which."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""

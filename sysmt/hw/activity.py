"""What the cycle engine saw: how busy the array was, cycle by cycle and PE by PE."""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = ["Activity"]


@dataclasses.dataclass(frozen=True, eq=False)
class Activity:
    """Activity of an R x C array over one GEMM.

    Attributes
    ----------
    cycles : int
        Ticks of the engine's clock, drain included.
    busy_pes : ndarray (cycles,), int64
        PEs that worked on a slot of their tile in that cycle, padding slots included.
    active_pes : ndarray (cycles,), int64
        Those of them in which at least one thread was active.
    busy_rc, active_rc : ndarray (R, C), int64
        The same per PE: slots worked on, and slots with at least one active thread.
    collisions_rc : ndarray (R, C), int64
        Slots per PE in which two or more threads were active.
    """

    cycles: int
    busy_pes: np.ndarray
    active_pes: np.ndarray
    busy_rc: np.ndarray
    active_rc: np.ndarray
    collisions_rc: np.ndarray

"""The slot of `sysmt.hw.pe` in numpy: as many slots at a time as an array holds.

Waveforms (`sysmt.hw.trace`) and the test benches of the RTL are made with it. It shares nothing with `pe.py`,
the cycle engine or the kernels, and is held against `pe.py` by the tests of both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sysmt.config import ArrayConfig, Rounding

__all__ = ["Slots", "work_slots"]


class Slots(NamedTuple):
    """What became of many slots.

    Attributes
    ----------
    value : ndarray (...)
        Sum of each slot's products, of the operands' dtype.
    active, reduced_activations, reduced_weights : ndarray (..., T), bool
        By thread: both operands non-zero; operand of an active pair selected for reduction.
    """

    value: np.ndarray
    active: np.ndarray
    reduced_activations: np.ndarray
    reduced_weights: np.ndarray


def work_slots(activations: np.ndarray, weights: np.ndarray, config: ArrayConfig, signed: bool) -> Slots:
    """Let one PE after the other work on the operands that it holds.

    Parameters
    ----------
    activations, weights : ndarray (..., T), int32 or int64
        Values of 8-bit operands, the threads on the last axis.
    config : ArrayConfig
        Policy, rounding and saturation matter here; T is the operands' own.
    signed : bool
        Whether activations are int8.

    Returns
    -------
    Slots
    """
    policy = config.policy
    active = (activations != 0) & (weights != 0)
    contenders = active.sum(axis=-1, keepdims=True)
    if not policy.skips_zeros:
        contenders = np.full_like(contenders, activations.shape[-1])
    two, many = contenders == 2, contenders >= 3
    a_wide, w_wide = active, active
    if not policy.reduces_always:
        a_wide, w_wide = active & _is_wide(activations, signed), active & _is_wide(weights, True)
    given = a_wide & w_wide if policy.needs_both_wide else None
    reduces_a, reduces_w = many & a_wide, many & w_wide
    if policy.reduced_operand == "activation":
        reduces_a |= two & (a_wide if given is None else given)
    else:
        reduces_w |= two & (w_wide if given is None else given)
    used_a = np.where(reduces_a, _reduced(activations, config, signed), activations)
    used_w = np.where(reduces_w, _reduced(weights, config, True), weights)
    value = (used_a * used_w * active).sum(axis=-1, dtype=activations.dtype)
    return Slots(value, active, reduces_a, reduces_w)


def _is_wide(values: np.ndarray, signed: bool) -> np.ndarray:
    return (values < -8) | (values > 7) if signed else values > 15


def _reduced(values: np.ndarray, config: ArrayConfig, signed: bool) -> np.ndarray:
    floor, rest = values >> 4, values & 15
    if config.rounding is Rounding.TRUNCATE:
        return floor << 4
    rounded: np.ndarray = (floor + ((rest > 8) | ((rest == 8) & (floor & 1 == 1)))) << 4
    return np.minimum(rounded, 112 if signed else 240) if config.saturate else rounded

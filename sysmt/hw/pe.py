"""One slot of one PE: what the shared multiplier does in one cycle. This is the reference.

Everything else in `sysmt.hw` computes exactly this, faster. Squeezing is described in Shomron &
Weiser, "Non-Blocking Simultaneous Multithreading" (MICRO 2020, arXiv 2004.09309), section 3; what
they leave open is fixed in docs/semantics.md, with slots worked by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sysmt.config import ArrayConfig, Rounding

__all__ = ["SlotResult", "is_wide", "reduce", "work_slot"]


class SlotResult(NamedTuple):
    """What one slot adds to its accumulator and to the counters."""

    value: int
    active: int
    reduced_activations: int
    reduced_weights: int


def is_wide(value: int, signed: bool) -> bool:
    """Whether an operand needs more than 4 bits: outside [-8, 7] if signed, above 15 if not."""
    return not -8 <= value <= 7 if signed else value > 15


def reduce(value: int, signed: bool, config: ArrayConfig) -> int:
    """Keep the 4 high bits of an operand, rounded: a multiple of 16, unclipped unless `saturate`."""
    if config.rounding is Rounding.TRUNCATE:
        return value // 16 * 16
    high = round(value / 16) * 16  # Python rounds halves to even, as docs/semantics.md has it
    return min(high, 112 if signed else 240) if config.saturate else high


def work_slot(
    activations: Sequence[int], weights: Sequence[int], config: ArrayConfig, signed: bool = False
) -> SlotResult:
    """Work off one slot: T pairs of operands, of which the multiplier serves the active ones.

    Parameters
    ----------
    activations, weights : sequence of int
        The T operand pairs; activations in 0..255, or in -128..127 if `signed`; weights in -128..127.
    config : ArrayConfig
        Policy, rounding and saturation. T is taken from the operands.
    signed : bool
        Whether the activations are int8.

    Returns
    -------
    SlotResult
        Sum of products, number of active threads, and how many operands were reduced.
    """
    policy = config.policy
    pairs = [(a, w) for a, w in zip(activations, weights, strict=True) if a and w]
    active = len(pairs)
    threads = len(activations)
    contenders = active if policy.skips_zeros else threads
    value = reduced_activations = reduced_weights = 0
    for a, w in pairs:
        a_wide = policy.reduces_always or is_wide(a, signed)
        w_wide = policy.reduces_always or is_wide(w, True)
        reduce_a = reduce_w = False
        if contenders >= 3:  # four 4b x 4b products
            reduce_a, reduce_w = a_wide, w_wide
        elif contenders == 2:  # two 4b x 8b products
            spared = policy.needs_both_wide and not (a_wide and w_wide)
            reduce_a = policy.reduced_operand == "activation" and a_wide and not spared
            reduce_w = policy.reduced_operand == "weight" and w_wide and not spared
        value += (reduce(a, signed, config) if reduce_a else a) * (reduce(w, True, config) if reduce_w else w)
        reduced_activations += reduce_a
        reduced_weights += reduce_w
    return SlotResult(value, active, reduced_activations, reduced_weights)

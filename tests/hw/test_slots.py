"""Slots in numpy against `sysmt.hw.pe`, slot by slot: values and who was reduced, under every rule."""

import numpy as np
import pytest

from sysmt.config import ArrayConfig, Policy, Rounding
from sysmt.hw.pe import work_slot
from sysmt.hw.slots import work_slots

EDGES = [0, 0, 1, 7, 8, 9, 15, 16, 23, 24, 25, 37, 40, 119, 120, 127]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_many_slots_are_worked_off_as_the_reference_does(threads, policy, rounding, saturate, signed):
    config = ArrayConfig(threads=threads, policy=policy, rounding=rounding, saturate=saturate)
    rng = np.random.default_rng(threads)
    weights = rng.choice([*EDGES, *(-value for value in EDGES), -128], (400, threads))
    activations = rng.choice([*EDGES, *([-128, -9, -8] if signed else [128, 247, 248, 255])], (400, threads))
    slots = work_slots(activations, weights, config, signed)
    for i, (a, w) in enumerate(zip(activations.tolist(), weights.tolist(), strict=True)):
        want = work_slot(a, w, config, signed)
        assert slots.value[i] == want.value
        assert slots.active[i].sum() == want.active
        assert slots.reduced_activations[i].sum() == want.reduced_activations
        assert slots.reduced_weights[i].sum() == want.reduced_weights

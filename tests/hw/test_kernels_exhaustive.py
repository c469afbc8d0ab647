"""All 256 x 256 operand pairs through every case of the slot rule, in every thread position."""

import itertools

import numpy as np
import pytest

from sysmt.config import ArrayConfig, Policy, Rounding
from sysmt.hw import fast
from sysmt.hw.kernels import available_paths

VECTOR_PATHS = [path for path in available_paths() if path != "scalar"]
UNSIGNED = np.arange(256, dtype=np.uint8)
SIGNED = np.arange(-128, 128).astype(np.int8)
# Partners of the pair under test: (activation, weight) that are active; 37 and -53 are wide, 9 and -3 narrow.
PARTNERS = [(37, -53), (9, 127), (37, -3)]


def products(config, signed, position, active):
    """Set all pairs against each other in one thread, with `active` of the other threads busy."""
    activations = SIGNED if signed else UNSIGNED
    a = np.zeros((256, config.threads), activations.dtype)
    b = np.zeros((config.threads, 256), np.int8)
    others = [t for t in range(config.threads) if t != position]
    for t, (partner_a, partner_b) in zip(others[: active - 1], PARTNERS, strict=False):
        a[:, t], b[t] = partner_a, partner_b
    a[:, position], b[position] = activations, SIGNED
    return a, b


@pytest.mark.parametrize("path", VECTOR_PATHS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("policy", list(Policy))
def test_every_pair_in_every_case(path, signed, saturate, rounding, policy):
    for threads in (1, 2, 4):
        config = ArrayConfig(threads=threads, policy=policy, saturate=saturate, rounding=rounding)
        for position, active in itertools.product(range(threads), range(1, threads + 1)):
            a, b = products(config, signed, position, active)
            expected, counters = fast.simulate(a, b, config, path="scalar")
            out, counted = fast.simulate(a, b, config, path=path)
            np.testing.assert_array_equal(out, expected)
            assert counted == counters


@pytest.mark.parametrize("path", VECTOR_PATHS)
@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("policy", [Policy.SA, Policy.SAW, Policy.SW, Policy.S])
@pytest.mark.parametrize("extreme", ["full", "nine bits", "few nine bits", "minus", "zeros"])
def test_adversarial_values(path, threads, policy, extreme):
    rng = np.random.default_rng(0)
    m, k, n = 300, 200, 20
    a, b = rng.integers(0, 200, (m, k)).astype(np.uint8), rng.integers(-127, 128, (k, n)).astype(np.int8)
    if extreme == "full":
        a[:], b[:] = 255, 127
    elif extreme == "nine bits":
        a[:], b[:] = rng.integers(248, 256, a.shape), rng.integers(120, 128, b.shape)
    elif extreme == "few nine bits":
        a[rng.random(a.shape) < 0.01] = 251
        a[rng.random(a.shape) < 0.5] = 0
    elif extreme == "minus":
        a, b[:] = rng.choice([-128, 127], a.shape).astype(np.int8), -128
    else:
        a[:, ::2] = 0
        b[1::2] = 0
    config = ArrayConfig(threads=threads, policy=policy)
    expected, counters = fast.simulate(a, b, config, path="scalar")
    out, counted = fast.simulate(a, b, config, path=path, cpu_threads=2)
    np.testing.assert_array_equal(out, expected)
    assert counted == counters

"""One slot of one PE against values worked out by hand: each row of the tables in docs/semantics.md."""

import numpy as np
import pytest

from sysmt.config import ArrayConfig, Policy
from sysmt.hw.pe import is_wide, reduce, work_slot

WITHOUT_S = ("A", "W", "Aw", "aW")


def work(policy, pairs, *, signed=False, **options):
    """Work off one slot; return (value, active, reduced activations, reduced weights)."""
    activations, weights = zip(*pairs, strict=True)
    config = ArrayConfig(threads=len(pairs), policy=policy, **options)
    return tuple(work_slot(activations, weights, config, signed))


# ------------------------------------------------------------------ c = 0 and c = 1: idle, exact


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize(
    "pairs",
    [
        [(0, 0)],
        [(0, -7)],
        [(200, 0)],
        [(0, 50), (37, 0)],
        [(0, 50), (37, 0), (0, 0), (255, 0)],
    ],
)
def test_idle_slot(policy, pairs):
    assert work(policy, pairs) == (0, 0, 0, 0)


@pytest.mark.parametrize("policy", Policy)
def test_one_thread_is_exact_under_every_policy(policy):
    assert work(policy, [(255, 127)]) == (32385, 1, 0, 0)  # 255 * 127, though both are wide
    assert work(policy, [(5, -128)]) == (-640, 1, 0, 0)
    assert work(policy, [(-128, -128)], signed=True) == (16384, 1, 0, 0)


@pytest.mark.parametrize("policy", ["S+A", "S+W", "S+Aw", "S+aW", "S"])
def test_one_active_thread_has_the_multiplier_to_itself(policy):
    assert work(policy, [(0, 50), (37, 20)]) == (740, 1, 0, 0)  # 37 * 20
    assert work(policy, [(100, 50), (37, 0)]) == (5000, 1, 0, 0)  # 100 * 50
    assert work(policy, [(0, 1), (9, 0), (100, 50), (0, 0)]) == (5000, 1, 0, 0)


# ------------------------------------------------------------------ c = 2: two 4b x 8b products

# Halves used throughout: 100 = 6.25 * 16 -> 96, 37 = 2.3125 * 16 -> 32,
#                          50 = 3.125 * 16 -> 48, 20 = 1.25 * 16 -> 16.
BOTH_WIDE = [(100, 50), (37, 20)]
NARROW_WEIGHT = [(100, 5), (37, 20)]
NARROW_ACTIVATION = [(9, 50), (37, 20)]

TWO_WAY = [
    (BOTH_WIDE, "S+A", (5440, 2, 2, 0)),  # 96*50 + 32*20 = 4800 + 640
    (BOTH_WIDE, "S+W", (5392, 2, 0, 2)),  # 100*48 + 37*16 = 4800 + 592
    (BOTH_WIDE, "S+Aw", (5440, 2, 2, 0)),  # both operands of both pairs wide: as S+A
    (BOTH_WIDE, "S+aW", (5392, 2, 0, 2)),  # ... as S+W
    (BOTH_WIDE, "S", (5440, 2, 2, 0)),  # wide or not, the activation: as S+A here
    (BOTH_WIDE, "A", (5440, 2, 2, 0)),  # no zeros, so S makes no difference
    (BOTH_WIDE, "W", (5392, 2, 0, 2)),
    (BOTH_WIDE, "Aw", (5440, 2, 2, 0)),
    (BOTH_WIDE, "aW", (5392, 2, 0, 2)),
    (NARROW_WEIGHT, "S+A", (1120, 2, 2, 0)),  # 96*5 + 32*20 = 480 + 640
    (NARROW_WEIGHT, "S+W", (1092, 2, 0, 1)),  # 100*5 (5 is narrow) + 37*16 = 500 + 592
    (NARROW_WEIGHT, "S+Aw", (1140, 2, 1, 0)),  # 100*5 (w spares it) + 32*20 = 500 + 640
    (NARROW_WEIGHT, "S+aW", (1092, 2, 0, 1)),  # 100*5 + 37*16
    (NARROW_WEIGHT, "S", (1120, 2, 2, 0)),  # 96*5 + 32*20
    (NARROW_WEIGHT, "A", (1120, 2, 2, 0)),
    (NARROW_WEIGHT, "W", (1092, 2, 0, 1)),
    (NARROW_WEIGHT, "Aw", (1140, 2, 1, 0)),
    (NARROW_WEIGHT, "aW", (1092, 2, 0, 1)),
    (NARROW_ACTIVATION, "S+A", (1090, 2, 1, 0)),  # 9*50 (9 is narrow) + 32*20 = 450 + 640
    (NARROW_ACTIVATION, "S+W", (1024, 2, 0, 2)),  # 9*48 + 37*16 = 432 + 592
    (NARROW_ACTIVATION, "S+Aw", (1090, 2, 1, 0)),  # 9*50 + 32*20
    (NARROW_ACTIVATION, "S+aW", (1042, 2, 0, 1)),  # 9*50 (a spares the 50) + 37*16 = 450 + 592
    (NARROW_ACTIVATION, "S", (1440, 2, 2, 0)),  # 9 = 0.5625 * 16 -> 16: 16*50 + 32*20 = 800 + 640
    (NARROW_ACTIVATION, "A", (1090, 2, 1, 0)),
    (NARROW_ACTIVATION, "W", (1024, 2, 0, 2)),
    (NARROW_ACTIVATION, "Aw", (1090, 2, 1, 0)),
    (NARROW_ACTIVATION, "aW", (1042, 2, 0, 1)),
]


@pytest.mark.parametrize(("pairs", "policy", "expected"), TWO_WAY)
def test_two_way_collision(pairs, policy, expected):
    assert work(policy, pairs) == expected


@pytest.mark.parametrize(("pairs", "policy", "expected"), [row for row in TWO_WAY if row[1] not in WITHOUT_S])
def test_two_active_threads_of_four_collide_two_ways(pairs, policy, expected):
    first, second = pairs
    assert work(policy, [first, (0, 77), second, (200, 0)]) == expected


def test_policy_s_reduces_narrow_operands_even_to_zero():
    # 5 = 0.3125 * 16 -> 0: 0*50 + 32*20
    assert work("S", [(5, 50), (37, 20)]) == (640, 2, 2, 0)
    assert work("S+A", [(5, 50), (37, 20)]) == (890, 2, 1, 0)  # 5*50 + 32*20: spared


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("A", (640, 1, 1, 0)),  # 32*20, although the other pair is idle
        ("W", (592, 1, 0, 1)),  # 37*16
        ("Aw", (640, 1, 1, 0)),  # both wide: 32*20
        ("aW", (592, 1, 0, 1)),  # both wide: 37*16
    ],
)
def test_policies_without_s_collide_with_zeros_at_two_threads(policy, expected):
    assert work(policy, [(0, 50), (37, 20)]) == expected
    assert work(policy, [(37, 20), (100, 0)]) == expected  # the wide 100 meets a zero: not counted


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("A", (160, 1, 1, 0)),  # 32*5
        ("W", (185, 1, 0, 0)),  # 37*5: 5 is narrow
        ("Aw", (185, 1, 0, 0)),  # 37*5: the narrow 5 spares the 37
        ("aW", (185, 1, 0, 0)),
    ],
)
def test_narrow_operands_are_spared_without_s_too(policy, expected):
    assert work(policy, [(100, 0), (37, 5)]) == expected


@pytest.mark.parametrize("policy", ["S+A", "A", "S+Aw", "Aw", "S"])
def test_selected_operand_counts_though_rounding_leaves_it(policy):
    # 32 = 2 * 16 stays 32: 32*50 + 32*20 = 1600 + 640
    assert work(policy, [(32, 50), (37, 20)]) == (2240, 2, 2, 0)


# ------------------------------------------------------------------ c >= 3: four 4b x 4b products

# 9 and -5 are narrow; reduced all the same (policy S) they become 16 and 0 (-5 = -0.3125 * 16).
# 200 = 12.5 * 16 -> 192 (12 is even), -100 = -6.25 * 16 -> -96.
THREE = [(100, 50), (37, 20), (9, -5), (200, 0)]
FOUR = [(100, 50), (37, 20), (9, -5), (200, -100)]


@pytest.mark.parametrize("policy", [policy for policy in Policy if policy is not Policy.S])
def test_four_way_collision_reduces_each_wide_operand(policy):
    # 96*48 + 32*16 + 9*-5 = 4608 + 512 - 45
    assert work(policy, THREE) == (5075, 3, 2, 2)
    # 5075 + 192*-96 = 5075 - 18432
    assert work(policy, FOUR) == (-13357, 4, 3, 3)


def test_four_way_collision_under_s_reduces_everything():
    # 96*48 + 32*16 + 16*0 = 4608 + 512
    assert work("S", THREE) == (5120, 3, 3, 3)
    # 5120 + 192*-96 = 5120 - 18432
    assert work("S", FOUR) == (-13312, 4, 4, 4)


@pytest.mark.parametrize("policy", WITHOUT_S)
def test_policies_without_s_collide_with_zeros_at_four_threads(policy):
    # Four 4b x 4b products whatever is zero: 96*48; 96*48 + 32*16 = 4608 + 512; narrow operands spared.
    assert work(policy, [(100, 50), (0, 7), (37, 0), (0, 0)]) == (4608, 1, 1, 1)
    assert work(policy, [(100, 50), (0, 77), (37, 20), (200, 0)]) == (5120, 2, 2, 2)
    assert work(policy, [(9, 50), (0, 77), (37, -5), (200, 0)]) == (272, 2, 1, 1)  # 9*48 + 32*-5 = 432 - 160


# ------------------------------------------------------------------ rounding and saturation


@pytest.mark.parametrize("activation", range(248, 256))
def test_high_activations_become_256_or_saturate_at_240(activation):
    # 15.5 * 16 and above -> 16 * 16 (16 is even): 256*50 + 32*20 = 12800 + 640; held at 240: 12000 + 640
    pairs = [(activation, 50), (37, 20)]
    assert work("S+A", pairs) == (13440, 2, 2, 0)
    assert work("S+A", pairs, saturate=True) == (12640, 2, 2, 0)


@pytest.mark.parametrize("weight", range(120, 128))
def test_high_weights_become_128_or_saturate_at_112(weight):
    # 7.5 * 16 and above -> 8 * 16: 100*128 + 37*16 = 12800 + 592; held at 112: 11200 + 592
    pairs = [(100, weight), (37, 20)]
    assert work("S+W", pairs) == (13392, 2, 0, 2)
    assert work("S+W", pairs, saturate=True) == (11792, 2, 0, 2)


@pytest.mark.parametrize("saturate", [False, True])
def test_last_values_below_the_overflow(saturate):
    assert work("S+A", [(247, 50), (37, 20)], saturate=saturate) == (12640, 2, 2, 0)  # 247 -> 240
    assert work("S+W", [(100, 119), (37, 20)], saturate=saturate) == (11792, 2, 0, 2)  # 119 -> 112
    assert work("S+W", [(100, -128), (37, 20)], saturate=saturate) == (-12208, 2, 0, 2)  # -12800 + 592


def test_both_operands_overflow_or_saturate_together():
    # 255*127, four times: 4 * 256*128 = 131072; saturated 4 * 240*112 = 107520
    assert work("S+A", [(255, 127)] * 4) == (131072, 4, 4, 4)
    assert work("S+A", [(255, 127)] * 4, saturate=True) == (107520, 4, 4, 4)
    assert work("S+A", [(255, -128)] * 4) == (-131072, 4, 4, 4)
    assert work("S+A", [(255, -128)] * 4, saturate=True) == (-122880, 4, 4, 4)  # 4 * 240*-128


@pytest.mark.parametrize("saturate", [False, True])
def test_truncation_floors_and_ignores_saturate(saturate):
    options = {"rounding": "truncate", "saturate": saturate}
    # 47 -> 32, 255 -> 240: 32*50 + 240*20 = 1600 + 4800
    assert work("S+A", [(47, 50), (255, 20)], **options) == (6400, 2, 2, 0)
    # 127 -> 112, -17 -> -32: 100*112 + 37*-32 = 11200 - 1184
    assert work("S+W", [(100, 127), (37, -17)], **options) == (10016, 2, 0, 2)
    # -1 -> -16, 5 -> 0, 16 stays: 96*-16 + 0*48 + 16*16 = -1536 + 256
    assert work("S", [(100, -1), (5, 50), (16, 20), (0, 0)], **options) == (-1280, 3, 3, 3)


@pytest.mark.parametrize(
    ("value", "even", "floor"),
    [(24, 32, 16), (40, 32, 32), (56, 64, 48), (-24, -32, -32), (-40, -32, -48), (8, 0, 0), (-8, 0, -16)],
)
def test_ties_go_to_even(value, even, floor):
    # 1.5 -> 2, 2.5 -> 2, 3.5 -> 4, and with the other sign likewise; 0.5 -> 0
    assert reduce(value, True, ArrayConfig()) == even
    assert reduce(value, True, ArrayConfig(rounding="truncate")) == floor


@pytest.mark.parametrize("signed", [False, True])
def test_all_values_against_numpy_rounding(signed):
    values = np.arange(-128, 128) if signed else np.arange(256)
    nearest = [reduce(int(v), signed, ArrayConfig()) for v in values]
    saturated = [reduce(int(v), signed, ArrayConfig(saturate=True)) for v in values]
    truncated = [reduce(int(v), signed, ArrayConfig(rounding="truncate")) for v in values]
    np.testing.assert_array_equal(nearest, 16 * np.rint(values / 16))  # numpy rounds halves to even
    np.testing.assert_array_equal(saturated, np.minimum(nearest, 112 if signed else 240))
    np.testing.assert_array_equal(truncated, values & ~15)
    narrow = values[[not is_wide(int(v), signed) for v in values]]
    assert narrow.tolist() == (list(range(-8, 8)) if signed else list(range(16)))


# ------------------------------------------------------------------ signed activations


def test_signed_activations_reduce_like_weights():
    # -100 -> -96, 37 -> 32: -96*50 + 32*20 = -4800 + 640
    assert work("S+A", [(-100, 50), (37, 20)], signed=True) == (-4160, 2, 2, 0)
    # 120 -> 128, or 112 saturated: 128*50 + 640, 112*50 + 640; -128 stays: -6400 + 640
    assert work("S+A", [(120, 50), (37, 20)], signed=True) == (7040, 2, 2, 0)
    assert work("S+A", [(120, 50), (37, 20)], signed=True, saturate=True) == (6240, 2, 2, 0)
    assert work("S+A", [(-128, 50), (37, 20)], signed=True, saturate=True) == (-5760, 2, 2, 0)
    # -1 -> -16 when truncated under S: -16*50 + 32*20 = -800 + 640
    assert work("S", [(-1, 50), (37, 20)], signed=True, rounding="truncate") == (-160, 2, 2, 0)


def test_signed_activations_are_wide_outside_minus_8_to_7():
    # narrow -8 and 7: -8*50 + 7*20 = -400 + 140; wide -9 -> -16 and 8 -> 0: -16*50 + 0
    assert work("S+A", [(-8, 50), (7, 20)], signed=True) == (-260, 2, 0, 0)
    assert work("S+A", [(-9, 50), (8, 20)], signed=True) == (-800, 2, 2, 0)
    # 15 -> 16 signed, but narrow unsigned; 16 is wide in both: 16*50 + 16*20; 15*50 + 16*20
    assert work("S+A", [(15, 50), (16, 20)], signed=True) == (1120, 2, 2, 0)
    assert work("S+A", [(15, 50), (16, 20)]) == (1070, 2, 1, 0)


def test_weights_are_wide_outside_minus_8_to_7():
    # 100*-8 + 37*7 = -800 + 259; -9 -> -16 and 8 -> 0: 100*-16 + 0
    assert work("S+W", [(100, -8), (37, 7)]) == (-541, 2, 0, 0)
    assert work("S+W", [(100, -9), (37, 8)]) == (-1600, 2, 0, 2)

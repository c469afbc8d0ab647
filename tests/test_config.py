import dataclasses
import fractions
import math

import numpy as np
import pytest

from sysmt import ArrayConfig, ConfigError, Drain, Policy, Rounding
from sysmt.config import parse_number
from sysmt.hw.timing import gemm_cycles


def test_names_become_members_and_stay_strings():
    config = ArrayConfig(policy="S+Aw", drain="none", rounding="truncate")
    assert config.policy is Policy.SAW
    assert config.drain is Drain.NONE
    assert config.rounding is Rounding.TRUNCATE
    assert config.policy == "S+Aw"
    assert ArrayConfig(**config.to_record()) == config


def test_nine_policies():
    assert [p.value for p in Policy] == ["S", "A", "W", "Aw", "aW", "S+A", "S+W", "S+Aw", "S+aW"]
    assert [p.value for p in Policy if not p.skips_zeros] == ["A", "W", "Aw", "aW"]
    assert [p.value for p in Policy if p.reduced_operand == "weight"] == ["W", "aW", "S+W", "S+aW"]
    assert [p.value for p in Policy if p.needs_both_wide] == ["Aw", "aW", "S+Aw", "S+aW"]
    assert [p.value for p in Policy if p.reduces_always] == ["S"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 3}, r"threads=3.*1, 2 or 4"),
        ({"threads": 0}, r"1, 2 or 4"),
        ({"threads": "2"}, r"'2'.*str"),
        ({"threads": True}, r"True"),
        ({"rows": 0}, r"rows=0.*at least 1"),
        ({"cols": -1}, r"cols=-1"),
        ({"rows": 65537}, r"rows=65537 is too large; it must be at most 65,536"),
        ({"cols": 10**20}, r"cols=1.*at most 65,536"),
        ({"rows": 1.5}, r"1.5.*float"),
        ({"policy": "S+B"}, r"S\+B.*allowed.*S\+Aw"),
        ({"policy": "s+a"}, r"did you mean"),
        ({"drain": "seriel"}, r"did you mean 'serial'"),
        ({"rounding": None}, r"None"),
        ({"saturate": 1}, r"saturate=1"),
    ],
)
def test_wrong_values(changes, message):
    with pytest.raises(ConfigError, match=message):
        ArrayConfig(**changes)


def test_replace_validates_and_names_unknown_fields():
    assert ArrayConfig().replace(threads=4).threads == 4
    with pytest.raises(ConfigError, match="1, 2 or 4"):
        ArrayConfig().replace(threads=5)
    with pytest.raises(ConfigError, match=r"'row'.*'rows'"):
        ArrayConfig().replace(row=5)


def test_numpy_integers_are_fine_and_the_config_is_frozen():
    config = ArrayConfig(rows=np.int64(8))
    assert type(config.rows) is int
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rows = 3


@pytest.mark.parametrize(
    ("drain", "threads", "cycles"),
    [
        # 40 x 20 outputs on 16 x 16: 3 * 2 = 6 tiles; L = 100 / T
        ("serial", 1, 6 * (100 + 32 + 16 - 2)),
        ("serial", 4, 6 * (25 + 32 + 16 - 2)),
        ("overlapped", 2, 6 * (50 + 16 + 16 - 2) + 16),
        ("none", 2, 6 * (50 + 16 + 16 - 2)),
    ],
)
def test_cycles_by_hand(drain, threads, cycles):
    config = ArrayConfig(rows=16, cols=16, threads=threads, drain=drain)
    assert gemm_cycles(40, 20, 100, config) == cycles


@pytest.mark.parametrize("drain", list(Drain))
@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_no_tiles_no_cycles(drain, shape):
    assert gemm_cycles(*shape, ArrayConfig(drain=drain)) == 0


@pytest.mark.parametrize(
    "value", [1, 0.5, np.float32(0.5), np.int64(1), np.array(0.5), fractions.Fraction(1, 2)]
)
def test_numbers_of_every_kind_become_floats(value):
    number = parse_number(value, "share", "a number in (0, 1]", lambda share: 0 < share <= 1)
    assert type(number) is float
    assert number == value


@pytest.mark.parametrize(
    "value",
    [True, np.True_, np.array(True), "1", b"1", None, 1j, [1], np.ones(1), 10**400, 0, 2, math.nan, math.inf],
)
def test_what_is_no_number_of_the_range_is_refused_by_name(value):
    with pytest.raises(ConfigError, match=r"share=.*a number in \(0, 1\] is needed"):
        parse_number(value, "share", "a number in (0, 1]", lambda share: 0 < share <= 1)

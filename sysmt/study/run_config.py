"""The configuration of one run: every choice of `sysmt run`, validated, to and from TOML."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from sysmt.config import (
    ArrayConfig,
    Drain,
    Policy,
    RecalibrationMode,
    Rounding,
    parse_count,
    parse_name,
    parse_number,
    parse_recalibration,
    parse_threads,
)
from sysmt.cost.energy import TABLES
from sysmt.errors import ConfigError, nearest
from sysmt.nn.own_code import is_own_code

__all__ = ["RANDOM_WEIGHTS", "Choice", "RunConfig", "Setting"]

RANDOM_WEIGHTS = "random"
"""Stands for fresh weights: accuracy is chance then, but cycles and speed are not."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the network runs in one row of the results.

    Attributes
    ----------
    name : str
        ``"2T"``, ``"map"``, ``"4T throttled 1"``, ``"4T recalibrated"``, ...
    threads : int
        Threads of all simulated layers that `threads_map` does not name.
    threads_map : mapping of str to int
        Threads of single layers.
    throttled : int
        So many layers, those with the highest MSE, are lowered to the run's `throttle_to`.
    recalibrate : bool
        Recalibrate the BatchNorm statistics under this setting's noise first.
    """

    name: str
    threads: int
    threads_map: Mapping[str, int] = dataclasses.field(default_factory=dict)
    throttled: int = 0
    recalibrate: bool = False


NETWORK, ARRAY, CALIBRATION, SETTINGS, MACHINE = (
    "Network and data",
    "The array",
    "Calibration",
    "Settings to measure",
    "This machine",
)
"""Groups of choices, as ``--help`` shows them."""

Check = Callable[[Any, str], Any]
"""Returns the value of a field as it is kept, from what was given and the field's name; or raises."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What there is to say of one field of `RunConfig`: for its docstring, the command line and its check.

    Attributes
    ----------
    group : str
    help : str
    check : callable or None
    metavar, shown : str or None
        What ``--help`` shows as the value, and as the default.
    as_text : bool
        Whether the command line takes text that is parsed later.
    """

    group: str
    help: str
    check: Check | None = None
    metavar: str | None = None
    shown: str | None = None
    as_text: bool = False


def choice(default: Any, group: str, help: str, check: Check | None = None, **more: Any) -> Any:
    """Declare a field with everything that there is to say of it, once."""
    return dataclasses.field(default=default, metadata={"choice": Choice(group, help, check, **more)})


def count(minimum: int = 1, maximum: int | None = None) -> Check:
    """Check for an integer from `minimum` to `maximum`."""
    return lambda value, field: parse_count(value, field, minimum=minimum, maximum=maximum)


def number(what: str, allowed: Callable[[float], bool]) -> Check:
    """Check for a number; `what` names those that are allowed."""
    return lambda value, field: parse_number(value, field, what, allowed)


def name_of(kind: type[StrEnum]) -> Check:
    """Check for a member of an enum, or its name."""
    return lambda value, field: parse_name(kind, value, field)


def _thread_counts(given: Any) -> tuple[int, ...]:
    if isinstance(given, str | int) or not given:
        raise ConfigError(f"threads={given!r} is no list of thread counts, such as 1,2,4")
    counts = tuple(parse_threads(threads) for threads in given)
    if len(set(counts)) < len(counts):
        raise ConfigError(f"threads={','.join(map(str, counts))} lists a thread count twice")
    return counts


def _threads_by_layer(given: Any) -> dict[str, int]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"threads_map={given!r} is no table of threads by layer")
    return {name: parse_threads(threads, f"threads of layer {name!r}") for name, threads in given.items()}


def _described(cls: type[RunConfig]) -> type[RunConfig]:
    """Put the fields into the docstring, with the words that the command line has for them."""
    lines = [
        f"    {field.name} : {field.type}\n        {field.metadata['choice'].help}"
        for field in dataclasses.fields(cls)
    ]
    cls.__doc__ = f"{cls.__doc__}".replace("    FIELDS", "\n".join(lines))
    return cls


@_described
@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What one run measures, and how.

    Attributes
    ----------
    FIELDS

    Raises
    ------
    ConfigError
        If a value is outside what is listed above.
    """

    model: str = choice(
        "digits32",
        NETWORK,
        "Network: digits32, digits, resnet20 .. resnet110, mobilenet_v1, torchvision's name, timm:NAME, or a "
        "function of your own, FILE.py:NAME or MODULE:NAME, whose code is run.",
    )
    weights: str | None = choice(
        None,
        NETWORK,
        "Checkpoint: a path, torchvision:NAME, or random (where only cycles matter).",
        shown="digits32 and digits: trained on the spot and kept",
    )
    data: str | None = choice(
        None,
        NETWORK,
        "Images: digits32, digits, cifar10:DIR, npz:FILE, imagefolder:DIR, or a function of your own, "
        "FILE.py:NAME, whose code is run.",
        shown="digits32 and digits, for the models of these names",
    )
    train_data: str | None = choice(
        None,
        NETWORK,
        "Training images, where --data has none; same forms.",
        shown="those of --data",
    )
    classes: str | None = choice(
        None,
        NETWORK,
        "Names of the classes in the order of the network's outputs, one a line, for image folders.",
        metavar="FILE",
        shown="classes.txt beside the images, or the training folders",
    )
    preprocessing: str = choice(
        "auto", NETWORK, "auto (by image size), cifar, small, imagenet, digits or digits32."
    )
    image_size: int | None = choice(
        None, NETWORK, "Scale images to this side, in pixels.", count(), shown="as the preprocessing has it"
    )
    skip_bad_images: bool = choice(
        False, NETWORK, "Leave unreadable images out, with a warning, instead of stopping."
    )
    prune: float | None = choice(
        None,
        NETWORK,
        "Set this share of the weights, in [0, 1), to zero first: the smallest, without training.",
        number("a number in [0, 1)", lambda value: 0 <= value < 1),
        shown="none",
    )
    threads: tuple[int, ...] = choice(
        (1, 2, 4),
        SETTINGS,
        "Threads per PE, each a setting: a list of 1, 2, 4.",
        lambda value, field: _thread_counts(value),
        metavar="LIST",
        as_text=True,
    )
    threads_map: Mapping[str, int] | None = choice(
        None,
        SETTINGS,
        'One more setting, threads by layer: TOML lines such as "layer1.0.conv1" = 2; default for the rest.',
        lambda value, field: _threads_by_layer(value),
        metavar="FILE",
        shown="none",
        as_text=True,
    )
    throttle: int = choice(
        0,
        SETTINGS,
        "Measure settings again with this many layers, those of the highest MSE, lowered.",
        count(0),
        metavar="K",
    )
    throttle_to: int = choice(1, SETTINGS, "Threads that --throttle lowers layers to: 1 or 2.")
    recalibrate: RecalibrationMode | None = choice(
        None,
        SETTINGS,
        "Measure each setting again with BatchNorm recalibrated under its noise: ema (also if no mode is "
        "given), cumulative or final.",
        parse_recalibration,
        metavar="[MODE]",
        shown="off",
        as_text=True,
    )
    recalibration_images: int = choice(
        2048, SETTINGS, "Training images for that; fewer if there are fewer.", count()
    )
    images: int | None = choice(None, SETTINGS, "Test images to evaluate.", count(), shown="all")
    errors: bool = choice(
        False, SETTINGS, "Report each layer's SQNR (dB) and MSE against T = 1; twice the work."
    )
    policy: Policy = choice(
        Policy.SA, ARRAY, "What a collision reduces, and what spares it.", name_of(Policy)
    )
    rows: int = choice(16, ARRAY, "PE rows R: output pixels of a tile.")
    cols: int = choice(16, ARRAY, "PE columns C: output channels of a tile.")
    drain: Drain = choice(
        Drain.SERIAL, ARRAY, "How accumulators leave between tiles; sets the cycles.", name_of(Drain)
    )
    saturate: bool = choice(
        False, ARRAY, "Hold rounded operands in 4 bits (at most 240, +112) instead of 256, +128."
    )
    rounding: Rounding = choice(
        Rounding.NEAREST_EVEN, ARRAY, "How the low 4 bits of a reduced operand go.", name_of(Rounding)
    )
    first: bool = choice(False, ARRAY, "Simulate the first convolution, too.")
    linear: bool = choice(False, ARRAY, "Simulate fully connected layers, too.")
    depthwise: bool = choice(False, ARRAY, "Simulate depthwise convolutions, too.")
    functional: bool = choice(
        False, ARRAY, "Simulate calls of conv2d and linear that belong to no module, too."
    )
    clock_mhz: float | None = choice(
        None,
        ARRAY,
        "Clock, MHz: adds the array's latency per image and images/s.",
        number("a number above 0 MHz", lambda value: value > 0),
        shown="none",
    )
    energy: str | None = choice(
        None,
        ARRAY,
        "Energy table: 45nm, sysmt-micro2020, sysmt-rtl, or a TOML file of your own.",
        metavar="TABLE",
        shown="45nm",
    )
    calibration_images: int = choice(
        2048, CALIBRATION, "Training images for activation ranges; fewer if there are fewer.", count()
    )
    per_tensor: bool = choice(
        False, CALIBRATION, "One weight scale per layer instead of one per output channel."
    )
    percentile: float | None = choice(
        None,
        CALIBRATION,
        "Percentile in (0, 100] of an image's activations to use.",
        number("a number in (0, 100]", lambda value: 0 < value <= 100),
        shown="maximum",
    )
    reorder: bool = choice(False, CALIBRATION, "Pair often-wide positions of K with rarely-wide ones.")
    calibration: str | None = choice(
        None,
        CALIBRATION,
        "Use this file of `sysmt calibrate` instead of calibrating.",
        metavar="FILE",
        shown="calibrate",
    )
    batch_size: int = choice(
        128, MACHINE, "Images per batch; of the results only recalibrated ones depend on it.", count()
    )
    cpu_threads: int | None = choice(None, MACHINE, "CPU threads.", count(), shown="torch's choice")
    seed: int = choice(
        0, MACHINE, "Draws calibration images and augmentation, and random weights.", count(0, 2**63 - 1)
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, check = getattr(self, field.name), field.metadata["choice"].check
            if field.type == "bool" and not isinstance(value, bool):
                raise ConfigError(f"{field.name}={value!r} must be true or false")
            if field.type in ("str", "str | None") and not isinstance(value, str | None):
                raise ConfigError(f"{field.name}={value!r} must be a text")
            if check is not None and (value is not None or field.default is not None):
                object.__setattr__(self, field.name, check(value, field.name))
        self.array()  # raises where rows or columns are impossible
        if self.throttle_to not in (1, 2):
            raise ConfigError(
                f"throttle_to={self.throttle_to!r} is not possible; layers are lowered to 1 or 2"
            )
        if self.throttle and not any(count > self.throttle_to for count in self.threads):
            raise ConfigError(
                f"throttle={self.throttle} lowers layers to {self.throttle_to}T, but threads lists "
                f"nothing above that ({', '.join(map(str, self.threads))})"
            )
        if self.calibration is not None and (self.percentile is not None or self.reorder):
            raise ConfigError(
                "percentile and reorder are choices of calibration; a calibration file has made them already"
            )

    def array(self) -> ArrayConfig:
        """Return the array, with the first of the thread counts."""
        return ArrayConfig(
            rows=self.rows,
            cols=self.cols,
            threads=self.threads[0],
            policy=self.policy,
            drain=self.drain,
            saturate=self.saturate,
            rounding=self.rounding,
        )

    def settings(self) -> list[Setting]:
        """Return what to measure besides the float network, in order: the recalibrated settings last."""
        plain = [Setting(f"{count}T", count) for count in self.threads]
        if self.threads_map is not None:
            layers = {name: count for name, count in self.threads_map.items() if name != "default"}
            default = self.threads_map.get("default", max(self.threads))
            plain.append(Setting("map", default, layers))
        if self.throttle:
            plain += [
                Setting(f"{count}T throttled {self.throttle}", count, throttled=self.throttle)
                for count in self.threads
                if count > self.throttle_to
            ]
        if self.recalibrate is None:
            return plain
        return plain + [
            dataclasses.replace(setting, name=f"{setting.name} recalibrated", recalibrate=True)
            for setting in plain
        ]

    def to_record(self) -> dict[str, Any]:
        """Return plain values for TOML; relative paths become absolute, so that it works from anywhere."""
        record = dataclasses.asdict(self)
        record |= {"policy": self.policy.value, "drain": self.drain.value, "rounding": self.rounding.value}
        record["recalibrate"] = self.recalibrate.value if self.recalibrate else None
        record["threads"] = list(self.threads)
        for field in ("weights", "calibration", "classes"):
            if record[field] is not None and record[field] != RANDOM_WEIGHTS and ":" not in record[field]:
                record[field] = _absolute(record[field])
        if self.energy is not None and self.energy not in TABLES:
            record["energy"] = _absolute(self.energy)
        for field in ("model", "data", "train_data"):
            given = record[field] or ""
            kind, _, path = given.partition(":")
            if is_own_code(given):
                where, _, function = given.rpartition(":")
                record[field] = f"{_absolute(where)}:{function}" if where.endswith(".py") else given
            elif path and field != "model":
                record[field] = f"{kind}:{_absolute(path)}"
        return {key: value for key, value in record.items() if value is not None}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str = "") -> RunConfig:
        """Make a configuration from plain values, such as TOML's; a `ConfigError` starts with `where`."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in record:
            if key not in known:
                raise ConfigError(
                    f"{where or 'the configuration'} has an unknown entry {key!r}{nearest(key, known)}"
                )
        try:
            return cls(**record)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())

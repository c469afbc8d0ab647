"""The configuration of one run: every choice of `sysmt run`, validated, to and from TOML."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
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
    parse_recalibration,
    parse_threads,
)
from sysmt.cost.energy import TABLES
from sysmt.errors import ConfigError, nearest

__all__ = ["RANDOM_WEIGHTS", "RunConfig", "Setting"]

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


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What one run measures, and how.

    Attributes
    ----------
    model : str
        A name that `sysmt.nn.networks.models.build_model` knows.
    weights : str or None
        Path, ``"torchvision:NAME"`` or ``"random"``; None for ``"digits32"`` and
        ``"digits"``, which are trained on the spot.
    data, train_data : str or None
        Data specifications (see `sysmt.nn.data.labelled_images.open_data`); the second for training
        images, where `data` has none. None means ``"digits32"`` or ``"digits"`` for the model of that name.
    preprocessing : str
        Preset name, or ``"auto"``.
    image_size : int or None
        Side of the input, pixels.
    skip_bad_images : bool
        Leave unreadable images out instead of stopping.
    images : int or None
        Test images to evaluate; None for all.
    batch_size : int
        Images per batch; no result but recalibrated statistics depends on it.
    calibration_images, recalibration_images : int
        Training images to use; fewer if there are fewer.
    threads : tuple of int
        Uniform settings, each T in 1, 2, 4.
    threads_map : mapping of str to int, or None
        One more setting with threads by layer; ``"default"`` is for the layers that it does not name.
    policy, rows, cols, drain, saturate, rounding
        The array; see `ArrayConfig`.
    first, linear, depthwise : bool
        Simulate the first convolution, Linear layers, depthwise convolutions too.
    per_tensor : bool
        One weight scale per layer instead of one per output channel.
    percentile : float or None
        Percentile in (0, 100] of each image's activations, instead of the maximum.
    reorder : bool
        Pair often-wide positions of K with rarely-wide ones.
    errors : bool
        Report each layer's SQNR and MSE against T = 1.
    calibration : str or None
        File that `sysmt calibrate` wrote, instead of calibrating.
    recalibrate : RecalibrationMode or None
        ``"ema"``, ``"cumulative"`` or ``"final"``: measure each setting once more, recalibrated.
    throttle : int
        Measure each setting above `throttle_to` once more, with this many layers lowered to it.
    throttle_to : int
        1 or 2.
    prune : float or None
        Share of weights in [0, 1) to set to zero first, the smallest of all; no training follows.
    clock_mhz : float or None
        Clock of the array, MHz, for latencies.
    energy : str or None
        Energy table: a name or a TOML file, as `sysmt.cost.energy.load_table` takes it; None for 45 nm.
    cpu_threads : int or None
        CPU threads of this machine; None for torch's own choice.
    seed : int
        Draws calibration images, augmentation, and random weights.

    Raises
    ------
    ConfigError
        If a value is outside what is listed above.
    """

    model: str = "digits32"
    weights: str | None = None
    data: str | None = None
    train_data: str | None = None
    preprocessing: str = "auto"
    image_size: int | None = None
    skip_bad_images: bool = False
    images: int | None = None
    batch_size: int = 128
    calibration_images: int = 2048
    recalibration_images: int = 2048
    threads: tuple[int, ...] = (1, 2, 4)
    threads_map: Mapping[str, int] | None = None
    policy: Policy = Policy.SA
    rows: int = 16
    cols: int = 16
    drain: Drain = Drain.SERIAL
    saturate: bool = False
    rounding: Rounding = Rounding.NEAREST_EVEN
    first: bool = False
    linear: bool = False
    depthwise: bool = False
    per_tensor: bool = False
    percentile: float | None = None
    reorder: bool = False
    errors: bool = False
    calibration: str | None = None
    recalibrate: RecalibrationMode | None = None
    throttle: int = 0
    throttle_to: int = 1
    prune: float | None = None
    clock_mhz: float | None = None
    energy: str | None = None
    cpu_threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        def put(field: str, value: object) -> None:
            object.__setattr__(self, field, value)

        for name in ("batch_size", "calibration_images", "recalibration_images"):
            put(name, parse_count(getattr(self, name), name))
        for name in ("images", "image_size", "cpu_threads"):
            if getattr(self, name) is not None:
                put(name, parse_count(getattr(self, name), name))
        for name in ("seed", "throttle"):
            put(name, parse_count(getattr(self, name), name, minimum=0))
        put("threads", self._parse_threads())
        if self.threads_map is not None:
            counts = {
                name: parse_threads(count, f"threads of layer {name!r}")
                for name, count in self.threads_map.items()
            }
            put("threads_map", counts)
        array = self.array()
        put("policy", array.policy)
        put("drain", array.drain)
        put("rounding", array.rounding)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise ConfigError(f"{field.name}={value!r} must be true or false")
            if field.type in ("str", "str | None") and not isinstance(value, str | None):
                raise ConfigError(f"{field.name}={value!r} must be a text")
        if self.recalibrate is not None:
            put("recalibrate", parse_recalibration(self.recalibrate, "recalibrate"))
        if self.throttle_to not in (1, 2):
            raise ConfigError(
                f"throttle_to={self.throttle_to!r} is not possible; layers are lowered to 1 or 2"
            )
        if self.throttle and not any(count > self.throttle_to for count in self.threads):
            raise ConfigError(
                f"throttle={self.throttle} lowers layers to {self.throttle_to}T, but threads lists "
                f"nothing above that ({', '.join(map(str, self.threads))})"
            )
        self._check_number("percentile", lambda value: 0 < value <= 100, "in (0, 100]")
        self._check_number("prune", lambda value: 0 <= value < 1, "in [0, 1)")
        self._check_number("clock_mhz", lambda value: value > 0, "above 0 MHz")
        if self.calibration is not None and (self.percentile is not None or self.reorder):
            raise ConfigError(
                "percentile and reorder are choices of calibration; a calibration file has made them already"
            )

    def _parse_threads(self) -> tuple[int, ...]:
        given = self.threads
        if isinstance(given, str | int) or not given:
            raise ConfigError(f"threads={given!r} is no list of thread counts, such as 1,2,4")
        counts = tuple(parse_threads(count) for count in given)
        if len(set(counts)) < len(counts):
            raise ConfigError(f"threads={','.join(map(str, counts))} lists a thread count twice")
        return counts

    def _check_number(self, field: str, allowed: Any, words: str) -> None:
        value = getattr(self, field)
        if value is None:
            return
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or not allowed(value):
            raise ConfigError(f"{field}={value!r} is out of range; it must be a number {words}")
        object.__setattr__(self, field, float(value))

    def array(self) -> ArrayConfig:
        """Return the array, with the first of the thread counts."""
        return ArrayConfig(
            rows=self.rows,
            cols=self.cols,
            threads=self.threads[0],
            policy=parse_name(Policy, self.policy, "policy"),
            drain=parse_name(Drain, self.drain, "drain"),
            saturate=self.saturate,
            rounding=parse_name(Rounding, self.rounding, "rounding"),
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
        for field in ("weights", "calibration"):
            if record[field] is not None and record[field] != RANDOM_WEIGHTS and ":" not in record[field]:
                record[field] = _absolute(record[field])
        if self.energy is not None and self.energy not in TABLES:
            record["energy"] = _absolute(self.energy)
        for field in ("data", "train_data"):
            kind, _, path = (record[field] or "").partition(":")
            if path:
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

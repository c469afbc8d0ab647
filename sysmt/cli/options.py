"""The choices of `RunConfig` as options, declared once for all commands that take some of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from sysmt.config import Drain, Policy, Rounding
from sysmt.errors import ConfigError
from sysmt.study.run_config import RunConfig

__all__ = [
    "ARRAY",
    "CALIBRATION",
    "EVERYTHING",
    "LAYERS",
    "MACHINE",
    "NETWORK",
    "StudyName",
    "StudyNew",
    "StudyOut",
    "StudyOverwrite",
    "StudyPlots",
    "StudyRetry",
    "StudyStorage",
    "config_values",
    "study_option",
    "takes",
]

_NETWORK, _ARRAY, _CALIBRATION, _SETTINGS, _MACHINE = (
    "Network and data",
    "The array",
    "Calibration",
    "Settings to measure",
    "This machine",
)


def _option(kind: Any, panel: str, help: str, **more: Any) -> Any:
    return Annotated[kind, typer.Option(help=help, rich_help_panel=panel, **more)]


_OPTIONS: dict[str, Any] = {
    "model": _option(
        str,
        _NETWORK,
        "Network: digits32, digits, resnet20 .. resnet110, mobilenet_v1, or torchvision's name.",
    ),
    "weights": _option(
        str | None,
        _NETWORK,
        "Checkpoint: a path, torchvision:NAME, or random (where only cycles matter).",
        show_default="digits32 and digits: trained on the spot and kept",
    ),
    "data": _option(
        str | None,
        _NETWORK,
        "Images: digits32, digits, cifar10:DIR, npz:FILE or imagefolder:DIR.",
        show_default="digits32 and digits, for the models of these names",
    ),
    "train_data": _option(
        str | None,
        _NETWORK,
        "Training images, where --data has none; same forms.",
        show_default="those of --data",
    ),
    "preprocessing": _option(
        str, _NETWORK, "auto (by image size), cifar, small, imagenet, digits or digits32."
    ),
    "image_size": _option(
        int | None,
        _NETWORK,
        "Scale images to this side, in pixels.",
        show_default="as the preprocessing has it",
    ),
    "skip_bad_images": _option(
        bool, _NETWORK, "Leave unreadable images out, with a warning, instead of stopping."
    ),
    "prune": _option(
        float | None,
        _NETWORK,
        "Set this share of the weights, in [0, 1), to zero first: the smallest, without training.",
        show_default="none",
    ),
    "threads": _option(str, _SETTINGS, "Threads per PE, each a setting: a list of 1, 2, 4.", metavar="LIST"),
    "threads_map": _option(
        Path | None,
        _SETTINGS,
        'One more setting, threads by layer: TOML lines such as "layer1.0.conv1" = 2; default for the rest.',
        metavar="FILE",
        show_default="none",
    ),
    "throttle": _option(
        int,
        _SETTINGS,
        "Measure settings again with this many layers, those of the highest MSE, lowered.",
        metavar="K",
    ),
    "throttle_to": _option(int, _SETTINGS, "Threads that --throttle lowers layers to: 1 or 2."),
    "recalibrate": _option(
        str | None,
        _SETTINGS,
        "Measure each setting again with BatchNorm recalibrated under its noise: ema (also if no mode is "
        "given), cumulative or final.",
        metavar="[MODE]",
        show_default="off",
    ),
    "recalibration_images": _option(int, _SETTINGS, "Training images for that; fewer if there are fewer."),
    "images": _option(int | None, _SETTINGS, "Test images to evaluate.", show_default="all"),
    "errors": _option(
        bool, _SETTINGS, "Report each layer's SQNR (dB) and MSE against T = 1; twice the work."
    ),
    "policy": _option(Policy, _ARRAY, "What a collision reduces, and what spares it."),
    "rows": _option(int, _ARRAY, "PE rows R: output pixels of a tile."),
    "cols": _option(int, _ARRAY, "PE columns C: output channels of a tile."),
    "drain": _option(Drain, _ARRAY, "How accumulators leave between tiles; sets the cycles."),
    "saturate": _option(
        bool, _ARRAY, "Hold rounded operands in 4 bits (at most 240, +112) instead of 256, +128."
    ),
    "rounding": _option(Rounding, _ARRAY, "How the low 4 bits of a reduced operand go."),
    "first": _option(bool, _ARRAY, "Simulate the first convolution, too."),
    "linear": _option(bool, _ARRAY, "Simulate fully connected layers, too."),
    "depthwise": _option(bool, _ARRAY, "Simulate depthwise convolutions, too."),
    "clock_mhz": _option(
        float | None,
        _ARRAY,
        "Clock, MHz: adds the array's latency per image and images/s.",
        show_default="none",
    ),
    "energy": _option(
        str | None,
        _ARRAY,
        "Energy table: 45nm, sysmt-micro2020, sysmt-rtl, or a TOML file of your own.",
        metavar="TABLE",
        show_default="45nm",
    ),
    "calibration_images": _option(
        int, _CALIBRATION, "Training images for activation ranges; fewer if there are fewer."
    ),
    "per_tensor": _option(
        bool, _CALIBRATION, "One weight scale per layer instead of one per output channel."
    ),
    "percentile": _option(
        float | None,
        _CALIBRATION,
        "Percentile in (0, 100] of an image's activations to use.",
        show_default="maximum",
    ),
    "reorder": _option(bool, _CALIBRATION, "Pair often-wide positions of K with rarely-wide ones."),
    "calibration": _option(
        str | None,
        _CALIBRATION,
        "Use this file of `sysmt calibrate` instead of calibrating.",
        metavar="FILE",
        show_default="calibrate",
    ),
    "batch_size": _option(
        int, _MACHINE, "Images per batch; of the results only recalibrated ones depend on it."
    ),
    "cpu_threads": _option(int | None, _MACHINE, "CPU threads.", show_default="torch's choice"),
    "seed": _option(int, _MACHINE, "Draws calibration images and augmentation."),
}

NETWORK = ("model", "weights", "data", "train_data", "preprocessing", "image_size", "skip_bad_images")
ARRAY = ("policy", "rows", "cols", "drain", "saturate", "rounding")
LAYERS = ("first", "linear", "depthwise")
CALIBRATION = ("calibration_images", "per_tensor", "percentile", "reorder")
MACHINE = ("batch_size", "cpu_threads", "seed")
EVERYTHING = tuple(_OPTIONS)


def study_option(help: str, **more: Any) -> Any:
    """Declare an option of the commands that work on a study."""
    return typer.Option(help=help, rich_help_panel="Study", **more)


StudyOut = Annotated[
    Path | None,
    study_option(
        "Directory for the results; the same command goes on with what is there.",
        metavar="DIR",
        show_default="results/COMMAND-MODEL-n",
    ),
]
StudyOverwrite = Annotated[bool, study_option("Start anew in --out.")]
StudyStorage = Annotated[
    str | None,
    study_option(
        "Database for the study, such as postgresql://USER@HOST/DB.",
        metavar="URL",
        show_default="study.db in --out",
    ),
]
StudyName = Annotated[
    str | None, study_option("Name of the study in its storage.", show_default="COMMAND MODEL")
]
StudyNew = Annotated[
    bool,
    study_option(
        "Without --out, begin another study although one of the same configuration was stopped.",
        show_default=False,
    ),
]
StudyRetry = Annotated[
    bool, study_option("Take up again the points that ended three workers each.", show_default=False)
]
StudyPlots = Annotated[bool, study_option("Draw the plots.")]


def takes(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the named options of `RunConfig`, before its own.

    The command's first parameter is then ``chosen``: a dict of those that stand on the command line,
    in the form that `RunConfig` takes; the others keep their defaults.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        keyword = inspect.Parameter.KEYWORD_ONLY
        shared = [
            inspect.Parameter(name, keyword, default=_shown(defaults[name]), annotation=_OPTIONS[name])
            for name in names
        ]
        context = inspect.Parameter("context", keyword, annotation=typer.Context)

        def with_options(context: typer.Context, **values: Any) -> None:
            chosen = {name: values.pop(name) for name in names}
            command(config_values(context, chosen), **values)

        parameters = [context, *shared, *(parameter.replace(kind=keyword) for parameter in own)]
        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
        return with_options

    return decorate


def _shown(default: Any) -> Any:
    return ",".join(map(str, default)) if isinstance(default, tuple) else default


def config_values(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """Keep the values that stand on the command line, and parse those that typer leaves as text."""
    chosen = {}
    for name, value in values.items():
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        if name == "threads":
            value = _parse_list(value)
        elif name == "threads_map":
            from sysmt.study.thread_maps import read_threads_map

            value = read_threads_map(value)
        chosen[name] = value
    return chosen


def _parse_list(text: str) -> tuple[int, ...]:
    parts: Iterable[str] = (part.strip() for part in text.split(","))
    try:
        return tuple(int(part) for part in parts)
    except ValueError:
        raise ConfigError(f"threads={text!r} is no list of thread counts, such as 1,2,4") from None

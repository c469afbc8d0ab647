"""The choices of `RunConfig` as options, declared once for all commands that take some of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from sysmt.errors import ConfigError
from sysmt.study.run_config import Choice, RunConfig

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


def _option(field: dataclasses.Field[Any], kind: Any) -> Any:
    """Make an option of a field of `RunConfig`, from what the field says of itself."""
    choice: Choice = field.metadata["choice"]
    if choice.as_text:
        kind = Path | None if field.name == "threads_map" else str | None if field.default is None else str
    more: dict[str, Any] = {"metavar": choice.metavar} if choice.metavar else {}
    more |= {"show_default": choice.shown} if choice.shown else {}
    return Annotated[kind, typer.Option(help=choice.help, rich_help_panel=choice.group, **more)]


_HINTS = get_type_hints(RunConfig)
_OPTIONS = {field.name: _option(field, _HINTS[field.name]) for field in dataclasses.fields(RunConfig)}

NETWORK = (
    "model",
    "weights",
    "data",
    "train_data",
    "classes",
    "preprocessing",
    "image_size",
    "skip_bad_images",
)
ARRAY = ("policy", "rows", "cols", "drain", "saturate", "rounding")
LAYERS = ("first", "linear", "depthwise", "functional")
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

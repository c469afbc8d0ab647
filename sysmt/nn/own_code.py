"""Functions of the user's own, by specification: ``path/to/net.py:build``, ``package.module:factory``.

Such a specification runs the code that it names, with all that this code does on import.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sysmt.errors import ConfigError, SysmtError, nearest

__all__ = ["call_own", "is_own_code", "own_file", "takes_own"]

_SPECIFICATION = re.compile(r"(?P<where>.+\.py|[A-Za-z_]\w*(\.\w+)*):(?P<name>[A-Za-z_]\w*)")


def is_own_code(spec: str) -> bool:
    """Whether a specification names a function in a file or a module: ``FILE.py:NAME``, ``MODULE:NAME``."""
    match = _SPECIFICATION.fullmatch(spec)
    return match is not None and (match["where"].endswith(".py") or "." in match["where"])


def own_file(spec: str) -> Path | None:
    """Return the file that holds the code, for a hash of it; None where it cannot be told."""
    where = spec.rpartition(":")[0]
    if where.endswith(".py"):
        return Path(where).expanduser()
    found = importlib.util.find_spec(where)
    return Path(found.origin) if found is not None and found.origin else None


def call_own(spec: str, error: type[SysmtError] = ConfigError, **options: Any) -> Any:
    """Call the function that a specification names with those of `options` that it takes and are not None.

    Parameters
    ----------
    spec : str
        Of the form that `is_own_code` recognises.
    error : type
        What is raised for a missing file or function, and from anything that the user's code raises.
    **options
        Such as ``num_classes=10``.
    """
    function = _function(spec, error)
    given = {key: value for key, value in options.items() if value is not None and _takes(function, key)}
    try:
        return function(**given)
    except Exception as problem:  # the user's code may raise whatever it likes
        raise error(f"{spec} raised {type(problem).__name__}: {problem}") from problem


def takes_own(spec: str, name: str, error: type[SysmtError] = ConfigError) -> bool:
    """Whether the function that a specification names has a parameter of this name."""
    return _takes(_function(spec, error), name)


def _function(spec: str, error: type[SysmtError]) -> Callable[..., Any]:
    where, _, name = spec.rpartition(":")
    module = _module(where, error)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise error(
            f"{where} has no function {name!r}{nearest(name, known)}; it has {', '.join(known) or 'none'}"
        )
    found: Callable[..., Any] = function
    return found


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name, or takes any."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _module(where: str, error: type[SysmtError]) -> ModuleType:
    """Import a file or a module, once."""
    import sysmt.nn.torchvision_import  # noqa: F401  (their import of torchvision may need its remedy)

    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except Exception as problem:
            raise error(f"{where} cannot be imported: {type(problem).__name__}: {problem}") from problem
    path = Path(where).expanduser().absolute()
    if not os.path.isfile(path):
        raise error(f"{path} is missing; a Python file is needed")
    content = path.read_bytes()
    key = hashlib.sha256(os.fsencode(path) + b"\0" + content).hexdigest()[:16]
    name = f"sysmt_own_{path.stem}_{key}"  # a changed file is another module; pickles find it by this name
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as problem:
        del sys.modules[name]
        raise error(f"{path} cannot be imported: {type(problem).__name__}: {problem}") from problem
    return module

"""`sysmt info`: what is installed here, and what the kernels can use."""

from __future__ import annotations

import json
import os
import platform
from typing import Annotated, Any

import typer

import sysmt
from sysmt.errors import PathError

__all__ = ["info"]


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show versions, the processor, kernel paths and whether the compiled parts work."""
    facts = _facts()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            for line, text in enumerate(value if isinstance(value, list) else [value]):
                print(f"{'' if line else name:{width}}  {'-' if text is None else text}")


def _facts() -> dict[str, Any]:
    return {
        "sysmt": sysmt.__version__,
        "python": platform.python_version(),
        **_kernels(),
        **_processor(),
        **_libraries(),
    }


def _kernels() -> dict[str, Any]:
    try:
        from sysmt.hw import _native, cycle, kernels
    except ImportError as error:
        return {"compiled_modules": f"cannot be loaded: {error}"}
    facts: dict[str, Any] = {
        "compiled_modules": [str(_native.__file__), str(cycle.__file__)],
        "kernel_paths": list(kernels.available_paths()),
        "SYSMT_PATH": os.environ.get("SYSMT_PATH"),
    }
    try:
        facts["active_path"] = kernels.active_path()
    except PathError as error:
        facts["active_path"] = f"error: {error}"
    return facts


def _processor() -> dict[str, Any]:
    from sysmt.study.run_directory import processor_name

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": processor_name(), "cpus_usable": usable, "system": platform.platform()}


def _libraries() -> dict[str, Any]:
    import numpy as np
    import torch

    from sysmt.files import cache_directory

    try:
        from sysmt.nn.torchvision_import import torchvision

        vision = torchvision.__version__
    except Exception as error:  # whatever a broken installation raises is the answer here
        vision = f"cannot be loaded: {error}"
    return {
        "numpy": np.__version__,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_mkldnn": torch.backends.mkldnn.is_available(),
        "torchvision": vision,
        "cache": str(cache_directory()),
    }

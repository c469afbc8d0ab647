"""The one place that imports torchvision.

A CPU-only torch cannot load the compiled operators of a torchvision wheel that was built for CUDA, and
torchvision's import then fails, because it registers shape functions for two operators that do not
exist. Networks, transforms and data sets need neither operator, so their bare schemas are enough.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

__all__ = ["torchvision"]

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _load_compiled_operators() -> None:
    """Load torchvision's own operators where they can be: defining a schema twice would fail."""
    spec = importlib.util.find_spec("torchvision")
    for folder in (spec and spec.submodule_search_locations) or ():
        for library in sorted(Path(folder).glob("_C.*")):
            try:
                torch.ops.load_library(str(library))
            except OSError:  # built for another torch or for CUDA; the schemas stand in for it
                continue


def _define_missing_schemas() -> None:
    """Define the schemas that torchvision's import expects and nothing has defined so far."""
    if "torchvision" in sys.modules:
        return
    _load_compiled_operators()
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema.removeprefix(name))


_define_missing_schemas()

import torchvision  # noqa: E402

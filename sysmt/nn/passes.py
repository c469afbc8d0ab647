"""Passing images through a network: batches of what loaders give, and modules' modes, put back afterwards."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from sysmt.errors import CalibrationError

__all__ = ["evaluation_mode", "image_batches", "kept_modes"]


def image_batches(loader: Iterable[Any], images: int) -> Iterator[torch.Tensor]:
    """Yield input batches of exactly `images` images in all: the last batch is cut.

    Parameters
    ----------
    loader : iterable
        Of input tensors, or of (input, target, ...) tuples.
    images : int
        How many to use; fewer in the loader warn.

    Raises
    ------
    CalibrationError
        If the loader gives something else, or nothing.
    """
    if isinstance(loader, torch.Tensor):
        raise CalibrationError("the loader is a tensor; give a list of batches, such as [tensor]")
    seen = 0
    for item in loader:
        batch = item[0] if isinstance(item, Sequence) and not isinstance(item, str) and len(item) else item
        if not isinstance(batch, torch.Tensor) or batch.ndim < 1:
            raise CalibrationError(
                f"the loader gave {type(item).__name__}; batches must be tensors or (tensor, target) pairs"
            )
        batch = batch[: images - seen]
        seen += batch.shape[0]
        if batch.shape[0]:
            yield batch
        if seen >= images:
            return
    if not seen:
        raise CalibrationError("the loader gave no images")
    warnings.warn(f"the loader gave {seen} images; {images} were asked for", stacklevel=3)


@contextlib.contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Restore every module's `training` flag after the block.

    Flags are set one by one: `train` and `eval` may be overridden, and do not restore mixed states.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the network in eval mode without gradients, and restore every module's flag afterwards."""
    with kept_modes(model), torch.no_grad():
        model.eval()
        yield

"""Passing images through a network: batches of what loaders give, and modules' modes, put back afterwards."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from sysmt.errors import CalibrationError, SysmtError

__all__ = ["check_loader", "evaluation_mode", "image_batches", "input_batch", "kept_modes"]

_GIVE_A_LOADER = "give batches, as torch.utils.data.DataLoader(dataset, batch_size=128) makes them"


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
        If the loader gives something else, single images such as a `Dataset` holds, or nothing.
    """
    check_loader(loader, CalibrationError)
    seen = 0
    for item in loader:
        batch = input_batch(item, CalibrationError)[: images - seen]
        seen += batch.shape[0]
        if batch.shape[0]:
            yield batch
        if seen >= images:
            return
    if not seen:
        raise CalibrationError("the loader gave no images")
    warnings.warn(f"the loader gave {seen} images; {images} were asked for", stacklevel=3)


def check_loader(loader: object, error: type[SysmtError]) -> None:
    """Raise `error` if an object holds single images, or is nothing to iterate over."""
    kind = type(loader).__name__
    if isinstance(loader, torch.Tensor):
        raise error("the loader is a tensor; give a list of batches, such as [tensor]")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise error(f"the loader is a Dataset ({kind}), which holds single images; {_GIVE_A_LOADER}")
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise error(f"the loader is a {kind}, which cannot be iterated over; {_GIVE_A_LOADER}")


def input_batch(item: Any, error: type[SysmtError]) -> torch.Tensor:
    """Return the inputs of what a loader gave: a batch, or a tuple that starts with one."""
    parts = item if isinstance(item, Sequence) and not isinstance(item, str) and len(item) else [item]
    batch = parts[0]
    if not isinstance(batch, torch.Tensor) or batch.ndim < 1:
        raise error(
            f"the loader gave {type(item).__name__}; batches must be tensors or (tensor, target) pairs"
        )
    target = parts[1] if len(parts) > 1 and batch.ndim < 4 else None  # four axes are a batch of images
    if isinstance(target, Number | np.generic) or (isinstance(target, torch.Tensor) and not target.ndim):
        raise error(
            f"the loader gave one target for inputs of shape {tuple(batch.shape)}: these are single images, "
            f"not batches; {_GIVE_A_LOADER}"
        )
    return batch


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

"""Accuracy and loss on labelled images, and what is refused as such."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sysmt.errors import DataError, SysmtError
from sysmt.nn.data.sources import CLASSES_FILE
from sysmt.nn.passes import check_loader, evaluation_mode, input_batch
from sysmt.progress import progress_bar

__all__ = ["Evaluation", "check_labels", "device_of", "evaluate", "labelled_batches", "logits_of"]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a network does on labelled images.

    Attributes
    ----------
    top1, top5 : float
        Share of images whose label is the largest logit, or among the five largest (or among
        all, where there are fewer), in [0, 1].
    loss : float
        Mean cross-entropy, in nats.
    images : int
    correct : bool array (images,)
        Whether each image's largest logit is right, in the loader's order: for paired comparisons.
    seconds : float
    """

    top1: float
    top5: float
    loss: float
    images: int
    correct: np.ndarray = dataclasses.field(repr=False, compare=False)
    seconds: float = dataclasses.field(compare=False)

    def to_record(self) -> dict[str, int | float]:
        """Return plain values, one per table column."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "images": self.images,
            "seconds": self.seconds,
        }


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    progress: bool = True,
    what: str = "evaluating",
) -> Evaluation:
    """Measure accuracy and loss in evaluation mode, which is left again afterwards.

    Parameters
    ----------
    model : nn.Module
        Runs where its parameters are; a simulator attached to it runs too.
    loader : iterable of (inputs, labels)
        Such as `sysmt.nn.data.labelled_images.Loader`.
    progress : bool
        Show progress on stderr.
    what : str
        The progress bar's text.

    Returns
    -------
    Evaluation

    Raises
    ------
    DataError
        If there are no images, or labels that the network has no logit for.
    """
    device = device_of(model)
    correct: list[Tensor] = []
    top5 = 0
    loss = 0.0
    start = time.perf_counter()
    with (
        evaluation_mode(model),
        torch.inference_mode(),
        progress_bar(what, getattr(loader, "images", None), enabled=progress) as bar,
    ):
        for inputs, labels in labelled_batches(loader):
            logits = logits_of(model, inputs.to(device)).float().cpu()
            check_labels(logits, labels, loader)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            correct.append(logits.argmax(dim=1) == labels)
            largest = logits.topk(min(5, logits.shape[1]), dim=1).indices
            top5 += int((largest == labels[:, None]).any(dim=1).sum())
            bar.advance(len(labels))
    if not correct:
        raise DataError("the loader gave no images; there is nothing to evaluate")
    hits = torch.cat(correct).numpy()
    images = len(hits)
    seconds = time.perf_counter() - start
    return Evaluation(float(hits.mean()), top5 / images, loss / images, images, hits, seconds)


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Run a network; raise `DataError` where a network in float cannot take such images, or gives no logits.

    What an attached simulator raises passes through as it is.
    """
    try:
        logits = model(inputs)
    except (SysmtError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        if any("forward" in vars(module) for module in model.modules()):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{type(model).__name__} does not take images of shape {tuple(inputs.shape[1:])} (channels, "
            f"height, width): {reason}"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape[:-1] != inputs.shape[:1]:
        what = (
            f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"type {type(logits).__name__}"
        )
        raise DataError(
            f"{type(model).__name__} gives an output of {what} for {len(inputs)} images; logits "
            "(images, classes) are needed"
        )
    return logits


def labelled_batches(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a loader; raise `DataError` for what is no (inputs, labels) pair of tensors."""
    check_loader(loader, DataError)
    for item in loader:
        inputs = input_batch(item, DataError)
        if not isinstance(item, Sequence) or len(item) != 2 or not isinstance(item[1], Tensor):
            raise DataError(
                f"the loader gave {type(item).__name__}; pairs (inputs, labels) of tensors are needed"
            )
        labels = item[1]
        if labels.shape != inputs.shape[:1] or (len(labels) and labels.is_floating_point()):
            raise DataError(
                f"the loader gave inputs of shape {tuple(inputs.shape)} with labels of shape "
                f"{tuple(labels.shape)} and {labels.dtype}; one integer per image is needed"
            )
        yield inputs, labels


def check_labels(logits: Tensor, labels: Tensor, loader: object) -> None:
    """Refuse labels that the network has no logit for, and classes that it does not share."""
    classes = logits.shape[1]
    names = getattr(loader, "class_names", None)
    if names is not None and len(names) != classes:
        raise DataError(
            f"the images have {len(names)} classes, the network {classes}: labels would not fit"
            + (
                ". Where class folders are only some of the network's, name all of these in their order, one "
                f"a line, in a file: {CLASSES_FILE} beside the folders, or open_data(..., classes=FILE)"
                if len(names) < classes
                else ""
            )
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"labels go from {int(labels.min())} to {int(labels.max())}, the network has {classes} classes"
        )


def device_of(model: nn.Module) -> torch.device:
    """Return where a network's first parameter is; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

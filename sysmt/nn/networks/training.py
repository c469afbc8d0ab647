"""The training loop that everything in sysmt shares."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sysmt.config import parse_count, parse_number
from sysmt.errors import ConfigError, DataError, DivergedError, WeightsError
from sysmt.files import written_whole
from sysmt.nn.batchnorm.training_statistics import BatchStatistics, batch_statistics, check_statistics
from sysmt.nn.data.labelled_images import ImageData
from sysmt.nn.networks.checkpoints import read_torch_file, refresh_masked
from sysmt.nn.networks.evaluation import (
    Evaluation,
    check_labels,
    device_of,
    evaluate,
    labelled_batches,
    logits_of,
)
from sysmt.nn.networks.optimizers import Optimizer, Schedule, make_optimizer, make_scheduler
from sysmt.nn.passes import kept_modes
from sysmt.progress import Bar, progress_bar

__all__ = ["Evaluation", "History", "evaluate", "train"]


@dataclasses.dataclass(frozen=True)
class History:
    """What training did, epoch by epoch.

    Attributes
    ----------
    epochs : tuple of dict
        One record per epoch: epoch (from 1), lr at its end, loss and top1 over the augmented
        training images while they were learned, seconds, and test_top1 where it was asked for.
    tests : tuple of dict
        One record per test that fell due after a number of steps: step (from 1), epochs (done by
        then, a fraction) and test_top1.
    """

    epochs: tuple[dict[str, float], ...]
    tests: tuple[dict[str, float], ...] = ()

    @property
    def seconds(self) -> float:
        """Time of all epochs together."""
        return sum(record["seconds"] for record in self.epochs)

    def to_records(self) -> list[dict[str, float]]:
        """Return one flat record per epoch."""
        return [dict(record) for record in self.epochs]


def train(
    model: nn.Module,
    data: ImageData | Iterable[tuple[Tensor, Tensor]],
    epochs: int,
    *,
    optimizer: Optimizer = "sgd",
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: Schedule = "onecycle",
    milestones: Sequence[float] = (80 / 150, 120 / 150),
    batch_size: int = 128,
    augment: bool = True,
    images: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    label_smoothing: float = 0.0,
    statistics: str | BatchStatistics | None = None,
    freeze_after: int | None = None,
    after_step: Callable[[int], None] | None = None,
    test: Iterable[tuple[Tensor, Tensor]] | None = None,
    test_every: int | None = None,
    checkpoint: str | Path | None = None,
    channels_last: bool = True,
    progress: bool = True,
) -> History:
    """Train a network on labels with cross-entropy.

    The same seed gives the same weights on the same machine and thread count. Each epoch draws its random
    numbers from the seed and its own number, so a resumed run ends where an uninterrupted one does.

    Parameters
    ----------
    model : nn.Module
        Trained in place, and left where it was and in the mode it was in.
    data : ImageData or iterable of (inputs, labels)
        Of an ImageData, the training split, mixed and augmented anew each epoch; an iterable is taken as it
        is in each epoch and needs a length.
    epochs : int
    optimizer : {"sgd", "adamw"}
        SGD with Nesterov momentum, or AdamW.
    lr : float
        Largest learning rate.
    momentum : float
        Of SGD; AdamW's first beta.
    weight_decay : float
    schedule : {"onecycle", "cosine", "constant", "step"}
        Learning rate per step: up during 30 % of the steps and then down to nearly 0 (arXiv
        1708.07120), down along half a cosine, none, or down to a tenth at each of `milestones`.
    milestones : sequence of float
        Shares of all steps, in (0, 1) and ascending; by default after 80 and 120 of 150 epochs.
    batch_size, augment, images, seed
        See `ImageData.loader`; they do not apply to a plain iterable, the seed's use for dropout aside.
    device : str
        ``"auto"`` takes a GPU where there is one.
    label_smoothing : float
        In [0, 1).
    statistics : {"population", "final", "frozen"}, optional
        Which batches BatchNorm's running statistics come from; see
        `sysmt.nn.batchnorm.training_statistics`. By default each layer's own momentum decides.
    freeze_after : int, optional
        With frozen statistics: steps after which BatchNorm normalises by them and leaves them as they are.
    after_step : callable, optional
        Called with the number of steps done after each step: the place to put pruned weights back to 0.
    test : iterable of (inputs, labels), optional
        Evaluated after each epoch, for the history alone.
    test_every : int, optional
        Evaluate `test` after each so many steps instead, epochs aside.
    checkpoint : str or Path, optional
        Written after each epoch, whole or not at all. If it exists already, training goes on from it;
        if it is finished, its weights are loaded and nothing is trained.
    channels_last : bool
        On a CPU, keep four-dimensional weights channels_last meanwhile: it trains faster. Sums and dropout's
        draws run in another order, so the weights are not bit for bit those of the other layout.
    progress : bool
        Show progress on stderr.

    Returns
    -------
    History

    Raises
    ------
    ConfigError
        If a value is impossible, or a batch gives a BatchNorm layer one value per channel.
    DivergedError
        If the loss stops being a number: `lr` is too large then, or the network explodes.
    DataError
        If there are no images, or labels that the network has no logit for.
    WeightsError
        If the checkpoint is damaged, or belongs to another training.
    """
    numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    numbers |= {"label_smoothing": label_smoothing}
    for name, number in numbers.items():  # a checkpoint holds Python's numbers, not numpy's
        numbers[name] = parse_number(number, name, "a finite number")
    recipe: dict[str, Any] = {
        "epochs": parse_count(epochs, "epochs", minimum=0), "optimizer": optimizer, "schedule": schedule,
        "batch_size": parse_count(batch_size, "batch_size"), "augment": bool(augment),
        "images": images if images is None else parse_count(images, "images"),
        "seed": parse_count(seed, "seed", minimum=0), **numbers,
    }  # fmt: skip
    kind = check_statistics(statistics, freeze_after)
    # Newer choices are noted where they are made: checkpoints from before stay good.
    recipe |= {"milestones": [float(share) for share in milestones]} if schedule == "step" else {}
    recipe |= {"statistics": kind.value} if kind else {}
    recipe |= {"freeze_after": None if freeze_after is None else int(freeze_after)} if kind else {}
    if test_every is not None:
        recipe["test_every"] = parse_count(test_every, "test_every")
        if test is None:
            raise ConfigError(f"test_every={test_every} is without use: there is no test")
    home = device_of(model)
    contiguous = [tensor for tensor in _weights_4d(model) if tensor.is_contiguous()]
    device = _parse_device(device)
    try:
        model.to(device)
        if channels_last and device.type == "cpu":
            _lay_out(_weights_4d(model), torch.channels_last)
        with kept_modes(model), batch_statistics(model, kind) as batchnorms:
            run = _Run(model, data, recipe, Path(checkpoint) if checkpoint else None, test, batchnorms)
            with progress_bar("training", run.images and run.images * epochs, enabled=progress) as bar:
                bar.advance(run.images * len(run.records))
                for epoch in range(len(run.records), epochs):
                    with torch.random.fork_rng():
                        torch.manual_seed(_epoch_seed(seed, epoch))
                        record = run.epoch(epoch, after_step, bar)
                    if test is not None and test_every is None:
                        record["test_top1"] = evaluate(model, test, progress=False).top1
                    run.records.append(record)
                    run.save()
    finally:
        model.to(home)
        _lay_out(contiguous, torch.contiguous_format)
    return History(tuple(run.records), tuple(run.tests))


class _Run:
    """One training under way: what a checkpoint holds, and the steps of an epoch."""

    def __init__(
        self,
        model: nn.Module,
        data: ImageData | Iterable[tuple[Tensor, Tensor]],
        recipe: Mapping[str, Any],
        checkpoint: Path | None,
        test: Iterable[tuple[Tensor, Tensor]] | None,
        batchnorms: Sequence[nn.Module],
    ) -> None:
        self.model, self.data, self.recipe, self.checkpoint = model, data, dict(recipe), checkpoint
        self.test, self.batchnorms = test, batchnorms
        self.records: list[dict[str, float]] = []
        self.tests: list[dict[str, float]] = []
        first = self._loader(0)
        if not isinstance(first, Sized):
            raise ConfigError(f"{type(first).__name__} has no length; training must know the steps per epoch")
        self.images: int = getattr(first, "images", 0)
        self.optimizer = make_optimizer(model, recipe)
        lone = self.images > recipe["batch_size"] > 1 and self.images % recipe["batch_size"] == 1
        self.steps_per_epoch = len(first) - lone  # `epoch` leaves a lone last image out
        steps = max(1, self.steps_per_epoch * recipe["epochs"])
        self.scheduler = make_scheduler(self.optimizer, recipe, steps)
        if checkpoint is not None:
            if isinstance(data, ImageData):
                self.recipe["data"] = data.fingerprint()
            if checkpoint.exists():
                self._resume(checkpoint)

    def _loader(self, epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        if not isinstance(self.data, ImageData):
            return self.data
        return self.data.loader(
            "train",
            images=self.recipe["images"],
            batch_size=self.recipe["batch_size"],
            augment=self.recipe["augment"],
            shuffle=True,
            seed=self.recipe["seed"],
            epoch=epoch,
        )

    def epoch(self, epoch: int, after_step: Callable[[int], None] | None, bar: Bar) -> dict[str, float]:
        """Learn each batch once and return the epoch's record."""
        device = device_of(self.model)
        loader = self._loader(epoch)
        seen = hits = largest = 0
        total_loss = 0.0
        start = time.perf_counter()
        self.model.train()
        for inputs, labels in labelled_batches(loader):
            if len(labels) == 1 and largest > 1:
                continue  # a last batch of one image has no variance for BatchNorm to learn from
            if not len(labels):
                raise DataError("the loader gave a batch without images")
            largest = max(largest, len(labels))
            self._freeze()
            logits = self._forward(inputs.to(device))
            check_labels(logits, labels, loader)
            labels = labels.to(device)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe["label_smoothing"])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            if after_step is not None:
                after_step(self.scheduler.last_epoch)
            if not math.isfinite(loss.item()):
                raise DivergedError(
                    f"the loss became {loss.item()} in epoch {epoch + 1}: lr={self.recipe['lr']} is too large"
                )
            self._test()
            seen += len(labels)
            hits += int((logits.argmax(dim=1) == labels).sum())
            total_loss += loss.item() * len(labels)
            bar.advance(len(labels), f"epoch {epoch + 1}, loss {total_loss / seen:.3f}")
        if not seen:
            raise DataError("the loader gave no images; there is nothing to learn from")
        return {
            "epoch": epoch + 1,
            "lr": float(self.scheduler.get_last_lr()[0]),
            "loss": total_loss / seen,
            "top1": hits / seen,
            "seconds": time.perf_counter() - start,
        }

    def _freeze(self) -> None:
        """From its step on, let BatchNorm normalise as it does in evaluation."""
        freeze_after = self.recipe.get("freeze_after")
        if freeze_after is not None and self.scheduler.last_epoch >= freeze_after:
            for layer in self.batchnorms:
                layer.training = False

    def _forward(self, inputs: Tensor) -> Tensor:
        try:
            return logits_of(self.model, inputs)
        except DataError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                f"a batch of {len(inputs)} gives a BatchNorm layer one value per channel, which has no "
                "variance; batches must be larger"
            ) from error

    def _test(self) -> None:
        """Evaluate, if a test is due after this step."""
        step = self.scheduler.last_epoch
        if self.test is not None and "test_every" in self.recipe and step % self.recipe["test_every"] == 0:
            top1 = evaluate(self.model, self.test, progress=False).top1
            done = step / self.steps_per_epoch
            self.tests.append({"step": step, "epochs": done, "test_top1": top1})

    def save(self) -> None:
        """Write the checkpoint, if there is one to write."""
        if self.checkpoint is not None:
            with written_whole(self.checkpoint) as temporary:
                content = {
                    "recipe": self.recipe,
                    "records": self.records,
                    "tests": self.tests,
                    "state_dict": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                }
                torch.save(content, temporary)

    def _resume(self, path: Path) -> None:
        content = read_torch_file(path)
        recipe = content.get("recipe") if isinstance(content, Mapping) else None
        if not isinstance(recipe, Mapping):
            raise WeightsError(f"{path} is no checkpoint of a training; delete it or name another file")
        for key in {**recipe, **self.recipe}:
            if recipe.get(key) != self.recipe.get(key):
                raise WeightsError(
                    f"{path} belongs to another training: {key} was {recipe.get(key)!r} and is now "
                    f"{self.recipe.get(key)!r}; delete the file or name another"
                )
        try:
            self.optimizer.load_state_dict(content["optimizer"])
            self.scheduler.load_state_dict(content["scheduler"])
            self.model.load_state_dict(content["state_dict"])  # last: what is refused changes no network
            self.records = list(content["records"])
            self.tests = list(content.get("tests", ()))
            refresh_masked(self.model)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise WeightsError(f"{path} is no checkpoint of this network's training ({error})") from error


def _weights_4d(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dim() == 4]


def _lay_out(tensors: Iterable[Tensor], memory_format: torch.memory_format) -> None:
    """Change the order of weights in memory; the tensors themselves stay, and optimizers know them."""
    for tensor in tensors:
        tensor.data = tensor.data.to(memory_format=memory_format)


def _parse_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device={device!r} is not possible here ({reason}); 'auto', 'cpu' or 'cuda'"
        ) from None


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])

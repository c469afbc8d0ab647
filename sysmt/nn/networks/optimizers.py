"""Optimisers and learning rates by name, with their numbers checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from sysmt.errors import ConfigError

__all__ = ["Optimizer", "Schedule", "make_optimizer", "make_scheduler"]

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["onecycle", "cosine", "constant", "step"]


def make_optimizer(model: nn.Module, recipe: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Return an optimiser of a network's parameters; `recipe` as `train` makes it."""
    name, lr, momentum = recipe["optimizer"], recipe["lr"], recipe["momentum"]
    decay, smoothing = recipe["weight_decay"], recipe["label_smoothing"]
    if name not in get_args(Optimizer):
        raise ConfigError(f"optimizer={name!r} is unknown; allowed: {', '.join(get_args(Optimizer))}")
    if not (lr > 0 and 0 <= momentum < 1 and decay >= 0 and 0 <= smoothing < 1):
        raise ConfigError(
            f"lr={lr}, momentum={momentum}, weight_decay={decay}, label_smoothing={smoothing} cannot be: "
            f"lr must be above 0, weight_decay at least 0, the others in [0, 1)"
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError(f"{type(model).__name__} has no parameters to train")
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=(momentum, 0.999), weight_decay=decay)
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=decay, nesterov=momentum > 0)


def make_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Mapping[str, Any], steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return what sets the learning rate of each of so many `steps`."""
    name = recipe["schedule"]
    if name not in get_args(Schedule):
        raise ConfigError(f"schedule={name!r} is unknown; allowed: {', '.join(get_args(Schedule))}")
    schedulers = torch.optim.lr_scheduler
    if name == "onecycle":
        return schedulers.OneCycleLR(optimizer, recipe["lr"], total_steps=steps, cycle_momentum=False)
    if name == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, T_max=steps)
    if name == "step":
        shares = recipe["milestones"]
        if shares != sorted(set(shares)) or not all(0 < share < 1 for share in shares):
            raise ConfigError(
                f"milestones={tuple(shares)} must ascend and lie in (0, 1): shares of the steps"
            )
        return schedulers.MultiStepLR(optimizer, [round(share * steps) for share in shares], gamma=0.1)
    return schedulers.ConstantLR(optimizer, factor=1.0)

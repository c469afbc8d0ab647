"""The networks of the demonstrations, for handwritten digits: trained on the spot the first time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sysmt.config import parse_count
from sysmt.errors import OutputError, WeightsError
from sysmt.files import cache_directory
from sysmt.nn.data.labelled_images import open_data
from sysmt.nn.networks.checkpoints import load_weights, save_weights
from sysmt.nn.networks.models import build_model
from sysmt.nn.networks.training import train

__all__ = ["DIGITS", "trained_digits"]

RECIPE: dict[str, Any] = {"epochs": 30, "lr": 0.2, "weight_decay": 0.0, "batch_size": 64}

DIGITS: dict[str, dict[str, Any]] = {"digits": {}, "digits32": {"lr": 0.1}}
"""The networks that bring weights and images of their name, and how their recipe differs.

``"digits32"`` has half the channels and sees its digits anywhere on a black ground: it loses accuracy
that can be seen at four threads, where ``"digits"`` loses next to nothing."""


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread: a tiny network gains nothing from more, and sums in one order anywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trained_digits(
    cache_dir: str | Path | None = None, *, name: str = "digits", seed: int = 0, progress: bool = True
) -> nn.Module:
    """Return a digits network, trained on the spot the first time and read from disk afterwards.

    Parameters
    ----------
    cache_dir : str or Path, optional
        By default `sysmt.files.cache_directory`.
    name : str
        One of `DIGITS`; the images are those of that name.
    seed : int
        Of the initial weights, the order of the images and their augmentation.
    progress : bool
        Show progress on stderr.

    Returns
    -------
    nn.Module
        In evaluation mode, on the CPU.
    """
    data = open_data(name, seed=seed)
    recipe = RECIPE | DIGITS[name] | {"seed": parse_count(seed, "seed", minimum=0)}
    facts = {
        "model": name,
        "data": data.fingerprint(),
        "recipe": recipe,
        **data.preprocessing.to_record(),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(cache_dir or cache_directory()) / f"{name}-{key}.pt"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(name)
    if path.is_file():
        try:
            load_weights(model, path)
            return model
        except WeightsError as error:
            warnings.warn(f"{error}; training the {name} network again", stacklevel=2)
    with _one_thread():
        # Not channels_last: the figures that are published of this network belong to these last bits.
        train(model, data, **recipe, device="cpu", channels_last=False, progress=progress)
    try:
        save_weights(model, path, facts)
    except OutputError as error:
        warnings.warn(f"the trained {name} network is not kept: {error}", stacklevel=2)
    return model

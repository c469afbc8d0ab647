"""Prune weights by magnitude, or to an N:M pattern, with masks that survive training.

The recalibration paper (section 3) prunes "weights ... according to their magnitude and the entire
model is then retrained", iteratively; fewer non-zero weights mean fewer thread collisions. Masks are
those of `torch.nn.utils.prune`, so its tools work on them, too.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from sysmt.config import parse_count, parse_name
from sysmt.errors import ConfigError, UnsupportedLayerError, nearest
from sysmt.nn.data.labelled_images import ImageData
from sysmt.nn.networks.checkpoints import refresh_masked
from sysmt.nn.networks.training import evaluate, train

__all__ = [
    "PruningMethod",
    "PruningScope",
    "make_permanent",
    "prune_and_retrain",
    "prune_model",
    "sparsity_report",
]


class PruningMethod(StrEnum):
    """The criterion by which weights are chosen for pruning."""

    MAGNITUDE = "magnitude"


class PruningScope(StrEnum):
    """Whether the smallest weights are looked for in all layers together or in each layer."""

    GLOBAL = "global"
    LAYER = "layer"


def prune_model(
    model: nn.Module,
    sparsity: float | None = None,
    method: str | PruningMethod = "magnitude",
    scope: str | PruningScope = "global",
    pattern: str | None = None,
    exclude: Iterable[str] = (),
    first: bool = False,
    linear: bool = False,
) -> pd.DataFrame:
    """Set the smallest weights of the convolutions to zero, and mask them so that they stay zero.

    Weights that are pruned already stay so and count towards `sparsity`; thus calling again with
    more prunes on, and with less changes nothing. Among equal magnitudes the earlier weight goes first.

    Parameters
    ----------
    model : nn.Module
        The network, changed in place: a pruned layer's `weight` becomes ``weight_orig * weight_mask``.
    sparsity : float, optional
        Share of zeros to reach, in [0, 1): of all selected weights together (``scope="global"``), or of
        each layer's. The nearest whole number of weights is pruned. May be left out with a `pattern`,
        which implies it.
    method : {"magnitude"}
        The smallest absolute values go.
    scope : {"global", "layer"}
        Whether layers compete. Without effect on a `pattern`.
    pattern : str, optional
        ``"N:M"``, such as ``"2:4"``: of M weights in a row along K at most N stay, the largest. K is the
        GEMM's own order (in_channel, kernel_row, kernel_col) of one output channel, so a group is
        M input channels only where the kernel is 1 × 1. A ragged last group is filled up with zeros,
        as the array pads K: its r weights keep the min(N, r) largest.
    exclude : iterable of str
        Names of Conv2d or Linear layers to leave as they are.
    first, linear : bool
        Prune the first convolution (in order of definition) and Linear layers, too. They are left
        out by default, because the array leaves them in float.

    Returns
    -------
    DataFrame
        What `sparsity_report` says afterwards.

    Raises
    ------
    ConfigError
        If `sparsity` is outside [0, 1) or contradicts `pattern`, a name is unknown, or nothing is left to
        prune. Nothing has been pruned then.
    UnsupportedLayerError
        If a selected layer's weight is not a plain parameter of its own.
    """
    parse_name(PruningMethod, method, "method")
    scope = parse_name(PruningScope, scope, "scope")
    keep, group = _parse_pattern(pattern) if pattern is not None else (0, 0)
    sparsity = _parse_sparsity(sparsity, 1 - keep / group if group else None)
    layers = _select_layers(model, exclude, first, linear)
    with torch.no_grad():
        magnitudes = {name: _weight(layer).float().abs() for name, layer in layers.items()}
        if group:
            masks = {name: _pattern_mask(values, keep, group) for name, values in magnitudes.items()}
        elif scope is PruningScope.LAYER:
            masks = {name: _magnitude_mask(values.flatten(), sparsity) for name, values in magnitudes.items()}
        else:
            joined = _magnitude_mask(
                torch.cat([values.flatten() for values in magnitudes.values()]), sparsity
            )
            parts = joined.split([values.numel() for values in magnitudes.values()])
            masks = dict(zip(magnitudes, parts, strict=True))
        for name, layer in layers.items():
            _add_mask(layer, masks[name].view_as(layer.weight))
    return sparsity_report(model)


def make_permanent(model: nn.Module) -> tuple[str, ...]:
    """Drop all masks and leave plain weights with zeros in them.

    Returns
    -------
    tuple of str
        The parameters that were masked, such as ``"layer1.0.conv1.weight"``.
    """
    done = []
    with torch.no_grad():
        for name, module in model.named_modules():
            for key in _masked(module):
                prune.remove(module, key)
                done.append(f"{name}.{key}" if name else key)
    return tuple(done)


def prune_and_retrain(
    model: nn.Module,
    data: ImageData | Iterable[tuple[Tensor, Tensor]],
    schedule: Sequence[float] = (0.1, 0.2, 0.4),
    epochs: int = 5,
    *,
    scope: str | PruningScope = "global",
    exclude: Iterable[str] = (),
    first: bool = False,
    linear: bool = False,
    lr: float = 0.01,
    seed: int = 0,
    test: Iterable[tuple[Tensor, Tensor]] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **training: Any,
) -> pd.DataFrame:
    """Prune step by step by magnitude, and retrain the entire network after each step.

    The iterative method of the recalibration paper, section 3, after Han et al. (NIPS 2015). Masks
    stay on afterwards: train on, or call `make_permanent`. To retrain with an N:M pattern, call
    `prune_model` with it, and then `sysmt.nn.networks.training.train`, which keeps masks as well.

    Parameters
    ----------
    model : nn.Module
        The network, changed in place; the simulator must not be attached.
    data : ImageData or iterable of (inputs, labels)
        What `sysmt.nn.networks.training.train` takes.
    schedule : sequence of float
        Sparsities to reach one after the other, in [0, 1) and ascending.
    epochs : int
        Epochs of retraining after each step.
    scope, exclude, first, linear
        As for `prune_model`.
    lr : float
        Largest learning rate of each step.
    seed : int
        Step i trains with ``seed + i``.
    test : iterable of (inputs, labels), optional
        Evaluated after pruning and again after retraining in each step.
    checkpoint : str or Path, optional
        Step i keeps its training in a file of this name with ``-i`` before the suffix. Called again with the
        network as it was at first, what is finished is not trained again, and the step that was
        interrupted goes on after its last full epoch; the result is that of an uninterrupted run.
    progress : bool
        Show progress on stderr.
    **training
        Further options of `sysmt.nn.networks.training.train`, such as `weight_decay`.

    Returns
    -------
    DataFrame
        A row per step: `step` (from 1), `sparsity` (reached, of the selected weights), `epochs`, `loss`
        and `top1` of the last epoch over the training images, `pruned_top1` and `test_top1` on `test`
        before and after retraining (NaN without it). Accuracies in [0, 1].

    Raises
    ------
    ConfigError
        If `schedule` or another option is impossible; nothing has been pruned then, unless `train`
        refuses an option's value.
    DataError
        If there are no images, or their labels do not fit.
    WeightsError
        If a checkpoint is damaged, or belongs to another training.
    """
    _check_schedule(schedule)
    epochs = parse_count(epochs, "epochs", minimum=0)
    scope = parse_name(PruningScope, scope, "scope")
    options = [name for name in inspect.signature(train).parameters if name not in ("test", "checkpoint")]
    for name in training:
        if name not in options:
            raise ConfigError(f"retraining has no option {name!r}{nearest(name, options)}")
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    selected = list(_select_layers(model, exclude, first, linear))
    rows = []
    for step, sparsity in enumerate(schedule):
        report = prune_model(model, sparsity, scope=scope, exclude=exclude, first=first, linear=linear)
        counts = report.set_index("name").loc[selected, ["zeros", "weights"]].sum()
        pruned_top1 = evaluate(model, test, progress=progress).top1 if test is not None else math.nan
        kept = Path(checkpoint) if checkpoint is not None else None
        history = train(
            model,
            data,
            epochs,
            lr=lr,
            seed=seed + step,
            checkpoint=kept and kept.with_stem(f"{kept.stem}-{step + 1}"),
            progress=progress,
            **training,
        )
        refresh_masked(model)
        last = history.epochs[-1] if history.epochs else {}
        rows.append(
            {
                "step": step + 1,
                "sparsity": counts["zeros"] / counts["weights"],
                "epochs": epochs,
                "loss": last.get("loss", math.nan),
                "top1": last.get("top1", math.nan),
                "pruned_top1": pruned_top1,
                "test_top1": evaluate(model, test, progress=progress).top1 if test is not None else math.nan,
            }
        )
    return pd.DataFrame(rows)


def sparsity_report(model: nn.Module) -> pd.DataFrame:
    """Count the zero weights of every Conv2d and Linear layer.

    Returns
    -------
    DataFrame
        Columns `name`, `kind` (Conv2d or Linear), `weights`, `zeros`, `sparsity` (zeros / weights) and
        `masked` (weights that a mask holds at zero; 0 after `make_permanent`).
    """
    rows = []
    for name, layer in _layers(model).items():
        weight = _weight(layer)
        weights, zeros = weight.numel(), int((weight == 0).sum())
        masked = int((layer.get_buffer("weight_mask") == 0).sum()) if "weight" in _masked(layer) else 0
        rows.append((name, type(layer).__name__, weights, zeros, zeros / max(1, weights), masked))
    return pd.DataFrame(rows, columns=["name", "kind", "weights", "zeros", "sparsity", "masked"])


def _layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }


def _weight(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """Return a layer's weight, masked as its next forward pass will have it.

    The attribute `weight` of a masked layer is what the last forward pass made: of other parameters, if a
    `state_dict` was loaded or an optimiser stepped since.
    """
    if "weight" in _masked(layer):
        return layer.get_parameter("weight_orig").detach() * layer.get_buffer("weight_mask")
    return layer.weight.detach()


def _select_layers(
    model: nn.Module, exclude: Iterable[str], first: bool, linear: bool
) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the layers to prune by name, checked."""
    layers = _layers(model)
    excluded = {exclude} if isinstance(exclude, str) else set(exclude)
    for name in sorted(excluded):
        if name not in layers:
            raise ConfigError(
                f"exclude names {name!r}, but the network has no such Conv2d or Linear layer"
                f"{nearest(name, layers)}"
            )
    if not first:
        excluded.update([name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)][:1])
    if not linear:
        excluded.update(name for name, layer in layers.items() if isinstance(layer, nn.Linear))
    selected = {name: layer for name, layer in layers.items() if name not in excluded}
    if not selected:
        raise ConfigError(
            f"{type(model).__name__} has nothing to prune: of its {len(layers)} Conv2d and Linear layers "
            f"exclude, first={first} and linear={linear} leave none"
        )
    owners: dict[int, str] = {}
    for name, layer in selected.items():
        parameters = dict(layer.named_parameters(recurse=False))
        weight = parameters.get("weight_orig" if "weight" in _masked(layer) else "weight")
        if weight is None or nn.parameter.is_lazy(weight):
            raise UnsupportedLayerError(
                f"the weight of layer {name!r} is parametrised or not initialised yet; "
                "only plain parameters can be masked"
            )
        if id(weight) in owners:
            raise UnsupportedLayerError(
                f"layers {owners[id(weight)]!r} and {name!r} share their weight; one mask cannot serve both"
            )
        owners[id(weight)] = name
    return selected


def _check_schedule(schedule: Sequence[float]) -> None:
    """Refuse an empty schedule, and sparsities that are impossible or do not ascend."""
    if isinstance(schedule, str) or not isinstance(schedule, Sequence) or not schedule:
        raise ConfigError(f"schedule={schedule!r} must be a sequence of sparsities, such as (0.1, 0.2, 0.4)")
    checked = [_parse_sparsity(sparsity, None) for sparsity in schedule]
    if any(later <= earlier for earlier, later in itertools.pairwise(checked)):
        raise ConfigError(f"schedule={tuple(checked)} must ascend: pruned weights do not come back")


def _parse_pattern(pattern: str) -> tuple[int, int]:
    """Read ``"N:M"``."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    keep, group = (int(number) for number in match.groups()) if match else (0, 0)
    if not 1 <= keep < group:
        raise ConfigError(
            f"pattern={pattern!r} is unknown; allowed: 'N:M' with 1 <= N < M, such as '2:4': "
            "N of M weights stay"
        )
    return keep, group


def _parse_sparsity(sparsity: float | None, implied: float | None) -> float:
    """Return a sparsity in [0, 1) that agrees with the one that a pattern implies, if there is one."""
    if sparsity is None:
        if implied is None:
            raise ConfigError("sparsity is missing; give a number in [0, 1), or a pattern such as '2:4'")
        return implied
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity={sparsity!r} must be a number in [0, 1): the share of zero weights")
    if implied is not None and abs(sparsity - implied) > 1e-9:
        raise ConfigError(
            f"sparsity={sparsity} contradicts the pattern, which implies {implied:g}; leave one of them out"
        )
    return float(sparsity)


def _magnitude_mask(magnitudes: Tensor, sparsity: float) -> Tensor:
    """Return a flat mask that is False at the smallest values; of equal ones the earlier go first."""
    keep = torch.ones_like(magnitudes, dtype=torch.bool)
    count = round(sparsity * magnitudes.numel())
    if count:
        threshold = magnitudes.kthvalue(count).values
        below = magnitudes < threshold
        equal = (magnitudes == threshold).nonzero().flatten()
        keep[below] = False
        keep[equal[: count - int(below.sum())]] = False
    return keep


def _pattern_mask(magnitudes: Tensor, keep: int, group: int) -> Tensor:
    """Return a mask of the weight's shape with at most `keep` of `group` True along K."""
    rows = magnitudes.flatten(1)
    k = rows.shape[1]
    groups = F.pad(rows, (0, -k % group), value=-1.0).unflatten(1, (-1, group))
    # Sorted ascending and stably, the earlier of two equal weights comes first, and goes.
    order = groups.argsort(dim=-1, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., -keep:], True)
    return mask.flatten(1)[:, :k].view_as(magnitudes)


def _masked(module: nn.Module) -> list[str]:
    """Return the parameters of a module that `torch.nn.utils.prune` masks, without submodules."""
    buffers = dict(module.named_buffers(recurse=False))
    names = [name.removesuffix("_orig") for name, _ in module.named_parameters(recurse=False)]
    return [name for name in names if f"{name}_mask" in buffers]


def _add_mask(layer: nn.Conv2d | nn.Linear, mask: Tensor) -> None:
    """Mask a layer's weight, on top of a mask that it may have."""
    if "weight" in _masked(layer):
        mask = mask & (layer.get_buffer("weight_mask") != 0)
        prune.remove(layer, "weight")
    # What lies under the mask is zero, too: weight decay and momentum then have nothing to move there.
    layer.weight.masked_fill_(~mask, 0.0)
    prune.custom_from_mask(layer, "weight", mask)

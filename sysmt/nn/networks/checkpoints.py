"""Weights on disk: reading what others saved, writing whole files, and telling weights apart by hash."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import urllib.error
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sysmt.archives import check_archive
from sysmt.errors import ConfigError, OutputError, WeightsError, nearest
from sysmt.files import written_whole

__all__ = [
    "load_state",
    "load_weights",
    "read_metadata",
    "read_torch_file",
    "read_weights",
    "refresh_masked",
    "resolve_weights",
    "save_weights",
    "weights_hash",
    "without_prefix",
]

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "model_ema", "state_dict_ema", "ema")
"""Keys under which training scripts keep the state_dict; the first of them that is there counts."""

_SUBMODULES = ("model.", "net.", "network.")
"""Names under which a training's own module holds the network, as Lightning's do."""

_SAFETENSORS = ".safetensors"

_AUXILIARY = re.compile(r"(aux1|aux2|AuxLogits)\.")
"""Training-time classifiers of GoogLeNet and Inception-v3, which evaluation does not run."""

_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
"""Names of DenseNet's layers in published checkpoints: "norm.1" became "norm1"."""

_TORCHVISION = "torchvision:"


def read_torch_file(path: str | Path) -> Any:
    """Read a file that torch saved, tensors and plain values only, onto the CPU.

    Raises
    ------
    WeightsError
        If the file is missing, damaged, or holds other Python objects (which could run code).
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path's own, this takes names of any length
        raise WeightsError(
            f"{path} is {'a directory' if os.path.isdir(path) else 'missing'}; a checkpoint file is needed"
        )
    try:
        if zipfile.is_zipfile(path):  # torch's older format has no checksums
            check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in reason:
            raise WeightsError(
                f"{path} is no checkpoint, or holds Python objects besides tensors, which are not loaded "
                f"because they could run code; save the state_dict alone"
            ) from error
        raise WeightsError(f"{path} is damaged or no checkpoint; reading it failed: {reason}") from error


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint into a plain state_dict.

    Understood are a state_dict, one kept under ``"state_dict"``, ``"model"``, ``"model_state_dict"``,
    ``"net"``, ``"model_ema"``, ``"state_dict_ema"`` or ``"ema"``, what DataParallel, AveragedModel
    (``module.``) and `torch.compile` (``_orig_mod.``) put before names, half precision (floating-point
    values become float32), and masks of `torch.nn.utils.prune` (multiplied into their weights).

    Parameters
    ----------
    path : str or Path
        Of torch, or ``.safetensors`` (which needs the package of that name).

    Returns
    -------
    dict of str to Tensor
        Floating-point tensors are float32 and finite.

    Raises
    ------
    WeightsError
        If the file is missing, damaged, or no checkpoint.
    """
    content = _read_safetensors(path) if str(path).endswith(_SAFETENSORS) else read_torch_file(path)
    while isinstance(content, Mapping):  # wrappers may lie in wrappers
        wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            break
        content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(
            f"{path} holds a {type(content).__name__}; a state_dict with tensors by name is needed"
        )
    wrong = next((key for key, value in content.items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        known = ", ".join(repr(wrapper) for wrapper in _WRAPPERS)
        raise WeightsError(
            f"{path} is no state_dict: entry {wrong!r} is a {type(content[wrong]).__name__}, not a tensor; "
            f"a state_dict may also be kept under one of {known}"
        )
    state = {str(key).replace("_orig_mod.", ""): value for key, value in content.items()}
    if all(key.startswith("module.") or key == "n_averaged" for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items() if key != "n_averaged"}
    for key, value in state.items():
        if value.is_meta:
            raise WeightsError(f"{path} has {key!r} on the meta device: it was saved without values")
        if value.layout is not torch.strided:
            state[key] = value.to_dense()
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    state = _apply_masks(state)
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise WeightsError(f"{path} has values in {key!r} that are infinite or no numbers")
    return state


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read a file of safetensors onto the CPU."""
    if not os.path.isfile(path):
        raise WeightsError(f"{path} is missing; a checkpoint file is needed")
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise WeightsError(f"{path} needs the package safetensors: pip install safetensors") from error
    try:
        return dict(load_file(path))
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise WeightsError(f"{path} is damaged or no safetensors file ({error})") from error


def without_prefix(state: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Return the weights of the network inside a training's own module, under the names that it gives them.

    Parameters
    ----------
    state : mapping
        As `read_weights` returns it, such as Lightning's: ``model.conv1.weight`` beside metrics' own.
    expected : collection of str
        Some names of the network. Nothing changes if the state has one of them already.
    """
    for prefix in _SUBMODULES:
        inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if not any(key in state for key in expected) and any(key in inner for key in expected):
            return inner
    return dict(state)


def _apply_masks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace each pair "x_orig", "x_mask" by their product "x", as `torch.nn.utils.prune` computes it."""
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removesuffix("_orig")
        if name != key and f"{name}_mask" in state:
            plain[name] = value * state[f"{name}_mask"].to(value)
        elif not (key.endswith("_mask") and f"{key.removesuffix('_mask')}_orig" in state):
            plain[key] = value
    return plain


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into a network of the same architecture.

    Besides what `read_weights` understands: classifiers used in training only (GoogLeNet's, Inception's) are
    left out where the network has none, DenseNet's older names are translated, and counts of
    BatchNorm batches may be missing. A network with masks of `torch.nn.utils.prune` keeps them, so the
    checkpoint's weights must be 0 wherever a mask is.

    Parameters
    ----------
    model : nn.Module
        Changed in place, and only if everything fits.
    path : str or Path

    Raises
    ------
    WeightsError
        If the file is missing or damaged, or was made for another network: the message names the
        first keys and shapes that differ.
    """
    load_state(model, read_weights(path), path)


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load what `read_weights` returned; `path` is for messages. See `load_weights`."""
    masked = model.state_dict()
    own = _apply_masks(masked)
    state = without_prefix(state, own)
    state = {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
    if not any(_AUXILIARY.match(key) for key in own):
        state = {key: value for key, value in state.items() if not _AUXILIARY.match(key)}
    counts = {key for key in own if key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in state and key not in counts]
    unexpected = [key for key in state if key not in own and not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        differences = [
            f"{what} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
            for what, keys in (("lacks", missing), ("has besides", unexpected))
            if keys
        ]
        raise WeightsError(
            f"{path} was made for another network than {type(model).__name__}: it {' and '.join(differences)}"
        )
    fitting = {key: value for key, value in state.items() if key in own}
    for key, value in fitting.items():
        if value.shape != own[key].shape:
            raise WeightsError(
                f"{path} was made for another network than {type(model).__name__}: {key} has shape "
                f"{tuple(value.shape)}, the network needs {tuple(own[key].shape)}"
            )
        if own[key].is_floating_point() and not value.is_floating_point():
            raise WeightsError(f"{path} has {key} as {value.dtype}; floating-point weights are needed")
        mask = masked.get(f"{key}_mask") if key not in masked else None
        if mask is not None and bool((value[mask.cpu() == 0] != 0).any()):
            raise WeightsError(
                f"{path} has weights in {key} that the network's mask prunes; make the pruning permanent "
                "(sysmt.nn.networks.pruning.make_permanent) first, or load into a network without masks"
            )
    renamed = model.state_dict()  # with its record of modules' versions, without which MNASNet loads nothing
    renamed.clear()
    renamed.update((key if key in masked else f"{key}_orig", value) for key, value in fitting.items())
    model.load_state_dict(renamed, strict=False)
    refresh_masked(model)


def refresh_masked(model: nn.Module) -> None:
    """Recompute masked weights, as every forward pass does, without a graph that would bar copying."""
    with torch.no_grad():
        for module in model.modules():
            buffers = dict(module.named_buffers(recurse=False))
            for key, parameter in module.named_parameters(recurse=False):
                name = key.removesuffix("_orig")
                if name != key and f"{name}_mask" in buffers:
                    setattr(module, name, parameter * buffers[f"{name}_mask"])


def save_weights(model: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a network's state_dict and plain facts about it, whole or not at all.

    Parameters
    ----------
    model : nn.Module
        Masks of `torch.nn.utils.prune` are multiplied into their weights.
    path : str or Path
        An existing file is replaced.
    metadata : mapping, optional
        Numbers, strings, booleans, None, and lists and dicts of them.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    state = {key: value.detach().cpu() for key, value in _apply_masks(model.state_dict()).items()}
    with written_whole(path) as temporary:
        torch.save({"state_dict": state, "metadata": dict(metadata or {})}, temporary)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return what `save_weights` was told about a checkpoint; empty for checkpoints of others."""
    content = read_torch_file(path)
    metadata = content.get("metadata") if isinstance(content, Mapping) else None
    return dict(metadata) if isinstance(metadata, Mapping) else {}


def weights_hash(model: nn.Module, part: Literal["parameters", "buffers"] = "parameters") -> str:
    """Hash names, dtypes, shapes and bytes of a network's weights, or of its BatchNorm statistics.

    A calibration belongs to the weights: recalibrated BatchNorm statistics leave that hash as it is. All
    else in the `state_dict` counts as weights, whatever it is called: parameters that a weight is computed
    from, and buffers that are no statistics. Masks of `torch.nn.utils.prune` are multiplied in.

    Parameters
    ----------
    model : nn.Module
    part : {"parameters", "buffers"}
        Weights, or statistics.

    Returns
    -------
    str
        SHA-256, 64 hexadecimal digits.

    Raises
    ------
    WeightsError
        If values are on the meta device: there is nothing to hash.
    """
    if part not in ("parameters", "buffers"):
        raise ConfigError(f"part={part!r} is unknown; allowed: parameters, buffers")
    statistics = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _NormBase)
        for name, _ in module.named_buffers(recurse=False)
    }
    state = model.state_dict()
    plain = _apply_masks({name: value for name, value in state.items() if isinstance(value, Tensor)})
    digest = hashlib.sha256()
    for name in sorted(plain):
        if (name in statistics) == (part == "buffers"):
            value = plain[name].detach()
            if value.is_meta:
                raise WeightsError(
                    f"{name} of {type(model).__name__} is on the meta device: it has no values"
                )
            value = (value.to_dense() if value.layout is not torch.strided else value).cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def resolve_weights(weights: str | Path, model_name: str) -> Path:
    """Turn ``"torchvision:NAME"`` into the path of the published file; leave a path as it is.

    The file is taken from torch's hub cache, or else downloaded into it, and its hash checked.

    Parameters
    ----------
    weights : str or Path
        A path, or for example ``"torchvision:IMAGENET1K_V1"``.
    model_name : str
        Name of the network in torchvision.

    Returns
    -------
    Path

    Raises
    ------
    WeightsError
        If torchvision publishes no such weights, the download fails or the file is damaged.
    """
    if not str(weights).startswith(_TORCHVISION):
        return Path(weights)
    from sysmt.nn.torchvision_import import torchvision

    wanted = str(weights).removeprefix(_TORCHVISION)
    try:
        published = torchvision.models.get_model_weights(model_name)
    except ValueError:
        raise WeightsError(f"torchvision publishes no weights for model {model_name!r} ({weights})") from None
    names = [*published.__members__, "DEFAULT"]
    if wanted not in names:
        raise WeightsError(
            f"torchvision publishes no weights {wanted!r}{nearest(wanted, names)} for model {model_name!r}; "
            f"it has {', '.join(names)}"
        )
    return _published_file(published[wanted].url, str(weights))


def _published_file(url: str, weights: str) -> Path:
    """Path of a published file in torch's hub cache, downloaded if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    named = re.search(r"-([0-9a-f]{8,})\.", path.name)
    prefix = named.group(1) if named else None
    if not path.is_file():
        try:
            with written_whole(path) as temporary:
                torch.hub.download_url_to_file(url, str(temporary), hash_prefix=prefix, progress=False)
        except (urllib.error.URLError, OutputError, RuntimeError, OSError) as error:
            raise WeightsError(
                f"{weights} is not in torch's cache and could not be downloaded ({error}); "
                f"fetch {url} and give its path, or put it at {path}"
            ) from error
    elif prefix is not None:
        with path.open("rb") as file:
            if not hashlib.file_digest(file, "sha256").hexdigest().startswith(prefix):
                raise WeightsError(
                    f"{path} is damaged: its SHA-256 does not start with {prefix}; delete the file"
                )
    return path

"""BatchNorm under a noisy array: recalibrate its statistics, save them, fold it into the layer before it.

The method is Shomron & Weiser's "Post-Training BatchNorm Recalibration", section 2: squeezed threads
change the distributions inside the network, and BatchNorm layers that regather their running mean and
variance with that noise on win back much of the accuracy, without labels or gradients.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from numbers import Real
from typing import Any

import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer
from torch.overrides import TorchFunctionMode

from sysmt.config import parse_count, parse_name
from sysmt.errors import CalibrationError, ConfigError, WeightsError, nearest
from sysmt.nn.calibration import image_batches
from sysmt.progress import progress_bar

__all__ = [
    "FoldReport",
    "LayerShift",
    "RecalibrationMode",
    "RecalibrationReport",
    "fold_batchnorm",
    "load_statistics",
    "recalibrate_batchnorm",
    "save_statistics",
]


# Recalibration


class RecalibrationMode(StrEnum):
    """How the statistics of the batches become the running statistics."""

    EMA = "ema"
    CUMULATIVE = "cumulative"
    FINAL = "final"


@dataclasses.dataclass(frozen=True)
class LayerShift:
    """How far recalibration moved the statistics of one BatchNorm layer.

    Attributes
    ----------
    name : str
        The layer's name in the network.
    channels : int
        Its channels.
    values : int
        Values per channel that its new statistics rest on (under ``ema``: that it saw); 0 if the
        forward pass never ran it, and it kept its statistics.
    mean_shift, max_mean_shift : float
        Shift of the mean in units of the old standard deviation, sqrt(variance + eps): root mean
        square over the channels, and the largest absolute one.
    log_variance_ratio, max_log_variance_ratio : float
        ln((new variance + eps) / (old variance + eps)): mean over the channels, and the largest
        absolute one.
    """

    name: str
    channels: int
    values: int
    mean_shift: float
    max_mean_shift: float
    log_variance_ratio: float
    max_log_variance_ratio: float


@dataclasses.dataclass(frozen=True)
class RecalibrationReport:
    """What a recalibration used and what it moved.

    Attributes
    ----------
    mode : RecalibrationMode
        How batches were combined.
    momentum : float
        Weight of a new batch; used by ``ema`` alone.
    images, batches : int
        Images and batches that went through the network.
    layers : tuple of LayerShift
        One entry per BatchNorm layer, in the network's order of definition.
    """

    mode: RecalibrationMode
    momentum: float
    images: int
    batches: int
    layers: tuple[LayerShift, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per BatchNorm layer, the columns named as in `LayerShift`."""
        columns = [field.name for field in dataclasses.fields(LayerShift)]
        return pd.DataFrame([dataclasses.asdict(layer) for layer in self.layers], columns=columns)


class _Pool:
    """Mean and squared deviations per channel over everything added, in float64."""

    # Values converted to float64 at a time: bounds the extra memory to 32 MiB or one image.
    CHUNK = 1 << 22

    def __init__(self) -> None:
        self.values = 0
        self._mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Merge a batch (N, C, ...) by the pairwise update of Chan, Golub & LeVeque (1979)."""
        images = max(1, self.CHUNK // max(1, x[0].numel()))
        for part in torch.split(x.detach(), images):
            axes = [axis for axis in range(part.dim()) if axis != 1]
            variance, mean = torch.var_mean(part.double(), axes, correction=0)
            values = part.numel() // part.shape[1]
            total = self.values + values
            delta = mean - self._mean
            self._mean = self._mean + delta * (values / total)
            self._squares = (
                self._squares + variance * values + delta.square() * (self.values * (values / total))
            )
            self.values = total

    def store(self, layer: _BatchNorm) -> None:
        """Write mean and unbiased variance into the layer's running statistics."""
        mean, variance = _running(layer)
        mean.copy_(self._mean)
        variance.copy_(self._squares / (self.values - 1))


class _Gatherer:
    """Watches the inputs of the BatchNorm layers; pools them unless torch's own update does the work."""

    def __init__(self, layers: Mapping[str, _BatchNorm], mode: RecalibrationMode) -> None:
        self.layers = layers
        self.mode = mode
        self.values: Counter[str] = Counter()
        self._pools: dict[str, _Pool] = {}
        self._kept_pools: dict[str, _Pool] = {}

    def watch(self, name: str) -> Callable[..., None]:
        """Return a forward pre-hook for one layer."""

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            values = x.numel() // max(1, x.shape[1])
            if values < 2:
                raise CalibrationError(
                    f"BatchNorm layer {name!r} met an input of shape {tuple(x.shape)}: {values} value(s) per "
                    "channel have no variance; use larger batches, or a number of images that leaves no "
                    "single image for the last batch"
                )
            if self.mode is RecalibrationMode.EMA:
                self.values[name] += values
            else:
                self._pools.setdefault(name, _Pool()).add(x)

        return hook

    def end_batch(self, full: bool) -> None:
        """Close a batch; under ``final`` keep its statistics if it was a full one."""
        if self.mode is RecalibrationMode.FINAL:
            if full:
                self._kept_pools = self._pools
            self._pools = {}

    def store(self) -> None:
        """Write what was pooled into the layers, and refuse statistics that are no numbers."""
        pools = self._kept_pools if self.mode is RecalibrationMode.FINAL else self._pools
        for name, pool in pools.items():
            pool.store(self.layers[name])
            self.values[name] = pool.values
        for name, layer in self.layers.items():
            if not all(statistic.isfinite().all() for statistic in _running(layer)):
                raise CalibrationError(
                    f"BatchNorm layer {name!r} gathered statistics that are not finite: "
                    "the images, or the layers before it, gave NaN or infinity"
                )


def recalibrate_batchnorm(
    model: nn.Module,
    loader: Iterable[Any],
    mode: str | RecalibrationMode = "ema",
    momentum: float = 0.1,
    images: int = 2048,
    progress: bool = False,
) -> RecalibrationReport:
    """Regather running mean and variance of every BatchNorm layer, with the network as it is.

    With the simulator attached its noise is on, which is the point. No labels and no gradients are
    used; γ, β and all other weights stay as they are. Only BatchNorm layers are in training mode
    meanwhile (dropout stays off), so each of them normalises by the statistics of the batch, not by
    the running ones: that is how the paper does it, and why deeper layers see inputs that are
    already corrected. Batches should therefore be as large as in training.

    Afterwards training flags, `momentum` and `num_batches_tracked` of the layers are what they
    were; after an exception the statistics are, too. The same images in the same batches give
    the same statistics. Images must pass through the augmentation that the network was trained with.

    Parameters
    ----------
    model : nn.Module
        The network, changed in place.
    loader : iterable
        Input tensors (N, ...) or (input, target) pairs; targets are ignored.
    mode : {"ema", "cumulative", "final"}
        ``ema`` starts from the current statistics and applies torch's update,
        ``(1 - momentum) * running + momentum * batch``, per batch; ``cumulative`` pools all images exactly
        (variance around the pooled mean, unbiased); ``final`` keeps the statistics of the last full
        batch alone, the last one that is as large as any before it. A layer that a forward pass runs
        more than once counts every run.
    momentum : float
        Weight of a new batch under ``ema``, in (0, 1].
    images : int
        Images to use, at least 1: the last batch is cut to make it exactly this many. A `UserWarning`
        says so if the loader has fewer.
    progress : bool
        Show a progress bar.

    Returns
    -------
    RecalibrationReport
        How far each layer's statistics moved.

    Raises
    ------
    ConfigError
        On an unknown `mode`, `momentum` or `images` out of range, a network without BatchNorm, or a
        BatchNorm layer that tracks no statistics.
    CalibrationError
        If the loader is empty or gives something other than tensors, if a batch leaves one value
        per channel, or if statistics come out as NaN or infinity.

    References
    ----------
    G. Shomron and U. Weiser, "Post-Training BatchNorm Recalibration", section 2.
    """
    mode = parse_name(RecalibrationMode, mode, "mode")
    images = parse_count(images, "images")
    if isinstance(momentum, bool) or not isinstance(momentum, Real) or not 0 < momentum <= 1:
        raise ConfigError(f"momentum={momentum!r} must be a number in (0, 1]: the weight of a new batch")
    layers = _tracking_layers(model)
    gatherer = _Gatherer(layers, mode)
    used = batches = largest = 0
    with _only_batchnorm_training(model, layers, float(momentum)) as before, ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(gatherer.watch(name), with_kwargs=True)
            stack.callback(handle.remove)
        bar = stack.enter_context(progress_bar("recalibrating BatchNorm", images, enabled=progress))
        for batch in image_batches(loader, images):
            model(batch)
            gatherer.end_batch(full=len(batch) >= largest)
            used += len(batch)
            batches += 1
            bar.advance(len(batch))
            largest = max(largest, len(batch))
        gatherer.store()
    shifts = tuple(
        _shift(name, layer, before[layer], gatherer.values[name]) for name, layer in layers.items()
    )
    return RecalibrationReport(mode, float(momentum), used, batches, shifts)


@contextmanager
def _only_batchnorm_training(
    model: nn.Module, layers: Mapping[str, _BatchNorm], momentum: float
) -> Iterator[dict[_BatchNorm, tuple[Tensor, Tensor]]]:
    """Put the given layers alone into training mode; undo all of it, after an exception statistics too.

    Yields the statistics that the layers start with.
    """
    # Flags are set one by one: train() and eval() may be overridden, and do not restore mixed states.
    flags = {module: module.training for module in model.modules()}
    momenta = {layer: layer.momentum for layer in layers.values()}
    counts = {
        layer: layer.num_batches_tracked.clone()
        for layer in layers.values()
        if layer.num_batches_tracked is not None
    }
    statistics = {layer: _statistics(layer) for layer in layers.values()}
    try:
        for module in flags:
            module.training = False
        for layer in layers.values():
            layer.training = True
            layer.momentum = momentum
        with torch.no_grad():
            yield statistics
    except BaseException:
        for layer, (mean, variance) in statistics.items():
            _set_running(layer, mean, variance)
        raise
    finally:
        for module, flag in flags.items():
            module.training = flag
        for layer, value in momenta.items():
            layer.momentum = value
        for layer, count in counts.items():
            layer.num_batches_tracked.copy_(count)  # type: ignore[union-attr]


def _shift(name: str, layer: _BatchNorm, before: tuple[Tensor, Tensor], values: int) -> LayerShift:
    """Compare a layer's statistics with those it had before."""
    (old_mean, old_variance), (mean, variance) = before, _statistics(layer)
    old_spread = (old_variance.double() + layer.eps).clamp_min(1e-300)
    spread = (variance.double() + layer.eps).clamp_min(1e-300)
    shift = (mean.double() - old_mean.double()).abs() / old_spread.sqrt()
    ratio = (spread / old_spread).log()
    return LayerShift(
        name,
        layer.num_features,
        values,
        math.sqrt(float(shift.square().mean())),
        float(shift.max()),
        float(ratio.mean()),
        float(ratio.abs().max()),
    )


# Statistics


def save_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the running statistics of every BatchNorm layer that keeps them.

    Returns
    -------
    dict of str to Tensor (channels,)
        ``<layer>.running_mean`` and ``<layer>.running_var``, the keys of `state_dict`. Empty for a
        network without BatchNorm.
    """
    saved: dict[str, Tensor] = {}
    for name, layer in _named_batchnorms(model).items():
        if layer.running_mean is not None:
            mean_key, variance_key = _keys(name)
            saved[mean_key], saved[variance_key] = _statistics(layer)
    return saved


def load_statistics(model: nn.Module, statistics: Mapping[str, Any]) -> None:
    """Set the running statistics that `save_statistics` returned; all of them or, on an error, none.

    Parameters
    ----------
    model : nn.Module
        A network with the same BatchNorm layers.
    statistics : mapping of str to tensor or array (channels,)

    Raises
    ------
    WeightsError
        If keys are missing or unknown, shapes differ, or values are not finite or a variance negative.
    """
    layers = {
        name: layer for name, layer in _named_batchnorms(model).items() if layer.running_mean is not None
    }
    needed = {key for name in layers for key in _keys(name)}
    for key in statistics:
        if key not in needed:
            raise WeightsError(f"the network has no statistic {key!r}{nearest(key, needed)}")
    checked: list[tuple[_BatchNorm, Tensor, Tensor]] = []
    for name, layer in layers.items():
        values = []
        for key in _keys(name):
            if key not in statistics:
                raise WeightsError(
                    f"the statistics lack {key!r}; {len(statistics)} of {len(needed)} keys are there"
                )
            value = torch.as_tensor(statistics[key])
            if value.shape != (layer.num_features,):
                raise WeightsError(
                    f"{key!r} has shape {tuple(value.shape)}; the layer has {layer.num_features} channels"
                )
            if not value.isfinite().all() or (key.endswith("running_var") and (value < 0).any()):
                raise WeightsError(f"{key!r} holds values that are not finite, or a negative variance")
            values.append(value)
        checked.append((layer, values[0], values[1]))
    for layer, mean, variance in checked:
        _set_running(layer, mean, variance)


def _keys(name: str) -> tuple[str, str]:
    """Return the two `state_dict` keys of a layer's running statistics."""
    prefix = f"{name}." if name else ""
    return f"{prefix}running_mean", f"{prefix}running_var"


def _named_batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def _tracking_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return all BatchNorm layers by name; raise `ConfigError` if there are none, or one cannot gather."""
    layers = _named_batchnorms(model)
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no BatchNorm layer: there are no statistics to recalibrate"
        )
    for name, layer in layers.items():
        if layer.running_mean is None or layer.running_var is None or not layer.track_running_stats:
            raise ConfigError(
                f"BatchNorm layer {name!r} has track_running_stats=False: it keeps nothing to recalibrate"
            )
        if isinstance(layer.running_mean, UninitializedBuffer):
            raise ConfigError(
                f"BatchNorm layer {name!r} is lazy and not initialised yet: run one batch first"
            )
    return layers


def _running(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the buffers themselves."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return copies of running mean and variance."""
    mean, variance = _running(layer)
    return mean.detach().clone(), variance.detach().clone()


def _set_running(layer: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    with torch.no_grad():
        for buffer, value in zip(_running(layer), (mean, variance), strict=True):
            buffer.copy_(value)


# Folding

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """Which BatchNorm layers were folded, and why the others were not.

    Attributes
    ----------
    folded : dict of str to str
        BatchNorm layer to the layer that absorbed it.
    kept : dict of str to str
        BatchNorm layer to the reason why it stays.
    """

    folded: dict[str, str]
    kept: dict[str, str]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per BatchNorm layer: `name`, `into` (empty if it stays) and `reason`."""
        rows = [(name, into, "") for name, into in self.folded.items()]
        rows += [(name, "", reason) for name, reason in self.kept.items()]
        return pd.DataFrame(rows, columns=["name", "into", "reason"])


@dataclasses.dataclass
class _Flow:
    """What one forward pass shows about the layers that may fold."""

    runs: Counter[nn.Module] = dataclasses.field(default_factory=Counter)
    readers: Counter[nn.Module] = dataclasses.field(default_factory=Counter)  # of the layer's output
    sources: dict[nn.Module, nn.Module | str] = dataclasses.field(default_factory=dict)  # of a BN's input
    exposed: set[nn.Module] = dataclasses.field(default_factory=set)  # parameters read from outside
    odd_outputs: set[nn.Module] = dataclasses.field(default_factory=set)  # channels are not axis 1


def fold_batchnorm(model: nn.Module, example: Tensor | None = None) -> FoldReport:
    """Fold every BatchNorm that directly follows a convolution or Linear layer into it, in place.

    The layer's weights are multiplied by γ / sqrt(variance + eps), its bias takes the rest, and the
    BatchNorm becomes `nn.Identity`; a layer without bias gets one. Outputs in evaluation mode stay
    the same but for float rounding. All Conv, ConvTranspose and Linear layers of torch qualify;
    pruned weights keep their masks and zeros.

    What follows what is read off a `torch.fx` trace. Networks that cannot be traced, because their Python
    code depends on values, need an `example`: one forward pass is then watched tensor by tensor.
    A trace knows no shapes, and takes a Linear layer's output for (batch, features).

    Parameters
    ----------
    model : nn.Module
        The network, with its BatchNorm layers in evaluation mode and no simulator attached.
    example : Tensor, optional
        An input of the network. If given, its forward pass decides, and no trace is made.

    Returns
    -------
    FoldReport
        What was folded, and the reason for what was not, such as the pre-activation BatchNorm of
        DenseNet, which follows a concatenation.

    Raises
    ------
    ConfigError
        If a BatchNorm layer is in training mode, the simulator is attached, or the network cannot be
        traced and there is no `example`. Nothing has been folded then.
    """
    layers = _named_batchnorms(model)
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        if isinstance(module, _BatchNorm) and module.training:
            raise ConfigError(
                f"BatchNorm layer {name!r} is in training mode; call model.eval() before folding"
            )
        if isinstance(module, _FOLDABLE) and "forward" in vars(module):
            raise ConfigError(
                f"layer {name!r} has its forward replaced, as by an attached simulator; detach before folding"
            )
    flow = _traced_flow(model) if example is None else _observed_flow(model, example)
    owners = Counter(parameter for module in names for parameter in module.parameters(recurse=False))
    folded: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, batchnorm in layers.items():
        reason = _obstacle(batchnorm, flow, names, owners)
        if reason:
            kept[name] = reason
            continue
        source = flow.sources[batchnorm]
        assert isinstance(source, nn.Module)
        _absorb(source, batchnorm)
        _replace(model, batchnorm, nn.Identity().train(batchnorm.training))
        folded[name] = names[source]
    return FoldReport(folded, kept)


class _Tracer(fx.Tracer):
    """Traces through containers, and stops at every layer that may fold (subclasses included)."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*_FOLDABLE, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


def _traced_flow(model: nn.Module) -> _Flow:
    """Read the flow off a symbolic trace."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the network's own code raises on a proxy
        raise ConfigError(
            f"{type(model).__name__} cannot be traced by torch.fx ({error}); give example=, an input tensor"
        ) from error
    flow = _Flow()
    for node in graph.nodes:
        if node.op == "get_attr":
            flow.exposed.add(model.get_submodule(node.target.rpartition(".")[0]))
        if node.op != "call_module":
            continue
        module = model.get_submodule(node.target)
        flow.runs[module] += 1
        flow.readers[module] += len(node.users)
        if isinstance(module, _BatchNorm):
            before = node.all_input_nodes[0]
            if before.op == "call_module":
                flow.sources[module] = model.get_submodule(before.target)
            elif before.op == "placeholder":
                flow.sources[module] = "the network's input"
            else:
                flow.sources[module] = getattr(before.target, "__name__", str(before.target))
    return flow


class _Readers(TorchFunctionMode):
    """Counts which torch functions read each tensor, and remembers which one made it."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()
        self.maker: dict[int, str] = {}
        self._alive: list[Tensor] = []  # an id is unique only while its tensor lives

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = list(_tensors(result))
        if made:  # what gives no tensor asked for a shape or a type
            self.read(args, kwargs)
            self._alive += made
            self.maker |= {id(tensor): getattr(func, "__name__", str(func)) for tensor in made}
        return result

    def read(self, *values: Any) -> None:
        """Count one reader for every tensor inside `values`."""
        tensors = list(_tensors(values))
        self._alive += tensors
        self.count.update(id(tensor) for tensor in tensors)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _observed_flow(model: nn.Module, example: Tensor) -> _Flow:
    """Run one forward pass and see which tensor goes where."""
    flow, readers = _Flow(), _Readers()
    outputs: dict[nn.Module, Tensor] = {}
    makers: dict[int, nn.Module] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        what = "the network's input" if x is example else readers.maker.get(id(x), "outside the network")
        flow.sources[module] = makers.get(id(x), what)

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        flow.runs[module] += 1
        outputs[module] = output
        makers[id(output)] = module
        if isinstance(module, _FOLDABLE) and output.dim() != module.weight.dim():
            flow.odd_outputs.add(module)

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, (*_FOLDABLE, _BatchNorm)):
                hooks.callback(module.register_forward_hook(after).remove)
            if isinstance(module, _BatchNorm):
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        with torch.no_grad(), readers:
            readers.read(model(example))
    for module, output in outputs.items():
        flow.readers[module] = readers.count[id(output)]
        if any(readers.count[id(value)] > flow.runs[module] for value in module.parameters(recurse=False)):
            flow.exposed.add(module)
    return flow


def _obstacle(
    batchnorm: _BatchNorm, flow: _Flow, names: Mapping[nn.Module, str], owners: Mapping[nn.Parameter, int]
) -> str | None:
    """Say why a BatchNorm cannot be folded, or return ``None``."""
    if batchnorm.running_mean is None:
        return "it keeps no running statistics"
    if flow.runs[batchnorm] != 1:
        times = flow.runs[batchnorm]
        return f"the forward pass runs it {times} times" if times else "the forward pass never runs it"
    source = flow.sources[batchnorm]
    if isinstance(source, str):
        return f"it follows {source}, not a convolution or Linear layer"
    label = f"{type(source).__name__} {names[source]!r}"
    if type(source) not in _FOLDABLE:
        return f"it follows {label}, not a plain convolution or Linear layer of torch"
    assert isinstance(source, _FOLDABLE)
    if flow.runs[source] != 1:
        return f"the forward pass runs {label} before it {flow.runs[source]} times"
    if flow.readers[source] != 1:
        return f"the output of {label} also goes elsewhere"
    if source in flow.odd_outputs or _out_channels(source) != batchnorm.num_features:
        return f"it does not normalise the output channels of {label}"
    for module in (source, batchnorm):
        if module in flow.exposed or any(owners[value] > 1 for value in module.parameters(recurse=False)):
            return f"the parameters of {type(module).__name__} {names[module]!r} are used elsewhere, too"
    if "bias_orig" in dict(source.named_parameters(recurse=False)):
        return f"the bias of {label} is pruned"
    if not all(value.isfinite().all() for value in _affine(batchnorm)):
        return "its scale or shift is not finite"
    return None


def _out_channels(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else int(layer.out_channels)  # type: ignore[arg-type]


def _affine(batchnorm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift that the layer applies per channel, in float64."""
    mean, variance = (statistic.double() for statistic in _running(batchnorm))
    scale = (variance + batchnorm.eps).rsqrt()
    if batchnorm.weight is not None:
        scale = scale * batchnorm.weight.detach().double()
    shift = -mean * scale
    if batchnorm.bias is not None:
        shift = shift + batchnorm.bias.detach().double()
    return scale, shift


@torch.no_grad()
def _absorb(layer: nn.Module, batchnorm: _BatchNorm) -> None:
    """Multiply the layer's output channels by the BatchNorm's scale and add its shift."""
    scale, shift = _affine(batchnorm)
    # A pruned layer recomputes `weight` from `weight_orig` and its mask before every forward pass.
    pruned = "weight_orig" in dict(layer.named_parameters(recurse=False))
    weight = layer.get_parameter("weight_orig" if pruned else "weight")
    if isinstance(layer, _TRANSPOSED):  # (in, out / groups, ...): input channels of a group share its outputs
        per_group = scale.view(layer.groups, -1)
        factor = per_group.repeat_interleave(layer.in_channels // layer.groups, dim=0)
    else:
        factor = scale[:, None]
    factor = factor.view(*factor.shape, *[1] * (weight.dim() - 2))
    weight.copy_(weight.double() * factor)
    if pruned:
        layer.weight = weight * layer.get_buffer("weight_mask")
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)
    else:
        assert isinstance(layer.bias, nn.Parameter)
        layer.bias.copy_(layer.bias.double() * scale + shift)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is registered; one module may have several names."""
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if child is old:
                parent.add_module(key, new)

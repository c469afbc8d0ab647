"""`attach`: make a PyTorch network run on the simulated array, and read off what happened."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from sysmt.config import ArrayConfig, parse_count, parse_layer_names, parse_threads
from sysmt.errors import CalibrationError, ConfigError, UnsupportedLayerError, nearest
from sysmt.hw.energy import EnergyTable, load_table
from sysmt.hw.kernels import keep_heap
from sysmt.hw.memory import Memory
from sysmt.hw.operands import MAX_K
from sysmt.nn.blocks import FusedBlock, known_forward
from sysmt.nn.calibration import RangeObserver, WideObserver, image_batches, run_observed
from sysmt.nn.energy import layer_energy
from sysmt.nn.layers import CapturedGemm, HookedLayer
from sysmt.nn.lowering import LayerGeometry
from sysmt.quant.uniform import SCALES, ActivationRange, is_scale

__all__ = ["Simulation", "attach"]

FIRST_CONVOLUTION = "first convolution (first=False)"
LINEAR = "fully connected layer (linear=False)"
DEPTHWISE = "depthwise convolution (depthwise=False)"
EXCLUDED = "excluded by name"
NOT_REACHED = "not reached by any forward so far"


def attach(
    model: nn.Module,
    config: ArrayConfig | None = None,
    *,
    first: bool = False,
    linear: bool = False,
    depthwise: bool = False,
    errors: bool = False,
    exclude: Iterable[str] = (),
    per_channel: bool = True,
    fuse: bool = True,
) -> Simulation:
    """Put a network's convolutions on the simulated array.

    The instances' `forward` is replaced; modules, parameters and state_dict keys stay as they are.
    By default the layers that the papers leave in float stay so: the first executed convolution,
    fully connected layers and depthwise convolutions (recalibration paper, section 3 and Table 1).

    Parameters
    ----------
    model : nn.Module
        Any network with Conv2d (or Linear) layers; float32, on the CPU.
    config : ArrayConfig, optional
        The array; `config.threads` is the thread count of every simulated layer at first.
    first, linear, depthwise : bool
        Simulate the first executed Conv2d, Linear layers, depthwise convolutions as well.
    errors : bool
        Also run every layer at T = 1 on the same input, for the report's `mse` and `sqnr_db`.
    exclude : iterable of str
        Names of layers that stay in float, also such as could not be simulated.
    per_channel : bool
        Weight scales per output channel (as in the papers) or per layer.
    fuse : bool
        Do a BatchNorm (in evaluation mode) and a ReLU that directly follow a simulated convolution while
        it stores its output, where no gradients are recorded: in ``nn.Sequential`` and in the blocks of
        `sysmt.nn.blocks.FORWARDS`, unless a module concerned has hooks. No bit changes; torch's profiler
        does not see them.

    Returns
    -------
    Simulation
        Also a context manager that detaches at its end.

    Raises
    ------
    ConfigError
        If the model has nothing to simulate, is attached already, or a name in `exclude` is unknown.
    UnsupportedLayerError
        If a layer (named) is a convolution that the array does not do: transposed, 1-D, 3-D, lazy, or a
        subclass with a `forward` of its own.

    Examples
    --------
    >>> with sysmt.attach(model, sysmt.ArrayConfig(threads=4)) as sim:
    ...     sim.calibrate(loader, images=2048)
    ...     logits = model(x)
    ...     print(sim.report())
    """
    config = ArrayConfig() if config is None else config
    if not isinstance(config, ArrayConfig):
        raise ConfigError(f"config has type {type(config).__name__}; an ArrayConfig is needed")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model has type {type(model).__name__}; a torch.nn.Module is needed")
    return Simulation(
        model,
        config,
        first=first,
        linear=linear,
        depthwise=depthwise,
        errors=errors,
        exclude=exclude,
        per_channel=per_channel,
        fuse=fuse,
    )


class Simulation:
    """A network on the array, from `attach` to `detach`.

    Attributes
    ----------
    model : nn.Module
        The attached network.
    config : ArrayConfig
        The array; each layer has its own thread count beside it.
    errors : bool
        Whether layers are compared with T = 1.
    fuse : bool
        Whether BatchNorm and ReLU are done with the convolution before them.
    reorder : bool
        Whether the orders gathered by ``calibrate(reorder=True)`` are in force.
    layers : dict of str to HookedLayer
        Every Conv2d and Linear by name, those in float included.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ArrayConfig,
        *,
        first: bool,
        linear: bool,
        depthwise: bool,
        errors: bool,
        exclude: Iterable[str],
        per_channel: bool,
        fuse: bool,
    ) -> None:
        self.model = model
        self.config = config
        self.errors = errors
        self.per_channel = per_channel
        self.fuse = fuse
        self._include_first = first
        self._first_name: str | None = None
        self._reorder = False
        self._threads_by_name: dict[str, int] = {}
        excluded = parse_layer_names(exclude, "exclude")
        self.layers: dict[str, HookedLayer] = {}
        for name, module in model.named_modules():
            excluded_here = name in excluded
            excluded.discard(name)
            if isinstance(module, _ConvNd | nn.Linear):
                self._add_layer(name, module, linear, depthwise, excluded_here)
        if excluded:
            name = min(excluded)
            raise ConfigError(
                f"exclude names {name!r}, which the model does not have{nearest(name, self.layers)}"
            )
        self._check_something_to_simulate()
        self._attached = True
        self._images = 0
        self._forward_begins = False
        self._hook = model.register_forward_pre_hook(self._begin_forward)
        # torch's fast path of attention layers reads weights past the modules that hold them.
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        if any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules()):
            torch.backends.mha.set_fastpath_enabled(False)
        keep_heap()
        for layer in self.layers.values():
            layer.module.forward = layer  # type: ignore[method-assign]
        self._blocks = []
        for module in model.modules():
            if (forward := known_forward(module)) is not None:
                self._blocks.append(FusedBlock(self, module, forward))
                module.forward = self._blocks[-1]

    def _begin_forward(self, *_: Any) -> None:
        self._forward_begins = True

    def _add_layer(self, name: str, module: nn.Module, linear: bool, depthwise: bool, excluded: bool) -> None:
        if isinstance(module.__dict__.get("forward"), HookedLayer):
            raise ConfigError(f"layer {name!r} is attached to a simulation already; detach that one first")
        if not isinstance(module, nn.Conv2d | nn.Linear):
            if excluded:
                return
            raise UnsupportedLayerError(
                f"layer {name!r} is a {type(module).__name__}; the array runs Conv2d and Linear. "
                "Name it in `exclude` to leave it in float"
            )
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise UnsupportedLayerError(
                f"layer {name!r} is lazy and has no shape yet; run one float forward first"
            )
        reason = None
        if excluded:
            reason = EXCLUDED
        elif isinstance(module, nn.Linear):
            reason = None if linear else LINEAR
        elif LayerGeometry.of(module).depthwise and not depthwise:
            reason = DEPTHWISE
        k = LayerGeometry.of(module).gemm_k
        if reason is None and k > MAX_K:
            raise UnsupportedLayerError(
                f"layer {name!r} has K={k}, which could overflow a 32-bit accumulator; at most {MAX_K} is "
                "possible. Name it in `exclude` to leave it in float"
            )
        if reason is None and not _has_standard_forward(module):
            raise UnsupportedLayerError(
                f"layer {name!r} ({type(module).__name__}) has a forward of its own, which the array would "
                "not honour. Name it in `exclude` to leave it in float"
            )
        self.layers[name] = HookedLayer(self, name, module, reason)

    def _check_something_to_simulate(self) -> None:
        candidates = [layer for layer in self.layers.values() if layer.reason is None]
        convolutions = [layer for layer in self.layers.values() if isinstance(layer.module, nn.Conv2d)]
        if not self._include_first and len(convolutions) == 1:
            candidates = [layer for layer in candidates if layer is not convolutions[0]]
        if not candidates:
            left = ", ".join(
                f"{layer.name or 'the model itself'}: {layer.reason or FIRST_CONVOLUTION}"
                for layer in self.layers.values()
            )
            raise ConfigError(f"the model has no layer to simulate ({left or 'no Conv2d or Linear at all'})")

    # -- life ----------------------------------------------------------------------------------

    def __enter__(self) -> Simulation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Take the network off the array, leaving it as it was before `attach`.

        Statistics that were recalibrated meanwhile stay. Detaching twice does nothing.
        """
        if self._attached:
            self._attached = False
            self._hook.remove()
            torch.backends.mha.set_fastpath_enabled(self._fast_path)
        for block in self._blocks:
            if block.module.__dict__.get("forward") is block:
                del block.module.forward
        for layer in self.layers.values():
            if layer.module.__dict__.get("forward") is layer:
                del layer.module.forward
                if layer.module.forward != layer.original_forward:
                    layer.module.forward = layer.original_forward

    @property
    def knows_first(self) -> bool:
        """Whether it is settled which convolution is the first."""
        return self._include_first or self._first_name is not None

    def note_execution(self, layer: HookedLayer, images: int = 0) -> None:
        """Count the images of a forward, and leave the first convolution in float unless ``first=True``."""
        if self._forward_begins:
            self._forward_begins = False
            self._images += images
        if self._include_first or self._first_name is not None or not isinstance(layer.module, nn.Conv2d):
            return
        if layer.reason is None:
            waiting = "capture" if layer.captures else ""
            named = "set_threads" if layer.name in self._threads_by_name else waiting
            if named:
                layer.captures = []
                raise ConfigError(
                    f"{named} names {layer.name!r}, but it is the first convolution and stays in float; "
                    "attach with first=True to simulate it"
                )
            layer.reason = FIRST_CONVOLUTION
        self._first_name = layer.name

    # -- calibration ---------------------------------------------------------------------------

    def calibrate(
        self,
        loader: Iterable[Any],
        images: int = 2048,
        *,
        percentile: float | None = None,
        reorder: bool = False,
    ) -> None:
        """Gather activation ranges from the float network; resets the counters.

        Parameters
        ----------
        loader : iterable
            Of input tensors or (input, target) pairs: training images, through the network's training
            augmentation.
        images : int
            How many images to use; the last batch is cut. Fewer in the loader warn.
        percentile : float, optional
            Percentile in (0, 100] of each image's activations instead of their maximum.
        reorder : bool
            Also count how often each K position is wide (a second pass, with the final ranges), and
            run with the orders that follow from it.

        Raises
        ------
        CalibrationError
            If the loader gives no images or activations that are not finite, or can be iterated
            only once while `reorder` needs two passes.
        ConfigError
            If `images` or `percentile` is out of range.
        """
        images = parse_count(images, "images")
        if percentile is not None and not (isinstance(percentile, int | float) and 0 < percentile <= 100):
            raise ConfigError(f"percentile={percentile!r} is out of range; it must be in (0, 100]")
        if reorder and iter(loader) is loader:
            raise CalibrationError(
                "reordering needs a second pass over the calibration data, but the loader is an iterator "
                "that can be used only once; pass a list or a DataLoader"
            )
        if self._first_name is not None:
            layer = self.layers[self._first_name]
            layer.reason = None if layer.reason == FIRST_CONVOLUTION else layer.reason
            self._first_name = None
        observers = {layer.name: RangeObserver(layer.name, percentile) for layer in self.simulated()}
        try:
            run_observed(self.model, self.layers.values(), observers, image_batches(loader, images))
            ranges = {layer.name: observers[layer.name].result() for layer in self.simulated()}
            wide = {}
            if reorder:
                wide = {layer.name: WideObserver(layer, ranges[layer.name]) for layer in self.simulated()}
                run_observed(self.model, self.layers.values(), wide, image_batches(loader, images))
        finally:
            self.reset()
        for name, range_ in ranges.items():
            self.layers[name].range = range_
            self.layers[name].wide_counts = list(wide[name].counts) if reorder else None
        self.reorder = reorder
        unreached = [name for name, range_ in ranges.items() if range_ is None]
        if unreached:
            warnings.warn(
                f"{len(unreached)} layer(s) to be simulated were not reached in calibration, such as "
                f"{unreached[0]!r}: their forward was never called, so what they compute, if anything, stays "
                "in float and uncounted",
                stacklevel=2,
            )

    def ranges(self) -> dict[str, ActivationRange]:
        """Return the activation range of every simulated layer that has one."""
        return {layer.name: layer.range for layer in self.simulated() if layer.range is not None}

    def set_ranges(self, ranges: Mapping[str, ActivationRange | float]) -> None:
        """Bring your own activation scales; layers that are not named keep theirs. Resets the counters.

        Parameters
        ----------
        ranges : mapping of str to ActivationRange or float
            By layer name; a bare number is the scale of an unsigned range.

        Raises
        ------
        ConfigError
            If a name is unknown or its layer stays in float, or a scale is not positive and finite.
        """
        if not isinstance(ranges, Mapping):
            raise ConfigError(f"set_ranges got {type(ranges).__name__}; a mapping of layer names is needed")
        parsed = {}
        for name, given in ranges.items():
            layer = self._simulated_layer(name, "set_ranges")
            parsed[layer] = given if isinstance(given, ActivationRange) else ActivationRange(given)
        for layer, range_ in parsed.items():
            layer.range = range_
        self.reset()

    def set_weight_scales(self, scales: Mapping[str, np.ndarray | float | None]) -> None:
        """Bring your own weight scales; layers that are not named keep theirs. Resets the counters.

        By default the largest weight of an output channel becomes ±127. Ternary weights ±α are wide then;
        with α as the scale they are -1, 0 and +1. Calibration files do not hold these scales.

        Parameters
        ----------
        scales : mapping of str to float32 array (N,), float or None
            By layer name: one for each output channel, or one for all. Codes beyond ±127 are clamped. None
            goes back to the scales that follow from the weights.

        Raises
        ------
        ConfigError
            If a name is unknown or its layer stays in float, or scales are not positive, finite, normal
            float32 numbers or not as many as output channels.
        """
        if not isinstance(scales, Mapping):
            raise ConfigError(
                f"set_weight_scales got {type(scales).__name__}; a mapping of layer names is needed"
            )
        parsed = {}
        for name, given in scales.items():
            layer = self._simulated_layer(name, "set_weight_scales")
            parsed[layer] = None if given is None else _weight_scales(given, layer)
        for layer, values in parsed.items():
            layer.own_weight_scales = values
            layer.forget_packed()
        self.reset()

    @property
    def reorder(self) -> bool:
        """Whether the orders gathered in calibration are in force; set it to switch them on or off."""
        return self._reorder

    @reorder.setter
    def reorder(self, on: bool) -> None:
        missing = [
            layer.name for layer in self.simulated() if layer.wide_counts is None and layer.range is not None
        ]
        if on and missing:
            raise CalibrationError(
                f"layer {missing[0]!r} has no reordering statistics; calibrate(loader, reorder=True) first"
            )
        self._reorder = on
        for layer in self.layers.values():
            layer.forget_packed()

    # -- settings ------------------------------------------------------------------------------

    def set_threads(self, threads: int | Mapping[str, int]) -> None:
        """Set the thread count of all simulated layers, or of those named; resets the counters.

        Parameters
        ----------
        threads : int or mapping of str to int
            1, 2 or 4; a mapping leaves the layers that it does not name as they are.

        Raises
        ------
        ConfigError
            If a count is not 1, 2 or 4, or a name is unknown or its layer stays in float.
        """
        if isinstance(threads, Mapping):
            parsed = {
                self._simulated_layer(name, "set_threads"): parse_threads(count, f"threads of layer {name!r}")
                for name, count in threads.items()
            }
            self._threads_by_name.update({layer.name: count for layer, count in parsed.items()})
        else:
            count = parse_threads(threads)
            parsed = dict.fromkeys(self.simulated(), count)
            self._threads_by_name = {}
        for layer, count in parsed.items():
            layer.threads = count
        self.reset()

    def threads(self) -> dict[str, int]:
        """Return the thread count of every simulated layer."""
        return {layer.name: layer.threads for layer in self.simulated()}

    def reconfigure(self, **changes: Any) -> None:
        """Change fields of the array (policy, rounding, rows, ...), keeping ranges and thread counts.

        Resets the counters. Use `set_threads` for threads.

        Raises
        ------
        ConfigError
            If a field or value does not exist.
        """
        if "threads" in changes:
            raise ConfigError("reconfigure cannot change threads; use set_threads")
        self.config = self.config.replace(**changes)
        for layer in self.layers.values():
            layer.forget_packed()
        self.reset()

    def capture(self, name: str, image: int = 0, group: int = 0) -> CapturedGemm:
        """Keep the operands of one GEMM of the next forward that reaches the layer.

        Parameters
        ----------
        name : str
            A simulated layer.
        image, group : int
            Which image of the batch, and which group of a grouped convolution.

        Returns
        -------
        CapturedGemm
            Filled by the next forward: ``simulate_gemm(c.a_mk, c.b_kn, c.config, order=c.order)``
            computes just what the layer did.

        Raises
        ------
        ConfigError
            If the name is unknown, its layer stays in float, or image or group is out of range.
        """
        layer = self._simulated_layer(name, "capture")
        image, group = parse_count(image, "image", 0), parse_count(group, "group", 0)
        if group >= layer.geometry.groups:
            raise ConfigError(f"group={group}, but layer {name!r} has {layer.geometry.groups} group(s)")
        captured = CapturedGemm(name, image, group, self.config.replace(threads=layer.threads))
        layer.captures.append(captured)
        return captured

    def simulated(self) -> Iterator[HookedLayer]:
        """Iterate over the layers that run on the array."""
        return (layer for layer in self.layers.values() if layer.reason is None)

    def _simulated_layer(self, name: str, where: str) -> HookedLayer:
        layer = self.layers.get(name)
        if layer is None:
            raise ConfigError(
                f"{where}: the model has no Conv2d or Linear named {name!r}{nearest(name, self.layers)}"
            )
        if layer.reason is not None:
            raise ConfigError(f"{where}: layer {name!r} stays in float: {layer.reason}")
        return layer

    # -- results -------------------------------------------------------------------------------

    def reset(self) -> None:
        """Set all counters back to zero."""
        self._images = 0
        for layer in self.layers.values():
            layer.reset()

    @property
    def images(self) -> int:
        """Images that went through the network since the last reset, as its first layer saw them."""
        return self._images

    @property
    def cycles(self) -> int:
        """Array cycles of all Conv2d and Linear layers, those left in float counted at T = 1."""
        return sum(layer.stats.cycles for layer in self.layers.values())

    @property
    def speedup(self) -> float:
        """MAC-weighted speedup of the simulated layers: sum of macs / sum of (macs / T); 1.0 without macs."""
        return _mac_speedup((layer.stats.macs, layer.threads) for layer in self.simulated())

    @property
    def network_speedup(self) -> float:
        """The same over all Conv2d and Linear layers, those left in float counted at T = 1."""
        return _mac_speedup(
            (layer.stats.macs, layer.threads if layer.reason is None else 1) for layer in self.layers.values()
        )

    @property
    def speedup_cycles(self) -> float:
        """Cycles at T = 1 over cycles as configured, of the simulated layers; 1.0 without cycles."""
        return _cycle_speedup(self.simulated())

    @property
    def network_speedup_cycles(self) -> float:
        """The same over all Conv2d and Linear layers, those left in float counted at T = 1."""
        return _cycle_speedup(self.layers.values())

    def report(self, energy: EnergyTable | None = None, memory: Memory | None = None) -> pd.DataFrame:
        """Return a row for each Conv2d and Linear, those left in float included.

        Parameters
        ----------
        energy : EnergyTable, optional
            As `sysmt.hw.energy.load_table` gives it; by default the 45 nm table.
        memory : Memory, optional
            SRAMs and DRAM bandwidth; by default those of `sysmt.hw.memory.Memory`.

        Returns
        -------
        pandas.DataFrame
            ``name``; ``M, N, K`` of one GEMM; ``groups, images, threads`` (0: in float); ``macs``
            and ``cycles`` (in float: at T = 1); ``active_0`` .. ``active_4``; ``collisions``,
            ``collision_rate`` and ``utilization`` in [0, 1]; ``reduced_activations``,
            ``reduced_weights``; ``speedup_cycles``; ``energy_pj`` and ``energy_delay_pj_cycles`` (or
            whatever the table's unit is; 0 in float); with ``errors=True`` ``sqnr_db`` (dB) and ``mse``;
            ``reason`` a layer is in float or empty.
        """
        energy, memory = energy or load_table(), memory or Memory()
        rows = [self._report_row(layer, energy, memory) for layer in self.layers.values()]
        return pd.DataFrame(rows)

    def _report_row(self, layer: HookedLayer, energy: EnergyTable, memory: Memory) -> dict[str, Any]:
        simulated = layer.reason is None
        m, n, k = layer.gemm_shape or (0, layer.geometry.gemm_n, layer.geometry.gemm_k)
        record = layer.stats.to_record()
        row: dict[str, Any] = {
            "name": layer.name,
            "M": m,
            "N": n,
            "K": k,
            "groups": layer.geometry.groups,
            "images": layer.images,
            "threads": layer.threads if simulated else 0,
            "macs": record["macs"],
            "cycles": record["cycles"],
        }
        row |= {f"active_{c}": record.get(f"active_{c}", 0) for c in range(5)}
        row |= {
            key: record[key]
            for key in (
                "collisions",
                "collision_rate",
                "utilization",
                "reduced_activations",
                "reduced_weights",
                "speedup_cycles",
            )
        }
        row |= layer_energy(layer, energy, memory)
        if self.errors or any(one.compared for one in self.layers.values()):
            row |= {"sqnr_db": layer.sqnr_db, "mse": layer.mse}
        row["reason"] = layer.reason or ("" if layer.images else NOT_REACHED)
        return row


def _weight_scales(given: np.ndarray | float, layer: HookedLayer) -> np.ndarray:
    channels = layer.geometry.out_channels
    try:
        with np.errstate(over="ignore"):
            values = np.broadcast_to(np.asarray(given, np.float32), channels).copy()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"weight scales of layer {layer.name!r}: {channels} numbers or one are needed ({error})"
        ) from error
    if not is_scale(values).all():
        bad = int(np.argmin(is_scale(values)))
        raise ConfigError(
            f"weight scales of layer {layer.name!r}: {values[bad]:.3g} of output channel {bad} is no scale: "
            f"{SCALES}"
        )
    return values


def _has_standard_forward(module: nn.Module) -> bool:
    kind = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    methods = ("forward", "_conv_forward") if kind is nn.Conv2d else ("forward",)
    return "forward" not in module.__dict__ and all(
        inspect.getattr_static(type(module), method) is inspect.getattr_static(kind, method)
        for method in methods
    )


def _mac_speedup(layers: Iterable[tuple[int, int]]) -> float:
    total, time = 0, Fraction(0)
    for macs, threads in layers:
        total += macs
        time += Fraction(macs, threads)
    return float(total / time) if time else 1.0


def _cycle_speedup(layers: Iterable[HookedLayer]) -> float:
    stats = [layer.stats for layer in layers]
    cycles = sum(s.cycles for s in stats)
    return sum(s.single_thread_cycles for s in stats) / cycles if cycles else 1.0

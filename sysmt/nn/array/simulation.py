"""`attach`: make a PyTorch network run on the simulated array, and read off what happened."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import nn

from sysmt.config import ArrayConfig, parse_count, parse_number, parse_threads
from sysmt.cost.energy import EnergyTable
from sysmt.cost.memory import Memory
from sysmt.errors import CalibrationError, ConfigError, UnsupportedLayerError, nearest
from sysmt.hw.kernels import keep_heap
from sysmt.nn.array.attention import FAST_PATH
from sysmt.nn.array.calibration import RangeObserver, WideObserver, run_observed
from sysmt.nn.array.fused_blocks import FusedBlock, known_forward
from sysmt.nn.array.hooks import (
    CatchingHook,
    DirectHook,
    RootWatch,
    has_standard_forward,
    own_modes,
    running,
)
from sysmt.nn.array.layer import ArrayLayer, CapturedGemm
from sysmt.nn.array.lowering import LayerGeometry
from sysmt.nn.array.other_work import FunctionalCalls, Product, UncountedProducts
from sysmt.nn.array.report import cycle_speedup, layer_report, mac_speedup
from sysmt.nn.array.selection import (
    FIRST_CONVOLUTION,
    Choice,
    Exclusion,
    excluded_layers,
    is_layer,
    string_entries,
    unsupported,
)
from sysmt.nn.array.settings import ArraySettings
from sysmt.nn.array.stand_in import StandIn
from sysmt.nn.passes import image_batches
from sysmt.quant.uniform import SCALES, ActivationRange, is_scale

__all__ = ["Simulation", "attach"]

_Made = TypeVar("_Made", RangeObserver, WideObserver)


def attach(
    model: nn.Module,
    config: ArrayConfig | None = None,
    *,
    first: bool = False,
    linear: bool = False,
    depthwise: bool = False,
    errors: bool = False,
    exclude: Exclusion | Iterable[Exclusion] = (),
    per_channel: bool = True,
    fuse: bool = True,
    functional: bool = False,
    strict: bool = False,
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
    exclude : str, type, callable, or iterable of these
        Layers that stay in float, also such as could not be simulated: by name, by the name of a block
        that they lie in, by a pattern (``"blocks.*.fc1"``), by the type of the module or block, or by a
        function of name and module.
    per_channel : bool
        Weight scales per output channel (as in the papers) or per layer.
    fuse : bool
        Do a BatchNorm (in evaluation mode) and a ReLU that directly follow a simulated convolution while
        it stores its output, where no gradients are recorded: in ``nn.Sequential`` and in the blocks of
        `sysmt.nn.array.fused_blocks.FORWARDS`, unless a module concerned has hooks. No bit changes;
        torch's profiler does not see them.
    functional : bool
        Simulate calls of `torch.nn.functional.conv2d` and `linear` outside any convolution or Linear, too.
        They are found in the first forward, and counted in float otherwise. The projections of
        `nn.MultiheadAttention` follow `linear`.
    strict : bool
        Raise if there are layers that the array cannot take, and name them all, instead of leaving them in
        float.

    Returns
    -------
    Simulation
        Also a context manager that detaches at its end.

    Raises
    ------
    ConfigError
        If the model has nothing to simulate, is attached already, or an entry of `exclude` leaves out
        nothing.
    UnsupportedLayerError
        If K of a layer (named) is too large; with ``strict=True`` also if there are convolutions that the
        array does not do: transposed, 1-D, 3-D, or lazy ones without a shape.

    Notes
    -----
    A layer with a forward of its own is run as it says; the calls of `torch.nn.functional.conv2d` and
    `linear` in it go to the array, with the operands that they have: padded, standardised or masked.

    Whatever else multiplies, such as the products of attention, transposed convolutions and recurrent
    layers, stays in float and is counted, each with a row and a reason in the report.

    Copies of the attached network, by `copy.deepcopy`, `torch.save` or `pickle`, are plain float networks.

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
        functional=functional,
        strict=strict,
    )


class Simulation:
    """A network on the array, from `attach` to `detach`.

    What is one number of the whole network is a property (`images`, `cycles`, `speedup`); what has an entry
    for each layer, or changes something, is a method.

    Attributes
    ----------
    model : nn.Module
        The attached network.
    layers : dict of str to ArrayLayer
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
        exclude: Exclusion | Iterable[Exclusion],
        per_channel: bool,
        fuse: bool,
        functional: bool,
        strict: bool,
    ) -> None:
        self.model = model
        self._settings = ArraySettings(config, per_channel, errors, fuse)
        excluded = excluded_layers(model, exclude)
        self._choice = Choice(first, linear, depthwise, functional, excluded, string_entries(exclude))
        self._first_name: str | None = None
        self._threads_by_name: dict[str, int] = {}
        self._images = 0
        self._forward_begins = False
        self._forward_images = 0
        self._attached = False
        self._observe: Callable[[ArrayLayer], None] | None = None
        self.layers: dict[str, ArrayLayer] = {}
        self._blocks: list[FusedBlock] = []
        self._stand_ins: list[StandIn] = []
        _check_free(model)
        named = [*model.named_modules()]
        if strict:
            _check_supported(named, excluded)
        hooks = [
            self._hook(name, module)
            for name, module in named
            if is_layer(module) and unsupported(name, module) is None
        ]
        self._check_something_to_simulate()
        self._has_attention = any(
            isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention) for _, module in named
        )
        keep_heap()
        try:
            for hook in hooks:
                self._install(hook)
            for _, module in named:
                if (forward := known_forward(module)) is not None:
                    self._blocks.append(FusedBlock(module, forward, self._settings))
                    self._install(self._blocks[-1])
            self._install(RootWatch(model, self._forward))
        except BaseException:
            self._remove_stand_ins()
            raise
        if self._has_attention:
            FAST_PATH.switch_off()
        self._functional = FunctionalCalls(model, self.layers, self._make_functional_layer)
        self._products = UncountedProducts(model, self._note_products)
        self._surveyed = False
        self._known = {id(module) for module in model.modules() if is_layer(module)}
        self._attached = True

    def _hook(self, name: str, module: nn.Module) -> StandIn:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        layer = self._make_layer(name, module, LayerGeometry.of(module), isinstance(module, nn.Linear))
        if has_standard_forward(module):
            return DirectHook(module, layer)
        return CatchingHook(module, name, self.layers, self._make_layer)

    def _make_layer(
        self, name: str, module: nn.Module, geometry: LayerGeometry, is_linear: bool
    ) -> ArrayLayer:
        return self._add_layer(
            name, module, geometry, is_linear, self._choice.reason(name, geometry, is_linear)
        )

    def _make_functional_layer(
        self, name: str, module: nn.Module, geometry: LayerGeometry, is_linear: bool
    ) -> ArrayLayer:
        reason = self._choice.functional_reason(name, module, geometry, is_linear)
        return self._add_layer(name, module, geometry, is_linear, reason)

    def _add_layer(
        self, name: str, module: nn.Module, geometry: LayerGeometry, is_linear: bool, reason: str | None
    ) -> ArrayLayer:
        layer = ArrayLayer(name, module, geometry, is_linear, reason, self._settings, self)
        self.layers[name] = layer
        if self._observe is not None:
            self._observe(layer)
        return layer

    def _check_something_to_simulate(self) -> None:
        candidates = [layer for layer in self.layers.values() if layer.reason is None]
        convolutions = [layer for layer in self.layers.values() if not layer.is_linear]
        if not self._choice.first and len(convolutions) == 1:
            candidates = [layer for layer in candidates if layer is not convolutions[0]]
        if not candidates and not self._choice.functional:
            left = ", ".join(
                f"{layer.name or 'the model itself'}: {layer.reason or FIRST_CONVOLUTION}"
                for layer in self.layers.values()
            )
            raise ConfigError(f"the model has no layer to simulate ({left or 'no Conv2d or Linear at all'})")

    def _install(self, stand_in: StandIn) -> None:
        stand_in.install()
        self._stand_ins.append(stand_in)

    def _remove_stand_ins(self) -> None:
        while self._stand_ins:
            self._stand_ins.pop().remove()  # the last first: it may stand before another

    # -- life ----------------------------------------------------------------------------------

    def __enter__(self) -> Simulation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __reduce__(self) -> Any:
        raise ConfigError(
            "a Simulation cannot be copied or pickled; copy its model, which gives a float network, and "
            "attach that"
        )

    def detach(self) -> None:
        """Take the network off the array, leaving it as it was before `attach`.

        Statistics that were recalibrated meanwhile stay. Reports can still be read. Detaching twice does
        nothing.
        """
        if not self._attached:
            return
        self._attached = False
        self._remove_stand_ins()
        if self._has_attention:
            FAST_PATH.release()

    def _check_attached(self, what: str) -> None:
        if not self._attached:
            raise ConfigError(f"{what}: this simulation is detached; attach the model again")

    # -- what layers say -----------------------------------------------------------------------

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        """Run a forward: the first with eyes for everything, later ones for what the first has found."""
        self._begin_forward()
        calls = not self._surveyed or self._functional.found
        products = not self._surveyed or self._products.found
        if not calls and not products:
            yield
            return
        self._functional.begin()
        self._products.begin()
        with contextlib.ExitStack() as stack:
            stack.enter_context(running(self._functional))
            stack.enter_context(own_modes(calls, products))
            if calls:
                stack.enter_context(self._functional)
            if products:
                stack.enter_context(self._products)
            yield
        self._surveyed = True

    def _begin_forward(self) -> None:
        self._forward_begins = True
        self._forward_images = 0
        if self._has_attention:
            FAST_PATH.keep_off()
        newcomers = [
            module for module in self.model.modules() if is_layer(module) and id(module) not in self._known
        ]
        if newcomers:
            self._known |= {id(module) for module in newcomers}
            names = [name for name, module in self.model.named_modules() if module in newcomers]
            warnings.warn(
                f"{len(names)} layer(s) were added or replaced after attach, such as {names[0]!r}: they run "
                "in float, uncounted; detach and attach again",
                stacklevel=4,
            )

    def layer_called(self, layer: ArrayLayer) -> None:
        """Settle that the first convolution that runs is the first, and stays in float unless asked for."""
        if self.knows_first() or layer.is_linear:
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

    def layer_ran(self, images: int) -> None:
        """Count the images of a forward, as its first layer saw them."""
        if self._forward_begins:
            self._forward_begins = False
            self._forward_images = images
            self._images += images

    def _note_products(self, name: str, module: nn.Module, reason: str, products: Sequence[Product]) -> None:
        """Count products that no layer has computed, in a row of their own."""
        layer = self.layers.get(name)
        if layer is None:
            layer = self._add_layer(name, module, LayerGeometry(1, 1), True, reason)
        layer.counts.add_products(products, self._forward_images, self._settings.array(1))

    def knows_first(self) -> bool:
        """Whether it is settled which convolution is the first."""
        return self._choice.first or self._first_name is not None

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
        self._check_attached("calibrate")
        images = parse_count(images, "images")
        if percentile is not None:
            percentile = parse_number(
                percentile, "percentile", "a number in (0, 100]", lambda value: 0 < value <= 100
            )
        if reorder and iter(loader) is loader:
            raise CalibrationError(
                "reordering needs a second pass over the calibration data, but the loader is an iterator "
                "that can be used only once; pass a list or a DataLoader"
            )
        if self._first_name is not None:
            layer = self.layers[self._first_name]
            layer.reason = None if layer.reason == FIRST_CONVOLUTION else layer.reason
            self._first_name = None
        wide: dict[str, WideObserver] = {}
        try:
            with self._observed(lambda layer: RangeObserver(layer.name, percentile)) as observers:
                run_observed(self.model, observers, image_batches(loader, images))
            ranges = {layer.name: observers[layer.name].result() for layer in self.simulated()}
            if reorder:
                with self._observed(
                    lambda layer: WideObserver(ranges.get(layer.name), layer.geometry)
                ) as wide:
                    run_observed(self.model, wide, image_batches(loader, images))
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

    @contextlib.contextmanager
    def _observed(self, make: Callable[[ArrayLayer], _Made]) -> Iterator[dict[str, _Made]]:
        """Let each simulated layer be observed, those that a forward brings along included."""
        observers: dict[str, _Made] = {}

        def observe(layer: ArrayLayer) -> None:
            if layer.reason is None:
                layer.observer = observers[layer.name] = make(layer)

        self._observe = observe
        try:
            for layer in self.layers.values():
                observe(layer)
            yield observers
        finally:
            self._observe = None
            for layer in self.layers.values():
                layer.observer = None

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
        self._check_attached("set_ranges")
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
        self._check_attached("set_weight_scales")
        if not isinstance(scales, Mapping):
            raise ConfigError(
                f"set_weight_scales got {type(scales).__name__}; a mapping of layer names is needed"
            )
        parsed = {}
        for name, given in scales.items():
            layer = self._simulated_layer(name, "set_weight_scales")
            parsed[layer] = None if given is None else _weight_scales(given, layer)
        for layer, values in parsed.items():
            layer.weights.own_scales = values
            layer.weights.forget()
        self.reset()

    # -- settings ------------------------------------------------------------------------------

    def _set(self, **changes: Any) -> None:
        """Replace settings, and hand them down."""
        self._settings = self._settings.replaced(changes)
        for layer in self.layers.values():
            layer.settings = self._settings
        for block in self._blocks:
            block.settings = self._settings

    @property
    def config(self) -> ArrayConfig:
        """The array; each layer has its own thread count beside it."""
        return self._settings.config

    @property
    def errors(self) -> bool:
        """Whether layers are compared with T = 1; can be set."""
        return self._settings.errors

    @errors.setter
    def errors(self, on: bool) -> None:
        self._set(errors=on)

    @property
    def fuse(self) -> bool:
        """Whether BatchNorm and ReLU are done with the convolution before them; can be set."""
        return self._settings.fuse

    @fuse.setter
    def fuse(self, on: bool) -> None:
        self._set(fuse=on)

    @property
    def reorder(self) -> bool:
        """Whether the orders gathered in calibration are in force; can be set."""
        return self._settings.reorder

    @reorder.setter
    def reorder(self, on: bool) -> None:
        missing = [
            layer.name for layer in self.simulated() if layer.wide_counts is None and layer.range is not None
        ]
        if on and missing:
            raise CalibrationError(
                f"layer {missing[0]!r} has no reordering statistics; calibrate(loader, reorder=True) first"
            )
        self._set(reorder=on)
        for layer in self.layers.values():
            layer.weights.forget()

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
        self._check_attached("set_threads")
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
        self._check_attached("reconfigure")
        if "threads" in changes:
            raise ConfigError("reconfigure cannot change threads; use set_threads")
        self._set(config=self.config.replace(**changes))
        for layer in self.layers.values():
            layer.weights.forget()
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
        self._check_attached("capture")
        layer = self._simulated_layer(name, "capture")
        image, group = parse_count(image, "image", 0), parse_count(group, "group", 0)
        if group >= layer.geometry.groups:
            raise ConfigError(f"group={group}, but layer {name!r} has {layer.geometry.groups} group(s)")
        captured = CapturedGemm(name, image, group, self.config.replace(threads=layer.threads))
        layer.captures.append(captured)
        return captured

    def simulated(self) -> Iterator[ArrayLayer]:
        """Iterate over the layers that run on the array."""
        return (layer for layer in self.layers.values() if layer.reason is None)

    def _simulated_layer(self, name: str, where: str) -> ArrayLayer:
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
        return sum(layer.counts.stats.cycles for layer in self.layers.values())

    @property
    def speedup(self) -> float:
        """MAC-weighted speedup of the simulated layers: sum of macs / sum of (macs / T); 1.0 without macs."""
        return mac_speedup(self.simulated())

    @property
    def network_speedup(self) -> float:
        """The same over all Conv2d and Linear layers, those left in float counted at T = 1."""
        return mac_speedup(self.layers.values())

    @property
    def speedup_cycles(self) -> float:
        """Cycles at T = 1 over cycles as configured, of the simulated layers; 1.0 without cycles."""
        return cycle_speedup(self.simulated())

    @property
    def network_speedup_cycles(self) -> float:
        """The same over all Conv2d and Linear layers, those left in float counted at T = 1."""
        return cycle_speedup(self.layers.values())

    def report(self, energy: EnergyTable | None = None, memory: Memory | None = None) -> pd.DataFrame:
        """Return a row for each Conv2d and Linear, those left in float included.

        Parameters
        ----------
        energy : EnergyTable, optional
            As `sysmt.cost.energy.load_table` gives it; by default the 45 nm table.
        memory : Memory, optional
            SRAMs and DRAM bandwidth; by default those of `sysmt.cost.memory.Memory`.

        Returns
        -------
        pandas.DataFrame
            ``name``; ``M, N, K`` of one GEMM; ``groups, images, threads`` (0: in float); ``macs``
            and ``cycles`` (in float: at T = 1); ``active_0`` .. ``active_4``; ``collisions``,
            ``collision_rate`` and ``utilization`` in [0, 1]; ``reduced_activations``,
            ``reduced_weights``; ``speedup_cycles``; ``energy_pj`` and ``energy_delay_pj_cycles`` (or
            whatever the table's unit is; 0 in float); with ``errors=True`` ``sqnr_db`` (dB) and ``mse``;
            ``reason`` a layer is in float or empty. With a memory that has a bandwidth, ``cycles`` and
            ``speedup_cycles`` include stalls; ``compute_cycles``, ``stall_cycles`` and
            ``speedup_compute_cycles`` stand beside them.
        """
        return layer_report(self.layers.values(), self.errors, energy, memory)


def _weight_scales(given: np.ndarray | float, layer: ArrayLayer) -> np.ndarray:
    channels = layer.geometry.out_channels
    try:
        with np.errstate(over="ignore"):  # what overflows is no scale, and refused below
            values = np.asarray(given, np.float32)
        np.broadcast_to(values, channels)  # raises where they are not one or as many
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"weight scales of layer {layer.name!r}: {channels} numbers or one are needed ({error})"
        ) from error
    if not is_scale(values).all():
        bad = int(np.argmin(is_scale(values)))
        raise ConfigError(
            f"weight scales of layer {layer.name!r}: {values.flat[bad]:.3g} (number {bad}) is no scale: "
            f"{SCALES} is needed"
        )
    return values


def _check_supported(named: Iterable[tuple[str, nn.Module]], excluded: frozenset[str]) -> None:
    """Raise one error that names every layer which the array cannot take and nobody has excluded."""
    found = [
        reason
        for name, module in named
        if is_layer(module) and name not in excluded and (reason := unsupported(name, module)) is not None
    ]
    if found:
        raise UnsupportedLayerError(f"{'; '.join(found)}. Name them in `exclude` to leave them in float")


def _check_free(model: nn.Module) -> None:
    """Raise if a module has a stand-in already; warn of layers that nobody can give one."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            if module.original_name.startswith(("Conv", "Linear")):
                warnings.warn(
                    f"layer {name!r} is compiled by TorchScript: it runs in float, uncounted", stacklevel=5
                )
        elif isinstance(module.__dict__.get("forward"), StandIn):
            raise ConfigError(
                f"module {name!r} is attached to a simulation or a Q-format network already; detach that "
                "first"
            )

"""How much each layer's thread count hurts the logits, without computing the layers before it again.

One layer differs from the baseline at a time, so all that runs before it gives what it gave before. For
a batch of images the baseline runs once and every module's output is kept; then, for each layer and
thread count, the largest modules that end before that layer hand out what they kept, and only the rest
of the network runs. Images are the outer loop, so one batch's activations are all that is in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn
from torch.nn import functional as F

from sysmt.config import THREAD_COUNTS, parse_count, parse_threads
from sysmt.errors import CalibrationError
from sysmt.nn.array.simulation import Simulation
from sysmt.nn.passes import evaluation_mode, image_batches
from sysmt.progress import progress_bar

__all__ = ["PrefixReuse", "Sensitivities", "sensitivities"]


@dataclasses.dataclass(frozen=True)
class Sensitivities:
    """What one layer at a time does to the network's output.

    Attributes
    ----------
    table : DataFrame
        A row per layer and thread count other than the baseline's: ``layer``, ``threads``; ``kl``, the mean
        Kullback-Leibler divergence of the softmax from the baseline's, in nats; ``mse``, the mean squared
        change of the layer's own output against T = 1; ``flips``, the share of images whose largest
        logit changes, in [0, 1]; ``macs`` of the layer per image.
    baseline : int
        Threads of all the other layers.
    images : int
    seconds : float
        Wall time of it all.
    modules_run, modules_reused : int
        Calls of modules without submodules, in the runs that change a layer: computed, and spared.
    """

    table: pd.DataFrame
    baseline: int
    images: int
    seconds: float
    modules_run: int
    modules_reused: int

    def cost(self, layer: str, threads: int) -> float:
        """Return the divergence of one layer at so many threads; 0 at the baseline's."""
        if threads == self.baseline:
            return 0.0
        rows = self.table[(self.table["layer"] == layer) & (self.table["threads"] == threads)]
        return float(rows["kl"].iloc[0])


def sensitivities(
    sim: Simulation,
    loader: Iterable[Any],
    images: int = 256,
    *,
    baseline: int = 1,
    threads: Iterable[int] = THREAD_COUNTS,
    reuse: bool = True,
) -> Sensitivities:
    """Measure each simulated layer's sensitivity to each thread count, the other layers at the baseline.

    Parameters
    ----------
    sim : Simulation
        Calibrated. Its thread counts are restored afterwards, its counters reset.
    loader : iterable
        Input tensors or (input, target) pairs; targets are not used. The batch size bounds the memory.
    images : int
    baseline : int
        1, 2 or 4.
    threads : iterable of int
        Counts to try, besides the baseline's.
    reuse : bool
        False computes everything anew each time; the result is the same.

    Returns
    -------
    Sensitivities

    Raises
    ------
    CalibrationError
        If the network takes another path through its modules when run again, as a random one would.
    """
    images = parse_count(images, "images")
    baseline = parse_threads(baseline, "baseline")
    counts = [parse_threads(count) for count in threads]
    before = sim.threads()
    sim.set_threads(baseline)
    names = [layer.name for layer in sim.simulated()]
    errors, sim.errors = sim.errors, True
    sums = {(name, count): np.zeros(3) for name in names for count in counts if count != baseline}
    macs: dict[str, int] = {}
    seen = run = reused = 0
    start = time.monotonic()
    try:
        with (
            evaluation_mode(sim.model),
            PrefixReuse(sim.model) as prefix,
            progress_bar("layer sensitivities", images * len(sums), unit="images x settings") as bar,
        ):
            for batch in image_batches(loader, images):
                sim.reset()
                reference = F.log_softmax(_logits(prefix.record(batch)).double(), dim=1)
                macs |= {layer.name: layer.counts.stats.macs // len(batch) for layer in sim.simulated()}
                seen += len(batch)
                for (name, count), total in sums.items():
                    layer = sim.layers[name]
                    layer.threads = count
                    layer.reset()
                    try:
                        output = prefix.run(batch, layer.module if reuse else sim.model)
                        mse = layer.counts.mse
                    finally:
                        layer.threads = baseline
                        layer.reset()
                    changed = F.log_softmax(_logits(output).double(), dim=1)
                    kl = float(F.kl_div(changed, reference, reduction="sum", log_target=True))
                    total += kl, mse * len(batch), int((changed.argmax(1) != reference.argmax(1)).sum())
                    bar.advance(len(batch))
            run, reused = prefix.leaves_run, prefix.leaves_reused
    finally:
        sim.errors = errors
        sim.set_threads(before)
    rows = [
        {"layer": name, "threads": count}
        | {key: float(value) for key, value in zip(("kl", "mse", "flips"), total / seen, strict=True)}
        | {"macs": macs[name]}
        for (name, count), total in sums.items()
    ]
    return Sensitivities(pd.DataFrame(rows), baseline, seen, time.monotonic() - start, run, reused)


def _logits(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise CalibrationError("sensitivities need a network that returns logits of shape (images, classes)")
    return output


@dataclasses.dataclass
class _Call:
    """One call of a module in the recorded forward."""

    module: nn.Module
    end: int = 0
    """Index of the first call after this one and those inside it."""
    leaves: int = 0
    """Calls of modules without submodules, inside it or itself."""
    output: Tensor | None = None
    """What it returned, kept apart from changes in place; None if that was no tensor."""
    original: Tensor | None = None
    version: int = 0
    changed_later: bool = False


class PrefixReuse:
    """Runs a network again from one of its modules on, for any network of `torch.nn` modules.

    A context manager: inside it, the modules' `forward` is replaced, and afterwards it is as it was.

    Attributes
    ----------
    leaves_run, leaves_reused : int
        Calls of modules without submodules by `run` so far, computed and spared.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls: list[_Call] = []
        self._mode: str | None = None
        self._cursor = self._stop = 0
        self.leaves_run = self.leaves_reused = 0

    def __enter__(self) -> PrefixReuse:
        self._replaced = [
            (module, module.forward, module.__dict__.get("forward")) for module in self._model.modules()
        ]
        for module, forward, _ in self._replaced:
            module.forward = self._stand_in(module, forward)
        return self

    def __exit__(self, *exception: object) -> None:
        for module, _, own in self._replaced:
            del module.forward
            if own is not None:
                module.forward = own
        self._calls = []

    def record(self, batch: Tensor) -> Any:
        """Run the network, keeping what each module returns; forgets the batch before."""
        self._calls = []
        with self._as("record"):
            output = self._model(batch)
        for call in self._calls:
            # Layers such as ReLU(inplace=True) or `x += y` write into what an earlier module returned.
            call.changed_later = call.original is not None and call.original._version != call.version
            call.original = None
        return output

    def run(self, batch: Tensor, module: nn.Module) -> Any:
        """Run the network on the recorded batch, computing from the first call of `module` on.

        Raises
        ------
        CalibrationError
            If the modules before it are not called in the recorded order.
        """
        self._cursor = 0
        self._stop = next(
            (i for i, call in enumerate(self._calls) if call.module is module), len(self._calls)
        )
        with self._as("replay"):
            return self._model(batch)

    @contextlib.contextmanager
    def _as(self, mode: str) -> Iterator[None]:
        self._mode = mode
        try:
            yield
        finally:
            self._mode = None

    def _stand_in(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        leaf = not any(True for _ in module.children())

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if self._mode == "record":
                return self._record(module, leaf, forward, args, kwargs)
            if self._mode == "replay":
                return self._replay(module, leaf, forward, args, kwargs)
            return forward(*args, **kwargs)

        return stand_in

    def _record(
        self,
        module: nn.Module,
        leaf: bool,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        call = _Call(module)
        index = len(self._calls)
        self._calls.append(call)
        output = forward(*args, **kwargs)
        call.end = len(self._calls)
        call.leaves = int(leaf) + sum(inner.leaves for inner in self._children(index))
        if isinstance(output, Tensor):
            call.original, call.version = output, output._version
            last = self._calls[-1] if call.end > index + 1 else None
            shared = last is not None and last.original is output and last.version == output._version
            call.output = last.output if last is not None and shared else output.detach().clone()
        return output

    def _children(self, index: int) -> Iterator[_Call]:
        """Calls directly inside a call."""
        at = index + 1
        while at < len(self._calls):
            yield self._calls[at]
            at = max(at + 1, self._calls[at].end)

    def _replay(
        self,
        module: nn.Module,
        leaf: bool,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._cursor < self._stop:
            call = self._calls[self._cursor]
            if call.module is not module:
                raise CalibrationError(
                    f"the network called {type(module).__name__} where it had called "
                    f"{type(call.module).__name__} on the same images; it must repeat itself"
                )
            if call.output is not None and call.end <= self._stop:
                self._cursor = call.end
                self.leaves_reused += call.leaves
                return call.output.clone() if call.changed_later else call.output
            self._cursor += 1
        self.leaves_run += leaf
        return forward(*args, **kwargs)

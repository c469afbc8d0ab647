"""The networks that an experiment runs on: those that the options name, or those of ``--preset shared``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from common import preset as presets
from sysmt.errors import ConfigError
from sysmt.study.ledger import Ledger
from sysmt.study.run_config import RunConfig
from sysmt.study.workload import OpenWorkload

QUICK = {"images": 200, "calibration_images": 256, "recalibration_images": 512}
"""What ``--quick`` makes of these options where they are not given."""

_REMARKS = ("weights", "data", "train_data", "cpu_threads")
"""Of a network's configuration, what no point depends on: weights and images are told by their hashes."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network with its weights and its images.

    Attributes
    ----------
    name : str
        What tables and figures call it.
    config : RunConfig
    prepare : callable
        Unpacks or trains what `config` names, where that is still to be done.
    key : str
        Short, for file names; by default the model's name.
    """

    name: str
    config: RunConfig
    prepare: Callable[[], object] = lambda: None
    key: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.key or self.config.model)

    def facts(self) -> dict[str, Any]:
        """Return what the points depend on, for the ledger."""
        every = dict.fromkeys((field.name for field in dataclasses.fields(self.config)), "none")
        record = every | self.config.to_record()
        return {name: value for name, value in record.items() if name not in _REMARKS}

    def remarks(self) -> dict[str, Any]:
        """Return what stands beside it in the ledger, for the record."""
        record = dict.fromkeys(_REMARKS, "none") | self.config.to_record()
        return {name: record[name] for name in _REMARKS}

    def open(self, ledger: Ledger) -> OpenWorkload:
        """Open it, and make sure that the points in `ledger` are its own."""
        self.prepare()
        subject = OpenWorkload(self.config)
        ledger.identify(self.name, subject.identity())
        return subject


def workloads(
    chosen: Mapping[str, Any], preset: str | None, quick: bool, shared: tuple[str, ...], **defaults: Any
) -> list[Workload]:
    """Decide which networks an experiment runs on.

    Parameters
    ----------
    chosen : mapping
        `OPTIONS` that stand on the command line.
    preset : str or None
        ``"shared"``, ``"shared:NAME,NAME"`` or None.
    quick : bool
    shared : tuple of str
        The networks of `presets.NETWORKS` that ``"shared"`` alone stands for.
    **defaults
        Values of `RunConfig` that the experiment prefers to its defaults.
    """
    values = {**defaults, **(QUICK if quick else {}), **chosen}
    if preset is None:
        config = RunConfig(**values)
        return [Workload(config.model, config)]
    kind, _, names = preset.partition(":")
    if kind != "shared":
        raise ConfigError(f"preset={preset!r} is unknown; allowed: shared, shared:NAME,NAME")
    clash = [name for name in ("model", "weights", "data", "train_data") if name in chosen]
    if clash:
        raise ConfigError(f"--preset brings networks and images of its own; leave out --{clash[0]}")
    keys = names.split(",") if names else shared
    networks = {key: presets.network(key) for key in keys}
    return [
        Workload(one.title, RunConfig(**(values | one.values())), one.prepare, key)
        for key, one in networks.items()
    ]

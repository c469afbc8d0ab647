"""sysmt: a bit-exact, cycle-level model of SySMT, a systolic array with non-blocking multithreading.

>>> import numpy as np, sysmt
>>> r = sysmt.simulate_gemm(np.ones((4, 8), np.uint8), np.ones((8, 4), np.int8), sysmt.ArrayConfig(threads=2))
>>> r.stats.collision_rate
1.0
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sysmt.config import ArrayConfig, Drain, Engine, Policy, Rounding
    from sysmt.errors import (
        CalibrationError,
        ConfigError,
        DataError,
        OperandError,
        OutputError,
        PathError,
        SysmtError,
        UnsupportedLayerError,
        WeightsError,
    )
    from sysmt.hw.gemm import GemmResult, simulate_gemm
    from sysmt.hw.kernels import active_path, available_paths
    from sysmt.hw.stats import Counters, GemmStats
    from sysmt.nn.array.simulation import Simulation, attach
    from sysmt.nn.batchnorm.folding import fold_batchnorm
    from sysmt.nn.batchnorm.recalibration import recalibrate_batchnorm
    from sysmt.quant.uniform import ActivationRange

# Loaded on first use: whoever needs the machine alone does not wait for torch.
_HOMES = {
    "sysmt.config": ("ArrayConfig", "Drain", "Engine", "Policy", "Rounding"),
    "sysmt.errors": (
        "CalibrationError",
        "ConfigError",
        "DataError",
        "OperandError",
        "OutputError",
        "PathError",
        "SysmtError",
        "UnsupportedLayerError",
        "WeightsError",
    ),
    "sysmt.hw.gemm": ("GemmResult", "simulate_gemm"),
    "sysmt.hw.kernels": ("active_path", "available_paths"),
    "sysmt.hw.stats": ("Counters", "GemmStats"),
    "sysmt.nn.batchnorm.recalibration": ("recalibrate_batchnorm",),
    "sysmt.nn.batchnorm.folding": ("fold_batchnorm",),
    "sysmt.nn.array.simulation": ("Simulation", "attach"),
    "sysmt.quant.uniform": ("ActivationRange",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ActivationRange",
    "ArrayConfig",
    "CalibrationError",
    "ConfigError",
    "Counters",
    "DataError",
    "Drain",
    "Engine",
    "GemmResult",
    "GemmStats",
    "OperandError",
    "OutputError",
    "PathError",
    "Policy",
    "Rounding",
    "Simulation",
    "SysmtError",
    "UnsupportedLayerError",
    "WeightsError",
    "__version__",
    "active_path",
    "attach",
    "available_paths",
    "fold_batchnorm",
    "recalibrate_batchnorm",
    "simulate_gemm",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'sysmt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""PyTorch networks on the machine: lowering, attach, calibration, BatchNorm, pruning, models, data."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sysmt.nn.low_bit.low_precision_batchnorm import LowPrecisionBatchNorm1d as LowPrecisionBatchNorm1d
    from sysmt.nn.low_bit.low_precision_batchnorm import LowPrecisionBatchNorm2d as LowPrecisionBatchNorm2d

_LAYERS = ("LowPrecisionBatchNorm1d", "LowPrecisionBatchNorm2d")


def __getattr__(name: str) -> Any:
    if name not in _LAYERS:  # loaded on first use: the package itself stays quick to import
        raise AttributeError(f"module 'sysmt.nn' has no attribute {name!r}")
    from sysmt.nn.low_bit import low_precision_batchnorm

    return getattr(low_precision_batchnorm, name)

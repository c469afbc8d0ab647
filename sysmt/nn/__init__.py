"""PyTorch networks on the machine: lowering, attach, calibration, BatchNorm, pruning, models, data."""

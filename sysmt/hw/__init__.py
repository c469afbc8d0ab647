"""The machine: PEs, the array, its engines, kernels and counters. Never imports torch."""

"""PyTorch networks on the machine: the simulation, its layers, calibration, energy, export."""

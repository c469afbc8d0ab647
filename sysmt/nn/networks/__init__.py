"""Networks: models by name, checkpoints, training, pruning."""

"""BatchNorm: recalibrated under the noise, folded, and where its statistics come from in training."""

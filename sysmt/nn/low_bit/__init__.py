"""Training and inference at few bits: straight-through estimators, low-precision BatchNorm, Q format."""

"""Optimizers, gradient clipping, learning-rate schedule, frozen parameters."""

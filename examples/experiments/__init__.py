"""Experiments on routing: docs/experiments.md."""

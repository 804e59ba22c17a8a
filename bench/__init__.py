"""Benchmarks: every module here but `record` and `run` has a `records()`."""

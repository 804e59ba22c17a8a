"""What a benchmark returns: one number, and what it is held against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured number.

    Args:
        name: what was measured, unique over all benchmarks, e.g. `moe_layer/16x4096x768/ours`.
        value: the measurement, in ``unit``.
        unit: e.g. `ms`, `tokens/s`, `x floor`.
        target: the bound in words, e.g. `<= 1.15`; empty for a number that has none.
        met: whether the bound holds; `None` without one.
    """

    name: str
    value: float
    unit: str
    target: str = ""
    met: bool | None = None

"""What a benchmark returns: one number and its target."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured number.

    Args:
        name: what was measured, unique over all benchmarks, e.g. `moe_layer/16x4096x768/ours`.
        value: the measurement, in ``unit``.
        unit: e.g. `ms`, `tokens/s`, `x floor`.
        target: the bound, e.g. `<= 1.15`; empty for a number without one.
        met: whether the target is met; `None` without one.
    """

    name: str
    value: float
    unit: str
    target: str = ""
    met: bool | None = None

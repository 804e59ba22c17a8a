"""Selects the implementation of each operation, explicitly.

An implementation is a folder of this package with one module per operation. `auto` takes the first
one in `IMPLEMENTATIONS` that runs on the device and has the operation; the reason names it and
explains why earlier ones were passed over. Any other name is used as given or rejected, never
replaced. An implementation that does not run everywhere has a function `unavailable`, which returns
the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from fused_kernels.operations import Kernel, Kernels

OPERATIONS = (
    *("combine_tokens", "dispatch_tokens", "gated_silu", "linear_cross_entropy"),
    *("rank_in_expert", "rms_norm", "rotary", "router"),
)
"""The attributes of `Kernels`: what a layer needs besides GEMMs, attention and communication, and
the loss.
"""

IMPLEMENTATIONS: dict[str, frozenset[str] | None] = {
    "triton": frozenset({"cuda"}),
    "native": frozenset({"cpu"}),
    "reference": None,
}
"""Implementation -> device types it runs on (`None`: all), in the order `auto` prefers them."""

LEFT_TO_REFERENCE = {
    ("native", "linear_cross_entropy"): "its time is in torch's GEMMs",
    ("native", "rms_norm"): "there is none in C++",
    ("native", "rotary"): "there is none in C++",
    ("native", "router"): "there is none in C++",
}
"""(implementation, operation) -> why the reference is that implementation's own, too."""


class KernelUnavailable(LookupError):
    """The requested implementation does not exist, or not on this device or machine.

    Args:
        requested: the requested name.
        expected: what would be valid here, in words.
        reason: why the requested one is not available on this machine, if it exists.
    """

    def __init__(self, requested: str, expected: str, reason: str = "") -> None:
        self.requested, self.expected, self.reason = requested, expected, reason
        text = f"kernel implementation {requested!r} is not available: use {expected}"
        super().__init__(f"{text}; {reason}" if reason else text)


def known(operation: str, device_type: str) -> list[str]:
    """Implementations of ``operation`` for ``device_type``, best first, available here or not."""
    return [
        name
        for name, devices in IMPLEMENTATIONS.items()
        if (devices is None or device_type in devices)
        and importlib.util.find_spec(f"{__package__}.{name}.{operation}") is not None
    ]


def _unavailable(name: str) -> str | None:
    """Why an implementation does not run on this machine; `None` if it does."""
    package = importlib.import_module(f"{__package__}.{name}")
    reason: Callable[[], str | None] | None = getattr(package, "unavailable", None)
    return None if reason is None else reason()


def select(operation: str, requested: str = "auto", device_type: str = "cpu") -> Kernel:
    """The implementation of ``operation`` to use.

    Args:
        operation: one of `OPERATIONS`.
        requested: an implementation's name, or `auto`.
        device_type: `cpu` or `cuda`.

    Raises:
        KernelUnavailable: no such implementation, or it lacks this operation on this device.
        ValueError: no such operation.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation is {operation!r}, expected one of {', '.join(OPERATIONS)}")
    names = known(operation, device_type)
    left = LEFT_TO_REFERENCE.get((requested, operation))
    if left is not None and device_type in (IMPLEMENTATIONS.get(requested) or ()):
        reason = f"as requested: {requested} leaves it to the reference, {left}"
        module = importlib.import_module(f"{__package__}.reference.{operation}")
        return Kernel(operation, "reference", reason, module, sole=len(names) == 1)
    candidates = names if requested == "auto" else [requested]
    if not set(candidates) <= set(names):
        raise KernelUnavailable(requested, f"auto or {' or '.join(names)} on {device_type}")
    missing = []
    # In order, and no further than needed: an implementation may run a compiler to find out.
    for name in candidates:
        why_not = _unavailable(name)
        if why_not is not None:
            missing.append(f"no {name}: {why_not}")
            continue
        rest = f"auto: first of {', '.join(names[len(missing) :])} on {device_type}"
        reason = "; ".join([rest, *missing]) if requested == "auto" else "as requested"
        module = importlib.import_module(f"{__package__}.{name}.{operation}")
        return Kernel(operation, name, reason, module, sole=len(names) == 1)
    others = " or ".join(name for name in names if name not in candidates)
    raise KernelUnavailable(requested, f"auto or {others} on {device_type}", "; ".join(missing))


def load_kernels(requested: str = "auto", device_type: str = "cpu") -> Kernels:
    """`select` for every operation.

    Raises:
        KernelUnavailable: as `select`.
    """
    selected = [select(operation, requested, device_type) for operation in OPERATIONS]
    modules: dict[str, Any] = {kernel.operation: kernel.module for kernel in selected}
    return Kernels(**modules, selected=tuple(selected))

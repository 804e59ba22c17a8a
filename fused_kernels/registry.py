"""Choosing the implementation of an operation, explicitly.

An implementation is a folder of this package with one module per operation. `auto` takes the first
one in `IMPLEMENTATIONS` that runs on the device and has the operation, and says so, and why not
those before it; a name is taken literally or refused, never replaced by another. An implementation
that does not run everywhere has a function `unavailable`, which says why not here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

OPERATIONS = ("combine_tokens", "dispatch_tokens", "gated_silu", "rank_in_expert")
"""What an expert layer needs besides GEMMs and communication."""

IMPLEMENTATIONS: dict[str, frozenset[str] | None] = {
    "native": frozenset({"cpu"}),
    "reference": None,
}
"""Implementation -> device types it runs on (`None`: all), in the order `auto` prefers them."""


class KernelUnavailable(LookupError):
    """The implementation asked for does not exist, or not here.

    Args:
        requested: the name asked for.
        expected: what would be valid here, in words.
    """

    def __init__(self, requested: str, expected: str) -> None:
        self.requested = requested
        self.expected = expected
        super().__init__(f"kernel implementation {requested!r} is not available: use {expected}")


@dataclass(frozen=True)
class Kernel:
    """One operation as chosen.

    Args:
        operation: its name, one of `OPERATIONS`.
        implementation: the folder it came from.
        reason: why that one, for the log.
        module: the functions `forward` and, where it has one, `backward`; of the gate also
            `forward_step` and `backward_step`, which prepare a call and make it later, and
            `OVERWRITES_GRADIENT`.
    """

    operation: str
    implementation: str
    reason: str
    module: ModuleType


def known(operation: str, device_type: str) -> list[str]:
    """Implementations of ``operation`` for ``device_type``, best first, available here or not."""
    return [
        name
        for name, devices in IMPLEMENTATIONS.items()
        if (devices is None or device_type in devices)
        and importlib.util.find_spec(f"{__package__}.{name}.{operation}") is not None
    ]


def _unavailable(name: str) -> str | None:
    """Why an implementation does not run on this machine; `None`: it does."""
    package = importlib.import_module(f"{__package__}.{name}")
    asked: Callable[[], str | None] | None = getattr(package, "unavailable", None)
    return None if asked is None else asked()


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
    asked = names if requested == "auto" else [requested]
    if not set(asked) <= set(names):
        raise KernelUnavailable(requested, f"auto or {' or '.join(names)} on {device_type}")
    missing = []
    for name in asked:  # No other is asked: one may take a compiler to answer.
        why_not = _unavailable(name)
        if why_not is not None:
            missing.append(f"no {name}: {why_not}")
            continue
        rest = f"auto: first of {', '.join(names[len(missing) :])} on {device_type}"
        reason = "; ".join([rest, *missing]) if requested == "auto" else "as asked"
        module = importlib.import_module(f"{__package__}.{name}.{operation}")
        return Kernel(operation, name, reason, module)
    others = " or ".join(name for name in names if name not in asked)
    raise KernelUnavailable(requested, f"auto or {others} on {device_type}; {'; '.join(missing)}")


def select_all(requested: str = "auto", device_type: str = "cpu") -> dict[str, Kernel]:
    """`select` for every operation."""
    return {operation: select(operation, requested, device_type) for operation in OPERATIONS}

"""Starts Triton kernels with checked operands, or records what would be started.

`recorded` runs any operation on tensors without memory (`device="meta"`) and returns its launches,
for the tool that compiles them ahead of time: what it compiles is what an operation starts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Of the elements that kernels compute with."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel as it is started.

    Args:
        kernel: the function under `triton.jit`.
        programs: how many programs run it.
        arguments: tensors and integers, by the kernel's names.
        constants: what the kernel is compiled for.
        warps: of 32 threads, of each program.
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Tensor | int]
    constants: Mapping[str, Any]
    warps: int

    @property
    def name(self) -> str:
        """Of the kernel."""
        name: str = self.kernel.__name__
        return name


_RECORD: ContextVar[list[Launch] | None] = ContextVar("_RECORD", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches instead of starting them, in this thread."""
    launches: list[Launch] = []
    token = _RECORD.set(launches)
    try:
        yield launches
    finally:
        _RECORD.reset(token)


def launch(
    kernel: Callable[..., Any],
    programs: int,
    arguments: Mapping[str, Tensor | int],
    constants: Mapping[str, Any],
    warps: int = 4,
) -> None:
    """Start ``programs`` programs of a kernel on the device of its operands; none: do nothing."""
    if programs == 0:
        return
    made = Launch(
        kernel=kernel, programs=programs, arguments=arguments, constants=constants, warps=warps
    )
    record = _RECORD.get()
    if record is not None:
        record.append(made)
        return
    first = next(x for x in arguments.values() if isinstance(x, Tensor))
    # Triton starts on the current device, whatever the operands'.
    with torch.cuda.device_of(first):
        made.kernel[(programs,)](**arguments, **constants, num_warps=warps)


def checked(name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """``x``, contiguous: kernels receive bare addresses.

    Args:
        name: of the operation, for the message.
        x: an operand.
        shape: that it must have.
        dtype: likewise; `None` for any of `DTYPES`.

    Raises:
        TypeError: no kernel computes with its dtype.
        ValueError: another shape or dtype.
    """
    if dtype is None and x.dtype not in DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise TypeError(f"{name} of {x.dtype}, expected {known}; use the reference kernels")
    if x.shape != tuple(shape) or x.dtype != (dtype or x.dtype):
        found = f"{x.dtype} {tuple(x.shape)}"
        raise ValueError(f"{name}: expected {dtype or x.dtype} {tuple(shape)}, found {found}")
    return x.contiguous()


def computed(dtype: torch.dtype) -> Any:
    """Triton's dtype of a computation with such elements: fp32, or fp64 for fp64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def block_of(width: int, most: int) -> int:
    """Columns of a program: the least power of two that holds ``width``, at most ``most``."""
    return min(triton.next_power_of_2(max(1, width)), most)


def warps_of(elements: int, each: int = 16) -> int:
    """Warps of a program that holds so many elements of an operand, about ``each`` a thread."""
    return max(1, min(16, elements // (32 * each)))


def cdiv(total: int, step: int) -> int:
    """How many steps cover ``total``."""
    return -(-total // step)

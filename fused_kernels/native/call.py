"""Calls of the compiled operations, with every argument checked first.

C++ receives bare addresses: a wrong shape, dtype or stride would read or write other memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_kernels.native.library import library

SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
"""Of a function's name, by the dtype of its elements."""
Operand = tuple[Tensor, Sequence[int], torch.dtype]
"""A tensor, and the shape and dtype that it must have."""
_INDEX_OUT_OF_RANGE = 1


def computed(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the computation: fp32, or fp64 for fp64 elements."""
    return torch.promote_types(dtype, torch.float32)


def operation(
    name: str, dtype: torch.dtype | None, operands: Sequence[Operand], *numbers: int
) -> Callable[[], None]:
    """A function that makes one call, as often as it is called.

    Args:
        name: of the C++ function.
        dtype: of its elements, the suffix of the name; `None` for a name without suffix.
        operands: contiguous CPU tensors, passed by address.
        numbers: the integer arguments after them.

    Raises:
        TypeError: there is no function for that dtype.
        ValueError: a tensor on another device, not contiguous, or of another shape or dtype.
        IndexError: by the call, an index out of range.
    """
    if dtype is not None:
        if dtype not in SUFFIXES:
            known = ", ".join(str(known).removeprefix("torch.") for known in SUFFIXES)
            raise TypeError(f"{name} of {dtype}, expected {known}; use the reference kernels")
        name = f"{name}_{SUFFIXES[dtype]}"
    function = getattr(library(), name)
    values = [_address(name, *operand) for operand in operands]
    sizes = [ctypes.c_int64(number) for number in numbers]

    def call() -> None:
        if function(*values, *sizes) == _INDEX_OUT_OF_RANGE:
            raise IndexError(f"{name}: an index lies outside of what it points into")

    call.keeps = operands  # type: ignore[attr-defined]
    return call


def _address(name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> ctypes.c_void_p:
    right = x.shape == tuple(shape) and x.dtype == dtype and x.device.type == "cpu"
    if not right or not x.is_contiguous():
        found = f"{x.dtype} {tuple(x.shape)} on {x.device}, strides {x.stride()}"
        expected = f"contiguous {dtype} {tuple(shape)} on the CPU"
        raise ValueError(f"{name}: expected {expected}, found {found}")
    return ctypes.c_void_p(x.data_ptr())

"""Sums of squares whose error does not grow with the number of elements.

On a CPU, PyTorch's vector norms add squares in fp32, in a few running sums over the whole reduced
dimension: relative errors are 1e-5 at a million elements and 5e-3 at 67 million. A gradient norm
would then depend on how tensors are cut over ranks, and clipping with it. Here at most `BLOCK`
squares are added in fp32, and the blocks in fp64: 1e-9 for whole tensors of any size, at the speed
of a plain norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 256
"""Squares that are added in fp32. On one CPU core, 16.8 million elements: 10 ms with 256, 15 ms
with 64; 170 ms if all are added in fp64."""


def squares(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """Sums of squares over dimensions, which are kept with size 1.

    Args:
        tensor: of a floating-point type with at most 32 bits.
        dims: the dimensions, none negative; at least one.

    Returns:
        fp64. Example: [4, 6] over (1,) gives [4, 1], the sum of each row.
    """
    # Blocks lie along the longest dimension, which is cut [n] -> [n / b, b]: a view, also of a
    # tensor that is not contiguous.
    longest = max(dims, key=lambda dim: tensor.shape[dim])
    block = _divisor(tensor.shape[longest])
    blocks = torch.linalg.vector_norm(
        tensor.unflatten(longest, (-1, block)), dim=longest + 1, dtype=_sum_dtype(tensor)
    )
    return blocks.double().square_().sum(dim=tuple(dims), keepdim=True)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of all squares: an fp64 scalar on the device of the tensors.

    Args:
        tensors: at least one, on one device.
    """
    if tensors[0].device.type != "cpu":
        # One kernel for all tensors, which adds in the type of its result.
        norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float64)
        return torch.stack(norms).square_().sum()
    return torch.stack([_flat_square(tensor.reshape(-1)) for tensor in tensors]).sum()


def _flat_square(flat: Tensor) -> Tensor:
    whole = flat.numel() // BLOCK * BLOCK
    rest = flat.new_zeros(BLOCK)
    rest[: flat.numel() - whole] = flat[whole:]
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, BLOCK), dim=1).double()
    return norms.square_().sum() + torch.linalg.vector_norm(rest).double().square_()


def _divisor(size: int) -> int:
    """The largest power of two that divides a size, at most `BLOCK`."""
    return min(size & -size, BLOCK) if size else 1


def _sum_dtype(tensor: Tensor) -> torch.dtype | None:
    """fp64 off the CPU, where it costs nothing beside reading the tensor."""
    return None if tensor.device.type == "cpu" else torch.float64

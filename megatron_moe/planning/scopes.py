"""What code that runs allocates for: the category of a new tensor by where it is created."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_moe.planning.memory import CATEGORIES

BACKWARD = {
    "_CopyToRows": "dispatch_buffers",
    "_SumRows": "dispatch_buffers",
    "_AllToAll": "dispatch_buffers",
    "_Fp32Matmul": "logits",
    "_LinearCrossEntropy": "logits",
}
"""Category of what the backward pass of an autograd function creates, by the function's name."""


class Scopes:
    """The categories of the blocks that are running, the innermost last."""

    def __init__(self) -> None:
        self._entered: list[str] = []

    @contextmanager
    def enter(self, category: str) -> Iterator[None]:
        """What the block creates has this category, one of `CATEGORIES`."""
        if category not in CATEGORIES:
            raise ValueError(f"category is {category!r}, expected one of {', '.join(CATEGORIES)}")
        self._entered.append(category)
        try:
            yield
        finally:
            self._entered.pop()

    def category(self, tensor: Tensor) -> str:
        """Of a tensor that is created now: that of the block, or of the backward pass."""
        if self._entered:
            return self._entered[-1]
        # "_CopyToRowsBackward" of a Python function, "MmBackward0" of PyTorch's own.
        return BACKWARD.get(backward_node().removesuffix("Backward"), "activations")


def backward_node() -> str:
    """Name of the autograd node whose backward pass is running; empty in a forward pass."""
    node = torch._C._current_autograd_node()
    return "" if node is None else str(node.name())

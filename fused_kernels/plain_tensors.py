"""Tells tensors that compiled kernels can read from those that have only a shape."""

from __future__ import annotations

import torch
from torch import Tensor


def runs_on(*tensors: Tensor) -> bool:
    """Whether the tensors have memory. Fake ones have only a shape; for them the reference
    implementation computes the shape of the result.

    Raises:
        TypeError: a tensor of another class, whose memory may mean anything.
    """
    others = [x for x in tensors if type(x) not in (Tensor, torch.nn.Parameter)]
    if not others:
        return True
    # Imported here: it takes a second, and only dry runs have such tensors.
    from torch._subclasses.fake_tensor import FakeTensor

    for x in others:
        if not isinstance(x, FakeTensor):
            raise TypeError(f"compiled kernels take plain tensors, found {type(x).__name__}")
    return False

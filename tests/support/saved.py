"""What a forward pass keeps in memory for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], object], besides: Collection[int] = ()) -> int:
    """Bytes of the memory that saved tensors keep alive: a view keeps all that it is a view of.

    Args:
        run: the forward pass.
        besides: addresses of memory that is not counted.
    """
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)  # So that no address is used twice.
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        held = run()
    assert held is not None
    return sum(size for address, size in sizes.items() if address not in besides)

"""A stand-in for a CUDA graph on a CPU: the operations of some work, to be repeated without Python.

As a graph does, it repeats operations on the memory and with the numbers that they had, so that
whatever Python would have changed in between stays as it was; and recording has no effect: memory
from before that the work writes is put back. Reading a value is an error while it records.

What it cannot show: that a GPU captures these operations, or that memory that is freed in the work
may be used again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item"}


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class RecordedOps(TorchDispatchMode):
    """Operations with their operands and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        if name in _READS:
            raise RuntimeError(f"{name} reads a value while operations are recorded")
        if func._schema.is_mutable or func.namespace == "c10d":
            for tensor in _tensors((args, kwargs)):
                place = _place(tensor)
                if place not in self._made and place not in self._before:
                    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                    self._before[place] = whole, whole.clone()
        out = func(*args, **kwargs)
        operands = {_place(tensor) for tensor in _tensors((args, kwargs))}
        self._made |= {_place(tensor) for tensor in _tensors(out)} - operands
        self.calls.append((func, args, kwargs, out))
        return out

    def record(self, work: Callable[[], None]) -> None:
        """Note the operations of ``work``, without a lasting effect."""
        with self:
            work()
        for whole, before in self._before.values():
            whole.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat them; results go where they were."""
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
                if isinstance(old, Tensor):
                    if _place(old) != _place(new):
                        old.copy_(new)
                elif isinstance(new, torch.ScriptObject):
                    torch._C._distributed_c10d.Work.unbox(new).wait()

"""One process in the place of any rank of a cluster, with tensors that have no memory.

PyTorch's fake process group completes every collective at once and moves nothing, and fake tensors
have shapes, types and strides but no values. So the real model, schedule and optimizer run, at the
speed of their Python. What reads a value on the host has none to read: `HostReads` answers 1 and
notes who asked, which is also a list of the reads that would make a GPU wait.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Answers 1 to `.item()` and its kin while it is entered, as a context manager.

    Attributes:
        places: `module:line` of this project or of Megatron-Core for each read, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation that is no read."""
        if func is not torch.ops.aten._local_scalar_dense.default:
            return func(*args, **(kwargs or {}))
        self.places.append(_caller())
        dtype = args[0].dtype
        if dtype == torch.bool:
            return True
        return 1.0 if dtype.is_floating_point else 1


def _caller() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] in ("megatron_moe", "megatron") and not name.startswith(
            "megatron_moe.planning"
        ):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown"


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """The default process group is a fake one with this rank; objects are gathered from no other.

    Args:
        rank: the global rank.
        world_size: all ranks.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    gather, dist.all_gather_object = dist.all_gather_object, _gather_own_object
    try:
        yield
    finally:
        dist.all_gather_object = gather
        if dist.is_initialized():
            dist.destroy_process_group()


def _gather_own_object(
    object_list: list[Any], obj: Any, group: dist.ProcessGroup | None = None
) -> None:
    """Every rank has this rank's object. Megatron-Core gathers its lists of parameter groups."""
    object_list[:] = [obj] * len(object_list)


class _Coalesced(TorchDispatchMode):
    """Runs coalesced collectives, for which fake tensors have no rule, as single ones."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        c10d = torch.ops.c10d
        if func is c10d.allreduce_coalesced_.default:
            tensors, group, op, *rest = args
            return c10d.allreduce_.default(tensors[:1], group, op, None, *rest)[1]
        if func is c10d.reduce_scatter_tensor_coalesced_.default:
            outputs, inputs, *rest = args
            return c10d._reduce_scatter_base_.default(outputs[0], inputs[0], *rest)[1]
        if func is c10d.allgather_into_tensor_coalesced_.default:
            outputs, inputs, *rest = args
            return c10d._allgather_base_.default(outputs[0], inputs[0], *rest)[1]
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors that are created inside have no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Coalesced():
        yield

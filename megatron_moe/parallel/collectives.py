"""Collectives of small values: gather, broadcast, sums, and errors that all ranks raise together.

Values are JSON in byte tensors. The object collectives of `torch.distributed` would pickle them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_moe.errors import (
    CheckpointError,
    Corrupt,
    NoCheckpoint,
    NonFinite,
    UsageError,
    merged,
)
from megatron_moe.parallel.launch import Launched, Rendezvous

T = TypeVar("T")
_KINDS = (CheckpointError, Corrupt, NoCheckpoint, NonFinite)
"""Errors that keep their class when they are raised on the other ranks."""


@dataclass(frozen=True)
class RankGroup:
    """A group of ranks; by default this process alone.

    All ranks of the group call the same methods in the same order.

    Args:
        rank: this rank.
        size: number of ranks.
        device: on which the communication library of the group needs its tensors.
        group: the process group; `None` means the default one.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    group: dist.ProcessGroup | None = None

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, in rank order, on rank 0; `None` on the others."""
        if self.size == 1:
            return [value]
        mine = self._encode(value)
        # A gather needs tensors of one size: values are padded to the longest.
        lengths = [torch.zeros_like(_length(mine)) for _ in range(self.size)]
        dist.all_gather(lengths, _length(mine), group=self.group)
        counts = torch.cat(lengths).tolist()
        padded = torch.zeros(max(counts), dtype=torch.uint8, device=self.device)
        padded[: mine.numel()] = mine
        received = [torch.empty_like(padded) for _ in counts] if self.rank == 0 else None
        dist.gather(padded, received, dst=0, group=self.group)
        if received is None:
            return None
        return [_decode(data[:n]) for data, n in zip(received, counts, strict=True)]

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, on every rank; the arguments of the others are ignored."""
        if self.size == 1:
            return value
        data = self._encode(value if self.rank == 0 else None)
        length = _length(data)
        dist.broadcast(length, src=0, group=self.group)
        if self.rank != 0:
            data = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(data, src=0, group=self.group)
        return _decode(data)

    def all_reduce_sum(self, *values: int) -> list[int]:
        """The sum of each number over all ranks, on every rank."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(sums, group=self.group)
        return [int(value) for value in sums.tolist()]

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run ``action`` on every rank; if it fails on any, raise on all.

        Without this, a rank that fails would leave the others waiting in their next collective. For
        work of rank 0 alone, the action does nothing on the others.

        Returns:
            The result of this rank's action.

        Raises:
            CheckpointError: on every rank, if a rank's action raised a `UsageError`; errors of
                several ranks are merged.
            Exception: the original one, on a rank whose action raised anything else. The other
                ranks raise a `CheckpointError` with its text.
        """
        result: T
        failure: list[Any] | None = None
        unexpected: Exception | None = None
        try:
            result = action()
        except CheckpointError as error:
            failure = [type(error).__name__, error.to_json()]
        except UsageError as error:
            known = CheckpointError(error.what, error.found, error.expected, error.fix)
            failure = [CheckpointError.__name__, known.to_json()]
        except Exception as error:  # reported to the other ranks, then raised on this one
            unexpected = error
            known = CheckpointError(f"rank {self.rank}", repr(error), "no failure")
            failure = [CheckpointError.__name__, known.to_json()]
        self._raise_on_all(failure, unexpected)
        return result

    def _raise_on_all(self, failure: list[Any] | None, unexpected: Exception | None) -> None:
        gathered = self.gather(failure)
        failures = [item for item in gathered or [] if item is not None]
        failures = self.broadcast(failures)
        if unexpected is not None:
            raise unexpected
        if failures:
            raise merged([_error(name, values) for name, values in failures])

    def _encode(self, value: Any) -> torch.Tensor:
        data = bytearray(json.dumps(value).encode())
        return torch.frombuffer(data, dtype=torch.uint8).to(self.device)


@dataclass(frozen=True)
class StoreRankGroup(RankGroup):
    """The same before there are process groups, over the launcher's store.

    Args:
        rendezvous: of the ranks, if there are several.
    """

    rendezvous: Rendezvous | None = None

    def gather(self, value: Any) -> list[Any] | None:
        """As `RankGroup.gather`."""
        if self.rendezvous is None:
            return [value]
        gathered = self.rendezvous.gather(json.dumps(value))
        return None if gathered is None else [json.loads(text) for text in gathered]

    def broadcast(self, value: Any) -> Any:
        """As `RankGroup.broadcast`."""
        if self.rendezvous is None:
            return value
        mine = json.dumps(value if self.rank == 0 else None)
        return json.loads(self.rendezvous.broadcast(mine))


def launch_rank_group(here: Launched, timeout: timedelta) -> RankGroup:
    """The ranks of a launch, before or after their process groups are created.

    Args:
        here: this rank.
        timeout: for the slowest rank.
    """
    if dist.is_initialized():
        return RankGroup(here.rank, here.world_size)
    rendezvous = Rendezvous(here, timeout) if here.world_size > 1 else None
    return StoreRankGroup(here.rank, here.world_size, rendezvous=rendezvous)


def _error(name: str, values: list[Any]) -> CheckpointError:
    kinds = {kind.__name__: kind for kind in _KINDS}
    return kinds.get(name, CheckpointError).from_json(values)


def _length(data: torch.Tensor) -> torch.Tensor:
    return torch.tensor([data.numel()], dtype=torch.int64, device=data.device)


def _decode(data: torch.Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())

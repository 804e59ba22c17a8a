"""What ranks tell each other around a save or a load: small JSON values, and whether all went well.

JSON over byte tensors rather than the object collectives of torch.distributed, which pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_moe.errors import CheckpointError, Corrupt, UsageError, merged
from megatron_moe.parallel.launch import Launched
from megatron_moe.parallel.meeting import Rendezvous

T = TypeVar("T")


@dataclass(frozen=True)
class RankGroup:
    """The ranks that save or load together: all of the run.

    Args:
        rank: this one.
        size: how many.
        device: where the communication library wants its tensors.
        group: what they talk over; by default the default group.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    group: dist.ProcessGroup | None = None

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, in rank order, on rank 0; None on the others."""
        if self.size == 1:
            return [value]
        mine = self._encode(value)
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
        """The value of rank 0; the others' arguments are ignored."""
        if self.size == 1:
            return value
        data = self._encode(value if self.rank == 0 else None)
        length = _length(data)
        dist.broadcast(length, src=0, group=self.group)
        if self.rank != 0:
            data = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(data, src=0, group=self.group)
        return _decode(data)

    def sums(self, *values: int) -> list[int]:
        """Each number added up over all ranks, on every rank."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(found, group=self.group)
        return [int(value) for value in found.tolist()]

    def together(self, action: Callable[[], T]) -> T:
        """Run ``action`` here while the other ranks run theirs.

        Raises:
            CheckpointError: on every rank, if any rank's action raised one; they are merged.
            Exception: the original, on a rank whose action failed in another way.
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
        except Exception as error:  # told to the others, then raised here
            unexpected = error
            known = CheckpointError(f"rank {self.rank}", repr(error), "no failure")
            failure = [CheckpointError.__name__, known.to_json()]
        self._agree(failure, unexpected)
        return result

    def _agree(self, failure: list[Any] | None, unexpected: Exception | None) -> None:
        told = self.gather(failure)
        failures = [item for item in told if item is not None] if told is not None else []
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
    """The same before there are process groups.

    Args:
        meeting: where they meet, if there are several.
    """

    meeting: Rendezvous | None = None

    def gather(self, value: Any) -> list[Any] | None:
        """As `RankGroup.gather`."""
        if self.meeting is None:
            return [value]
        told = self.meeting.gather(json.dumps(value))
        return None if told is None else [json.loads(text) for text in told]

    def broadcast(self, value: Any) -> Any:
        """As `RankGroup.broadcast`."""
        if self.meeting is None:
            return value
        return json.loads(self.meeting.broadcast(json.dumps(value if self.rank == 0 else None)))


def launch_rank_group(here: Launched, timeout: timedelta) -> RankGroup:
    """The ranks of a launch, whether their groups are made already or not.

    Args:
        here: this rank.
        timeout: for the slowest rank.
    """
    if dist.is_initialized():
        return RankGroup(here.rank, here.world_size)
    meeting = Rendezvous(here, timeout) if here.world_size > 1 else None
    return StoreRankGroup(here.rank, here.world_size, meeting=meeting)


def _error(name: str, values: list[Any]) -> CheckpointError:
    kind = Corrupt if name == Corrupt.__name__ else CheckpointError
    return kind.from_json(values)


def _length(data: torch.Tensor) -> torch.Tensor:
    return torch.tensor([data.numel()], dtype=torch.int64, device=data.device)


def _decode(data: torch.Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())

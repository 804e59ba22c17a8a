"""What a rank waits for: the collective and the group, as its threads' stacks show them.

Nothing is recorded while a run is well. Where a failure is found, the frames of the thread that
waits still hold the name of the collective and its process group.

A GPU runs collectives by itself, and the thread waits for the device instead. For these
`pending_collectives` asks the flight recorder of `torch.distributed`.
"""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

_WAITING = (
    "/torch/distributed/",
    "/megatron/core/pipeline_parallel/p2p_communication.py",
    "/megatron/core/distributed/param_and_grad_buffer.py",
)
"""Files in whose functions a thread waits for other ranks."""
_WATCHING = ("/parallel/failures.py", "/platform/signals.py")
_COLLECTIVES = "/torch/distributed/distributed_c10d.py"
_PENDING = 4
"""Unfinished collectives that are reported at most, the oldest."""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """A collective that has not ended on a rank."""

    operation: str
    """Function that waits, e.g. `all_reduce`."""
    group: str
    """Name of the process group, e.g. `data parallel`."""
    ranks: tuple[int, ...]
    """Members of the group."""

    def __str__(self) -> str:
        members = f" ({ranks_text(self.ranks)})" if self.ranks else ""
        return f"{self.operation} of the {self.group} group{members}"


def ranks_text(ranks: Iterable[int]) -> str:
    """Ranks in a few words, runs of them as ranges: `ranks 0-6, 8`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    several = len(runs) > 1 or any(len(run) > 1 for run in runs)
    return ("ranks " if several else "rank ") + ", ".join(texts)


def frames_of(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames of a thread, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def frames_of_error(error: BaseException) -> list[FrameType]:
    """The frames through which an exception went, the innermost first."""
    frames: list[FrameType] = []
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    return frames[::-1]


def wait_in(frames: Iterable[FrameType]) -> Wait | None:
    """The collective in which a thread with these frames waits; `None` if it is in none.

    Args:
        frames: the innermost first.
    """
    operation = ""
    for frame in frames:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if not any(part in file for part in _WAITING):
            # It computes; or the group that it waits for is unknown.
            return Wait(operation=operation, group="unknown", ranks=()) if operation else None
        if name != "wrapper":
            operation = name.strip("_")
        group = _group_of(frame, default=file.endswith(_COLLECTIVES) and name[0] != "_")
        if group is not None:
            return Wait(operation=operation, group=_name_of(group), ranks=_ranks_of(group))
    return None


def _group_of(frame: FrameType, default: bool) -> dist.ProcessGroup | None:
    for value in frame.f_locals.values():
        if isinstance(value, dist.ProcessGroup):
            return value
    # Collectives are called with `None` for the default group.
    return dist.group.WORLD if default and "group" in frame.f_locals else None


def _name_of(group: dist.ProcessGroup) -> str:
    if group is dist.group.WORLD:
        return "default"
    name = group.group_desc or group.group_name
    return name.lower().replace("_", " ").removesuffix(" group")


def _ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    try:
        return tuple(dist.get_process_group_ranks(group))
    except (KeyError, ValueError, RuntimeError):  # destroyed meanwhile
        return ()


def current_wait() -> Wait | None:
    """The collective in which a thread of this process waits, the main thread first."""
    frames = sys._current_frames()
    main = threading.main_thread().ident
    for thread in sorted(frames, key=lambda ident: ident != main):
        if thread != threading.get_ident() and (found := wait_in(frames_of(frames[thread]))):
            return found
    return None


def stacks() -> dict[str, list[str]]:
    """Stacks of the threads by their names, the outermost call first; without those that watch."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found: dict[str, list[str]] = {}
    for ident, frame in sys._current_frames().items():
        own = any(entry.f_code.co_filename.endswith(_WATCHING) for entry in frames_of(frame))
        if own and ident != threading.main_thread().ident:
            continue
        name = names.get(ident, "unknown")
        key = name if name not in found else f"{name} ({ident})"
        found[key] = [
            f"{entry.filename}:{entry.lineno} {entry.name}: {entry.line}"
            for entry in traceback.extract_stack(frame)
        ]
    return found


def pending_collectives() -> list[dict[str, Any]]:
    """Unfinished collectives that the flight recorder has, if there is a recorder.

    It records those of NCCL and of gloo; `TORCH_FR_BUFFER_SIZE` is how many, 0 turns it off.
    """
    try:
        from torch._C import _distributed_c10d as c10d

        dump: Any = vars(c10d)["_dump_fr_trace_json"]  # torch's stubs do not have it
        entries = json.loads(dump(True, False)).get("entries", [])
    except (ImportError, KeyError, RuntimeError, ValueError, TypeError):
        return []
    pending = [entry for entry in entries if not entry.get("retired", True)]
    return [
        {
            "operation": entry.get("profiling_name"),
            "group": (entry.get("process_group") or ["", ""])[-1],
            "sequence": entry.get("collective_seq_id"),
            "state": entry.get("state"),
            "sizes": entry.get("input_sizes"),
        }
        for entry in pending[:_PENDING]
    ]

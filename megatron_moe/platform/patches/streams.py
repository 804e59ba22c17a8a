"""Streams and events of a device that runs everything in order, in the calling thread.

Streams keep an identity of their own: the engine decides by comparing streams whether data must be
handed over, and streams that all look equal would make it leave that out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_moe.platform.patches.base import AttributePatch


class CpuEvent:
    """Stands for `torch.cuda.Event`; it remembers when it was recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded = 0.0

    def record(self, stream: Any = None) -> None:
        self._recorded = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """What came before has already run."""

    def synchronize(self) -> None:
        """What came before has already run."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: CpuEvent) -> float:
        """Milliseconds from this event to `end`."""
        return (end._recorded - self._recorded) * 1000.0


class CpuStream:
    """Stands for `torch.cuda.Stream`. Two streams are equal only if they are the same one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, stream: Any) -> None:
        """What came before has already run."""

    def wait_event(self, event: Any) -> None:
        """What came before has already run."""

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        event = event or CpuEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """What came before has already run."""

    def query(self) -> bool:
        return True


class Streams(AttributePatch):
    """`torch.cuda.Stream`, `Event` and the notion of a current stream."""

    name = "streams"

    def replacements(self) -> list[tuple[Any, str, Any]]:
        default = CpuStream()
        stack: list[CpuStream] = [default]

        @contextmanager
        def use(stream: CpuStream | None) -> Iterator[None]:
            stack.append(stack[-1] if stream is None else stream)
            try:
                yield
            finally:
                stack.pop()

        def set_current(stream: CpuStream) -> None:
            stack[-1] = stream

        return [
            (torch.cuda, "Stream", CpuStream),
            (torch.cuda, "Event", CpuEvent),
            (torch.cuda, "current_stream", lambda device=None: stack[-1]),
            (torch.cuda, "default_stream", lambda device=None: default),
            (torch.cuda, "stream", use),
            (torch.cuda, "set_stream", set_current),
            (torch.Tensor, "record_stream", lambda self, stream: None),
        ]

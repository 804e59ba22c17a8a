"""`torch.cuda` without a GPU: the current device is the CPU, which runs everything in order.

- Devices: tensors are allocated on the CPU, and moving one there changes nothing.
- Streams and events: work runs in order, in the calling thread, so there is nothing to wait for.
  Streams keep an identity of their own, however: Megatron-Core compares streams to decide whether
  data must be passed from one to another, and equal ones would make it skip that.
- Random numbers: what Megatron-Core takes for the GPU's generator is the CPU's. Its tracker swaps
  the state of the generator for that of a named stream of numbers and back, which works the same on
  the CPU's: dropout differs between tensor-parallel ranks, agrees between data-parallel ones, and
  is repeated by recomputation, as on a GPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_moe.platform.patches.base import AttributePatch, Patch

_TRACKER = "megatron.core.tensor_parallel.random"


class CurrentDevice(AttributePatch):
    """Megatron-Core allocates nearly everything with `device=torch.cuda.current_device()`."""

    name = "current-device"

    # A function of its own for each name, here and below, however alike they are: `torch.compile`
    # cannot be imported if two names of `torch.cuda` are the same function.
    def replacements(self) -> list[tuple[Any, str, Any]]:
        cpu = torch.device("cpu")
        return [
            (torch.cuda, "current_device", lambda: cpu),
            (torch.cuda, "synchronize", lambda device=None: None),
        ]


class MoveToDevice(AttributePatch):
    """`.cuda()` of a tensor, and so of a module, that is on the right device already."""

    name = "move-to-device"

    def replacements(self) -> list[tuple[Any, str, Any]]:
        return [(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)]


class CpuEvent:
    """In place of `torch.cuda.Event`; holds the time at which it was recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded = 0.0

    def record(self, stream: Any = None) -> None:
        self._recorded = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """All earlier work is done."""

    def synchronize(self) -> None:
        """All earlier work is done."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: CpuEvent) -> float:
        """Milliseconds from this event to `end`."""
        return (end._recorded - self._recorded) * 1000.0


class CpuStream:
    """In place of `torch.cuda.Stream`. A stream is equal only to itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, stream: Any) -> None:
        """All earlier work is done."""

    def wait_event(self, event: Any) -> None:
        """All earlier work is done."""

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        event = event or CpuEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """All earlier work is done."""

    def query(self) -> bool:
        return True


class Streams(AttributePatch):
    """`torch.cuda.Stream`, `Event` and the current stream."""

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


class RandomState(AttributePatch):
    """The random state of `torch.cuda`, and Megatron-Core's own accessors of it."""

    name = "random-state"

    def replacements(self) -> list[tuple[Any, str, Any]]:
        import megatron.core.tensor_parallel.random as tracker

        return [
            (torch.cuda, "get_rng_state", lambda *args, **kwargs: _get_state()),
            (torch.cuda, "set_rng_state", lambda state, *args, **kwargs: _set_state(state)),
            (torch.cuda, "manual_seed", lambda seed: _seed(seed)),
            (torch.cuda, "manual_seed_all", lambda seed: _seed(seed)),
            (tracker, "_get_cuda_rng_state", _get_state),
            (tracker, "_set_cuda_rng_state", _set_state),
        ]


class RandomStateWarning(Patch):
    """The tracker warns when the CPU generator moved while the GPU's was in use: always, here."""

    name = "random-state-warning"

    def apply(self) -> None:
        logging.getLogger(_TRACKER).addFilter(_is_not_about_one_generator)

    def undo(self) -> None:
        logging.getLogger(_TRACKER).removeFilter(_is_not_about_one_generator)


def _is_not_about_one_generator(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _seed(seed: int) -> None:
    # Not `torch.manual_seed`: it seeds the GPUs as well, with the function that this one replaces.
    torch.default_generator.manual_seed(int(seed))

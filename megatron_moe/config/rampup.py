"""Batch-size ramp-up: the global batch as a function of the sequences consumed so far.

As Megatron-LM's `--rampup-batch-size START INCREMENT SAMPLES`: the batch grows from START by
INCREMENT, at equal distances, to the whole global batch after SAMPLES sequences. A function of the
consumed sequences needs no state: a run that resumes has the batches of one that never stopped.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.config.training import TrainConfig
from megatron_moe.errors import UsageError

FLAG = "--rampup-batch-size"


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """How many sequences each step takes.

    Args:
        full: sequences of a step after the ramp.
        start: sequences of the first step.
        increment: sequences by which a step grows at a time.
        samples: sequences after which the batch is full; 0 for no ramp.
    """

    full: int
    start: int
    increment: int
    samples: int

    @classmethod
    def of(cls, train: TrainConfig, full: int) -> BatchSizes:
        """The batch sizes of a run.

        Args:
            train: its validated settings.
            full: global batch size after the ramp, in sequences.

        Raises:
            UsageError: the ramp does not reach ``full`` in whole increments.
        """
        if train.rampup_batch_size is None:
            return cls(full=full, start=full, increment=1, samples=0)
        start, increment, samples = train.rampup_batch_size
        given = f"{start} {increment} {samples}"
        if start >= full or (full - start) % increment:
            expected = f"whole increments from START to --global-batch-size ({full})"
            raise UsageError(FLAG, given, expected)
        return cls(full=full, start=start, increment=increment, samples=samples)

    @property
    def constant(self) -> bool:
        """Whether there is no ramp."""
        return self.samples == 0

    def check_divides(self, unit: int, meaning: str) -> None:
        """Check that every batch of the ramp is a multiple of ``unit``.

        Raises:
            UsageError: some would not be.
        """
        if not self.constant and (self.start % unit or self.increment % unit):
            expected = f"a START and an INCREMENT that are multiples of {meaning} ({unit})"
            raise UsageError(FLAG, f"{self.start} {self.increment} {self.samples}", expected)

    def at(self, consumed: int) -> int:
        """Sequences of the step that follows ``consumed`` sequences."""
        if consumed >= self.samples:
            return self.full
        increments = (self.full - self.start) // self.increment
        return self.start + consumed * increments // self.samples * self.increment

    def samples_of(self, iterations: int) -> int:
        """Sequences of the first ``iterations`` steps."""
        if self.constant:
            return iterations * self.full
        ramp = _whole_ramp(self)
        if iterations < len(ramp):
            return ramp[iterations]
        return ramp[-1] + (iterations - len(ramp) + 1) * self.full

    def iterations_of(self, samples: int) -> int:
        """Whole steps that ``samples`` sequences suffice for."""
        done = consumed = 0
        for done, consumed in enumerate(self.ramp()):
            if consumed + self.at(consumed) > samples:
                return done
        return done + (samples - consumed) // self.full

    def ramp(self) -> Iterator[int]:
        """Sequences consumed before each step of the ramp, and before the first full one."""
        consumed = 0
        while consumed < self.samples:
            yield consumed
            consumed += self.at(consumed)
        yield consumed


@functools.lru_cache(maxsize=8)
def _whole_ramp(sizes: BatchSizes) -> tuple[int, ...]:
    """`BatchSizes.ramp`, kept: a learning rate that counts sequences asks at every step."""
    return tuple(sizes.ramp())

"""Sets of training steps on the command line: `10`, `1:100`, `1000:9000:1000`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.errors import UsageError

_WORD = re.compile(r"([0-9]{1,18})(?::([0-9]{1,18})(?::([0-9]{1,18}))?)?")


@dataclass(frozen=True)
class StepSet:
    """Steps, counted from 1.

    Args:
        ranges: first step, last step and distance of each range.
    """

    ranges: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, flag: str, words: Sequence[str]) -> StepSet:
        """Read `STEP` or `FIRST:LAST[:EVERY]`, both ends included.

        Example: `5 10:20:5` are the steps 5, 10, 15 and 20.

        Raises:
            UsageError: another word, step 0, or a range that ends before it begins.
        """
        ranges = []
        for word in words:
            match = _WORD.fullmatch(word)
            numbers = [int(text) for text in match.groups() if text] if match else [0]
            first, last, every = (*numbers, *(numbers[0], 1)[len(numbers) - 1 :])
            if not 1 <= first <= last or every < 1:
                expected = "steps such as 10, or FIRST:LAST or FIRST:LAST:EVERY from 1 on"
                raise UsageError(flag, word, expected)
            ranges.append((first, last, every))
        return cls(tuple(ranges))

    def __contains__(self, step: int) -> bool:
        return any(a <= step <= b and (step - a) % every == 0 for a, b, every in self.ranges)

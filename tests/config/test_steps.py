"""Sets of steps on the command line."""

from __future__ import annotations

import pytest

from megatron_moe.config.steps import StepSet
from megatron_moe.errors import UsageError


def test_steps_and_ranges_with_both_ends() -> None:
    steps = StepSet.of("--x", ["5", "10:20:5", "30:32"])
    assert [n for n in range(1, 50) if n in steps] == [5, 10, 15, 20, 30, 31, 32]
    assert 1 not in StepSet.of("--x", [])


@pytest.mark.parametrize("word", ["0", "x", "3:2", "1:9:0", "-1", "1:2:3:4", "", "1:", "٣"])
def test_other_words_are_errors(word: str) -> None:
    with pytest.raises(UsageError, match="--x must be steps such as 10") as error:
        StepSet.of("--x", [word])
    assert error.value.found == word

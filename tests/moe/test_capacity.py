"""Slots and groups, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_moe.config import MoEConfig
from megatron_moe.errors import UsageError
from megatron_moe.moe.plan import Capacity, capacity_of, slots_per_expert


def moe(**settings: Any) -> MoEConfig:
    return MoEConfig(**{"num_experts": 32, "moe_router_topk": 2, **settings})


def test_the_published_capacities() -> None:
    """2048 tokens a row, 32 experts: 80 slots in training, 128 in evaluation."""
    for training, slots in ((True, 80), (False, 128)):
        capacity = capacity_of(moe(), rows=4, row_tokens=2048, training=training)
        assert capacity == Capacity(group_size=2048, groups=4, slots=slots)


@pytest.mark.parametrize(
    ("rule", "tokens", "factor", "slots"),
    [
        ("t5x", 100, 1.25, 4),  # 3.9 rounds to 4
        ("t5x", 112, 1.25, 4),  # 4.375 rounds to 4
        ("t5x", 160, 1.25, 6),  # 6.25 rounds to 6
        ("t5x", 64, 1.0, 4),  # 2, raised to the least
        ("port", 160, 1.25, 12),  # floor(12.5) is even
        ("port", 168, 1.25, 14),  # floor(13.125) = 13, made even
        ("port", 32, 1.0, 4),  # 2, raised to the least
        ("port", 512, 1.25, 40),
        ("t5x", 3, 1.25, 3),  # never more than tokens
        ("port", 512, 100.0, 512),
        ("megatron", 160, 1.25, 13),  # ceil(12.5), odd
        ("megatron", 32, 1.0, 2),  # no minimum
        ("megatron", 512, 100.0, 512),
    ],
)
def test_slots_by_hand(rule: str, tokens: int, factor: float, slots: int) -> None:
    assert slots_per_expert(moe(moe_capacity_rule=rule), tokens, factor) == slots


def test_without_a_factor_every_token_fits() -> None:
    dropless = moe(moe_expert_capacity_factor=None, moe_eval_capacity_factor=None)
    for training in (True, False):
        assert capacity_of(dropless, rows=2, row_tokens=8, training=training).slots == 8


@pytest.mark.parametrize(
    ("rule", "size", "expected"),
    [
        ("t5x", None, (64, 4)),
        ("port", None, (256, 1)),
        ("megatron", None, (256, 1)),
        ("port", 64, (64, 4)),
        ("t5x", 16, (16, 16)),
        ("t5x", 128, (128, 2)),
        ("t5x", 256, (256, 1)),
    ],
)
def test_groups(rule: str, size: int | None, expected: tuple[int, int]) -> None:
    config = moe(moe_capacity_rule=rule, moe_capacity_group_size=size)
    capacity = capacity_of(config, rows=4, row_tokens=64, training=True)
    assert (capacity.group_size, capacity.groups) == expected


@pytest.mark.parametrize("size", [0, -4, 48, 96, 192, 512])
def test_a_group_that_is_no_part_and_no_multiple_of_a_row_is_rejected(size: int) -> None:
    expected = (
        r"--moe-capacity-group-size must be a divisor of the row \(64 tokens\) or whole rows that "
        rf"divide 4 rows \(got {size}\)"
    )
    with pytest.raises(UsageError, match=expected):
        capacity_of(moe(moe_capacity_group_size=size), rows=4, row_tokens=64, training=True)

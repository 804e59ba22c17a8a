"""The drop policy `fair`: by hand, and the two facts that its definition promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_kernels.reference import rank_in_expert
from megatron_moe.moe.drop_policies import fair
from megatron_moe.moe.dropping import DROP_POLICIES, Competition, Draw
from megatron_moe.moe.plan import Capacity, SlotRule
from tests.moe.test_plan import plan_of


def kept(
    choices: Tensor, slots: int, experts: int, step: int = 0, layer: int = 0, batch: int = 1
) -> Tensor:
    rule = SlotRule(num_experts=experts, policy=DROP_POLICIES["fair"])
    capacity = Capacity(group_size=len(choices) // batch, groups=batch, slots=slots)
    draw = Draw(step=step, layer=layer)
    return plan_of(choices, batch, capacity, rule, draw=draw).plan.kept_TK


def at_turn(monkeypatch: pytest.MonkeyPatch, u: float) -> None:
    """Let all experts have this u."""

    def turns(competition: Competition, like: Tensor) -> Tensor:
        shape = competition.topk, competition.num_experts
        return torch.full(shape, int(u * 2**32))

    monkeypatch.setattr(fair, "_turns", turns)


@pytest.mark.parametrize(
    ("u", "tokens"),
    # m = 5, C = 2. r C is 0 2 4 6 8. o = 0: mod 5 0 2 4 1 3; o = 1: 1 3 0 2 4; o = 2: 2 4 1 3 0;
    # o = 3: 3 0 2 4 1; o = 4: 4 1 3 0 2. Kept where it is 3 or 4: every token twice of five times.
    [(0.0, [2, 4]), (0.2, [1, 4]), (0.4, [1, 3]), (0.6, [0, 3]), (0.8, [0, 2])],
)
def test_by_hand(monkeypatch: pytest.MonkeyPatch, u: float, tokens: list[int]) -> None:
    at_turn(monkeypatch, u + 1e-6)
    kept_T = kept(torch.zeros(5, 1, dtype=torch.int64), 2, 1).flatten()
    assert kept_T.nonzero().flatten().tolist() == tokens


def test_second_choices_share_what_first_ones_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert 0: first choice of tokens 0 and 1, second of 2 to 5; of 4 slots 2 are left for 4.

    o = 0, m = 4, C = 2: r C mod 4 is 0 2 0 2, kept where it is at least 2: tokens 3 and 5. Expert
    1 is the first choice of tokens 2 to 5, which fill its slots, so that tokens 0 and 1 get none.
    """
    at_turn(monkeypatch, 0.0)
    choices = torch.tensor([[0, 1], [0, 1], [1, 0], [1, 0], [1, 0], [1, 0]])
    assert kept(choices, 4, 2).int().tolist() == [[1, 0], [1, 0], [1, 0], [1, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("load", [1, 2, 3, 7, 12, 30])
def test_every_choice_is_kept_at_equally_many_offsets(
    monkeypatch: pytest.MonkeyPatch, load: int
) -> None:
    """At exactly C of the m offsets, for every C up to m."""
    choices = torch.zeros(load, 1, dtype=torch.int64)
    for slots in range(1, load + 1):
        counts = torch.zeros(load, dtype=torch.int64)
        for offset in range(load):
            at_turn(monkeypatch, (offset + 0.5) / load)
            counts += kept(choices, slots, 1).flatten()
        assert counts.tolist() == [slots] * load


def test_any_stretch_of_choices_keeps_its_share() -> None:
    """Of L consecutive choices of one rank at an expert, L C / m, rounded down or up."""
    generator = torch.Generator().manual_seed(1)
    for step in range(30):
        experts = int(torch.randint(1, 6, (), generator=generator))
        choices = torch.randint(experts, (60, 1), generator=generator)
        slots = int(torch.randint(1, 30, (), generator=generator))
        kept_T = kept(choices, slots, experts, step).flatten()
        for expert in range(experts):
            mine = kept_T[choices.flatten() == expert].int()
            load, share = len(mine), min(slots, len(mine))
            total = torch.cat((mine.new_zeros(1), mine.cumsum(0)))
            for length in range(1, len(mine) + 1):
                counts = total[length:] - total[:-length]
                assert counts.min() >= length * share // load
                assert counts.max() <= -(-length * share // load)


@pytest.mark.parametrize("seed", range(5))
def test_over_steps_no_position_is_favoured(seed: int) -> None:
    """The same group in 400 steps: each choice is kept in its share of them, to within 4.

    By chance it would be within 4 standard deviations, which is 40.
    """
    generator = torch.Generator().manual_seed(seed)
    choices = torch.rand(40, 5, generator=generator).mul(torch.arange(1, 6)).topk(2).indices
    slots, steps = 6, 400
    counts = sum(kept(choices, slots, 5, step, layer=seed).int() for step in range(steps))
    assert isinstance(counts, Tensor)
    left = torch.full((5,), slots)
    for k in range(2):
        load = choices[:, k].bincount(minlength=5)
        share = torch.minimum(left, load)
        left -= share
        expected = steps * share[choices[:, k]] / load[choices[:, k]]
        assert (counts[:, k] - expected).abs().max() <= 4
    dropped = steps * choices.numel() - int(counts.sum())
    assert dropped > steps * 10


def test_order_puts_what_is_kept_first() -> None:
    choices = torch.rand(2, 30, 4).argsort(-1)[..., :2].transpose(1, 2).reshape(2, 60)
    competition = Competition(
        experts_GA=choices,
        weights_GA=lambda: choices,
        topk=2,
        num_experts=4,
        slots=5,
        draw=Draw(step=3),
        rank_in_expert=rank_in_expert,
    )
    kept_GA = fair.kept_fairly(competition)
    ordered = kept_GA.gather(1, fair.by_fair_share(competition))
    assert (ordered.int().diff(dim=1) <= 0).all()

"""Routing worked by hand, and against a queue simulated choice by choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_moe.config import MoEConfig
from megatron_moe.errors import UsageError
from megatron_moe.model.reference.queues import kept_choices
from megatron_moe.model.reference.routing import (
    balance_loss,
    capacity,
    capacity_group,
    route,
)


@pytest.mark.parametrize(
    ("rule", "experts", "tokens", "training", "slots"),
    [
        # The published sizes: a row of 2048 tokens.
        ("t5x", 32, 2048, True, 80),
        ("t5x", 32, 2048, False, 128),
        ("t5x", 16, 2048, True, 160),
        # Halves go to the even number; then at least 4.
        ("t5x", 5, 18, True, 4),  # 4.5 -> 4
        ("t5x", 5, 22, True, 6),  # 5.5 -> 6
        ("t5x", 32, 64, True, 4),  # 2.5 -> 2 -> min 4
        # floor(2 * 1.25 * T / E), then up to the next even number.
        ("port", 32, 2048, True, 160),
        ("port", 32, 2048, False, 256),
        ("port", 8, 16, True, 6),  # 5 -> 6
        ("port", 8, 22, True, 6),  # 6.875 -> 6
        ("port", 8, 4, True, 4),  # 1 -> 2 -> min 4
        # ceil(2 T / E * 1.25), without a minimum.
        ("megatron", 32, 2048, True, 160),
        ("megatron", 8, 9, True, 3),  # 2.8125 -> 3
        ("megatron", 32, 8, True, 1),  # 0.625 -> 1
    ],
)
def test_capacity_worked_by_hand(
    rule: str, experts: int, tokens: int, training: bool, slots: int
) -> None:
    moe = MoEConfig(num_experts=experts, moe_capacity_rule=rule)
    assert capacity(moe, tokens, training_capacity=training) == slots


def test_capacity_without_a_factor_holds_every_token() -> None:
    moe = MoEConfig(moe_expert_capacity_factor=None)
    assert capacity(moe, 37, training_capacity=True) == 37
    assert capacity(moe, 64, training_capacity=False) == 16


def test_minimum_capacity_is_configurable() -> None:
    moe = MoEConfig(num_experts=8, moe_min_capacity=9)
    assert capacity(moe, 8, training_capacity=True) == 9


def test_groups_are_a_row_or_the_micro_batch_or_what_is_asked_for() -> None:
    assert capacity_group(MoEConfig(moe_capacity_rule="t5x"), 4, 32) == 32
    assert capacity_group(MoEConfig(moe_capacity_rule="port"), 4, 32) == 128
    assert capacity_group(MoEConfig(moe_capacity_rule="megatron"), 4, 32) == 128
    for size in (8, 32, 64, 128):
        assert capacity_group(MoEConfig(moe_capacity_group_size=size), 4, 32) == size
    for size in (0, 12, 48, 96, 256):
        with pytest.raises(UsageError, match="--moe-capacity-group-size"):
            capacity_group(MoEConfig(moe_capacity_group_size=size), 4, 32)


def test_first_choices_go_before_second_choices_worked_by_hand() -> None:
    # Token:        0       1       2       3
    ids = torch.tensor([[[0, 1], [1, 0], [0, 1], [0, 2]]])
    probs = torch.tensor([[[0.5, 0.4], [0.5, 0.4], [0.5, 0.4], [0.6, 0.3]]])
    kept = kept_choices(ids, probs, 3, 2, "position")
    # Expert 0 is queued for by tokens 0, 2, 3 as first choice, then by 1 as second: 0 and 2 stay.
    # Expert 1 by 1 (first), then 0 and 2 (second): 1 and 0 stay. Expert 2 by 3 alone.
    assert kept.tolist() == [[[True, True], [True, False], [True, False], [False, True]]]


def test_a_dropped_first_choice_still_stands_before_second_choices() -> None:
    # Expert 0: first choices of 0, 1, 2 with one slot; the second choice of token 3 ranks fourth.
    ids = torch.tensor([[[0, 1], [0, 1], [0, 1], [1, 0]]])
    probs = torch.full(ids.shape, 0.25)
    kept = kept_choices(ids, probs, 2, 1, "position")
    assert kept.tolist() == [[[True, False], [False, False], [False, False], [True, False]]]


def test_probs_policy_keeps_the_most_probable_worked_by_hand() -> None:
    ids = torch.tensor([[[0, 1], [1, 0], [0, 1], [0, 2]]])
    probs = torch.tensor([[[0.50, 0.40], [0.48, 0.47], [0.45, 0.41], [0.60, 0.30]]])
    kept = kept_choices(ids, probs, 3, 2, "probs")
    # Expert 0: .60 (3), .50 (0) stay, .47 (1's second) and .45 (2's first) go.
    # Expert 1: .48 (1), .41 (2) stay, .40 (0) goes.
    assert kept.tolist() == [[[True, False], [True, False], [False, True], [True, True]]]


def test_probs_policy_breaks_ties_by_position() -> None:
    ids = torch.tensor([[[0, 1], [1, 0], [0, 1], [0, 1]]])
    kept = kept_choices(ids, torch.full(ids.shape, 0.5), 2, 2, "probs")
    assert torch.equal(kept, kept_choices(ids, torch.full(ids.shape, 0.5), 2, 2, "position"))


def _queue(ids: Tensor, probs: Tensor, slots: int, policy: str) -> Tensor:
    """One group [T, K], choice by choice."""
    tokens, choices = ids.shape
    queue = [(k, t) for k in range(choices) for t in range(tokens)]
    if policy == "probs":
        queue.sort(key=lambda choice: -probs[choice[1], choice[0]].item())
    taken: dict[int, int] = {}
    kept = torch.zeros(tokens, choices, dtype=torch.bool)
    for k, t in queue:
        expert = int(ids[t, k])
        kept[t, k] = taken.get(expert, 0) < slots
        taken[expert] = taken.get(expert, 0) + 1
    return kept


@pytest.mark.parametrize("policy", ["position", "probs"])
@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize(("rule", "group"), [("t5x", None), ("port", None), ("t5x", 8)])
def test_routing_equals_a_simulated_queue(
    policy: str, topk: int, rule: str, group: int | None
) -> None:
    moe = MoEConfig(
        num_experts=5,
        moe_router_topk=topk,
        moe_capacity_rule=rule,
        moe_capacity_group_size=group,
        moe_expert_capacity_factor=0.9,
        moe_token_drop_policy=policy,
        moe_min_capacity=1,
    )
    rows, length = 3, 16
    generator = torch.Generator().manual_seed(topk)
    logits = torch.randn(rows * length, 5, generator=generator) + torch.tensor([1.0, 0, 0, 0, 0])
    routing = route(logits, rows, moe, 0, training_capacity=True)
    tokens = group or (length if rule == "t5x" else rows * length)
    slots = capacity(moe, tokens, training_capacity=True)
    expected = [
        _queue(routing.ids_TK[i : i + tokens], routing.probs_TK[i : i + tokens], slots, policy)
        for i in range(0, rows * length, tokens)
    ]
    assert 0 < routing.kept_TK.sum() < routing.kept_TK.numel()
    assert torch.equal(routing.kept_TK, torch.cat(expected))


def test_softmax_over_all_experts_before_the_choice_and_no_renormalisation() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    routing = route(logits, 1, MoEConfig(num_experts=4), 3, training_capacity=True)
    weights = torch.exp(logits[0]) / torch.exp(logits[0]).sum()
    assert routing.ids_TK.tolist() == [[0, 1]]
    torch.testing.assert_close(routing.probs_TK[0], weights[:2])
    assert routing.probs_TK.sum().item() == pytest.approx(0.8808, abs=1e-4)
    assert routing.layer == 3


def test_equal_probabilities_choose_the_first_experts() -> None:
    routing = route(torch.zeros(4, 16), 1, MoEConfig(num_experts=16), 0, training_capacity=True)
    assert routing.ids_TK.tolist() == [[0, 1]] * 4


def test_no_factor_drops_nothing_and_evaluation_has_its_own() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0, 0.0]]).expand(64, 4)
    moe = MoEConfig(num_experts=4, moe_expert_capacity_factor=None, moe_eval_capacity_factor=2.0)
    assert route(logits, 1, moe, 0, training_capacity=True).kept_TK.all()
    kept = route(logits, 1, moe, 0, training_capacity=False).kept_TK
    assert kept.sum(dim=0).tolist() == [32, 32]
    # Without competition a group size that does not fit the tokens does not matter.
    odd = replace(moe, moe_capacity_group_size=48)
    assert route(logits, 1, odd, 0, training_capacity=True).kept_TK.all()


def test_counts_are_of_choices_before_dropping() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0, 0.0]]).expand(64, 4)
    routing = route(logits, 1, MoEConfig(num_experts=4), 0, training_capacity=True)
    assert routing.counts_E.tolist() == [64, 64, 0, 0]
    assert not routing.kept_TK.all()


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("position", [[True, True], [True, True], [False, False], [True, False]]),
        ("probs", [[True, True], [False, True], [True, False], [True, False]]),
    ],
)
def test_the_example_of_the_docstring(policy: str, kept: list[list[bool]]) -> None:
    ids = torch.tensor([[[0, 1], [0, 2], [0, 1], [1, 0]]])
    probs = torch.tensor([[[0.50, 0.30], [0.40, 0.35], [0.60, 0.20], [0.45, 0.25]]])
    found = kept_choices(ids, probs, num_experts=3, slots=2, policy=policy)
    assert found[0].tolist() == kept


def test_balance_loss_is_k_when_balanced() -> None:
    # Four tokens over four experts, each the first choice once and the second choice once.
    ids = torch.tensor([[[0, 1], [1, 2], [2, 3], [3, 0]]])
    probs = torch.full((1, 4, 4), 0.25)
    assert balance_loss(probs, ids).item() == pytest.approx(2.0)


def test_balance_loss_worked_by_hand() -> None:
    # f = (1, .5, .5), P = (.6, .25, .15): 3 (.6 + .125 + .075) = 2.4.
    ids = torch.tensor([[[0, 1], [0, 2]]])
    probs = torch.tensor([[[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]]])
    assert balance_loss(probs, ids).item() == pytest.approx(2.4)


def test_balance_is_taken_per_row_or_over_the_micro_batch_or_not_at_all() -> None:
    # Row 0 wants experts 0 and 1, row 1 wants 2 and 3: balanced together, not alone.
    wants = torch.tensor([[8.0, 8.0, 0.0, 0.0], [0.0, 0.0, 8.0, 8.0]])
    logits = wants.repeat_interleave(8, dim=0)
    moe = MoEConfig(num_experts=4, moe_expert_capacity_factor=None)

    def loss(kind: str, training: bool = True) -> float:
        config = replace(moe, moe_router_load_balancing_type=kind)
        return route(logits, 2, config, 0, training_capacity=training).balance_loss.item()

    assert loss("aux_loss") == pytest.approx(2.0, abs=1e-3)
    # f = (1, 1, 0, 0), P = (1/2, 1/2, 0, 0) up to e^-8: 4 * (1/2 + 1/2) = 4 in each row.
    assert loss("seq_aux_loss") == pytest.approx(4.0, abs=1e-2)
    assert loss("none") == 0.0
    # Groups of both rows, of a row (as without a size), and of half a row.
    for size, expected in ((16, 2.0), (8, 4.0), (None, 4.0), (4, 4.0)):
        moe = replace(moe, moe_capacity_group_size=size)
        assert loss("group_aux_loss") == pytest.approx(expected, abs=1e-2)
    moe = replace(moe, moe_capacity_group_size=5, moe_eval_capacity_factor=None)
    assert loss("group_aux_loss", training=False) == pytest.approx(4.0, abs=1e-2)


def test_balance_gradient_is_through_the_mean_probability_alone() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    routing = route(logits, 1, MoEConfig(num_experts=4), 0, training_capacity=True)
    (found,) = torch.autograd.grad(routing.balance_loss, logits)
    # d/dlogit_te of E sum_e f_e mean_t p_te = E/T p_te (f_e - sum_j f_j p_tj).
    p = logits.detach().softmax(dim=-1)
    f = routing.counts_E / 6
    expected = 4 / 6 * p * (f - (p * f).sum(dim=-1, keepdim=True))
    torch.testing.assert_close(found, expected)


def test_router_z_loss_worked_by_hand() -> None:
    # log(e^0 + e^0) = .6931, log(e^1 + e^1) = 1.6931: (.4805 + 2.8667) / 2.
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    routing = route(logits, 1, MoEConfig(num_experts=2), 0, training_capacity=True)
    assert routing.z_loss.item() == pytest.approx(1.6736, abs=1e-4)

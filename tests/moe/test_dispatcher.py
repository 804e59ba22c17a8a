"""Tokens to rows and back: plans, values and gradients of the two moves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_moe.moe.dispatcher import TokenDispatcher
from megatron_moe.moe.dropping import by_position, by_prob
from megatron_moe.moe.exchange import ExpertGroups
from megatron_moe.moe.experts import StackedExperts
from megatron_moe.moe.plan import Plan
from megatron_moe.moe.router import route
from megatron_moe.moe.scoring import Scores
from tests.moe.cases import BATCH, DTYPE, HIDDEN, SEQUENCE, model_config, moe_config, tokens
from tests.support.kernels import IMPLEMENTATIONS, need


def planned(training: bool = True, **settings: object) -> tuple[TokenDispatcher, Scores, Plan]:
    """One rank, 24 tokens of two rows, four experts, two choices."""
    moe, groups = moe_config(**settings), ExpertGroups.of(None)
    dispatcher = TokenDispatcher(moe, groups)
    torch.manual_seed(0)
    weight = torch.randn(4, HIDDEN, dtype=DTYPE)
    scores, _ = route(tokens(0).view(-1, HIDDEN), weight, moe.moe_router_topk)
    experts = StackedExperts(model_config(), moe, groups, DTYPE, None)
    return dispatcher, scores, dispatcher.plan(scores, BATCH, training, experts)


def test_a_plan_holds_what_the_pass_needs() -> None:
    dispatcher, scores, plan = planned()
    assert dispatcher.slot_rule.policy is by_position
    assert (plan.capacity.groups, plan.capacity.group_size, plan.capacity.slots) == (BATCH, 12, 3)
    assert plan.choices_TK is scores.choices_TK
    assert plan.weights_TK is scores.weights_TK
    assert plan.schedule.layout.rows == plan.placement.source_R.numel()
    assert int(plan.placement.kept_TK.sum()) == int(plan.slots.full_GE.sum())


def test_capacity_and_policy_follow_the_configuration() -> None:
    dispatcher, _, plan = planned(
        training=False, moe_eval_capacity_factor=2.0, moe_token_drop_policy="probs"
    )
    assert plan.capacity.slots == 6
    assert dispatcher.slot_rule.policy is by_prob


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("impl", ["loop", "batched", "auto"])
def test_moves_against_plain_indexing(impl: str, kernels: str) -> None:
    """Experts that double every row: each token gets twice itself times its kept weights."""
    need(kernels)
    dispatcher, scores, plan = planned(moe_expert_impl=impl, moe_dispatch_impl=kernels)
    x = tokens(1).view(-1, HIDDEN).requires_grad_()
    weights = scores.weights_TK.clone().requires_grad_()

    def through(x_TH: Tensor, weights_TK: Tensor) -> Tensor:
        return dispatcher.combine(2 * dispatcher.dispatch(x_TH, plan), weights_TK, plan)

    found = through(x, weights)
    expected = 2 * x * (weights * plan.placement.kept_TK).sum(1, keepdim=True)
    torch.testing.assert_close(found, expected)
    assert (~plan.placement.kept_TK).any()
    grad = torch.randn(SEQUENCE * BATCH, HIDDEN, dtype=DTYPE)
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, weights), grad),
        torch.autograd.grad(expected, (x, weights), grad),
    )

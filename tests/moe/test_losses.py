"""The losses by hand, and how they enter the backward pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_moe.moe import losses
from megatron_moe.moe.router import Scores


def scores_of(logits: Tensor, choices: Tensor) -> Scores:
    probs = logits.softmax(-1)
    return Scores(logits, logits.logsumexp(-1), probs, choices, probs.gather(1, choices))


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("topk", [1, 2, 4])
def test_balanced_routing_has_loss_k(per_row: bool, topk: int) -> None:
    """Uniform probabilities and equal loads, E = 4: 4 * sum of 4 * (k / 4) * (1 / 4) = k."""
    choices = torch.stack([(torch.arange(8) // 2 + k) % 4 for k in range(topk)], dim=1)
    load = losses.load_per_row(choices, 2, 4)
    assert load.tolist() == [[topk] * 4] * 2
    loss = losses.load_balancing_loss(torch.full((8, 4), 0.25), load, 8, per_row)
    assert loss.item() == pytest.approx(topk)


def test_all_tokens_to_one_expert_has_loss_e() -> None:
    probs = torch.tensor([[1.0, 0.0, 0.0]]).expand(4, 3)
    load = losses.load_per_row(torch.zeros(4, 1, dtype=torch.int64), 1, 3)
    assert losses.load_balancing_loss(probs, load, 4, True).item() == pytest.approx(3.0)


def test_rows_that_balance_each_other_are_balanced_only_together() -> None:
    """Row 0 (tokens 0, 2) goes to expert 0 with certainty, row 1 to expert 1. E = 2, k = 1.

    Each row alone: 2 * (1 * 1 + 0) = 2. Together: 2 * (1/2 * 1/2 + 1/2 * 1/2) = 1.
    """
    choices = torch.tensor([[0], [1], [0], [1]])
    probs = torch.nn.functional.one_hot(choices[:, 0], 2).float()
    load = losses.load_per_row(choices, 2, 2)
    assert load.tolist() == [[2, 0], [0, 2]]
    assert losses.load_balancing_loss(probs, load, 4, per_row=True).item() == pytest.approx(2.0)
    assert losses.load_balancing_loss(probs, load, 4, per_row=False).item() == pytest.approx(1.0)


def test_shares_of_ranks_add_up() -> None:
    torch.manual_seed(0)
    choices, probs = torch.randint(0, 5, (12, 2)), torch.rand(12, 5).softmax(-1)
    load = losses.load_per_row(choices, 2, 5)
    for per_row in (True, False):
        whole = losses.load_balancing_loss(probs, load, 12, per_row)
        halves = [losses.load_balancing_loss(p, load, 12, per_row) for p in probs.split(6)]
        torch.testing.assert_close(sum(halves), whole)


def test_router_z_by_hand() -> None:
    """Logits (0, 0) give log 2, (3, 3) give 3 + log 2."""
    logits = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    z = losses.router_z_loss(scores_of(logits, torch.zeros(2, 1, dtype=torch.int64)), 2)
    assert z.item() == pytest.approx((math.log(2) ** 2 + (3 + math.log(2)) ** 2) / 2)


@pytest.mark.parametrize("scale", [None, 0.25])
def test_an_attached_loss_adds_its_scaled_gradient_and_no_value(
    scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    if scale is not None:
        MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), scale))
    x = torch.tensor([2.0], requires_grad=True)
    y = losses.attach(x * 3, x.square().sum())
    assert y.tolist() == [6.0]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(3 + (scale or 1.0) * 4)

"""The losses by hand, and how they enter the backward pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_moe.moe import losses
from megatron_moe.moe.losses import BalanceTerm, LossRule
from megatron_moe.moe.plan import Capacity
from megatron_moe.moe.scoring import Scores
from tests.moe.cases import BATCH, DTYPE, HIDDEN, SEQUENCE, layer_of, moe_config, tokens


def scores_of(probs: Tensor, log_z: Tensor) -> Scores:
    """Scores in which the losses see these, and the first expert is every token's only choice."""
    choices = torch.zeros(probs.shape[0], 1, dtype=torch.int64)
    return Scores(probs.log(), probs.log(), log_z, probs, choices, probs[:, :1])


def attach(
    scores: Scores,
    load: Tensor,
    tokens: int,
    per_row: bool,
    balance_weight: float = 1.0,
    z_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """With the load of each row, or that of all rows together."""
    parts = load.shape[0] if per_row else 1
    if not per_row:
        load = load.sum(0, keepdim=True)
    term = BalanceTerm(load_QE=load, parts=parts, weight=balance_weight)
    rule = LossRule(tokens=tokens, z_weight=z_weight)
    return losses.attach_losses(scores.weights_TK, scores, [term], rule)


def balance_of(probs: Tensor, load: Tensor, tokens: int, per_row: bool) -> Tensor:
    return attach(scores_of(probs, torch.zeros(probs.shape[0])), load, tokens, per_row)[1]


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("topk", [1, 2, 4])
def test_balanced_routing_has_loss_k(per_row: bool, topk: int) -> None:
    """Uniform probabilities and equal loads, E = 4: 4 * sum of 4 * (k / 4) * (1 / 4) = k."""
    choices = torch.stack([(torch.arange(8) // 2 + k) % 4 for k in range(topk)], dim=1)
    load = losses.load_per_row(choices, 2, 4)
    assert load.tolist() == [[topk] * 4] * 2
    loss = balance_of(torch.full((8, 4), 0.25), load, 8, per_row)
    assert loss.item() == pytest.approx(topk)


def test_all_tokens_to_one_expert_has_loss_e() -> None:
    probs = torch.tensor([[1.0, 0.0, 0.0]]).expand(4, 3)
    load = losses.load_per_row(torch.zeros(4, 1, dtype=torch.int64), 1, 3)
    assert balance_of(probs, load, 4, True).item() == pytest.approx(3.0)


def test_rows_that_balance_each_other_are_balanced_only_together() -> None:
    """Row 0 (tokens 0, 2) goes to expert 0 with certainty, row 1 to expert 1. E = 2, k = 1.

    Each row alone: 2 * (1 * 1 + 0) = 2. Together: 2 * (1/2 * 1/2 + 1/2 * 1/2) = 1.
    """
    choices = torch.tensor([[0], [1], [0], [1]])
    probs = torch.nn.functional.one_hot(choices[:, 0], 2).float()
    load = losses.load_per_row(choices, 2, 2)
    assert load.tolist() == [[2, 0], [0, 2]]
    assert balance_of(probs, load, 4, per_row=True).item() == pytest.approx(2.0)
    assert balance_of(probs, load, 4, per_row=False).item() == pytest.approx(1.0)


def test_shares_of_ranks_add_up() -> None:
    torch.manual_seed(0)
    choices, probs = torch.randint(0, 5, (12, 2)), torch.rand(12, 5).softmax(-1)
    load = losses.load_per_row(choices, 2, 5)
    for per_row in (True, False):
        whole = balance_of(probs, load, 12, per_row)
        halves = [balance_of(p, load, 12, per_row) for p in probs.split(6)]
        torch.testing.assert_close(sum(halves), whole)


def test_router_z_by_hand() -> None:
    """Logits (0, 0) give log 2, (3, 3) give 3 + log 2."""
    log_z = torch.tensor([math.log(2), 3 + math.log(2)])
    scores, load = scores_of(torch.full((2, 2), 0.5), log_z), torch.zeros(1, 2, dtype=torch.int64)
    _, _, z = attach(scores, load, tokens=2, per_row=True)
    assert z.item() == pytest.approx((math.log(2) ** 2 + (3 + math.log(2)) ** 2) / 2)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_attached_losses_add_their_scaled_gradient_and_no_value(
    per_row: bool, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the definitions written with plain operations and autograd, in fp64."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    if scale is not None:
        MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), scale))
    torch.manual_seed(4)
    tokens, rows, experts = 12, 3, 5
    logits = torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True)
    choices = torch.randint(0, experts, (tokens, 2))
    load = losses.load_per_row(choices, rows, experts)
    scores = scores_of(logits.softmax(-1), logits.logsumexp(-1))
    weights, *found = attach(scores, load, tokens, per_row, balance_weight=0.3, z_weight=0.7)
    assert torch.equal(weights, scores.weights_TK)

    chosen = torch.nn.functional.one_hot(choices, experts).sum(1).double()
    shares, probs = (x.view(-1, rows, experts) for x in (chosen, logits.softmax(-1)))
    dims = (0,) if per_row else (0, 1)
    balance = (experts * (shares.mean(dims) * probs.mean(dims)).sum(-1)).mean()
    z = logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(torch.stack(found), torch.stack((balance, z)))
    value = scores.weights_TK.square().sum()
    total = value + (scale or 1.0) * (0.3 * balance + 0.7 * z)
    (expected,) = torch.autograd.grad(total, logits, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(weights.square().sum(), logits)[0], expected)


@pytest.mark.parametrize("kind", ["seq_aux_loss", "aux_loss", "group_aux_loss", "none"])
@pytest.mark.parametrize("group", [None, 4, BATCH * SEQUENCE])
def test_the_losses_of_a_layer(kind: str, group: int | None) -> None:
    """Loads come from the slots where rows are groups, else from the choices: before drops both."""
    layer = layer_of(moe_config(moe_router_load_balancing_type=kind, moe_capacity_group_size=group))
    scores, _ = layer.router(tokens(3).view(-1, HIDDEN))
    plan = layer.dispatcher.plan(scores, BATCH, True, layer.experts)
    weights, (balance, z) = layer.losses.attach(scores, plan)
    assert torch.equal(weights, plan.weights_TK)
    groups = BATCH * SEQUENCE // (group or SEQUENCE)
    rows = {"aux_loss": 1, "group_aux_loss": groups}.get(kind, BATCH)
    chosen, probs = (
        x.view(SEQUENCE, BATCH, 4).transpose(0, 1).reshape(rows, -1, 4).mean(1)
        for x in (
            torch.nn.functional.one_hot(scores.choices_TK, 4).sum(1).to(DTYPE),
            scores.probs_TE.detach(),
        )
    )
    expected = 4 * (chosen * probs).sum(1).mean() * (kind != "none")
    torch.testing.assert_close(balance, expected)
    torch.testing.assert_close(z, scores.log_z_T.detach().square().mean())
    # Coefficients of the configuration, divided by the model's two expert layers.
    assert (layer.losses.balance, layer.losses.z_weight) == ([(kind, 0.15)], 0.1)


def test_the_loads_of_groups_by_hand() -> None:
    """Two rows of 4 tokens in (position, row) order; groups of 2 tokens, of a row, of both rows."""
    halves = torch.tensor([[0], [1], [2], [3]])
    size = {"groups": 4, "slots": 1}
    found = losses.load_per_group(halves, 2, Capacity(group_size=2, **size), 0, 8)
    assert found[:, 0].tolist() == [0, 2, 0, 2, 1, 3, 1, 3]
    found = losses.load_per_group(halves, 2, Capacity(group_size=2, **size), 2, 4)
    assert found[:, 0].tolist() == [1, 3, 1, 3], "the second of two ranks"
    # A shard of 3 positions cuts groups: positions 3 to 5 of rows of 6, in groups of 2.
    thirds = torch.tensor([[0], [1], [2], [3], [4], [5]])
    cut = Capacity(group_size=2, groups=6, slots=1)
    found = losses.load_per_group(thirds, 2, cut, 3, 6)
    assert found[:, 0].tolist() == [1, 4, 2, 5, 2, 5]
    pairs, both = torch.tensor([[7], [8]]), Capacity(group_size=8, groups=2, slots=1)
    found = losses.load_per_group(pairs, 4, both, 0, 16)
    assert found[:, 0].tolist() == [7, 7, 8, 8]


def test_a_group_of_rows_is_balanced_by_its_rows_together() -> None:
    """Four rows of 2 tokens, E = 2, k = 1: rows 0, 1 go to experts 0, 1; rows 2, 3 both to 0.

    Each row alone has loss 2. As groups of two rows: 1 and 2, so 1.5 in the mean; all together:
    2 * (3/4 * 3/4 + 1/4 * 1/4) = 1.25.
    """
    choices = torch.tensor([[0], [1], [0], [0]] * 2)
    probs = torch.nn.functional.one_hot(choices[:, 0], 2).float()
    scores = scores_of(probs, torch.zeros(8))
    load_BE = losses.load_per_row(choices, 4, 2)
    load_GE = load_BE.view(2, 2, 2).sum(1)
    pairs = Capacity(group_size=4, groups=2, slots=1)
    load = losses.load_per_group(load_GE, 4, pairs, 0, 8)
    term, rule = BalanceTerm(load_QE=load, parts=pairs.groups), LossRule(tokens=8)
    assert losses.attach_losses(scores.weights_TK, scores, [term], rule)[1].item() == 1.5
    assert attach(scores, load_BE, 8, per_row=True)[1].item() == 2.0
    assert attach(scores, load_BE, 8, per_row=False)[1].item() == 1.25

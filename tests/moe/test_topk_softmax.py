"""The router `topk_softmax`: Megatron-LM's order, top-k before the softmax."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe.config import RunConfig
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.model.reference.routing import route
from tests.moe.cases import DTYPE, HIDDEN, layer_of, moe_config, reference_of, tokens, watched
from tests.moe.ranks import check_layout, context_of
from tests.support.pool import Pool

LN_2, LN_3 = 0.6931471805599453, 1.0986122886681098
ROUTER = "topk_softmax"


def test_weights_are_a_softmax_over_the_chosen_logits() -> None:
    """exp(ln 3, ln 2) is (3, 2): divided by their sum (3/5, 2/5)."""
    layer = layer_of(moe_config(moe_router_type=ROUTER))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = torch.tensor([0.0, LN_3, -LN_3, LN_2])
    seen = watched(layer)
    layer(torch.ones(2, 1, HIDDEN, dtype=DTYPE))
    scores = seen[0].scores
    assert scores.choices_TK.tolist() == [[1, 3]] * 2
    torch.testing.assert_close(scores.weights_TK, torch.tensor([[0.6, 0.4]] * 2).to(DTYPE))
    # Over all four, for the losses: (1, 3, 1/3, 2) / (19/3).
    probs = torch.tensor([[3 / 19, 9 / 19, 1 / 19, 6 / 19]] * 2, dtype=DTYPE)
    torch.testing.assert_close(scores.probs_TE, probs)


def check_against_megatron_core(rank: int, world_size: int, *, topk: int) -> None:
    """Megatron-Core's own router with the same weight: choices, weights and gradients."""
    group = context_of(world_size, 1, 1, 1).pgs.tp
    groups = SimpleNamespace(tp=group, cp=group, tp_cp=group, tp_dp_cp=group)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=6,
        moe_router_topk=topk,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp64",
        add_bias_linear=False,
        perform_initialization=False,
    )
    theirs = TopKRouter(config, pg_collection=groups).to(DTYPE)
    ours = layer_of(moe_config(moe_router_type=ROUTER, moe_router_topk=topk, num_experts=6)).router
    theirs.weight.data.copy_(ours.weight.data)
    x, gain = tokens(1).requires_grad_(), tokens(2).view(-1, HIDDEN)[:, :6]
    probs_TE, map_TE = theirs(x)
    (probs_TE * gain).sum().backward()
    expected = x.grad, theirs.weight.grad
    x.grad = None

    scores, _ = ours(x.view(-1, HIDDEN))
    dense_TE = torch.zeros_like(gain).scatter(1, scores.choices_TK, scores.weights_TK)
    (dense_TE * gain).sum().backward()
    assert torch.equal(dense_TE > 0, map_TE)
    # Megatron-Core's softmax is fp32, whatever its operands are.
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(dense_TE, probs_TE, **tolerance)
    torch.testing.assert_close((x.grad, ours.weight.grad), expected, **tolerance)
    assert float(expected[1].abs().max()) > 0.01


@pytest.mark.parametrize("topk", [2, 4])
def test_it_is_megatron_cores_router_forward_and_backward(pool: Pool, topk: int) -> None:
    pool.run(check_against_megatron_core, 1, topk=topk)


@pytest.mark.parametrize(("tp", "ep", "etp"), [(2, 2, 1), (1, 2, 1)])
def test_the_layout_changes_nothing(pool: Pool, tp: int, ep: int, etp: int) -> None:
    settings = {"moe_router_type": ROUTER, "moe_token_drop_policy": "probs"}
    assert sum(pool.run(check_layout, 2, tp=tp, ep=ep, etp=etp, settings=settings)) > 0


def test_the_reference_layer_agrees() -> None:
    layer = layer_of(moe_config(moe_router_type=ROUTER))
    x = tokens(4)
    output, _ = reference_of(layer)(x.transpose(0, 1), training_capacity=True)
    torch.testing.assert_close(layer(x).transpose(0, 1), output)


def test_the_reference_routes_by_hand() -> None:
    """Policy `probs` drops by the weights: expert 0 keeps 0.6 and has no slot for 0.55."""
    logits_TE = torch.tensor([[0.55, 0.45, 1e-9], [0.6, 0.4, 1e-9]]).log()
    moe = moe_config(
        moe_router_type=ROUTER,
        num_experts=3,
        moe_expert_capacity_factor=1.5,
        moe_token_drop_policy="probs",
    )
    routing = route(logits_TE, 1, moe, 0, training_capacity=True)
    torch.testing.assert_close(routing.probs_TK, torch.tensor([[0.55, 0.45], [0.6, 0.4]]))
    assert routing.kept_TK.tolist() == [[False, True], [True, False]]


def test_one_choice_is_an_error() -> None:
    """Its weight would be 1 and its gradient 0; Megatron-Core rejects it as well."""
    config = RunConfig(moe=moe_config(moe_router_type=ROUTER, moe_router_topk=1))
    with pytest.raises(UsageError, match="--moe-router-topk must be >= 2 with --moe-router-type"):
        validate(config)

"""Megatron-LM's units of the losses and its capacity, against Megatron-Core's own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.config import MoEConfig
from megatron_moe.model.reference.routing import capacity, route
from megatron_moe.moe.plan import slots_per_expert
from tests.moe.cases import (
    BATCH,
    DTYPE,
    HIDDEN,
    SEQUENCE,
    layer_of,
    moe_config,
    set_loss_scale,
    tokens,
    watched,
)

TOKENS = BATCH * SEQUENCE


def loss_gradient(**settings: Any) -> Tensor:
    """Of the router's weight, from both losses alone, in one of two expert layers."""
    layer = layer_of(moe_config(moe_loss_convention="megatron", **settings))
    layer.router.weight.grad = None
    (layer(tokens(1)) * 0.0).sum().backward()
    return layer.router.weight.grad


def megatron_gradient(kind: str, topk: int, balance: float, z: float) -> Tensor:
    """The same as Megatron-Core's router attaches them."""
    from megatron.core.transformer.moe import moe_utils

    weight = layer_of(moe_config(moe_router_topk=topk)).router.weight.detach().requires_grad_()
    logits = tokens(1).view(TOKENS, HIDDEN) @ weight.t()
    scores, experts = logits.new_zeros(TOKENS, topk), logits.shape[1]
    chosen, probs = moe_utils.compute_routing_scores_for_aux_loss(logits, topk, "softmax")
    if kind == "seq_aux_loss":
        chosen, probs = (x.reshape(SEQUENCE, -1) for x in (chosen, probs))
    loss = moe_utils.switch_load_balancing_loss_func(
        probs, chosen.sum(0), probs.shape[0], topk, experts, balance
    )
    loss = loss / BATCH if kind == "seq_aux_loss" else loss
    attached = moe_utils.MoEAuxLossAutoScaler.apply(scores, loss)
    attached = moe_utils.MoEAuxLossAutoScaler.apply(attached, moe_utils.z_loss_func(logits, z))
    attached.sum().backward()
    return weight.grad


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize(("balance", "z"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_the_gradient_of_the_losses_is_megatron_cores(
    kind: str, topk: int, balance: float, z: float
) -> None:
    set_loss_scale(0.5)
    found = loss_gradient(
        moe_router_load_balancing_type=kind,
        moe_router_topk=topk,
        moe_aux_loss_coeff=balance,
        moe_z_loss_coeff=z,
    )
    expected = megatron_gradient(kind, topk, balance, z)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert found.norm() > 1e-3


def test_both_units_by_hand() -> None:
    """K = 2 and 4 expert layers: 0.01 and 1e-4 here are 0.005 and 2.5e-5 in Megatron-LM."""
    moe = MoEConfig(
        moe_aux_loss_coeff=0.005, moe_z_loss_coeff=2.5e-5, moe_loss_convention="megatron"
    )
    (balance,), z = moe.openmoe_coefficients(4)
    assert (balance, z) == pytest.approx((0.01, 1e-4))
    assert MoEConfig().openmoe_coefficients(4) == ((0.01,), 1e-4)


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.1, 1.25, 2.0, 100.0])
def test_the_capacity_is_megatron_cores(factor: float) -> None:
    """Of a micro-batch, as many tokens as there are at most. Among them are cases that another
    order of the operations rounds up by one: 1.1 * (2 * 100 / 20) is 11, 1.1 * 200 / 20 is not.
    """
    from megatron.core.transformer.moe.moe_utils import get_capacity

    for experts in (5, 8, 20, 32):
        for topk in (1, 2, 3):
            for count in (7, 100, 640, 2048):
                moe = MoEConfig(
                    num_experts=experts,
                    moe_router_topk=topk,
                    moe_capacity_rule="megatron",
                    moe_expert_capacity_factor=factor,
                )
                expected = get_capacity(count * topk, experts, factor)
                assert slots_per_expert(moe, count, factor) == min(expected, count)
                assert capacity(moe, count, training_capacity=True) == expected


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_what_drops_by_probability_is_what_megatron_core_drops(topk: int, factor: float) -> None:
    """Over the whole micro-batch, in the layer and in the reference."""
    from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

    moe = moe_config(
        moe_router_topk=topk,
        moe_capacity_rule="megatron",
        moe_expert_capacity_factor=factor,
        moe_token_drop_policy="probs",
        moe_min_capacity=4,
    )
    layer = layer_of(moe)
    seen, x_SBH = watched(layer), tokens(5)
    layer(x_SBH)
    probs = (x_SBH.view(TOKENS, HIDDEN) @ layer.router.weight.t()).softmax(-1).detach()
    best = probs.topk(topk).indices
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(1, best, True)
    _, kept_TE = apply_router_token_dropping(probs * chosen, chosen, topk, factor, "probs")
    assert 0 < kept_TE.sum() < chosen.sum()
    (decision,) = seen
    kept_TK = kept_TE.gather(1, decision.scores.choices_TK)
    assert torch.equal(decision.kept_TK, kept_TK)

    logits_BSE = (x_SBH @ layer.router.weight.t()).detach().transpose(0, 1).to(DTYPE)
    routing = route(logits_BSE.flatten(0, 1), BATCH, moe, 0, training_capacity=True)
    kept_BSK = routing.kept_TK.view(BATCH, SEQUENCE, topk)
    assert torch.equal(kept_BSK.transpose(0, 1).reshape(TOKENS, topk), kept_TK)

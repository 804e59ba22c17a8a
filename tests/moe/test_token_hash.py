"""The router `token_hash`: choices by the token's id alone, weights by its content."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_moe.config import RunConfig
from megatron_moe.data.batch import every_stage_reads
from megatron_moe.model.reference.routing import hashed_experts
from megatron_moe.moe.routers.token_hash import hashed
from tests.moe.cases import (
    BATCH,
    SEQUENCE,
    layer_of,
    moe_config,
    reference_of,
    set_loss_scale,
    tokens,
    watched,
)

SETTINGS: dict[str, Any] = {"moe_router_type": "token_hash", "moe_router_pre_softmax": False}
IDS = torch.randint(50, (SEQUENCE, BATCH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("experts", "topk"), [(4, 2), (7, 3)])
def test_experts_are_distinct_even_and_those_of_the_definition(experts: int, topk: int) -> None:
    ids = torch.arange(2000)
    chosen = hashed(ids, experts, topk)
    assert all(len(set(row)) == topk for row in chosen.tolist())
    for choice in chosen.unbind(1):
        share = choice.bincount(minlength=experts) / len(ids)
        assert (share - 1 / experts).abs().max() < 4 * (0.25 / len(ids)) ** 0.5
    moe = moe_config(num_experts=experts, moe_router_topk=topk)
    assert torch.equal(hashed_experts(ids.view(2, -1), moe), chosen)
    assert hashed(torch.tensor([256_299]), experts, topk).shape == (1, topk)


def test_choices_follow_the_id_and_weights_the_content() -> None:
    layer = layer_of(moe_config(**SETTINGS))
    seen = watched(layer)
    for seed in (1, 2):
        layer(tokens(seed), None, None, IDS)
    first, second = (one.scores for one in seen)
    assert torch.equal(first.choices_TK, hashed(IDS.flatten(), 4, 2))
    assert torch.equal(first.choices_TK, second.choices_TK)
    assert not torch.allclose(first.weights_TK, second.weights_TK)
    torch.testing.assert_close(first.weights_TK.sum(1), torch.ones(24).double())


def test_the_reference_layer_agrees() -> None:
    layer = layer_of(moe_config(**SETTINGS))
    reference = reference_of(layer)
    set_loss_scale(1.0)
    layer(tokens(4), None, None, IDS).square().sum().backward()
    rows = tokens(4).transpose(0, 1)
    output, routing = reference(rows, training_capacity=True, tokens_BS=IDS.t())
    losses = layer.moe.moe_aux_loss_coeff * routing.balance_loss
    losses = (losses + layer.moe.moe_z_loss_coeff * routing.z_loss) / layer.num_moe_layers
    (output.square().sum() + losses).backward()
    torch.testing.assert_close(layer.router.weight.grad, reference.router.weight.grad)


def test_every_pipeline_stage_reads_the_ids() -> None:
    assert every_stage_reads(RunConfig(moe=moe_config(**SETTINGS)))
    assert not every_stage_reads(RunConfig(moe=moe_config()))


def test_without_ids_it_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs the ids"):
        layer_of(moe_config(**SETTINGS))(tokens(1))

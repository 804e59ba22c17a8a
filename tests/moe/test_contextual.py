"""The router `contextual`: a moving average of preceding tokens, in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.moe.routers.contextual import BLOCK, preceding_mean
from tests.moe.cases import (
    BATCH,
    DTYPE,
    HIDDEN,
    SEQUENCE,
    layer_of,
    moe_config,
    reference_of,
    set_loss_scale,
    tokens,
    watched,
)
from tests.moe.ranks import check_layout
from tests.support.pool import Pool

SETTINGS: dict[str, Any] = {"moe_router_type": "contextual", "moe_router_context_decay": 0.6}


def test_the_average_by_hand() -> None:
    x = torch.tensor([4.0, 2.0, 8.0]).view(3, 1, 1)
    assert preceding_mean(x, 0.5).flatten().tolist() == [0.0, 2.0, 2.0]
    assert preceding_mean(x, 0.0).flatten().tolist() == [0.0, 4.0, 2.0], "the token before"


@pytest.mark.parametrize("length", [1, 5, BLOCK, 2 * BLOCK + 7])
def test_blocks_are_the_recurrence(length: int) -> None:
    x = torch.randn(length, 2, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    mean, seen = torch.zeros(2, 3, dtype=DTYPE), []
    for row in x:
        seen.append(mean)
        mean = 0.97 * mean + 0.03 * row
    torch.testing.assert_close(preceding_mean(x, 0.97), torch.stack(seen))


def choices_of(x: Tensor) -> Tensor:
    layer = layer_of(moe_config(**SETTINGS, moe_expert_capacity_factor=None))
    with torch.no_grad():
        layer.router.context_weight.mul_(40)
    seen = watched(layer)
    layer(x)
    return seen[0].scores.logits_TE.view(SEQUENCE, BATCH, -1)


def test_a_token_changes_later_ones_of_its_row_alone() -> None:
    x = tokens(1)
    other = x.clone()
    other[4, 1] += 1.0
    changed = (choices_of(x) != choices_of(other)).any(-1)
    assert not changed[:, 0].any() and not changed[:4, 1].any()
    assert changed[4:, 1].all()


def test_the_same_token_has_other_scores_elsewhere() -> None:
    """What the router `linear` cannot do: the id alone does not decide."""
    x = tokens(2)
    x[7] = x[3]
    logits = choices_of(x)
    assert not torch.allclose(logits[7], logits[3], atol=1e-3)


def test_the_reference_layer_agrees() -> None:
    layer = layer_of(moe_config(**SETTINGS))
    reference = reference_of(layer)
    with torch.no_grad():
        layer.router.context_weight.mul_(40)
        reference.router.context_weight.copy_(layer.router.context_weight)
    set_loss_scale(1.0)
    x = tokens(4).requires_grad_()
    layer(x).square().sum().backward()
    y = tokens(4).transpose(0, 1).requires_grad_()
    output, routing = reference(y, training_capacity=True)
    losses = layer.moe.moe_aux_loss_coeff * routing.balance_loss
    losses = (losses + layer.moe.moe_z_loss_coeff * routing.z_loss) / layer.num_moe_layers
    (output.square().sum() + losses).backward()
    torch.testing.assert_close(layer(x).transpose(0, 1), output)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.transpose(0, 1), y.grad)
    for name in ("weight", "context_weight"):
        expected = reference.router.get_parameter(name).grad
        torch.testing.assert_close(layer.router.get_parameter(name).grad, expected)
        assert expected is not None and float(expected.abs().max()) > 1e-3


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_are_in_fp32(score: str) -> None:
    settings = {**SETTINGS, "moe_router_score_function": score}
    router = layer_of(moe_config(**settings)).router.bfloat16()
    scores, x_TH = router(tokens(3).view(-1, HIDDEN).bfloat16(), BATCH)
    assert scores.logits_TE.dtype == scores.weights_TK.dtype == torch.float32
    assert x_TH.dtype == torch.bfloat16


@pytest.mark.parametrize(("tp", "ep"), [(2, 2)])
def test_the_layout_changes_nothing(pool: Pool, tp: int, ep: int) -> None:
    assert sum(pool.run(check_layout, 2, tp=tp, ep=ep, etp=1, settings=SETTINGS)) > 0

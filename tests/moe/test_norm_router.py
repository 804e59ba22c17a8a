"""The router `norm`: logits are norms of low-rank factors."""

from __future__ import annotations

from typing import Any

import torch

from tests.moe.cases import (
    DTYPE,
    HIDDEN,
    layer_of,
    moe_config,
    reference_of,
    set_loss_scale,
    tokens,
    watched,
)
from tests.moe.ranks import check_layout
from tests.support.pool import Pool

SETTINGS: dict[str, Any] = {"moe_router_type": "norm", "moe_router_norm_rank": 3}


def test_logits_by_hand() -> None:
    """Expert 0 sees (3, 4) of the token, of norm 5; the others see one number each."""
    layer = layer_of(moe_config(**{**SETTINGS, "moe_router_norm_rank": 2}))
    x = torch.zeros(2, 1, HIDDEN, dtype=DTYPE)
    x[0, 0, :3] = torch.tensor([3.0, 4.0, -2.0])
    with torch.no_grad():
        layer.router.weight.zero_()
        for row, column in ((0, 0), (1, 1), (2, 1), (5, 2)):
            layer.router.weight[row, column] = 1.0
    seen = watched(layer)
    layer(x)
    expected = torch.tensor([[5.0, 4.0, 2.0, 1e-3], [1e-3] * 4], dtype=DTYPE)
    torch.testing.assert_close(seen[0].scores.logits_TE, expected, rtol=1e-6, atol=1e-6)
    assert seen[0].scores.choices_TK.tolist() == [[0, 1], [0, 1]]


def test_the_reference_layer_agrees() -> None:
    layer = layer_of(moe_config(**SETTINGS))
    reference = reference_of(layer)
    set_loss_scale(1.0)
    layer(tokens(4)).square().sum().backward()
    output, routing = reference(tokens(4).transpose(0, 1), training_capacity=True)
    losses = layer.moe.moe_aux_loss_coeff * routing.balance_loss
    losses = (losses + layer.moe.moe_z_loss_coeff * routing.z_loss) / layer.num_moe_layers
    (output.square().sum() + losses).backward()
    torch.testing.assert_close(layer.router.weight.grad, reference.router.weight.grad)
    torch.testing.assert_close(layer(tokens(4)).transpose(0, 1), output)


def test_a_token_of_zeros_has_a_finite_gradient() -> None:
    layer = layer_of(moe_config(**SETTINGS))
    x = torch.zeros(4, 1, HIDDEN, dtype=DTYPE, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_the_layout_changes_nothing(pool: Pool) -> None:
    assert sum(pool.run(check_layout, 2, tp=2, ep=2, etp=1, settings=SETTINGS)) > 0

"""Forced choices: nothing changes with the router's own; others are weighted and dropped anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.model.reference.routing import route
from megatron_moe.moe import MoELayer
from megatron_moe.moe.replay import Forced, replayed
from tests.moe.cases import BATCH, SEQUENCE, layer_of, moe_config, reference_of, tokens, watched

ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax after top-k": {"moe_router_pre_softmax": False},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 1.5},
}


def passed(layer: MoELayer, x: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(tokens(100))
    grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    return (y.detach(), x.grad, *grads)


def others(seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(SEQUENCE * BATCH, 4, generator=generator).argsort(1)[:, :2]


@pytest.mark.parametrize("router", ROUTERS)
def test_the_routers_own_choices_change_nothing(router: str) -> None:
    layer = layer_of(moe_config(**ROUTERS[router]))
    seen = watched(layer)
    plain = passed(layer, tokens(0))
    own = seen[0].scores.choices_TK
    with replayed([layer], lambda number, micro_batch: Forced(own)):
        again = passed(layer, tokens(0))
    assert len(seen) == 2
    assert torch.equal(seen[1].kept_TK, seen[0].kept_TK)
    assert torch.equal(seen[1].scores.weights_TK, seen[0].scores.weights_TK)
    for one, other in zip(again, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.equal(passed(layer, tokens(0))[0], plain[0]), "it ends with the context"


@pytest.mark.parametrize("policy", ["position", "probs"])
@pytest.mark.parametrize("router", ROUTERS)
def test_other_choices_equal_the_reference_model(router: str, policy: str) -> None:
    settings: dict[str, Any] = {**ROUTERS[router], "moe_token_drop_policy": policy}
    layer = layer_of(moe_config(**settings, moe_aux_loss_coeff=0.0, moe_z_loss_coeff=0.0))
    seen = watched(layer)
    forced = others()
    with replayed([layer], lambda number, micro_batch: Forced(forced)):
        y, x_grad, *_ = passed(layer, tokens(0))
    reference = reference_of(layer)
    # The reference has tokens row by row.
    by_row = forced.view(SEQUENCE, BATCH, 2).transpose(0, 1).reshape(-1, 2)
    reference.forced_TK = by_row
    x = tokens(0).transpose(0, 1).clone().requires_grad_()
    expected, routing = reference(x, training_capacity=True)
    assert torch.equal(seen[0].scores.choices_TK, forced)
    kept = seen[0].kept_TK.view(SEQUENCE, BATCH, 2).transpose(0, 1).reshape(-1, 2)
    assert torch.equal(kept, routing.kept_TK)
    assert 0 < int((~kept).sum()) < kept.numel()
    torch.testing.assert_close(y, expected.transpose(0, 1))
    expected.backward(tokens(100).transpose(0, 1))
    assert x.grad is not None
    torch.testing.assert_close(x_grad, x.grad.transpose(0, 1))


def test_given_probabilities_weight_the_experts() -> None:
    layer = layer_of(moe_config(moe_expert_capacity_factor=None))
    forced, seen = others(), watched(layer)
    given = torch.rand(forced.shape, generator=torch.Generator().manual_seed(1))
    with replayed([layer], lambda number, micro_batch: Forced(forced, given)):
        layer(tokens(0))
    torch.testing.assert_close(seen[0].scores.weights_TK, given.double())
    normed = layer_of(moe_config(moe_router_pre_softmax=False))
    seen = watched(normed)
    with replayed([normed], lambda number, micro_batch: Forced(forced, given)):
        normed(tokens(0))
    weights = given.double() / given.double().sum(1, keepdim=True)
    torch.testing.assert_close(seen[0].scores.weights_TK, weights)


def test_each_micro_batch_has_its_own_also_when_it_is_recomputed() -> None:
    """Two forward passes without gradients, then both again with them, as in a pipeline."""
    layer = layer_of(moe_config())
    seen = watched(layer)
    forced = [others(1), others(2)]
    asked: list[tuple[int, int]] = []

    def choices(number: int, micro_batch: int) -> Forced:
        asked.append((number, micro_batch))
        return Forced(forced[micro_batch])

    with replayed([layer], choices):
        with torch.no_grad():
            first = [layer(tokens(n)) for n in range(2)]
        again = [layer(tokens(n)) for n in range(2)]
    assert asked == [(3, 0), (3, 1), (3, 0), (3, 1)]
    for one, other in zip(again, first, strict=True):
        torch.testing.assert_close(one, other)
    assert [torch.equal(s.scores.choices_TK, f) for s, f in zip(seen, forced, strict=True)]
    assert len(seen) == 2


def test_choices_of_another_shape_are_an_error() -> None:
    layer = layer_of(moe_config())
    with (
        replayed([layer], lambda number, micro_batch: Forced(others()[:3])),
        pytest.raises(ValueError, match=r"layer 3: choices must have the shape \(24, 2\)"),
    ):
        layer(tokens(0))


def test_the_reference_weighs_forced_choices_by_hand() -> None:
    """One row of two tokens, two experts and one slot each: the second token loses expert 0."""
    moe = moe_config(num_experts=2, moe_router_topk=1, moe_expert_capacity_factor=1.0)
    logits = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).log_softmax(1)
    found = route(logits, 1, moe, 0, training_capacity=True, forced_TK=torch.tensor([[0], [0]]))
    assert found.kept_TK.tolist() == [[True], [False]]
    torch.testing.assert_close(found.probs_TK, logits.exp()[:, :1])
    assert found.counts_E.tolist() == [2, 0]

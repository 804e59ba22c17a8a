"""Random experts for benchmarks, and noise on the router's input."""

from __future__ import annotations

import pytest
import torch

from megatron_moe.moe.forced import force_balance
from tests.moe.cases import layer_of, moe_config, tokens, watched

ROWS, LENGTH = 4, 512


def test_forced_choices_are_distinct_even_and_the_same_in_every_pass() -> None:
    layer, free = (
        layer_of(moe_config(moe_router_force_load_balancing=forced)) for forced in (True, False)
    )
    seen = watched(layer)
    x = tokens(0, LENGTH, ROWS) + 1.0  # a common direction, which the real router prefers
    first, second = layer(x), layer(x)
    choices_TK = seen[0].scores.choices_TK
    assert torch.equal(choices_TK, seen[1].scores.choices_TK)
    assert torch.equal(first, second)
    assert (choices_TK[:, 0] != choices_TK[:, 1]).all()
    other = force_balance(seen[0].scores, layer.layer_number + 1, layer.router.weights_of)
    assert not torch.equal(other.choices_TK, choices_TK), "layers have draws of their own"
    load = torch.bincount(choices_TK.flatten(), minlength=4) / choices_TK.numel()
    assert load.tolist() == pytest.approx([0.25] * 4, abs=0.02)
    real = watched(free)
    free(x)
    uneven = torch.bincount(real[0].scores.choices_TK.flatten(), minlength=4)
    assert uneven.max() > 1.3 * uneven.float().mean(), "real routing of this layer is not even"


def test_the_weights_are_the_routers_probabilities_and_carry_its_gradient() -> None:
    layer = layer_of(moe_config(moe_router_force_load_balancing=True, moe_aux_loss_coeff=0.0))
    seen = watched(layer)
    layer(tokens(1, 16, 2)).sum().backward()
    scores = seen[0].scores
    logits = scores.logits_TE
    expected = logits.softmax(1).gather(1, scores.choices_TK)
    assert torch.allclose(scores.weights_TK, expected, atol=1e-6)
    assert layer.router.weight.grad.abs().sum() > 0


def test_jitter_reaches_the_router_alone_and_in_training_alone() -> None:
    """All tokens are ones: the router's logits vary by the noise, and nothing else does."""
    eps = 0.01
    layer = layer_of(moe_config(moe_input_jitter_eps=eps))
    seen = watched(layer)
    received = []
    layer.experts.register_forward_pre_hook(lambda _, args: received.append(args[0].unique()))
    ones = torch.ones(256, 2, tokens(0).shape[2], dtype=tokens(0).dtype)
    layer(ones)
    layer.eval()(ones)
    trained, evaluated = (decision.scores.logits_TE for decision in seen)
    assert set(torch.cat(received).tolist()) <= {0.0, 1.0}
    # Not exactly 0 on every processor: a GEMM may add the products of its last rows differently.
    assert evaluated.std(0).max() < 1e-12
    # Uniform noise in [1 - eps, 1 + eps] has a standard deviation of eps / sqrt(3).
    spread = eps / 3**0.5 * layer.router.weight.norm(dim=1)
    assert torch.allclose(trained.std(0), spread.to(trained.dtype), rtol=0.15)
    bound = eps * layer.router.weight.abs().sum(1)
    assert ((trained - evaluated).abs().amax(0) <= bound * 1.0001).all()

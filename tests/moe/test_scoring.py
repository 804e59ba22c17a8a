"""Scores, choices and weights: Megatron-LM's meaning of its flags, by hand and by its own code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    group_limited_topk,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe.config import RunConfig
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.model.reference.routing import route
from megatron_moe.moe.scoring import ScoreRule, limited, score
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
from tests.moe.ranks import check_layout, context_of
from tests.support.pool import Pool

LN_2, LN_3 = 0.6931471805599453, 1.0986122886681098
EXPERTS = 8
AFTER: dict[str, Any] = {"moe_router_pre_softmax": False}
SIGMOID: dict[str, Any] = {"moe_router_score_function": "sigmoid"}
SCALED: dict[str, Any] = {"moe_router_topk_scaling_factor": 2.5}
GROUPS: dict[str, Any] = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
RULES: dict[str, dict[str, Any]] = {
    "before": {**SCALED},
    "after": AFTER,
    "sigmoid": {**SIGMOID, **SCALED},
    "one sigmoid": {**SIGMOID, "moe_router_topk": 1},
    "groups before": {**GROUPS, "moe_router_topk": 4},
    "groups after": {**GROUPS, **AFTER, "moe_router_topk": 4},
    "groups of sigmoids": {**GROUPS, **SIGMOID, "moe_router_group_topk": 1},
}


def rule_of(**settings: Any) -> ScoreRule:
    return ScoreRule.of(moe_config(num_experts=EXPERTS, **settings))


def random_logits(seed: int = 0, number: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, EXPERTS, generator=generator).mul_(2)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, [9 / 19, 6 / 19]),
        (AFTER, [3 / 5, 2 / 5]),
        (SIGMOID, [9 / 17, 8 / 17]),
        ({**SIGMOID, **SCALED}, [2.5 * 9 / 17, 2.5 * 8 / 17]),
    ],
)
def test_weights_by_hand(settings: dict[str, Any], weights: list[float]) -> None:
    """Softmax of (0, ln 3, -ln 3, ln 2): (3, 9, 1, 6) / 19; sigmoids: 1/2, 3/4, 1/4, 2/3."""
    layer = layer_of(moe_config(**settings))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = torch.tensor([0.0, LN_3, -LN_3, LN_2])
    seen = watched(layer)
    layer(torch.ones(2, 1, HIDDEN, dtype=DTYPE))
    scores = seen[0].scores
    assert scores.choices_TK.tolist() == [[1, 3]] * 2
    torch.testing.assert_close(scores.weights_TK, torch.tensor([weights] * 2).to(DTYPE))
    # What the losses read sums to 1 over all experts: sigmoids are 12/26, 18/26 ... of their sum.
    probs = torch.tensor([3 / 19, 9 / 19, 1 / 19, 6 / 19], dtype=DTYPE)
    if settings.get("moe_router_score_function") == "sigmoid":
        probs = torch.tensor([6 / 26, 9 / 26, 3 / 26, 8 / 26], dtype=DTYPE)
    torch.testing.assert_close(scores.probs_TE, probs.expand(2, -1))
    torch.testing.assert_close(scores.log_probs_TE, probs.log().expand(2, -1))
    log_z = torch.tensor(19 / 3, dtype=DTYPE).log()
    torch.testing.assert_close(scores.log_z_T, log_z.expand(2))


@pytest.mark.parametrize("name", RULES)
def test_it_is_megatron_cores_function(name: str) -> None:
    """Choices, weights and their gradients; and what its auxiliary losses read."""
    rule = rule_of(**RULES[name])
    logits, gain = random_logits().requires_grad_(), random_logits(1)
    theirs, map_TE = topk_routing_with_score_function(
        logits,
        rule.topk,
        use_pre_softmax=RULES[name].get("moe_router_pre_softmax") is not False,
        num_groups=rule.groups if rule.groups > 1 else None,
        group_topk=rule.group_topk if rule.groups > 1 else None,
        scaling_factor=rule.scale,
        score_function=rule.function,
    )
    (expected,) = torch.autograd.grad((theirs * gain).sum(), logits)
    scores = score(logits, rule)
    ours = torch.zeros_like(gain).scatter(1, scores.choices_TK, scores.weights_TK)
    (found,) = torch.autograd.grad((ours * gain).sum(), logits)
    assert torch.equal(torch.zeros_like(map_TE).scatter(1, scores.choices_TK, True), map_TE)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(found, expected)
    counted, probs = compute_routing_scores_for_aux_loss(logits, rule.topk, rule.function)
    torch.testing.assert_close(scores.probs_TE, probs)
    balance = scores.choices_TK if scores.balance_TK is None else scores.balance_TK
    assert torch.equal(torch.zeros_like(counted).scatter(1, balance, True), counted)
    if rule.groups > 1:
        assert not torch.equal(counted, map_TE), "groups leave something out"


def test_groups_by_hand_and_by_megatron_cores_function() -> None:
    """5 + 0 loses to 3 + 3 with two choices in a group; by the best alone it wins."""
    logits = torch.tensor([[5.0, 0.0, 3.0, 3.0]])
    rule = ScoreRule(topk=2, groups=2, group_topk=1)
    assert limited(logits, rule).tolist() == [[-torch.inf, -torch.inf, 3, 3]]
    rule = ScoreRule(topk=1, groups=2, group_topk=1)
    assert limited(logits, rule).tolist() == [[5, 0, -torch.inf, -torch.inf]]
    scores_TE = random_logits()
    for topk, groups, best in ((2, 4, 1), (4, 4, 2), (3, 4, 2), (4, 2, 1)):
        _, theirs = group_limited_topk(scores_TE, topk, len(scores_TE), EXPERTS, groups, best)
        rule = ScoreRule(topk=topk, groups=groups, group_topk=best)
        assert torch.equal(limited(scores_TE, rule).topk(topk).indices, theirs)
        assert len({int(e) // (EXPERTS // groups) for e in theirs[0]}) <= best


def check_against_megatron_core(
    rank: int, world_size: int, *, settings: dict[str, Any], kind: str
) -> None:
    """Megatron-Core's own router with the same weight: its losses, through the whole layer."""
    group = context_of(world_size, 1, 1, 1).pgs.tp
    groups = SimpleNamespace(tp=group, cp=group, tp_cp=group, tp_dp_cp=group)
    balance, z = 0.05, 0.02
    layer = layer_of(
        moe_config(
            num_experts=EXPERTS,
            moe_router_load_balancing_type=kind,
            moe_loss_convention="megatron",
            moe_aux_loss_coeff=balance,
            moe_z_loss_coeff=z,
            moe_expert_capacity_factor=None,
            **settings,
        )
    )
    rule = layer.router.rule
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=EXPERTS,
        moe_router_topk=rule.topk,
        moe_router_pre_softmax=settings.get("moe_router_pre_softmax", True),
        moe_router_score_function=rule.function,
        moe_router_topk_scaling_factor=rule.scale,
        moe_router_num_groups=settings.get("moe_router_num_groups"),
        moe_router_group_topk=settings.get("moe_router_group_topk"),
        moe_router_load_balancing_type=kind,
        moe_aux_loss_coeff=balance,
        moe_z_loss_coeff=z,
        moe_router_dtype="fp64",
        add_bias_linear=False,
        perform_initialization=False,
    )
    theirs = TopKRouter(config, pg_collection=groups).to(DTYPE)
    theirs.set_layer_number(1)
    theirs.weight.data.copy_(layer.router.weight.data)
    set_loss_scale(0.5)
    x, gain = tokens(1).requires_grad_(), tokens(2).view(-1, HIDDEN)[:, :EXPERTS]
    probs_TE, map_TE = theirs(x)
    (probs_TE * gain).sum().backward()
    expected = x.grad, theirs.weight.grad
    x.grad = None

    scores, _ = layer.router(x.view(-1, HIDDEN))
    plan = layer.dispatcher.plan(scores, x.shape[1], True, layer.experts)
    weights_TK, _ = layer.losses.attach(scores, plan)
    dense_TE = torch.zeros_like(gain).scatter(1, scores.choices_TK, weights_TK)
    (dense_TE * gain).sum().backward()
    assert torch.equal(dense_TE > 0, map_TE)
    # Megatron-Core's softmax and sigmoid are fp32, whatever their operands are.
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(dense_TE, probs_TE, **tolerance)
    torch.testing.assert_close((x.grad, layer.router.weight.grad), expected, **tolerance)
    assert float(expected[1].abs().max()) > 0.01


@pytest.mark.parametrize(
    ("name", "kind"),
    [("after", "aux_loss"), ("sigmoid", "seq_aux_loss"), ("groups of sigmoids", "aux_loss")],
)
def test_losses_and_gradients_are_those_of_megatron_cores_router(
    pool: Pool, name: str, kind: str
) -> None:
    pool.run(check_against_megatron_core, 1, settings=RULES[name], kind=kind)


LAYOUT_RULES: dict[str, dict[str, Any]] = {
    "after": {**AFTER, "moe_token_drop_policy": "probs"},
    "sigmoid": {**SIGMOID, "moe_token_drop_policy": "probs"},
    "groups": {
        "moe_router_num_groups": 2,
        "moe_router_group_topk": 1,
        "moe_router_load_balancing_type": "group_aux_loss",
        "moe_capacity_group_size": 4,
    },
}


@pytest.mark.parametrize("name", LAYOUT_RULES)
def test_the_layout_changes_nothing(pool: Pool, name: str) -> None:
    settings = LAYOUT_RULES[name]
    assert sum(pool.run(check_layout, 2, tp=2, ep=2, etp=1, settings=settings)) > 0


@pytest.mark.parametrize("name", [*LAYOUT_RULES, "groups after"])
def test_the_reference_layer_agrees(name: str) -> None:
    settings = LAYOUT_RULES.get(name) or {**LAYOUT_RULES["groups"], **AFTER}
    layer = layer_of(moe_config(**settings))
    set_loss_scale(1.0)
    x = tokens(4).requires_grad_()
    layer(x).square().sum().backward()
    y = tokens(4).transpose(0, 1).requires_grad_()
    reference = reference_of(layer)
    output, routing = reference(y, training_capacity=True)
    losses = layer.moe.moe_aux_loss_coeff * routing.balance_loss
    losses = (losses + layer.moe.moe_z_loss_coeff * routing.z_loss) / layer.num_moe_layers
    (output.square().sum() + losses).backward()
    torch.testing.assert_close(layer(x).transpose(0, 1), output)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.transpose(0, 1), y.grad)
    torch.testing.assert_close(layer.router.weight.grad, reference.router.weight.grad)


def test_the_reference_routes_by_hand() -> None:
    """Policy `probs` drops by the weights: expert 0 keeps 0.6 and has no slot for 0.55."""
    logits_TE = torch.tensor([[0.55, 0.45, 1e-9], [0.6, 0.4, 1e-9]]).log()
    moe = moe_config(
        **AFTER, num_experts=3, moe_expert_capacity_factor=1.5, moe_token_drop_policy="probs"
    )
    routing = route(logits_TE, 1, moe, 0, training_capacity=True)
    torch.testing.assert_close(routing.probs_TK, torch.tensor([[0.55, 0.45], [0.6, 0.4]]))
    assert routing.kept_TK.tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        # The weight would be 1 and its gradient 0; Megatron-Core rejects it as well.
        (
            {**AFTER, "moe_router_topk": 1},
            "--moe-router-topk must be >= 2 with --no-moe-rout",
        ),
        (
            {"moe_router_num_groups": 2},
            "--moe-router-group-topk must be given with --moe-rou",
        ),
        (
            {"moe_router_group_topk": 2},
            "--moe-router-num-groups must be given with --moe-rou",
        ),
        ({**GROUPS, "moe_router_num_groups": 3}, "must be a divisor of --num-experts .8."),
        (
            {**GROUPS, "moe_router_group_topk": 3},
            "--moe-router-group-topk must be <= --moe-rou",
        ),
        ({**GROUPS, "moe_router_topk": 5}, "--moe-router-topk must be <= the experts of"),
    ],
)
def test_what_does_not_fit_is_an_error(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        validate(RunConfig(moe=moe_config(num_experts=EXPERTS, **settings)))

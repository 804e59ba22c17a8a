"""Balance by a bias of each expert: both rules by hand, by Megatron-Core, and in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from megatron_moe.config import RunConfig
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.moe import MoELayer
from megatron_moe.moe.expert_bias import BINS, QuantileRule, SignRule, update_expert_biases
from megatron_moe.moe.scoring import ScoreRule, Scores, score
from tests.moe.cases import layer_of, moe_config, reference_of, tokens, watched
from tests.moe.ranks import check_layout, context_of
from tests.support.pool import Pool

SIGN: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.05,
}
QUANTILE: dict[str, Any] = {"moe_router_load_balancing_type": "quantile_balancing"}
RULES = {"sign": SIGN, "quantile": QUANTILE}


def bias_of(layer: MoELayer) -> Tensor:
    assert layer.router.expert_bias is not None
    return layer.router.expert_bias.weight


def scores_of(rows: list[list[float]], topk: int, bias: list[float] | None = None) -> Scores:
    """Of softmax scores that are given."""
    bias_E = None if bias is None else torch.tensor(bias)
    return score(torch.tensor(rows).log(), ScoreRule(topk=topk), bias_E)


def test_a_bias_counts_for_choices_alone() -> None:
    """0.5 and 0.3 are the best; a bias of 0.25 lifts the third expert over the second."""
    scores = scores_of([[0.5, 0.3, 0.2]], 2, [0.0, 0.0, 0.25])
    assert scores.choices_TK.tolist() == [[0, 2]]
    torch.testing.assert_close(scores.weights_TK, torch.tensor([[0.5, 0.2]]))
    assert scores.balance_TK is not None
    assert scores.balance_TK.tolist() == [[0, 1]], "the loss is of the scores themselves"


def test_the_sign_rule_by_hand_and_by_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    load_LE = torch.tensor([[4, 1, 1], [2, 2, 2]])
    bias_LE = torch.tensor([[0.0, 0.5, 0.0], [0.1, 0.2, 0.3]])
    moe = moe_config(num_experts=3, moe_router_bias_update_rate=0.01)
    found = SignRule(moe).updated(load_LE, bias_LE)
    torch.testing.assert_close(found, torch.tensor([[-0.01, 0.51, 0.01], [0.1, 0.2, 0.3]]))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    monkeypatch.setattr(parallel_state, "get_tensor_and_data_parallel_group", lambda **kwargs: None)
    generator = torch.Generator().manual_seed(0)
    load_LE = torch.randint(0, 50, (5, 3), generator=generator)
    bias_LE = torch.randn(5, 3, generator=generator)
    theirs = moe_utils.get_updated_expert_bias(load_LE.float(), bias_LE, 0.01)
    assert torch.equal(SignRule(moe).updated(load_LE, bias_LE), theirs)


def test_quantiles_by_hand() -> None:
    """Of 4 tokens, half must choose each of 2 experts.

    Their first scores are 0.9, 0.8, 0.7 and 0.4: with k = 1 the cutoff is the smaller score, and
    expert 0 is chosen if its bias exceeds -0.8, -0.6, -0.4 or 0 (the same score with the cutoff).
    Half of the tokens lie below -0.6, of which the bin ends at most 0.002 above, and for expert 1,
    with 0, 0, 0 and -0.2, the quantile is in the bin of 0.
    """
    moe = moe_config(num_experts=2, moe_router_topk=1, **QUANTILE)
    rule = QuantileRule(moe)
    zero_E = torch.zeros(2)
    scores = scores_of([[p, 1 - p] for p in (0.9, 0.8, 0.7, 0.4)], 1)
    counts_N = rule.count(scores, torch.zeros(0), zero_E, None)
    assert counts_N.view(2, BINS).sum(1).tolist() == [4, 4]
    bias_E = rule.updated(counts_N.unsqueeze(0), zero_E.unsqueeze(0))[0]
    expected = (-0.6 + 0.002 - (0.002 / 3)) / 2
    torch.testing.assert_close(bias_E, torch.tensor([expected, -expected]), rtol=0, atol=2e-3)
    assert abs(float(bias_E.sum())) < 1e-7
    kept = QuantileRule(moe_config(num_experts=2, moe_router_quantile_balancing_ema=0.75))
    old_E = torch.tensor([0.25, -0.25])
    smoothed = kept.updated(counts_N.unsqueeze(0), zero_E.unsqueeze(0) + old_E)
    plain = QuantileRule(moe_config(num_experts=2)).updated(counts_N.unsqueeze(0), old_E[None])
    torch.testing.assert_close(smoothed, 0.75 * old_E + 0.25 * plain)


@pytest.mark.parametrize("name", RULES)
def test_it_balances_unseen_tokens(name: str) -> None:
    """Loads of a router with a preference, before and after some steps."""
    layer = layer_of(moe_config(**RULES[name], moe_aux_loss_coeff=0.0, moe_z_loss_coeff=0.0))
    layer.dispatcher.moe = layer.moe
    seen = watched(layer)

    def violation() -> float:
        layer.eval()
        layer(tokens(99, sequence=500) + 0.5)
        layer.train()
        load = seen[-1].scores.choices_TK.flatten().bincount(minlength=4).double()
        return float(load.max() / load.mean())

    before = violation()
    assert before > 1.3
    for step in range(12):
        layer(tokens(step, sequence=500) + 0.5)
        update_expert_biases([layer], None)
    assert violation() < 1 + 0.35 * (before - 1)


@pytest.mark.parametrize("name", RULES)
def test_padding_does_not_count(name: str) -> None:
    """The bias of rows with padding is that of their text alone."""
    padding_SB, found = torch.zeros(12, 1, dtype=torch.bool), []
    padding_SB[5:] = True
    for length, pads in ((12, padding_SB), (5, None)):
        layer = layer_of(moe_config(**RULES[name]))
        layer(tokens(3, sequence=12, batch=1)[:length], pads)
        update_expert_biases([layer], None)
        found.append(bias_of(layer).clone())
    assert torch.equal(*found)
    assert found[0].any()


def test_what_counts_counts_once() -> None:
    """Not evaluation, not the first pass of a recomputed layer, not a step that was left out."""
    layer = layer_of(moe_config(**SIGN))
    bias = layer.router.expert_bias
    assert bias is not None and not bias_of(layer).requires_grad
    with torch.no_grad():
        layer(tokens(1))
    layer.eval()
    layer(tokens(1))
    assert bias.counts_N is None
    layer.train()
    layer(tokens(1))
    layer(tokens(2))
    assert bias.counts_N is not None and int(bias.counts_N.sum()) == 2 * 24 * 2
    update_expert_biases([layer], None, apply=False)
    assert bias.counts_N is None and not bias_of(layer).any()
    layer(tokens(1))
    update_expert_biases([layer], None, fixed=[bias.weight])
    assert bias.counts_N is None and not bias_of(layer).any()
    layer(tokens(1))
    update_expert_biases([layer], None)
    assert set(bias_of(layer).abs().tolist()) <= {0.0, float(torch.tensor(0.05))}
    assert bias_of(layer).any()


@pytest.mark.parametrize("name", RULES)
def test_the_reference_layer_agrees(name: str) -> None:
    layer = layer_of(moe_config(**RULES[name]))
    with torch.no_grad():
        bias_of(layer).copy_(torch.tensor([0.3, -0.2, 0.0, -0.1]))
    reference = reference_of(layer)
    with torch.no_grad():
        reference.bias_E.copy_(bias_of(layer))
    output, routing = reference(tokens(4).transpose(0, 1), training_capacity=True)
    torch.testing.assert_close(layer(tokens(4)).transpose(0, 1), output)
    plain = layer_of(moe_config(**RULES[name]))
    assert not torch.allclose(plain(tokens(4)).transpose(0, 1), output), "the bias counts"
    assert (float(routing.balance_loss.detach()) == 0) == (name == "quantile")


def check_updates(
    rank: int, world_size: int, *, tp: int, ep: int, settings: dict[str, Any]
) -> list[float]:
    """Three steps of two micro-batches: equal on every rank, and to one process with all tokens."""
    ctx = context_of(world_size, tp, ep, 1)
    layer = layer_of(moe_config(**settings), pgs=ctx.pgs, sequence_parallel=tp > 1)
    whole = layer_of(moe_config(**settings))
    with torch.no_grad():
        layer.router.weight.copy_(whole.router.weight)
    for step in range(3):
        for micro_batch in range(2):
            first = 10 * step + 5 * micro_batch
            for replica in range(ctx.layout.dp):
                whole(tokens(first + replica))
            layer(tokens(first + ctx.dp_rank).chunk(tp)[ctx.tp_rank])
        for one, pgs in ((layer, ctx.pgs), (whole, None)):
            update_expert_biases([one], pgs)
        assert torch.equal(bias_of(layer), bias_of(whole))
    return bias_of(layer).tolist()


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("name", RULES)
def test_biases_are_equal_on_every_rank_and_layout(pool: Pool, name: str, tp: int, ep: int) -> None:
    found = pool.run(check_updates, 2, tp=tp, ep=ep, settings=RULES[name])
    assert found[0] == found[1] and any(found[0])


def test_the_layout_changes_nothing(pool: Pool) -> None:
    assert sum(pool.run(check_layout, 2, tp=2, ep=2, etp=1, settings=SIGN)) > 0


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"moe_router_enable_expert_bias": True}, "--moe-router-enable-expert-bias must be unset"),
        ({"moe_router_num_groups": 2, "moe_router_group_topk": 1}, "--moe-router-num-groups must"),
        ({"moe_router_topk": 4}, "--moe-router-topk must be < --num-experts .4. with --moe-router"),
    ],
)
def test_what_quantiles_do_not_fit_is_an_error(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        validate(RunConfig(moe=moe_config(**QUANTILE, **settings)))

"""Pools of experts for documents: by hand, their draws, and what they leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_moe.config import RunConfig
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.moe import collect_statistics
from megatron_moe.moe.document_pools import pool_sizes, restricted
from megatron_moe.moe.dropping import Draw
from megatron_moe.moe.observing import begin_step
from megatron_moe.moe.scoring import ScoreRule, score
from tests.moe.cases import BATCH, SEQUENCE, layer_of, moe_config, tokens, watched

POOLS: dict[str, Any] = {"moe_router_document_pool": (2, 3)}


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_pools_by_hand(function: str) -> None:
    """Two documents of two tokens in one row, and pools of two experts of three.

    Document 0 has sums (.6, .5, .9) of scores, so its pool are experts 0 and 2, although its second
    token prefers 1 to 0. Document 1 has (.5, 1.1, .4) and the pool 0 and 1.
    """
    rows = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.3, 0.6], [0.3, 0.6, 0.1], [0.2, 0.5, 0.3]])
    rows = rows.double()
    logits = rows.log() if function == "softmax" else rows.logit()
    rule = ScoreRule(function=function, topk=1)  # type: ignore[arg-type]
    scores = restricted(
        score(logits.requires_grad_(), rule),
        rule,
        torch.tensor([0, 0, 1, 1]),
        rows=1,
        sizes=(2, 2),
        draw=Draw(),
    )
    pools = [{0, 2}, {0, 2}, {0, 1}, {0, 1}]
    for probs, raw, pool in zip(scores.probs_TE, rows, pools, strict=True):
        inside = torch.tensor([expert in pool for expert in range(3)])
        assert (probs > 0).tolist() == inside.tolist()
        torch.testing.assert_close(probs, raw * inside / (raw * inside).sum())
    assert scores.choices_TK.flatten().tolist() == [0, 2, 1, 1]
    if function == "softmax":
        shares = [0.8, 0.7, 0.9, 0.7]
        torch.testing.assert_close(scores.log_z_T, torch.tensor(shares).double().log())


def test_sizes_are_drawn_evenly_and_again_the_same() -> None:
    draw = Draw(layer=1, seed=7, step=3)
    sizes = pool_sizes(3000, (2, 4), draw, torch.device("cpu"))
    counts = sizes.bincount(minlength=5).tolist()
    assert counts[:2] == [0, 0] and all(900 < count < 1100 for count in counts[2:])
    assert torch.equal(sizes, pool_sizes(3000, (2, 4), draw, torch.device("cpu")))
    other = pool_sizes(3000, (2, 4), Draw(layer=1, seed=7, step=4), torch.device("cpu"))
    assert not torch.equal(sizes, other)


def test_a_row_uses_no_more_experts_than_its_pool_and_evaluation_uses_all() -> None:
    layer = layer_of(moe_config(**{**POOLS, "moe_router_document_pool": (2, 2)}))
    begin_step([layer], seed=1, step=1)
    seen = watched(layer)
    layer(tokens(3))
    choices = seen[0].scores.choices_TK.view(SEQUENCE, BATCH, -1)
    assert all(len(choices[:, row].unique()) == 2 for row in range(BATCH))
    statistics = collect_statistics([layer], None)[3]
    assert 0 < statistics.router_entropy < 1.4, "zero probabilities are no NaN"
    layer.eval()
    layer(tokens(3))
    assert len(seen[1].scores.choices_TK.unique()) == 4


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"moe_router_document_pool": (1, 3)}, "must be two sizes from --moe-router-topk .2. to"),
        ({"moe_router_document_pool": (3, 2)}, "must be two sizes"),
        ({**POOLS, "moe_z_loss_over": "chosen"}, "must be unset with --moe-z-loss-over chosen"),
        ({**POOLS, "moe_router_type": "token_hash"}, "must be unset with --moe-router-type token"),
    ],
)
def test_what_does_not_fit_is_an_error(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError, match=f"--moe-router-document-pool {error}"):
        validate(RunConfig(moe=moe_config(**settings)))

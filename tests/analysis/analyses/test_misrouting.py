"""Exchanges of an expert for the last token of a window, against passes forced by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.analysis.analyses import misrouting
from megatron_moe.analysis.analyses.misrouting import Misrouting, ranked_others, windows_of
from megatron_moe.analysis.family import all_families
from megatron_moe.analysis.model import MoEModel
from megatron_moe.analysis.observation import LayerRouting, TokenBatch
from megatron_moe.errors import UsageError
from tests.analysis.expert_cases import planted, result_of, setting_of, texts
from tests.analysis.families import SETTINGS


def _alone(batch: TokenBatch, row: int) -> TokenBatch:
    at = slice(row, row + 1)
    return TokenBatch(
        tokens_BS=batch.tokens_BS[at],
        next_BS=batch.next_BS[at],
        documents_BS=batch.documents_BS[at],
        domain=0,
        number=0,
    )


def _ranked(model: MoEModel, record: LayerRouting, token: int, groups: int) -> list[int]:
    """Experts that a token did not choose: those of its best two groups, then others by score."""
    bias = model.weights(record.layer).bias
    scores = record.router_probs_TE[token].double().numpy()
    ranked = scores + (0 if bias is None else bias.whole().double().numpy())
    size = len(scores) // groups
    parts = np.sort(ranked.reshape(groups, size), axis=1)
    worth = parts[:, -1] if bias is None else parts[:, -2:].sum(1)
    kept = set(np.argsort(-worth)[:2].tolist())
    rest = set(range(len(scores))) - set(record.ids_TK[token].tolist())
    able = sorted((e for e in rest if e // size in kept), key=lambda e: -ranked[e])
    unable = sorted((e for e in rest if e // size not in kept), key=lambda e: -scores[e])
    return [*able, *unable]


@pytest.mark.parametrize("kind", all_families())
def test_shares_are_those_of_single_windows(tmp_path: Path, kind: str) -> None:
    model, sample = planted(tmp_path, kind), texts(tmp_path, rows=5, batch_size=2)
    found = result_of(Misrouting(), model, sample, tmp_path)
    runner, batch, topk = model.load("cpu", torch.float32), windows_of(sample), model.sizes.topk
    assert len(batch.tokens_BS) == 10
    others = min(topk, model.sizes.num_experts - topk)
    for place, layer in enumerate(found.arrays["layers"]):
        better, improved, changes = [], [], []
        for row in range(10):
            one = _alone(batch, row)
            plain = runner.run(one, predictions=True)
            record = plain.layers[model.sizes.moe_layers.index(layer)]
            rest = _ranked(model, record, -1, SETTINGS[kind].get("n_group", 1))
            gains = []
            for expert in rest[:others][:4]:
                changed = record.ids_TK.clone()
                changed[-1, -1] = expert
                with runner.forced(int(layer), changed, record.weights_TK):
                    loss = runner.run(one, predictions=True).loss_T
                gains.append(float(plain.loss_T[-1] - loss[-1]))  # type: ignore[index]
            lower = [0.5 if abs(g) <= misrouting.NO_CHANGE else float(g > 0) for g in gains]
            better += lower
            improved.append(1 - math.prod(1 - each for each in lower))
            changes += [-gain for gain in gains]
        assert found.arrays["better_L"][place] == pytest.approx(np.mean(better))
        assert found.arrays["any_better_L"][place] == pytest.approx(np.mean(improved))
        assert found.arrays["mean_loss_change_L"][place] == pytest.approx(
            np.mean(changes), abs=1e-4
        )


def test_a_better_expert_next_in_rank_is_found(tmp_path: Path) -> None:
    """Expert 1 always comes second and alone knows what the next token is."""

    def plant(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.router.weight.zero_()
            layer.mlp.router.bias.copy_(torch.tensor([9.0, 8.0, 1, 1, 1, 1]))
            layer.mlp.experts.down_proj.zero_()
            layer.mlp.experts.down_proj_bias.zero_()
        model.model.layers[2].mlp.experts.down_proj_bias[1, 4] = 500
        model.model.norm.weight.fill_(1)
        model.lm_head.weight.mul_(0.1)
        model.lm_head.weight[:, 4] = 0
        model.lm_head.weight[9, 4] = 3

    model = planted(tmp_path, "gpt_oss", plant, num_experts_per_tok=1)
    from tests.analysis.planted import sample_of

    sample = sample_of(tmp_path, {"nines": [[9] * 12] * 12}, seq_length=12, vocab_size=300)
    found = result_of(Misrouting(), model, sample, tmp_path)
    assert found.arrays["better_L"][2] == 1
    assert found.arrays["any_better_L"][2] == 1
    # Experts behind rank 2k add nothing, as expert 0 does.
    assert found.arrays["better_random_L"][2] == 0.5
    assert found.arrays["mean_loss_change_L"][2] < -1


def test_dropped_choices_are_not_exchanged(tmp_path: Path) -> None:
    model, sample = planted(tmp_path, "native"), texts(tmp_path, rows=10, batch_size=4)
    runner = model.load("cpu", torch.float32)
    batch = windows_of(sample)
    record = runner.run(batch).layers[0]
    kept_BK = record.kept_TK[11::12]
    assert not bool(kept_BK.any(1).all())
    found = result_of(Misrouting(), model, sample, tmp_path)
    each = misrouting._exchanges(runner, batch, 1, setting_of(model, sample))
    assert np.isnan(each.gain_JB).any(0).tolist() == (~kept_BK.any(1)).tolist()
    assert (each.gain_JB[:, kept_BK.any(1).numpy()] != 0).all()
    assert 0 <= found.arrays["better_L"][0] <= 1


def test_windows_are_spread_and_others_are_ranked(tmp_path: Path) -> None:
    sample = texts(tmp_path, rows=100, length=80, batch_size=7)
    batch = windows_of(sample)
    assert batch.tokens_BS.shape == (32, 64)
    rows = np.concatenate([each.tokens_BS for each in sample.batches()])
    assert np.array_equal(batch.tokens_BS, rows[np.arange(32) * 200 // 32, :64])
    (tmp_path / "other").mkdir()
    model = planted(tmp_path, "olmoe")
    with pytest.raises(UsageError, match=r"rows of --data must be >= 8"):
        Misrouting().check(setting_of(model, texts(tmp_path / "other", rows=3)))
    runner = model.load("cpu", torch.float32)
    record = runner.run(_alone(batch, 0)).layers[0]
    order = ranked_others(runner, record, torch.tensor([5]))[0].tolist()
    scores = record.router_probs_TE[5]
    assert sorted([*order, *record.ids_TK[5].tolist()]) == list(range(6))
    assert scores[order].tolist() == sorted(scores[order].tolist(), reverse=True)


@pytest.mark.parametrize(
    ("kind", "groups"), [("deepseek_v2", 4), ("deepseek_v3", 4), ("glm4_moe", 4), ("minimax_m2", 1)]
)
def test_others_are_ranked_as_the_router_ranks(tmp_path: Path, kind: str, groups: int) -> None:
    """By score plus bias; experts of the two groups of four that were not kept come last."""
    model = planted(tmp_path, kind)
    runner = model.load("cpu", torch.float32)
    seen = runner.run(windows_of(texts(tmp_path, rows=6)))
    differ = 0
    for record in seen.layers:
        orders = ranked_others(runner, record, torch.arange(len(record.ids_TK)))
        for token, order in enumerate(orders.tolist()):
            assert order == _ranked(model, record, token, groups)
            scores = record.router_probs_TE[token].tolist()
            differ += order != sorted(order, key=lambda e: -scores[e])
    assert differ > 10  # the order of the scores is another one


def test_exchanges_of_identical_experts_change_nothing(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        for layer in model.model.layers:
            for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                stack.copy_(stack[:1].expand_as(stack).clone())

    model, sample = planted(tmp_path, "olmoe", plant), texts(tmp_path, rows=6)
    found = result_of(Misrouting(), model, sample, tmp_path)
    tried = found.numbers["experts tried for a token"]
    assert found.arrays["better_L"].tolist() == [0.5] * 3
    assert found.arrays["low_L"].tolist() == found.arrays["high_L"].tolist() == [0.5] * 3
    assert found.arrays["any_better_L"].tolist() == pytest.approx([1 - 0.5**tried] * 3)
    assert found.numbers["exchanges that do not change the loss"] == 1
    said = Misrouting().reading({"a": found})
    assert said.startswith("100% of the exchanges") and "do not change the loss" in said


def test_an_unchanged_loss_counts_as_one_half() -> None:
    gain_JB = np.array([[0.1, 0.0, -0.1, 0.0], [-0.1, 5e-6, -0.2, 0.3]])
    assert misrouting.lowered(gain_JB).tolist() == [[1, 0.5, 0, 0.5], [0, 0.5, 0, 1]]
    assert misrouting._any(gain_JB) == (1 + 0.75 + 0 + 1) / 4


def test_the_interval_is_that_of_tokens() -> None:
    """Four exchanges of a token agree, so that they are no more than one: 50 coins, not 200."""
    coin_B = np.random.default_rng(0).integers(2, size=50) - 0.5
    low, high = misrouting._interval(np.tile(coin_B, (4, 1)), 2000, 1)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 50), rel=0.15)


def test_tried_experts_are_spread_over_the_ranks() -> None:
    assert misrouting._places(8, 4) == [0, 2, 4, 6]
    assert misrouting._places(3, 4) == [0, 1, 2]
    assert misrouting._places(6, 4) == [0, 1, 3, 4]

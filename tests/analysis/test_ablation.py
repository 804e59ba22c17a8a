"""Losses without experts, against plain passes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megatron_moe.analysis.ablation import (
    ALL,
    DomainLoss,
    change_of,
    evaluate,
    evaluate_without,
    loss_table,
    parse_experts,
    part_of,
)
from megatron_moe.errors import UsageError
from tests.analysis.expert_cases import planted, texts
from tests.analysis.families import make


@torch.no_grad()
def test_losses_by_domain_are_those_of_the_class(tmp_path: Path) -> None:
    model, sample = planted(tmp_path, "mixtral"), texts(tmp_path, rows=5, batch_size=2)
    runner, module = model.load("cpu", torch.float32), make("mixtral")
    found = evaluate(runner, sample)
    assert list(found) == ["d0", "d1", ALL]
    rows: dict[int, list[float]] = {0: [], 1: []}
    for batch in sample.batches():
        logits = module(torch.from_numpy(batch.tokens_BS), use_cache=False).logits
        for row, labels in zip(logits, torch.from_numpy(batch.next_BS), strict=True):
            rows[batch.domain].append(float(F.cross_entropy(row, labels)))
    for domain in (0, 1):
        assert found[f"d{domain}"].rows_R.tolist() == pytest.approx(rows[domain], rel=1e-4)
        assert found[f"d{domain}"].tokens == 5 * 12
    assert found[ALL].loss == pytest.approx(np.mean(rows[0] + rows[1]), rel=1e-4)
    assert found[ALL].perplexity == pytest.approx(math.exp(found[ALL].loss))


@pytest.mark.parametrize("kind", ["mixtral", "native"])
def test_without_experts(tmp_path: Path, kind: str) -> None:
    model, sample = planted(tmp_path, kind), texts(tmp_path, rows=4)
    runner, layer = model.load("cpu", torch.float32), model.sizes.moe_layers[-1]
    whole = evaluate(runner, sample)
    same = evaluate_without(runner, sample, {})
    for name, each in whole.items():
        assert np.array_equal(same[name].rows_R, each.rows_R)
    for expert in range(model.sizes.num_experts):
        without = evaluate_without(runner, sample, {layer: [expert]})
        with runner.without({layer: [expert]}):
            assert np.array_equal(evaluate(runner, sample)[ALL].rows_R, without[ALL].rows_R)
        assert not np.array_equal(without[ALL].rows_R, whole[ALL].rows_R)
    with pytest.raises(UsageError, match="expert to leave out"):
        evaluate_without(runner, sample, {layer: [99]})


def test_a_loss_beyond_numbers_has_infinite_perplexity() -> None:
    assert DomainLoss(tokens=1, rows_R=np.array([800.0])).perplexity == math.inf


def test_change_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    whole = rng.normal(4, 1, 50)
    change, low, high = change_of(whole, whole + 0.3, 100, 1)
    assert (change, low, high) == pytest.approx((0.3, 0.3, 0.3))  # rows are paired
    noisy = whole + rng.normal(0.3, 0.2, 50)
    change, low, high = change_of(whole, noisy, 2000, 1)
    error = np.std(noisy - whole) / math.sqrt(50)
    assert change == pytest.approx(np.mean(noisy - whole))
    assert low == pytest.approx(change - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(change + 1.96 * error, abs=0.2 * error)
    assert math.isnan(change_of(whole[:1], noisy[:1], 100, 1)[1])


def test_part_of_a_sample_is_spread(tmp_path: Path) -> None:
    sample = texts(tmp_path, rows=10)
    part = part_of(sample, 2 * 12 * 4)
    for domain, whole in zip(part.domains, sample.domains, strict=True):
        assert domain.starts.tolist() == whole.starts[[0, 2, 5, 7]].tolist()
    assert part_of(sample, 10**9).tokens == sample.tokens
    assert part_of(sample, 1).tokens == 2 * 12
    short = part_of(sample, 2 * 5 * 4, 5)
    assert [len(domain.starts) for domain in short.domains] == [4, 4]
    assert (short.seq_length, short.tokens) == (5, 40)
    rows = np.concatenate([batch.tokens_BS for batch in short.batches()])
    whole = np.concatenate([batch.tokens_BS for batch in part.batches()])
    assert np.array_equal(rows, whole[:, :5])


def test_words_of_a_command_line(tmp_path: Path) -> None:
    sizes = planted(tmp_path, "olmoe").sizes
    assert parse_experts(["2:5,1", "0:3", "2:1"], sizes) == {2: [1, 5], 0: [3]}
    assert parse_experts([], sizes) == {}
    for word in ("2", "2:", "a:1", "2:-1", ":1", "2:1,", "2:1:3", "2:²", "9" * 5000 + ":1"):
        with pytest.raises(UsageError, match="--ablate must be LAYER:EXPERT"):
            parse_experts([word], sizes)
    with pytest.raises(UsageError, match=r"must be an MoE layer: 0, 1, 2 \(got 7\)"):
        parse_experts(["7:1"], sizes)
    with pytest.raises(UsageError, match=r"at most 3, .* \(got 4\)"):
        parse_experts(["1:0,1,2,3"], sizes)


def _without_expert_1(_: Any, given: tuple[Any, ...], result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of Mixtral's router: softmax without one expert, best K divided by their sum."""
    logits = result[0].clone()
    logits[:, 1] = -math.inf
    best = logits.softmax(-1).topk(result[1].shape[1])
    return logits, best.values / best.values.sum(-1, keepdim=True), best.indices


@torch.no_grad()
def test_the_table_has_losses_and_perplexities_of_each_domain(tmp_path: Path) -> None:
    """Against the class's own logits, and against those with the expert's logit at -inf."""
    model, sample = planted(tmp_path, "mixtral"), texts(tmp_path, rows=5, batch_size=2)
    runner, module = model.load("cpu", torch.float32), make("mixtral")
    layer = model.sizes.moe_layers[-1]
    found = loss_table(runner, sample, {layer: [1]}, 50, 1).columns
    assert found["domain"] == ["d0", "d1", ALL]
    for column in ("", "_without"):
        losses: dict[str, list[float]] = {"d0": [], "d1": []}
        for batch in sample.batches():
            logits = module(torch.from_numpy(batch.tokens_BS), use_cache=False).logits
            labels = torch.from_numpy(batch.next_BS).flatten()
            each = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
            losses[f"d{batch.domain}"] += each.tolist()
        losses[ALL] = losses["d0"] + losses["d1"]
        for place, name in enumerate(found["domain"]):
            mean = float(np.mean(losses[name]))
            assert found["tokens"][place] == len(losses[name])
            assert found[f"loss{column}"][place] == pytest.approx(mean, rel=1e-4)
            perplexity = found[f"perplexity{column}"][place]
            assert perplexity == pytest.approx(math.exp(mean), rel=1e-3)
        # From here on the expert's logit is -inf, by the test's own hand.
        module.model.layers[layer].mlp.gate.register_forward_hook(_without_expert_1)
    for place in range(3):
        ratio = found["perplexity_without"][place] / found["perplexity"][place]
        assert math.log(ratio) == pytest.approx(found["change"][place])

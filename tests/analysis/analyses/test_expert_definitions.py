"""Each definition of the analyses of experts, on a random model of every family.

The numbers that a report shows are worked out here from inputs, scores and choices of a plain pass
and from the weights in the files, token by token in fp64.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from megatron_moe.analysis.analyses.neuron_activity import NeuronActivity
from megatron_moe.analysis.analyses.output_norms import OutputNorms
from megatron_moe.analysis.analyses.output_similarity import OutputSimilarity
from megatron_moe.analysis.analyses.super_experts import SuperExperts
from megatron_moe.analysis.base import Material
from megatron_moe.analysis.collectors.expert_passes import chosen_tokens
from megatron_moe.analysis.model import MoEModel
from megatron_moe.analysis.result import Result
from megatron_moe.analysis.sample import Sample
from tests.analysis.expert_cases import (
    KINDS,
    SEED,
    Matrices,
    by_loops,
    passed,
    planted,
    setting_of,
    texts,
)


class _Token:
    """One token that goes through all experts of a layer.

    Attributes:
        sampled, short: whether it belongs to the sampled tokens, and to the short text.
        domain, id, position: where it is.
        scores_E: of the router.
        kept: experts that it chose and that kept it.
        activation_EF, inner_EF, output_EH: what each expert makes of it.
    """

    def __init__(self, record: Any, place: int, experts: Any, **where: Any) -> None:
        self.__dict__.update(where)
        x = record.inputs_NH[place].double().numpy()
        made = [by_loops(expert, x) for expert in experts]
        self.activation_EF, self.inner_EF, self.output_EH = (
            np.array([one[part] for one in made]) for part in range(3)
        )
        self.scores_E = record.router_probs_TE[place].double().numpy()
        pairs = zip(record.ids_TK[place].tolist(), record.kept_TK[place].tolist(), strict=True)
        self.kept = {expert for expert, kept in pairs if kept}


def _tokens(model: MoEModel, sample: Sample) -> list[list[Any]]:
    """The tokens that go through all experts, for each layer."""
    runner, layers = model.load("cpu", torch.float32), model.sizes.moe_layers
    chosen = chosen_tokens(sample, SEED)
    weights = [[Matrices(e) for e in model.weights(layer).experts] for layer in layers]
    found: list[list[Any]] = [[] for _ in layers]
    rows = [0] * len(sample.domains)
    for batch in sample.batches():
        seen = runner.run(batch, inputs=layers)
        for row, ids in enumerate(batch.tokens_BS.tolist()):
            each = chosen.get((batch.domain, rows[batch.domain]))
            rows[batch.domain] += 1
            if each is None:
                continue
            for n, position in enumerate(each.positions_N.tolist()):
                where = {"domain": batch.domain, "id": ids[position], "position": position}
                where |= {"sampled": bool(each.sampled_N[n]), "short": bool(each.short_N[n])}
                for layer, record in enumerate(seen.layers):
                    place = row * len(ids) + position
                    found[layer].append(_Token(record, place, weights[layer], **where))
    return found


def _similarity(token: Any) -> float:
    """Mean over pairs of experts."""
    outputs, values = token.output_EH, []
    for i, one in enumerate(outputs):
        for j, other in enumerate(outputs):
            if i != j:
                cosine = float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))
                values.append(1 - math.acos(cosine) / math.pi)
    return float(np.mean(values))


def _best(values: Any, count: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda e: -values[e])[:count])


def _check_similarity(result: Result, layers: list[list[Any]]) -> None:
    for at, tokens in enumerate(layers):
        long = [_similarity(token) for token in tokens if token.sampled]
        assert result.arrays["mean_L"][at] == pytest.approx(np.mean(long), abs=1e-5)
        short = [
            np.mean([_similarity(t) for t in tokens if t.short and t.domain == domain])
            for domain in (0, 1)
        ]
        assert result.arrays["short_mean_L"][at] == pytest.approx(np.mean(short), abs=1e-5)


def _check_norms(result: Result, layers: list[list[Any]], topk: int) -> None:
    for at, tokens in enumerate(layers):
        sampled = [token for token in tokens if token.sampled]
        norms = [[math.sqrt(float(o @ o)) for o in token.output_EH] for token in sampled]
        pairs = list(zip([token.scores_E for token in sampled], norms, strict=True))
        own = [stats.spearmanr(score, norm).statistic for score, norm in pairs]
        assert result.arrays["spearman_L"][at] == pytest.approx(np.mean(own), abs=1e-9)
        shared = [len(_best(score, topk) & _best(norm, topk)) / topk for score, norm in pairs]
        assert result.arrays["overlap_L"][at] == pytest.approx(np.mean(shared))
        assert result.arrays["equal_L"][at] == pytest.approx(np.mean(np.array(shared) == 1))
        of_chosen = [
            norm[e] for norm, token in zip(norms, sampled, strict=True) for e in token.kept
        ]
        expected = np.mean(of_chosen) / np.mean(norms)
        assert result.arrays["chosen_norm_L"][at] == pytest.approx(expected, rel=1e-4)


def _check_neurons(result: Result, layers: list[list[Any]]) -> None:
    for at, tokens in enumerate(layers):
        active = np.array([abs(t.activation_EF) > 0.001 for t in tokens if t.sampled])
        inner_EF = np.mean([abs(t.inner_EF) for t in tokens if t.sampled], axis=0)
        np.testing.assert_allclose(result.arrays["active_LEF"][at], active.mean(0), rtol=1e-6)
        np.testing.assert_allclose(result.arrays["inner_LEF"][at], inner_EF, rtol=1e-4)
        assert result.arrays["dead_L"][at] == pytest.approx(1 - active.any(0).mean())
        assert result.arrays["always_L"][at] == pytest.approx(active.all(0).mean())
        tenth = max(1, round(inner_EF.shape[1] / 10))
        held = [sum(sorted(row)[-tenth:]) / sum(row) for row in inner_EF.tolist()]
        assert result.arrays["largest_L"][at] == pytest.approx(np.mean(held), rel=1e-4)


def _check_largest(result: Result, layers: list[list[Any]]) -> None:
    table = next(table for table in result.tables if table.name == "activations").columns
    cells = iter(
        zip(*(table[n] for n in ("dimension", "token", "position", "largest_inner")), strict=True)
    )
    for at, tokens in enumerate(layers):
        largest = []
        for expert in range(len(tokens[0].output_EH)):
            cell, own = next(cells), [token for token in tokens if expert in token.kept]
            if not own:
                assert np.isnan(result.arrays["output_LE"][at, expert])
                assert cell[:3] == (-1, -1, -1)
                continue
            best = max(own, key=lambda t, e=expert: float(abs(t.output_EH[e]).max()))
            size_H = abs(best.output_EH[expert])
            assert cell[:3] == (int(size_H.argmax()), best.id, best.position)
            inner = max(float(abs(token.inner_EF[expert]).max()) for token in own)
            assert cell[3] == pytest.approx(inner, rel=1e-4)
            largest.append(float(size_H.max()))
            found = result.arrays["output_LE"][at, expert]
            assert found == pytest.approx(largest[-1], rel=1e-4)
            assert np.isfinite(result.arrays["ratio_LE"][at, expert])
        ratio_E = result.arrays["ratio_LE"][at]
        expected = [value / float(np.median(largest)) for value in largest]
        assert ratio_E[np.isfinite(ratio_E)].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_a_report_from_weights_and_inputs(tmp_path: Path, kind: str) -> None:
    model, sample = planted(tmp_path, kind), texts(tmp_path, rows=5, length=8, batch_size=2)
    collected, runner = passed(model, sample, ["expert_passes"], tmp_path)
    material = Material(
        model=model,
        setting=setting_of(model, sample),
        collected=collected,
        runner=runner,
        draws=10,
    )
    layers = _tokens(model, sample)
    assert len(layers) == len(model.sizes.moe_layers)
    _check_similarity(OutputSimilarity().compute(material), layers)
    _check_norms(OutputNorms().compute(material), layers, model.sizes.topk)
    _check_neurons(NeuronActivity().compute(material), layers)
    _check_largest(SuperExperts().compute(material), layers)

"""Each definition of the analyses of routing, on a random model of every family.

A plain pass gives the choices of each token (that they are the family's is the subject of
`tests/analysis/test_foreign_routing.py`); what a report shows is worked out here from that list,
one token at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe.analysis.base import Material, all_analyses
from megatron_moe.analysis.model import MoEModel
from megatron_moe.analysis.result import Result
from megatron_moe.analysis.sample import Sample
from tests.analysis.expert_cases import KINDS, passed, planted, setting_of
from tests.analysis.planted import sample_of

KEYS = (
    *("domains", "vocabulary", "context", "tokens", "positions", "drops", "coactivation", "flow"),
    *("predictability", "locality", "committee", "collapse", "saturation", "early_routing"),
)
LENGTH, FEW = 12, 10


@dataclass(frozen=True)
class _Token:
    """Where a token is, what it is, and what it chose in each layer."""

    domain: int
    row: int
    position: int
    id: int
    next: int
    predicted: int
    experts_LK: list[list[int]]
    kept_LK: list[list[bool]]
    scores_LE: list[list[float]]


def _sample(folder: Path) -> Sample:
    """Few ids, so that each is frequent; each domain is one document."""
    (folder / "data").mkdir()
    ids = np.random.default_rng(8).integers(3, 3 + FEW, size=(2, 20 * LENGTH + 1))
    named = {f"d{i}": [each.tolist()] for i, each in enumerate(ids)}
    return sample_of(folder / "data", named, seq_length=LENGTH, vocab_size=300, batch_size=4)


def _tokens(model: MoEModel, sample: Sample) -> list[_Token]:
    runner, found, row = model.load("cpu", torch.float32), [], 0
    for batch in sample.batches():
        seen = runner.run(batch, predictions=True)
        assert seen.predicted_T is not None
        for t in range(batch.size):
            found.append(
                _Token(
                    domain=batch.domain,
                    row=row + t // LENGTH,
                    position=t % LENGTH,
                    id=int(batch.tokens_BS.ravel()[t]),
                    next=int(batch.next_BS.ravel()[t]),
                    predicted=int(seen.predicted_T[t]),
                    experts_LK=[layer.ids_TK[t].tolist() for layer in seen.layers],
                    kept_LK=[layer.kept_TK[t].tolist() for layer in seen.layers],
                    scores_LE=[layer.router_probs_TE[t].tolist() for layer in seen.layers],
                )
            )
        row += len(batch.tokens_BS)
    return found


def _share(tokens: Sequence[_Token], layer: int, experts: int, first: bool = False) -> list[float]:
    """Share of tokens that choose each expert."""
    chosen = [token.experts_LK[layer][: 1 if first else None] for token in tokens]
    return [sum(e in each for each in chosen) / len(tokens) for e in range(experts)]


def _entropy(counts: Sequence[float]) -> float:
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts if n)


def _of(tokens: Sequence[_Token], **values: int) -> list[_Token]:
    return [t for t in tokens if all(getattr(t, name) == v for name, v in values.items())]


class _Check:
    """Numbers of each analysis by its key, for one layer."""

    def __init__(self, tokens: list[_Token], layer: int, model: MoEModel) -> None:
        self.tokens, self.layer = tokens, layer
        self.experts, self.topk = model.sizes.num_experts, model.sizes.topk
        self.loads = [n * len(tokens) for n in _share(tokens, layer, self.experts)]

    def domains(self, result: Result) -> None:
        for name, first in (("chosen", False), ("first", True)):
            expected = [
                _share(_of(self.tokens, domain=d), self.layer, self.experts, first) for d in (0, 1)
            ]
            np.testing.assert_allclose(result.arrays[f"{name}_LDE"][self.layer], expected)

    def vocabulary(self, result: Result) -> None:
        """The favourite expert's share of the occurrences of an id, mean over ids."""
        for kind, name in enumerate(("id", "next", "predicted")):
            occurrences = Counter(getattr(token, name) for token in self.tokens)
            listed = {token.id for token in self.tokens}  # other predictions have no row
            for column, least in enumerate((1, 10)):
                ids = [i for i, n in occurrences.items() if n >= least and i in listed]
                if not ids:
                    continue
                best = [
                    max(_share(_of(self.tokens, **{name: i}), self.layer, self.experts))
                    for i in ids
                ]
                found = result.arrays["chosen_LXC"][self.layer, kind, column]
                assert found == pytest.approx(np.mean(best))

    def context(self, result: Result) -> None:
        parts = []
        for i in {token.id for token in self.tokens}:
            own = _of(self.tokens, id=i)
            parts.append(len(own) * _entropy(_share(own, self.layer, self.experts)))
        whole = _entropy(self.loads)
        expected = (whole - sum(parts) / len(self.tokens)) / (whole - math.log(self.topk))
        assert result.arrays["chosen_LX"][self.layer, 0] == pytest.approx(expected)

    def tokens_(self, result: Result) -> None:
        for place, i in enumerate(result.arrays["ids_V"].tolist()):
            own = _of(self.tokens, id=i)
            share = np.array(_share(own, self.layer, self.experts)) / self.topk
            assert result.arrays["occurrences_V"][place] == len(own)
            assert result.arrays["spread_LV"][self.layer, place] == pytest.approx(np.std(share))
        assert len(result.arrays["ids_V"]) == FEW

    def positions(self, result: Result) -> None:
        expected = [
            np.std(np.array(_share(_of(self.tokens, position=p), self.layer, self.experts)))
            for p in range(LENGTH)
        ]
        found = result.arrays["spread_LP"][self.layer]
        np.testing.assert_allclose(found, np.array(expected) / self.topk)

    def drops(self, result: Result) -> None:
        for name, rule in (("any", all), ("all", any)):
            expected = [
                [
                    np.mean([not rule(t.kept_LK[self.layer]) for t in own])
                    for p in range(LENGTH)
                    if (own := _of(self.tokens, domain=d, position=p))
                ]
                for d in (0, 1)
            ]
            np.testing.assert_allclose(result.arrays[f"{name}_LDQ"][self.layer], expected)

    def coactivation(self, result: Result) -> None:
        chosen = [token.experts_LK[self.layer] for token in self.tokens]
        for i in range(self.experts):
            mine = [each for each in chosen if i in each]
            for j in range(self.experts):
                if i != j and mine:
                    expected = sum(j in each for each in mine) / len(mine)
                    found = result.arrays["share_LEE"][self.layer, i, j]
                    assert found == pytest.approx(expected)

    def _firsts(self) -> Counter[tuple[int, int]]:
        pairs = [
            (t.experts_LK[self.layer][0], t.experts_LK[self.layer + 1][0]) for t in self.tokens
        ]
        return Counter(pairs)

    def flow(self, result: Result) -> None:
        if self.layer + 1 == len(self.tokens[0].experts_LK):
            return
        found = result.arrays["first_MEE"][self.layer]
        assert {(i, j): n for (i, j), n in np.ndenumerate(found) if n} == self._firsts()
        every = Counter(
            (i, j)
            for token in self.tokens
            for i in token.experts_LK[self.layer]
            for j in token.experts_LK[self.layer + 1]
        )
        found = result.arrays["all_MEE"][self.layer]
        assert {(i, j): n for (i, j), n in np.ndenumerate(found) if n} == every

    def predictability(self, result: Result) -> None:
        if self.layer + 1 == len(self.tokens[0].experts_LK):
            return
        pairs = self._firsts()
        best = [max(n for (i, _), n in pairs.items() if i == e) for e in {i for i, _ in pairs}]
        found = result.arrays["accuracy_L"][self.layer]
        assert found == pytest.approx(sum(best) / len(self.tokens))

    def locality(self, result: Result) -> None:
        at = {(t.row, t.position): set(t.experts_LK[self.layer]) for t in self.tokens}
        for place, distance in enumerate((1, 2, 4, 8)):
            shared = [
                len(one & at[row, position + distance]) / self.topk
                for (row, position), one in at.items()
                if (row, position + distance) in at
            ]
            found = result.arrays["overlap_LJ"][self.layer, place]
            assert found == pytest.approx(np.mean(shared))

    def committee(self, result: Result) -> None:
        for d in (0, 1):
            share = _share(_of(self.tokens, domain=d), self.layer, self.experts)
            order = sorted(range(self.experts), key=lambda e: -share[e])
            members = {
                expert
                for rank, expert in enumerate(order)
                if sum(share[e] for e in order[:rank]) < self.topk / 2 - 1e-9
            }
            found = result.arrays["main_LDE"][self.layer, d]
            assert set(np.flatnonzero(found).tolist()) == members

    def collapse(self, result: Result) -> None:
        arrays, layer = result.arrays, self.layer
        mean = sum(self.loads) / self.experts
        assert arrays["max_violation_L"][layer] == pytest.approx(max(self.loads) / mean - 1)
        assert arrays["effective_L"][layer] == pytest.approx(math.exp(_entropy(self.loads)))
        assert arrays["dead_L"][layer] == sum(n == 0 for n in self.loads)
        first = [  # sigmoid scores do not add up to 1
            t.scores_LE[layer][t.experts_LK[layer][0]] / sum(t.scores_LE[layer])
            for t in self.tokens
        ]
        assert arrays["confidence_L"][layer] == pytest.approx(np.mean(first), rel=1e-5)

    def saturation(self, result: Result) -> None:
        expected = [token.experts_LK[self.layer] for token in self.tokens]
        assert result.arrays["ids_LTK"][self.layer].tolist() == expected

    def early_routing(self, result: Result) -> None:
        for place, i in enumerate(result.arrays["ids_I"].tolist()):
            own = np.array(_share(_of(self.tokens, id=i), self.layer, self.experts))
            found = result.arrays["share_LIE"][self.layer, place]
            np.testing.assert_allclose(found, own / self.topk)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_a_report_from_choices(tmp_path: Path, kind: str) -> None:
    model, sample, known = planted(tmp_path, kind), _sample(tmp_path), all_analyses()
    names = sorted({name for key in KEYS for name in known[key].uses})
    collected, runner = passed(model, sample, names, tmp_path)
    material = Material(
        model=model,
        setting=setting_of(model, sample),
        collected=collected,
        runner=runner,
        draws=2,
    )
    tokens = _tokens(model, sample)
    assert len(tokens) == sample.tokens
    for key in KEYS:
        result = known[key].compute(material)
        for layer in range(len(model.sizes.moe_layers)):
            check = getattr(_Check(tokens, layer, model), "tokens_" if key == "tokens" else key)
            check(result)

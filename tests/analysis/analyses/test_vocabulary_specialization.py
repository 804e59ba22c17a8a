"""Vocabulary specialization and context independence: a hash of the id, chance, tiny tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_moe.analysis.analyses.context_independence import ContextIndependence, explained
from megatron_moe.analysis.analyses.vocabulary_specialization import VocabularySpecialization
from megatron_moe.analysis.nulls import entropy
from megatron_moe.analysis.observation import TokenBatch
from megatron_moe.analysis.result import Result
from tests.analysis.planted import (
    Ids,
    PlantedModel,
    random_rule,
    random_sample,
    result_of,
    sample_of,
    token_rule,
)


def test_a_hash_of_the_id_is_fully_specialized(tmp_path: Path) -> None:
    model = PlantedModel(token_rule(8, 2), experts=8, topk=2)
    sample = random_sample(tmp_path, tokens=4000)
    result = result_of(VocabularySpecialization(), model, sample)
    for rule in ("chosen", "first"):
        assert (result.arrays[f"{rule}_LXC"][:, 0] == 1.0).all()
        # The next token does not depend on the token; the predicted one is a function of the next.
        np.testing.assert_allclose(
            result.arrays[f"{rule}_LXC"][:, 1:], result.arrays[f"{rule}_null_LXC"][:, 1:], atol=0.03
        )
    assert "as OpenMoE reports" in VocabularySpecialization().reading({"m": result})
    context = result_of(ContextIndependence(), model, sample)
    np.testing.assert_allclose(context.arrays["chosen_beyond_LX"][:, 0], 1.0, rtol=1e-9)
    np.testing.assert_allclose(context.arrays["first_beyond_LX"][:, 0], 1.0, rtol=1e-9)
    np.testing.assert_allclose(context.arrays["chosen_beyond_LX"][:, 1:], 0.0, atol=0.01)
    assert "whatever the context" in ContextIndependence().reading({"m": context})


def test_a_random_router_is_at_chance(tmp_path: Path) -> None:
    """Ids occur ten times, so that the chance level is far above k/E."""
    model = PlantedModel(random_rule(8, 2), experts=8, topk=2)
    sample = random_sample(tmp_path, tokens=4000, vocab=400)
    result = result_of(VocabularySpecialization(), model, sample, draws=200)
    for rule in ("chosen", "first"):
        found, null = result.arrays[f"{rule}_LXC"], result.arrays[f"{rule}_null_LXC"]
        np.testing.assert_allclose(found[:, :, :2], null[:, :, :2], rtol=0.05)
    assert result.arrays["chosen_LXC"][0, 0, 0] > 0.4
    assert "unlike in OLMoE" in VocabularySpecialization().reading({"m": result})
    assert any("No id occurs 50 times" in note for note in result.notes)
    context = result_of(ContextIndependence(), model, sample, draws=200)
    np.testing.assert_allclose(context.arrays["chosen_beyond_LX"], 0, atol=0.01)
    assert context.arrays["chosen_LX"].min() > 0.05
    assert "unlike in OpenMoE" in ContextIndependence().reading({"m": context})


@pytest.mark.parametrize(
    ("predicted", "said"),
    [
        (0.50, "As in OLMoE, the last layer follows the predicted token more"),
        (0.41, "about equally"),
        (0.39, "about equally"),
        (0.30, "Even the last layer follows the input token"),
        (np.nan, "cannot be told"),
    ],
)
def test_the_last_layer_is_read_with_a_margin(predicted: float, said: str) -> None:
    """Beyond chance; the input token is 40 points above, the predicted one as given."""
    found, null = np.full((2, 3, 3), 0.5), np.full((2, 3, 3), 0.1)
    found[-1, 2, 1], null[-1, 2, 1] = predicted + 0.2, 0.2
    arrays = {"chosen_LXC": found, "chosen_null_LXC": null}
    result = Result(analysis="vocabulary", arrays=arrays, numbers={})
    text = VocabularySpecialization().reading({"m": result})
    assert said in text
    # One of the conclusions, not two.
    assert sum(each in text for each in ("As in OLMoE", "equally", "Even", "be told")) == 1


def test_specialization_by_hand(tmp_path: Path) -> None:
    """Id 5 eight times: expert 1 six times, expert 2 twice. Id 6 eight times: always expert 0."""
    texts = {"a": [[5] * 8 + [6] * 8 + [7]]}
    choices = [[1]] * 6 + [[2]] * 2 + [[0]] * 8

    def rule(batch: TokenBatch, layer: int) -> Ids:
        return np.array(choices)

    model = PlantedModel(rule, experts=4, topk=1)
    result = result_of(VocabularySpecialization(), model, sample_of(tmp_path, texts, batch_size=8))
    assert result.arrays["chosen_LXC"][0, 0].tolist()[0] == (0.75 + 1.0) / 2
    assert np.isnan(result.arrays["chosen_LXC"][0, 0, 1])
    # Next ids: 5 at the first seven tokens, 6 at the next eight, 7 at the last.
    assert result.arrays["chosen_LXC"][0, 1, 0] == pytest.approx((6 / 7 + 7 / 8 + 1) / 3)
    assert "10 times" in VocabularySpecialization().reading({"m": result})


def test_values_and_examples_of_experts(tmp_path: Path) -> None:
    """Ids are even or odd; even ones go to expert 1, odd ones to 0 (id 3) or mostly to 2."""

    def rule(batch: TokenBatch, layer: int) -> Ids:
        ids = batch.tokens_BS.reshape(-1)
        return np.where(ids % 2 == 0, 1, np.where(ids == 3, 0, np.where(ids == 5, 2, 3)))[:, None]

    model = PlantedModel(rule, experts=5, topk=1)
    result = result_of(VocabularySpecialization(), model, random_sample(tmp_path, vocab=8))
    assert result.arrays["experts_ids_LXE"][0, 0].tolist() == [1, 4, 1, 2, 0]
    assert result.arrays["experts_LXE"][0, 0, :4].tolist() == [1.0] * 4
    rows = [row for row in result.tables[2].rows if row[0] == 0 and row[1] == 0]
    assert len(rows) == 1 and rows[0][2:4] == (3, "<3>") and rows[0][5] == 1.0


def test_explained_share_by_hand() -> None:
    """Two ids, one fixed, one split between two experts: a bit is left for 4 of 12 tokens."""
    table = np.array([[8, 0], [2, 2]])
    whole = entropy(np.array([10, 2]))
    share = explained(table, np.array([8, 4]), entropy(table), 1)
    assert share == pytest.approx((whole - np.log(2) / 3) / whole)
    assert np.isnan(explained(np.array([[3, 3]]), np.array([3]), np.array([0.0]), 2))


def test_figures(tmp_path: Path) -> None:
    model = PlantedModel(random_rule(4, 2), experts=4, topk=2)
    sample = random_sample(tmp_path, tokens=800)
    for analysis in (VocabularySpecialization(), ContextIndependence()):
        result = result_of(analysis, model, sample)
        assert analysis.figures({"m": result}) and analysis.figures({"m": result, "n": result})

"""A planted expert with a huge output is found, and the model needs it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.analysis.analyses.super_experts import (
    SuperExperts,
    _random_sets,
    ratios,
    super_experts,
)
from megatron_moe.analysis.result import Result
from megatron_moe.analysis.sample import Sample
from tests.analysis.expert_cases import planted, result_of, setting_of
from tests.analysis.families import make
from tests.analysis.planted import PlantedModel, sample_of

FREQUENT, DIMENSION = 7, 11


def mostly_one_token(folder: Path) -> Sample:
    """Texts in which four of five tokens are the same."""
    rng = np.random.default_rng(2)
    ids = rng.integers(3, 50, size=(12, 16))
    ids[rng.random(ids.shape) < 0.8] = FREQUENT
    folder.mkdir(exist_ok=True)
    return sample_of(folder, {"text": [*ids.tolist(), [5]]}, seq_length=16, vocab_size=300)


def _busiest(sample: Sample) -> int:
    """The expert of layer 1 that the frequent token chooses first."""
    model, chosen = make("olmoe", num_experts_per_tok=1), []
    handle = model.model.layers[1].mlp.gate.register_forward_hook(
        lambda _, given, result: chosen.append(result[2].flatten())
    )
    for batch in sample.batches():
        model(torch.from_numpy(batch.tokens_BS))
    handle.remove()
    return int(torch.cat(chosen).bincount().argmax())


def test_a_planted_one_is_found_and_without_it_the_loss_is_higher(tmp_path: Path) -> None:
    sample = mostly_one_token(tmp_path / "data")
    expert = _busiest(sample)

    def plant(model: Any) -> None:
        experts = model.model.layers[1].mlp.experts
        # A neuron that is always on and writes to one dimension, from which the head reads the
        # frequent token.
        experts.down_proj[expert, DIMENSION] = 0
        experts.down_proj[expert, DIMENSION, 0] = 4000
        experts.gate_up_proj[expert, 0] = experts.gate_up_proj[expert, 12]
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.fill_(1)
        model.model.layers[2].mlp.experts.down_proj.mul_(0.01)
        model.model.norm.weight.fill_(1)
        model.lm_head.weight.mul_(0.1)
        model.lm_head.weight[:, DIMENSION] = 0
        model.lm_head.weight[FREQUENT, DIMENSION] = 1.5

    model = planted(tmp_path, "olmoe", plant, num_experts_per_tok=1)
    found = result_of(SuperExperts(), model, sample, tmp_path)
    table = {table.name: table.columns for table in found.tables}["left_out"]
    assert (table["layer"][0], table["expert"][0], table["super"][0]) == (1, expert, True)
    assert table["ratio"][0] > 50
    assert table["dimension"][0] == DIMENSION
    n = found.numbers
    assert n["super experts"] == 1 and n["hidden dimension of the largest outputs"] == DIMENSION
    assert n["change of the loss without them"] > 0.3
    assert (
        n["change of the loss without them"]
        > n["change of the loss without random experts, largest"]
    )
    assert n["perplexity without them"] > n["perplexity of the whole model"]
    said = SuperExperts().reading({"a": found})
    assert "1 super expert has" in said and "as in the paper" in said


def test_a_random_model_has_none(tmp_path: Path) -> None:
    model = planted(tmp_path, "qwen2_moe")
    found = result_of(SuperExperts(), model, mostly_one_token(tmp_path / "data"), tmp_path)
    assert found.numbers["super experts"] == 0
    assert found.numbers["experts left out"] == 1
    assert any("No expert is a super expert" in note for note in found.notes)
    assert "There are no super experts" in SuperExperts().reading({"a": found})


@pytest.mark.parametrize(
    ("change", "low", "high", "largest", "said"),
    [
        (0.30, 0.10, 0.50, 0.02, "depends on them, as in the paper"),
        (0.30, 0.10, 0.50, -0.02, "depends on them, as in the paper"),
        (0.30, -0.10, 0.70, 0.02, "too few rows"),
        (0.30, math.nan, math.nan, 0.02, "too few rows"),
        (0.30, 0.10, 0.50, 0.28, "little more than others"),
        (-0.30, -0.50, -0.10, -0.40, "not at all, unlike"),
    ],
)
def test_a_dependence_needs_its_interval_and_a_margin_over_random_sets(
    change: float, low: float, high: float, largest: float, said: str
) -> None:
    name = "change of the loss without"
    numbers = {
        "super experts": 1.0,
        "largest ratio to the median of a layer": 50.0,
        "hidden dimension of the largest outputs": 3.0,
        "experts left out whose largest output is there": 1.0,
        "experts left out": 1.0,
        f"{name} them": change,
        f"{name} them, low": low,
        f"{name} them, high": high,
        f"{name} random experts": largest - 0.01,
        f"{name} random experts, largest": largest,
    }
    assert said in SuperExperts().reading({"a": Result(analysis="super-experts", numbers=numbers)})


def test_ratios_and_both_conditions_by_hand() -> None:
    output = np.array([[1.0, 2.0, 3.0, 30.0], [1.0, 1.0, 1.0, 400.0], [0.1, 0.1, 0.1, 3.0]])
    assert ratios(output)[0].tolist() == [0.4, 0.8, 1.2, 12.0]
    # Ratios are 12, 400 and 30; the first and last are below a tenth of 400.
    assert super_experts(output) == [(1, 3)]
    output[0, 3] = 50
    assert super_experts(output) == [(1, 3), (0, 3)]
    output[1, 0] = np.nan  # not seen
    assert super_experts(output) == [(1, 3), (0, 3)]
    assert np.isnan(ratios(np.full((1, 3), np.nan))).all()


def test_no_more_experts_than_a_token_can_miss(tmp_path: Path) -> None:
    def plant(model: Any) -> None:
        for expert in range(3):
            model.model.layers[0].mlp.experts.down_proj[expert] *= 10.0 ** (3 + expert)

    model = planted(tmp_path, "mixtral", plant, num_experts_per_tok=2, num_local_experts=8)
    found = result_of(SuperExperts(), model, mostly_one_token(tmp_path / "data"), tmp_path)
    assert found.numbers["experts left out"] <= 6
    assert found.numbers["super experts"] == pytest.approx(found.numbers["experts left out"])


def test_random_sets_are_other_experts_of_the_layer(tmp_path: Path) -> None:
    """Of six others, three draws of two share none; of three, a set of five can only be these."""
    model = PlantedModel(lambda batch, layer: np.zeros((1, 1), int), experts=8, topk=1)
    setting = setting_of(model, mostly_one_token(tmp_path / "data"))
    drawn = [each[1] for each in _random_sets({1: [2, 5]}, setting)]
    assert [len(each) for each in drawn] == [2] * 3
    assert sorted(e for each in drawn for e in each) == [0, 1, 3, 4, 6, 7]
    again = _random_sets({0: [0, 1, 2, 3, 4], 1: [7]}, setting)
    assert all(sorted(each[0]) == [5, 6, 7] for each in again)
    assert len({each[1][0] for each in again} - {7}) == len(again)

"""The reading of a layer against whole matrices in fp64; how often and how much it reads."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.analysis.analyses.expert_similarity import ExpertSimilarity
from megatron_moe.analysis.analyses.neuron_averages import NeuronAverages
from megatron_moe.analysis.analyses.neuron_matching import NeuronMatching
from megatron_moe.analysis.analyses.router_similarity import RouterSimilarity
from megatron_moe.analysis.analyses.weight_components import WeightComponents
from megatron_moe.analysis.analyses.weight_norms import WeightNorms
from megatron_moe.analysis.base import Analysis
from megatron_moe.analysis.family import all_families
from megatron_moe.analysis.opening import open_model
from megatron_moe.analysis.weights import survey as module
from megatron_moe.analysis.weights.projections import neurons_of, projections_of
from megatron_moe.analysis.weights.survey import WeightSurvey, survey
from megatron_moe.convert.model import LogicalModel
from megatron_moe.convert.native import write_native
from tests.analysis.families import make, save
from tests.analysis.weights.toy import ToyModel, material_of, random_expert, random_model, stored
from tests.convert.cases import CONFIG, model_of

ANALYSES = (
    ExpertSimilarity,
    NeuronAverages,
    NeuronMatching,
    RouterSimilarity,
    WeightComponents,
    WeightNorms,
)


def check_grams(found: WeightSurvey, matrices: dict[tuple[int, str], list[np.ndarray]]) -> None:
    """Against whole matrices [F, H], a neuron each row; `None` for one of another width."""
    for layer in found.layers:
        for name, each in layer.projections.items():
            rows = matrices[layer.layer, name]
            assert len(rows) == len(layer.names)
            scale = np.abs(each.gram_RR[0, 0])
            for i, first in enumerate(rows):
                for j, second in enumerate(rows):
                    mean = first.mean(0) @ second.mean(0)
                    np.testing.assert_allclose(each.mean_gram_RR[i, j], mean, atol=1e-6 * scale)
                    comparable = len(first) == len(second) == len(rows[0])
                    expected = (first * second).sum() if comparable else np.nan
                    np.testing.assert_allclose(each.gram_RR[i, j], expected, atol=1e-6 * scale)


def _whole(weights: Any, name: str) -> np.ndarray:
    matrix = getattr(weights, name).whole().double().numpy()
    return matrix.T if name == "down" else matrix


@pytest.mark.parametrize("block", [1, 7 * 4 * 16 * 4, 64 << 20])
def test_any_block_of_neurons(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", block)
    model = random_model(layers=1, experts=4, width=24, hidden=16)
    rows = {
        (1, n): [_whole(e, n) for e in model.weights(1).experts] for n in ("up", "gate", "down")
    }
    check_grams(survey(model, (1,), 0), rows)


def test_each_tensor_is_read_once_for_all_analyses_but_the_matching() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = [[random_expert(6, 8, generator) for _ in range(3)]]
    model = ToyModel(
        [torch.randn(3, 8)],
        experts,
        [random_expert(6, 8, generator)],
        {0: random_expert(9, 8, generator)},
    )
    material = material_of(model)
    for made in ANALYSES:
        if made is not NeuronMatching:
            made().compute(material)
    assert len(model.reads) == 5 * 3 and set(model.reads.values()) == {1}


def test_other_networks() -> None:
    """The shared expert, and of two dense layers at the same distance the lower one."""
    generator = torch.Generator().manual_seed(0)
    experts = [[random_expert(6, 8, generator) for _ in range(3)]]
    shared, wide, equal = (random_expert(width, 8, generator) for width in (6, 9, 6))
    model = ToyModel([torch.randn(3, 8)], experts, [shared], {0: wide, 2: equal})
    found = survey(model, (1,), 0)
    assert found.layers[0].names == ("0", "1", "2", "shared", "dense 0")
    layer, dense = model.weights(1), model.dense_weights()
    rows = {
        (1, n): [_whole(e, n) for e in (*layer.experts, layer.shared, dense[0])]
        for n in ("up", "gate", "down")
    }
    check_grams(found, rows)
    assert found.notes() == [
        "Dense layers are 9 neurons wide and experts 6: only their average neurons are compared."
    ]


def test_neurons_are_projected_on_their_components() -> None:
    model = random_model(layers=1, experts=4, width=24, hidden=16)
    found = survey(model, (1,), 0).layers[0].projections["down"]
    neurons = np.concatenate([_whole(e, "down") for e in model.weights(1).experts])
    _, value, right = np.linalg.svd(neurons - neurons.mean(0), full_matrices=False)
    place = (neurons - neurons.mean(0)) @ right[:2].T
    assert found.neurons_EGC.shape == (4, 24, 2)
    np.testing.assert_allclose(np.abs(found.neurons_EGC.reshape(-1, 2)), np.abs(place), atol=1e-4)
    np.testing.assert_allclose(found.neurons_share[:16], value**2 / (value**2).sum(), atol=1e-6)


def test_a_sample_of_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POINTS", 20)
    model = random_model(layers=1, experts=4, width=24, hidden=16)
    found = survey(model, (1,), 0).layers[0].projections["up"]
    assert found.neurons_EGC.shape == (4, 5, 2)
    places = module.sampled_neurons(24, 5, 0)
    assert len(set(places.tolist())) == 5 and places.tolist() == sorted(places.tolist())
    neurons = np.concatenate([_whole(e, "up")[places] for e in model.weights(1).experts])
    value = np.linalg.svd(neurons - neurons.mean(0), compute_uv=False)
    np.testing.assert_allclose(
        found.neurons_share[:16], (value**2 / (value**2).sum())[:16], atol=1e-6
    )


def _numpy(weight: torch.Tensor) -> np.ndarray:
    return weight.detach().double().numpy()


def _own_neurons(block: Any, kind: str) -> dict[str, list[np.ndarray]]:
    """Matrices [F, H] of each expert, from the stacks of the family's class."""
    both, down = _numpy(block.experts.gate_up_proj), _numpy(block.experts.down_proj)
    if kind == "gpt_oss":  # [E, H, 2F] in alternating columns, and [E, F, H]
        return {
            "gate": [each.T[::2] for each in both],
            "up": [each.T[1::2] for each in both],
            "down": list(down),
        }
    width = down.shape[2]
    return {
        "gate": [each[:width] for each in both],
        "up": [each[width:] for each in both],
        "down": [each.T for each in down],
    }


@pytest.mark.parametrize("kind", all_families())
def test_every_family(tmp_path: Path, kind: str) -> None:
    """Against the parameters of the family's own class, in its orientation of gate and up."""
    module = make(kind)
    model = open_model(save(module, tmp_path / "m"))
    rows: dict[tuple[int, str], list[np.ndarray]] = {}
    for index in model.sizes.moe_layers:
        block = module.model.layers[index].mlp
        own = _own_neurons(block, kind)
        shared = getattr(block, "shared_experts", getattr(block, "shared_expert", None))
        dense = [i for i in range(model.sizes.num_layers) if i not in model.sizes.moe_layers]
        others = [] if shared is None else [shared]
        if dense:
            nearest = min(dense, key=lambda i: (abs(i - index), i))
            others.append(module.model.layers[nearest].mlp)
        for name, matrices in own.items():
            extra = [_numpy(getattr(each, f"{name}_proj").weight) for each in others]
            rows[index, name] = [*matrices, *(w.T if name == "down" else w for w in extra)]
        found = survey(model, (index,), 0).layers[0]
        router = _numpy((getattr(block, "gate", None) or block.router).weight)
        np.testing.assert_allclose(found.router_gram_EE, router @ router.T, atol=1e-9)
    check_grams(survey(model, model.sizes.moe_layers, 0), rows)
    for made in ANALYSES:
        stored(made(), model, tmp_path / made.key, draws=20)


@pytest.mark.parametrize("released", [True, False])
def test_the_project_s_own_model(tmp_path: Path, released: bool) -> None:
    """Released OpenMoE has a fourth projection: the first half of its wide gate."""
    variant = "gated-swiglu" if released else "swiglu"
    config = replace(CONFIG, model=replace(CONFIG.model, ffn_variant=variant))
    source = model_of(config)
    write_native(source, tmp_path / "m", 1 << 30, lambda _: None)
    model = open_model(tmp_path / "m")
    width = config.model.ffn_hidden_size
    assert model.sizes.moe_layers == (1, 3)
    rows: dict[tuple[int, str], list[np.ndarray]] = {}
    for index in model.sizes.moe_layers:
        names = {n: f"layers.{index}.moe.experts.{n}" for n in ("gate", "up", "down")}
        stacks = {n: _tensor(source, name) for n, name in names.items()}
        others = [f"layers.{index}.shared", f"layers.{index - 1}.ffn"]
        dense = {n: [_tensor(source, f"{o}.{n}.weight") for o in others] for n in stacks}
        # Experts are stored [E, in, out], the others [out, in].
        wide = [*(w.T for w in stacks["gate"]), *dense["gate"]]
        rows[index, "gate"] = [w[width:] for w in wide] if released else wide
        rows[index, "up"] = [*(w.T for w in stacks["up"]), *dense["up"]]
        rows[index, "down"] = [*stacks["down"], *(w.T for w in dense["down"])]
        if released:
            rows[index, "linear"] = [w[:width] for w in wide]
    found = survey(model, model.sizes.moe_layers, 0)
    assert set(found.projections) == {name for _, name in rows}
    assert found.layers[1].names == ("0", "1", "2", "3", "shared", "dense 2")
    check_grams(found, rows)
    for made in ANALYSES:
        stored(made(), model, tmp_path / made.key, draws=20)


def _tensor(source: LogicalModel, name: str) -> np.ndarray:
    return source.tensors[name].whole().double().numpy()


@pytest.mark.parametrize("made", ANALYSES)
def test_experts_of_zeros(tmp_path: Path, made: type[Analysis]) -> None:
    """As upcycling leaves the down projections; warnings are errors."""
    generator = torch.Generator().manual_seed(0)
    experts = [dict(random_expert(6, 8, generator)) for _ in range(3)]
    for each in experts:
        each["down"] = torch.zeros(8, 6)
    model = ToyModel([torch.randn(3, 8)] * 6, [experts] * 6)
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = stored(made(), model, tmp_path)
        assert "nan" not in made().reading({"a": found})


def test_a_part_of_a_matrix_does_not_keep_the_whole(tmp_path: Path) -> None:
    """The released gate is half of a matrix, and so are gate and up of stacked files."""
    write_native(model_of(CONFIG), tmp_path / "m", 1 << 30, lambda _: None)
    save(make("olmoe"), tmp_path / "stacked", save_original_format=False)
    for folder, layer in (("m", 1), ("stacked", 0)):
        weights = open_model(tmp_path / folder).weights(layer)
        for name in projections_of(weights):
            found = neurons_of(weights.experts[1], name)
            assert found.untyped_storage().nbytes() == found.numel() * found.element_size()

"""Small models of other families with planted experts, and what their experts compute, by loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_moe.analysis.base import Analysis, Material
from megatron_moe.analysis.collector import Collector, Setting, make_collector
from megatron_moe.analysis.family import all_families
from megatron_moe.analysis.model import ExpertWeights, MoEModel, MoERunner
from megatron_moe.analysis.opening import open_model
from megatron_moe.analysis.result import Result
from megatron_moe.analysis.sample import Sample
from megatron_moe.analysis.stream import stream
from megatron_moe.convert.model import LazyTensor
from tests.analysis.families import SETTINGS, VOCAB, make, save
from tests.analysis.planted import sample_of
from tests.inference import cases

Array = npt.NDArray[np.float64]
SEED = 3
KINDS = (*all_families(), "native")
"""Every family, and a checkpoint of this project, which drops tokens."""


def planted(
    folder: Path, kind: str, change: Callable[[Any], None] = lambda model: None, **settings: Any
) -> MoEModel:
    """A random model of a family that `change` has edited; `native` is OpenMoE and not edited."""
    if kind == "native":
        return open_model(cases.save(folder / "native"))
    made = make(kind, **settings)
    with torch.no_grad():
        change(made)
    return open_model(save(made, folder / kind))


def texts(
    folder: Path, *, rows: int = 12, length: int = 12, domains: int = 2, **options: int
) -> Sample:
    """Domains of random ids that every model of these tests has."""
    (folder / "data").mkdir(exist_ok=True)
    rng = np.random.default_rng(8)
    ids = rng.integers(3, VOCAB, size=(domains, rows, length))
    named = {f"d{i}": [*each.tolist(), [5]] for i, each in enumerate(ids)}
    return sample_of(folder / "data", named, seq_length=length, vocab_size=300, **options)


def setting_of(model: MoEModel, sample: Sample) -> Setting:
    return Setting(sizes=model.sizes, sample=sample, layers=model.sizes.moe_layers, seed=SEED)


def passed(
    model: MoEModel, sample: Sample, names: Sequence[str], folder: Path
) -> tuple[dict[str, Collector], MoERunner]:
    """The collectors after a pass, and the runner."""
    setting, runner = setting_of(model, sample), model.load("cpu", torch.float32)
    made = {name: make_collector(name, setting) for name in names}
    stream(runner, sample, made, state=folder / "pass", fingerprint="", advance=lambda _: None)
    return made, runner


def result_of(
    analysis: Analysis, model: MoEModel, sample: Sample, folder: Path, draws: int = 50
) -> Result:
    """The analysis of a model, after what every analysis must fulfil is checked."""
    made, runner = passed(model, sample, analysis.uses, folder)
    setting = setting_of(model, sample)
    analysis.check(setting)
    result = analysis.compute(
        Material(model=model, setting=setting, collected=made, runner=runner, draws=draws)
    )
    check_shown(analysis, {"a": result})
    check_shown(analysis, {"a": result, "b": result})
    return result


def check_shown(analysis: Analysis, results: Mapping[str, Result]) -> None:
    """Figures have distinct keys and panels, and the reading is a text without gaps."""
    figures = analysis.figures(results)
    keys = [figure.key for figure in figures]
    assert keys and len(set(keys)) == len(keys)
    assert all(figure.panels for figure in figures)
    said = analysis.reading(results)
    assert said.endswith(".") and "nan" not in said
    for result in results.values():
        for table in result.tables:
            assert len({len(column) for column in table.columns.values()}) == 1


class Matrices:
    """The weights of an expert, read once, in fp64."""

    def __init__(self, expert: ExpertWeights) -> None:
        def values(tensor: LazyTensor | None) -> Array | None:
            return None if tensor is None else tensor.whole().double().numpy()

        self.gate, self.up, self.down = map(values, (expert.gate, expert.up, expert.down))
        self.linear = values(expert.linear)
        biases = (expert.gate_bias, expert.up_bias, expert.down_bias)
        self.gate_bias, self.up_bias, self.down_bias = map(values, biases)


def by_loops(expert: Matrices, x: Array) -> tuple[Array, Array, Array]:
    """Activation, input of the down projection and output for one token, in fp64."""
    gate, up, down = expert.gate, expert.up, expert.down
    assert gate is not None and up is not None and down is not None
    if expert.gate_bias is None:
        activation = np.array([_silu(float(row @ x)) for row in gate])
        inner = activation * (up @ x)
        if expert.linear is not None:
            inner = inner * (expert.linear @ x)
        return activation, inner, down @ inner
    # GPT-OSS: projections with biases, clamped, and `z sigmoid(1.702 z)`.
    limit = SETTINGS["gpt_oss"]["swiglu_limit"]
    gated = [min(z, limit) for z in gate @ x + expert.gate_bias]
    raised = [max(-limit, min(z, limit)) + 1 for z in up @ x + expert.up_bias]
    activation = np.array([z / (1 + math.exp(-1.702 * z)) for z in gated])
    inner = activation * np.array(raised)
    return activation, inner, down @ inner + expert.down_bias


def _silu(z: float) -> float:
    return z / (1 + math.exp(-z))

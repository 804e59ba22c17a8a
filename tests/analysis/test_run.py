"""A run of analyses: what is computed once, what an interruption costs, what decides a result."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.analysis.base import Analysis, Material, all_analyses
from megatron_moe.analysis.observation import TokenBatch
from megatron_moe.analysis.opening import open_model
from megatron_moe.analysis.plot import Figure
from megatron_moe.analysis.result import RESULT, Result, Table, read_result, write_result
from megatron_moe.analysis.run import RunOptions, analyse, steps_of
from megatron_moe.analysis.sample import Sample
from tests.analysis.planted import random_sample
from tests.inference.cases import CONFIG, save


class Count(Analysis):
    """How many tokens there are, and how often that was computed."""

    key = title = question = definition = source = "count"
    group = "routing"
    uses = ("domains",)
    computed = 0

    def compute(self, material: Material) -> Result:
        type(self).computed += 1
        tokens = material.setting.sample.tokens
        assert sum(v.sum() for v in material.collected["domains"].state().values()) > 0
        return Result(analysis=self.key, numbers={"tokens": float(tokens)})

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        return []

    def reading(self, results: Mapping[str, Result]) -> str:
        return ""


class Stop(Exception):
    """The process ends here."""


@pytest.fixture(name="model")
def _model(tmp_path: Path) -> Any:
    return open_model(save(tmp_path / "checkpoint"))


@pytest.fixture(name="sample")
def _sample(tmp_path: Path) -> Sample:
    return random_sample(tmp_path, tokens=600, domains=2, seq_length=20, batch_size=4)


def test_a_result_is_computed_once_until_something_else_decides_it(
    model: Any, sample: Sample, tmp_path: Path
) -> None:
    options = RunOptions(out=tmp_path / "out")
    steps: list[int] = []

    def again(**changes: Any) -> int:
        before = Count.computed
        found = analyse(model, sample, [Count()], replace(options, **changes), steps.append)
        assert found["count"].numbers == {"tokens": sample.tokens}
        return Count.computed - before

    assert again() == 1 and sum(steps) == steps_of(sample, [Count()])
    assert again() == 0
    assert again(seed=5) == 1
    assert again(layers=(1,)) == 1
    assert again(dtype=torch.bfloat16) == 1


def test_an_interrupted_pass_goes_on(
    model: Any, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_moe.analysis import stream

    monkeypatch.setattr(stream.stream, "__kwdefaults__", {"save_seconds": -1.0})
    options, read = RunOptions(out=tmp_path / "out"), []
    original = type(model.load("cpu", options.dtype)).run

    def run(self: Any, batch: Any, **more: Any) -> Any:
        read.append(batch.number)
        if read.count(5) == 1 and batch.number == 5:
            raise Stop
        return original(self, batch, **more)

    monkeypatch.setattr(type(model.load("cpu", options.dtype)), "run", run)
    domains = all_analyses()["domains"]
    with pytest.raises(Stop):
        analyse(model, sample, [domains], options, lambda _: None)
    found = analyse(model, sample, [domains], options, lambda _: None)["domains"]
    assert read == [0, 1, 2, 3, 4, 5, *range(5, sample.num_batches)]
    whole = replace(options, out=tmp_path / "whole")
    same = analyse(model, sample, [domains], whole, lambda _: None)["domains"]
    assert found.numbers == same.numbers
    assert all((found.arrays[name] == same.arrays[name]).all() for name in same.arrays)


def test_a_stored_result_is_the_result(tmp_path: Path) -> None:
    result = Result(
        analysis="x",
        numbers={"one": 1.5, "none": float("nan")},
        tables=[Table(name="t", columns={"a": [1, 2], "b": [0.5, float("inf")]}, about="rows")],
        arrays={"m": np.arange(6.0).reshape(2, 3), "names": np.array(["é", "b"])},
        notes=["few tokens"],
    )
    write_result(tmp_path, result, "mark")
    found = read_result(tmp_path, "mark")
    assert found is not None
    assert found.numbers["one"] == 1.5 and np.isnan(found.numbers["none"])
    assert found.tables[0].columns == {"a": [1, 2], "b": [0.5, None]}
    assert (found.arrays["m"] == result.arrays["m"]).all() and found.notes == ["few tokens"]
    assert found.arrays["names"].tolist() == ["é", "b"]
    assert (tmp_path / "t.csv").read_text().splitlines() == ["a,b", "1,0.5", "2,"]
    assert read_result(tmp_path, "another mark") is None
    (tmp_path / RESULT).unlink()  # interrupted before the last file
    assert read_result(tmp_path, "mark") is None


def test_a_pass_counts_for_new_collectors_alone(
    model: Any, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, known, read = RunOptions(out=tmp_path / "out"), all_analyses(), []
    runner = type(model.load("cpu", options.dtype))
    original = runner.run

    def run(self: Any, batch: Any, **more: Any) -> Any:
        read.append(batch.number)
        return original(self, batch, **more)

    monkeypatch.setattr(runner, "run", run)

    def passes(*keys: str) -> int:
        before = len(read)
        analyse(model, sample, [known[key] for key in keys], options, lambda _: None)
        return len(read) - before

    assert passes("domains", "collapse") == sample.num_batches
    (tmp_path / "out" / model.label / "domains" / RESULT).unlink()
    assert passes("domains", "collapse") == 0  # from the states of the pass
    assert passes("domains", "locality") == sample.num_batches
    for path in (tmp_path / "out" / model.label / "pass").glob("domains.npz"):
        path.unlink()
    assert passes("domains", "collapse", "locality") == 0  # results are there


def test_the_model_is_the_one_that_was_opened_and_is_not_kept(tmp_path: Path) -> None:
    opened = open_model(save(tmp_path / "run", step=7))
    save(tmp_path / "run", step=9)
    runner: Any = opened.load("cpu", torch.float32)
    assert runner.loaded.step == opened.step == 7
    network = weakref.ref(runner.loaded.model)
    del runner
    gc.collect()
    assert network() is None


def test_the_ids_of_an_observation_are_those_that_the_model_read(tmp_path: Path) -> None:
    objective = replace(CONFIG.objective, decoder_start_token_id=5)
    runner = open_model(save(tmp_path / "run", replace(CONFIG, objective=objective))).load(
        "cpu", torch.float32
    )
    ids = np.arange(40, 48).reshape(1, 8)
    batch = TokenBatch(
        tokens_BS=ids, next_BS=ids + 1, documents_BS=np.zeros_like(ids), domain=0, number=0
    )
    assert runner.run(batch).batch.tokens_BS.tolist() == [[5, *range(41, 48)]]

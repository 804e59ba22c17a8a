"""Routing traces of a checkpoint."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch

from megatron_moe.analysis.opening import open_model
from megatron_moe.analysis.traces import write_traces
from megatron_moe.errors import UsageError
from megatron_moe.moe.trace import read_step
from tests.analysis.planted import random_sample
from tests.inference.cases import save


def test_a_trace_is_what_the_model_decides(tmp_path: Path) -> None:
    model = open_model(save(tmp_path / "checkpoint"))  # has an evaluation capacity: drops tokens
    runner = model.load("cpu", torch.float32)
    sample = random_sample(tmp_path, tokens=300, domains=2, seq_length=20, batch_size=3)
    steps: list[int] = []
    write_traces(tmp_path / "traces", model, runner, sample, torch.float32, steps.append)
    assert sum(steps) == sample.num_batches
    trace, about = read_step(tmp_path / "traces", 7)
    assert (about.experts, about.topk, about.layers) == (4, 2, (1,))
    seen = [(batch, runner.run(batch).layers[0]) for batch in sample.batches()]
    assert len(trace) == sample.tokens
    for name, expected in (
        ("token_id", [batch.tokens_BS.ravel() for batch, _ in seen]),
        ("experts", [layer.ids_TK.numpy() for _, layer in seen]),
        ("probabilities", [layer.probs_TK.numpy() for _, layer in seen]),
        ("kept", [layer.kept_TK.numpy() for _, layer in seen]),
        ("domain", [np.repeat(sample.names[batch.domain], batch.size) for batch, _ in seen]),
    ):
        assert (getattr(trace, name) == np.concatenate(expected)).all(), name
    assert not trace.kept.all()
    assert (trace.position == np.tile(np.arange(20), sample.tokens // 20)).all()
    assert (trace.sample == np.repeat(np.arange(sample.tokens // 20), 20)).all()


def test_files_of_another_trace_are_not_mixed_in(tmp_path: Path) -> None:
    model = open_model(save(tmp_path / "checkpoint"))
    runner = model.load("cpu", torch.float32)
    sample = random_sample(tmp_path, tokens=300, seq_length=20, batch_size=3)
    write_traces(tmp_path / "traces", model, runner, sample, torch.float32, lambda _: None)
    other = random_sample(tmp_path, tokens=300, seq_length=10, batch_size=3)
    with pytest.raises(UsageError, match="--routing-trace-dir must be empty, or with traces of"):
        write_traces(tmp_path / "traces", model, runner, other, torch.float32, lambda _: None)


def test_what_an_interruption_left_is_kept(tmp_path: Path) -> None:
    model = open_model(save(tmp_path / "checkpoint"))
    runner = model.load("cpu", torch.float32)
    sample = random_sample(tmp_path, tokens=300, seq_length=20, batch_size=3)
    folder = tmp_path / "traces"
    write_traces(folder, model, runner, sample, torch.float32, lambda _: None)
    whole = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    removed = sorted(folder.iterdir())[2]
    content = read_step(folder, 7)[0]
    removed.unlink()
    write_traces(folder, model, runner, sample, torch.float32, lambda _: None)
    again = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert [name for name in whole if whole[name] != again[name]] == [removed.name]
    assert (read_step(folder, 7)[0].experts == content.experts).all()


def test_other_weights_under_the_same_label_are_not_taken_for_these(tmp_path: Path) -> None:
    sample = random_sample(tmp_path, tokens=300, seq_length=20, batch_size=3)
    for number, said in enumerate((None, "--routing-trace-dir must be empty")):
        model = open_model(save(tmp_path / f"checkpoint {number}"), label="a")
        runner = model.load("cpu", torch.float32)
        folder = tmp_path / "traces"
        if said is None:
            write_traces(folder, model, runner, sample, torch.float32, lambda _: None)
        else:
            with pytest.raises(UsageError, match=said):
                write_traces(folder, model, runner, sample, torch.float32, lambda _: None)


QUERY = re.compile(r"```sql\n(.*?)```", re.DOTALL)
DOCUMENTATION = Path(__file__).parents[2] / "docs/routing_trace.md"


def test_the_documented_queries_of_duckdb_count_what_the_model_decides(tmp_path: Path) -> None:
    model = open_model(save(tmp_path / "checkpoint"))
    runner = model.load("cpu", torch.float32)
    sample = random_sample(tmp_path, tokens=300, domains=2, seq_length=20, batch_size=3)
    write_traces(tmp_path / "traces", model, runner, sample, torch.float32, lambda _: None)
    shares, drops = (
        duckdb.sql(query.replace("traces/", f"{tmp_path}/traces/")).fetchall()
        for query in QUERY.findall(DOCUMENTATION.read_text())
    )
    first: Counter[tuple[int, str, int]] = Counter()
    tokens: Counter[str] = Counter()
    chosen: Counter[tuple[int, int]] = Counter()
    dropped: Counter[tuple[int, int]] = Counter()
    for batch in sample.batches():
        name, layer = sample.names[batch.domain], runner.run(batch).layers[0]
        tokens[name] += batch.size
        for ids, kept in zip(layer.ids_TK.tolist(), layer.kept_TK.tolist(), strict=True):
            first[1, name, ids[0]] += 1
            chosen.update((1, expert) for expert in ids)
            dropped.update((1, e) for e, has_slot in zip(ids, kept, strict=True) if not has_slot)
    expected = [(*key, first[key] / tokens[key[1]]) for key in sorted(first)]
    assert [row[:3] for row in shares] == [row[:3] for row in expected]
    assert [float(row[3]) for row in shares] == pytest.approx([row[3] for row in expected])
    assert drops == [(*key, chosen[key], dropped[key]) for key in sorted(chosen)]
    assert sum(dropped.values()) > 0

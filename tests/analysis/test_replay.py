"""Choices of a trace forced upon a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megatron_moe.analysis.ablation import ALL, evaluate
from megatron_moe.analysis.model import MoEModel
from megatron_moe.analysis.opening import open_model
from megatron_moe.analysis.replay import Replay, replay_table
from megatron_moe.analysis.sample import Sample
from megatron_moe.analysis.traces import write_traces
from megatron_moe.errors import UsageError
from tests.analysis.expert_cases import KINDS, planted, texts
from tests.analysis.families import make, save
from tests.analysis.planted import random_sample


def _traced(model: MoEModel, sample: Sample, folder: Path) -> Path:
    runner = model.load("cpu", torch.float32)
    write_traces(folder, model, runner, sample, torch.float32, lambda _: None)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_trace_changes_no_loss(tmp_path: Path, kind: str) -> None:
    model, sample = planted(tmp_path, kind), texts(tmp_path, rows=4, batch_size=3)
    folder = _traced(model, sample, tmp_path / "traces")
    runner, steps = model.load("cpu", torch.float32), list[int]()
    table = replay_table(runner, sample, Replay(folder, model, sample), 20, 1, steps.append).columns
    assert sum(steps) == 2 * sample.num_batches
    assert table["domain"] == ["d0", "d1", ALL] and table["same_choices"] == [1.0] * 3
    whole = evaluate(runner, sample)
    for place, name in enumerate(table["domain"]):
        assert table["loss"][place] == whole[name].loss
        assert table["loss_replayed"][place] == pytest.approx(whole[name].loss, rel=1e-5)
        assert table["perplexity_replayed"][place] == pytest.approx(
            whole[name].perplexity, rel=1e-4
        )


@torch.no_grad()
def test_the_choices_of_another_checkpoint_are_made(tmp_path: Path) -> None:
    """Against the class, whose routers are made to return the trace of a model of other weights."""
    (tmp_path / "other").mkdir()
    sample = texts(tmp_path, rows=4, batch_size=3)

    def change(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator()))

    model = planted(tmp_path, "mixtral")
    folder = _traced(planted(tmp_path / "other", "mixtral", change), sample, tmp_path / "traces")
    runner, replay = model.load("cpu", torch.float32), Replay(folder, model, sample)
    table = replay_table(runner, sample, replay, 20, 1, lambda _: None).columns
    assert 0.3 < table["same_choices"][-1] < 0.98
    module, losses = make("mixtral"), []
    for batch in sample.batches():
        trace, handles = replay.of(batch), []
        for number, layer in enumerate(module.model.layers):
            rows = trace.select(trace.layer == number)
            weights = torch.from_numpy(rows.probabilities / rows.probabilities.sum(1)[:, None])
            experts = torch.from_numpy(rows.experts.astype(np.int64))
            handles.append(
                layer.mlp.gate.register_forward_hook(
                    lambda _, given, result, w=weights, e=experts: (result[0], w, e)
                )
            )
        logits = module(torch.from_numpy(batch.tokens_BS), use_cache=False).logits
        labels = torch.from_numpy(batch.next_BS).flatten()
        losses += F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").tolist()
        for handle in handles:
            handle.remove()
    assert table["loss_replayed"][-1] == pytest.approx(float(np.mean(losses)), rel=1e-4)
    assert abs(table["change"][-1]) > 1e-3


def test_other_traces_are_refused(tmp_path: Path) -> None:
    model, sample = planted(tmp_path, "olmoe"), texts(tmp_path, rows=4, batch_size=3)
    folder = _traced(model, sample, tmp_path / "traces")
    with pytest.raises(UsageError, match=r"--routing-replay-dir must be a folder with the trace"):
        Replay(tmp_path, model, sample)
    other = open_model(save(make("mixtral"), tmp_path / "mixtral"))
    with pytest.raises(UsageError, match=r"a trace of 4 experts, 3 choices and MoE layers 0, 1, 2"):
        Replay(folder, other, sample)
    (tmp_path / "more").mkdir()
    tokens = random_sample(tmp_path / "more", tokens=200, seq_length=12, vocab=40)
    with pytest.raises(UsageError, match=r"a trace that tools/analyze_moe\.py wrote of these"):
        Replay(folder, model, tokens)
    sorted(folder.iterdir())[0].unlink()
    with pytest.raises(UsageError, match=r"files of --routing-replay-dir .* must be 4, one for"):
        Replay(folder, model, sample)

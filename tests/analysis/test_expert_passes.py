"""What goes through all experts, and every sum of it, by plain loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from megatron_moe.analysis.collector import Collector, Inputs, make_collector
from megatron_moe.analysis.collectors import expert_passes
from megatron_moe.analysis.collectors.expert_passes import ExpertPasses, chosen_tokens
from megatron_moe.analysis.model import MoEModel, MoERunner
from megatron_moe.analysis.observation import Observation, TokenBatch
from megatron_moe.analysis.sample import Sample
from megatron_moe.analysis.stream import stream
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


def test_chosen_tokens_are_bounded_and_spread(tmp_path: Path, monkeypatch: Any) -> None:
    sample = texts(tmp_path, rows=40, length=30)
    monkeypatch.setattr(expert_passes, "TOKENS", 200)
    monkeypatch.setattr(expert_passes, "LEAST", 10)
    found = chosen_tokens(sample, SEED)
    for domain in (0, 1):
        rows = sorted(row for d, row in found if d == domain)
        assert rows == [row * 40 // 16 for row in range(16)]
        assert sum(each.sampled_N.sum() for (d, _), each in found.items() if d == domain) == 16 * 7
    for (_, row), each in found.items():
        assert each.positions_N[0] == 0 and not each.sampled_N[0] and not each.short_N[0]
        assert (np.diff(each.positions_N) > 0).all()
        short = each.positions_N[each.short_N].tolist()
        assert short == (list(range(1, 9)) if row == 0 else [])
    drawn = np.concatenate([each.positions_N[each.sampled_N] for each in found.values()])
    assert len(np.unique(drawn)) == 29  # every position but the first
    monkeypatch.setattr(expert_passes, "LEAST", 150)
    assert sum(each.sampled_N.sum() for each in chosen_tokens(sample, SEED).values()) == 2 * 16 * 10


def _loops(model: MoEModel, sample: Sample) -> dict[str, Any]:
    """The sums, from inputs and scores of a plain pass, token by token."""
    runner, sizes = model.load("cpu", torch.float32), model.sizes
    chosen, layers = chosen_tokens(sample, SEED), sizes.moe_layers
    count, experts, topk = len(layers), sizes.num_experts, sizes.topk
    sums: dict[str, Any] = {
        "tokens": np.zeros(1),
        "short_D": np.zeros(2),
        "angles_LEE": np.zeros((count, experts, experts)),
        "other_angles_LEE": np.zeros((count, experts, experts)),
        "short_angles_DLEE": np.zeros((2, count, experts, experts)),
        "ranks_LEE": np.zeros((count, experts, experts)),
        "shuffled_LEE": np.zeros((count, experts, experts)),
        "equal_L": np.zeros(count),
        "shuffled_equal_L": np.zeros(count),
        "active_LEF": np.zeros((count, experts, sizes.expert_width)),
        "inner_LEF": np.zeros((count, experts, sizes.expert_width)),
    }
    for name in ("score", "norm", "chosen", "chosen_norm", "seen", "output_max", "inner_max"):
        sums[f"{name}_LE"] = np.zeros((count, experts))
    sums["output_at_LE3"] = np.full((count, experts, 3), -1)
    row_of = {0: 0, 1: 0}
    experts_of = {la: [Matrices(e) for e in model.weights(la).experts] for la in layers}
    for batch in sample.batches():
        seen = runner.run(batch, inputs=layers)
        for r in range(len(batch.tokens_BS)):
            key = (batch.domain, row_of[batch.domain])
            row_of[batch.domain] += 1
            if key not in chosen:
                continue
            each = chosen[key]
            sums["tokens"] += each.sampled_N.sum()
            sums["short_D"][batch.domain] += each.short_N.sum()
            for i, layer in enumerate(layers):
                record = seen.layers[i]
                assert record.inputs_NH is not None
                at = [r * sample.seq_length + int(p) for p in each.positions_N]
                x_NH = record.inputs_NH[at].double().numpy()
                made = [[by_loops(e, x) for e in experts_of[layer]] for x in x_NH]
                outputs = np.array([[one[2] for one in token] for token in made])
                scores = record.router_probs_TE[at].double().numpy()
                kept = [
                    {int(e) for e, k in zip(record.ids_TK[t], record.kept_TK[t], strict=True) if k}
                    for t in at
                ]
                sampled = [n for n in range(len(at)) if each.sampled_N[n]]
                for place, n in enumerate(sampled):
                    after = sampled[(place + 1) % len(sampled)]
                    sums["angles_LEE"][i] += _angles(outputs[n], outputs[n])
                    sums["other_angles_LEE"][i] += _angles(outputs[n], outputs[after])
                    norms = [math.sqrt((o * o).sum()) for o in outputs[n]]
                    _rank(sums, i, scores[n], norms, topk, "ranks_LEE", "equal_L")
                    _rank(sums, i, scores[after], norms, topk, "shuffled_LEE", "shuffled_equal_L")
                    for e in range(experts):
                        sums["score_LE"][i, e] += scores[n, e]
                        sums["norm_LE"][i, e] += norms[e]
                        sums["active_LEF"][i, e] += abs(made[n][e][0]) > 0.001
                        sums["inner_LEF"][i, e] += abs(made[n][e][1])
                        if e in kept[n]:
                            sums["chosen_LE"][i, e] += 1
                            sums["chosen_norm_LE"][i, e] += norms[e]
                for n, place in enumerate(at):
                    if each.short_N[n]:
                        short = sums["short_angles_DLEE"][batch.domain, i]
                        short += _angles(outputs[n], outputs[n])
                    for e in kept[n]:
                        sums["seen_LE"][i, e] += 1
                        inner = float(np.abs(made[n][e][1]).max())
                        sums["inner_max_LE"][i, e] = max(sums["inner_max_LE"][i, e], inner)
                        largest = float(np.abs(outputs[n, e]).max())
                        if largest > sums["output_max_LE"][i, e]:
                            sums["output_max_LE"][i, e] = largest
                            sums["output_at_LE3"][i, e] = (
                                int(np.abs(outputs[n, e]).argmax()),
                                int(batch.tokens_BS.ravel()[place]),
                                int(each.positions_N[n]),
                            )
    return sums


def _angles(first: Any, second: Any) -> Any:
    found = np.zeros((len(first), len(second)))
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            cosine = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
            found[i, j] = 1 - math.acos(max(-1.0, min(1.0, cosine))) / math.pi
    return found


def _rank(
    sums: Any, i: int, scores: Any, norms: list[float], topk: int, counts: str, equal: str
) -> None:
    by_score = sorted(range(len(norms)), key=lambda e: -scores[e])
    by_norm = sorted(range(len(norms)), key=lambda e: -norms[e])
    for rank, e in enumerate(by_score):
        sums[counts][i, rank, by_norm.index(e)] += 1
    sums[equal][i] += set(by_score[:topk]) == set(by_norm[:topk])


@pytest.mark.parametrize("kind", KINDS)
def test_every_sum_against_loops(tmp_path: Path, kind: str) -> None:
    model = planted(tmp_path, kind)
    sample = texts(tmp_path, rows=5, length=8, batch_size=2)
    found = cast(
        ExpertPasses, passed(model, sample, ["expert_passes"], tmp_path)[0]["expert_passes"]
    ).state()
    expected = _loops(model, sample)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
    assert found["tokens"][0] == 2 * 5 * 7


def test_sums_do_not_depend_on_the_batches_and_go_on(tmp_path: Path) -> None:
    model = planted(tmp_path, "olmoe")
    states = []
    for size in (1, 4, 100):
        (tmp_path / str(size)).mkdir()
        sample = texts(tmp_path / str(size), rows=20, length=10, batch_size=size)
        made, runner = passed(model, sample, ["expert_passes"], tmp_path / str(size))
        states.append(made["expert_passes"].state())
    for other in states[1:]:
        for name, value in states[0].items():
            np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    setting = setting_of(model, sample)
    first, second = (make_collector("expert_passes", setting) for _ in range(2))
    for batch in sample.batches():
        if batch.number == 1:
            second.restore({k: v.copy() for k, v in first.state().items()})
        each = second if batch.number >= 1 else first
        wanted = each.inputs_for(batch)
        inputs, places = (wanted.layers, wanted.places_N) if wanted else ((), np.zeros(0, int))
        each.add(runner.run(batch, inputs=inputs, places=torch.from_numpy(places)), runner)
    for name, value in states[-1].items():
        np.testing.assert_array_equal(second.state()[name], value, err_msg=name)


def test_inputs_are_recorded_only_where_they_are_read(tmp_path: Path) -> None:
    model, sample = planted(tmp_path, "olmoe"), texts(tmp_path, rows=64, length=6, batch_size=1)
    collector = make_collector("expert_passes", setting_of(model, sample))
    read = [batch.number for batch in sample.batches() if collector.inputs_for(batch)]
    assert read == [d * 64 + row * 4 for d in (0, 1) for row in range(16)]


@pytest.mark.parametrize("kind", ["olmoe", "native"])
def test_only_inputs_of_chosen_tokens_stay_in_memory(tmp_path: Path, kind: str) -> None:
    """In every layer of every batch, and with no larger storage behind them."""
    model, sample = planted(tmp_path, kind), texts(tmp_path, rows=20, length=30, batch_size=8)
    runner, setting = model.load("cpu", torch.float32), setting_of(model, sample)
    seen: list[Observation] = []

    class Watched(type(runner)):  # type: ignore[misc]
        def run(self, *given: Any, **named: Any) -> Observation:
            seen.append(super().run(*given, **named))
            return seen[-1]

    runner.__class__ = Watched
    made = {"expert_passes": make_collector("expert_passes", setting)}
    stream(runner, sample, made, state=tmp_path / "s", fingerprint="", advance=lambda _: None)
    chosen = chosen_tokens(sample, SEED)
    assert sum(len(each.layers[0].inputs_NH) for each in seen if has_inputs(each)) == sum(
        len(each.positions_N) for each in chosen.values()
    )
    for each in filter(has_inputs, seen):
        for layer in each.layers:
            assert layer.inputs_NH is not None
            assert len(layer.inputs_NH) < each.batch.size
            own = layer.inputs_NH.numel() * layer.inputs_NH.element_size()
            assert layer.inputs_NH.untyped_storage().nbytes() == own
    bound = expert_passes.TOKENS + 2 * expert_passes.ROWS * (1 + expert_passes.SHORT)
    assert sum(len(each.positions_N) for each in chosen.values()) <= bound


def has_inputs(seen: Observation) -> bool:
    return seen.layers[0].inputs_NH is not None


def test_collectors_that_read_other_tokens_get_their_own(tmp_path: Path) -> None:
    """One with all layers and odd tokens beside `expert_passes`, whose sums do not change."""
    model, sample = planted(tmp_path, "olmoe"), texts(tmp_path, rows=5, length=9, batch_size=3)
    runner, setting = model.load("cpu", torch.float32), setting_of(model, sample)

    class Odd(Collector):
        count = 0

        def inputs_for(self, batch: TokenBatch) -> Inputs:
            return Inputs((0, 2), np.arange(1, batch.size, 2))

        def add(self, seen: Observation, runner: MoERunner) -> None:
            whole = runner.run(seen.batch, inputs=(0, 2))
            for layer in (0, 2):
                own, every = seen.layers[layer].inputs_NH, whole.layers[layer].inputs_NH
                assert own is not None and every is not None
                assert torch.equal(own, every[1::2])
            self.count += 1

    odd = Odd()
    alone, _ = passed(model, sample, ["expert_passes"], tmp_path / "alone")
    made = {"odd": odd, "expert_passes": make_collector("expert_passes", setting)}
    stream(runner, sample, made, state=tmp_path / "s", fingerprint="", advance=lambda _: None)
    assert odd.count == sample.num_batches
    for name, value in alone["expert_passes"].state().items():
        np.testing.assert_array_equal(made["expert_passes"].state()[name], value, err_msg=name)

"""The collectors of routing choices: plain loops, any batch size, and continuation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe.analysis.collector import Setting, make_collector
from megatron_moe.analysis.collectors import choices, positions, tokens
from megatron_moe.analysis.observation import TokenBatch
from tests.analysis.planted import (
    Ids,
    PlantedModel,
    collected,
    random_rule,
    random_sample,
    sample_of,
)

NAMES = (
    *("domains", "positions", "tokens", "coactivation"),
    *("flow", "load", "choices", "locality"),
)
E, K, S = 6, 2, 8


def _kept(batch: TokenBatch, layer: int) -> np.ndarray:
    """Drops that differ between positions, ranks and layers."""
    t = np.arange(batch.size)[:, None]
    return ((t % S) * 3 + np.arange(K) + layer) % 4 > 0


def _model(**changes: object) -> PlantedModel:
    return PlantedModel(random_rule(E, K), experts=E, topk=K, layers=(1, 3), kept=_kept)


def test_sums_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    states = []
    for size in (1, 4, 1000):
        (tmp_path / str(size)).mkdir()
        sample = random_sample(
            tmp_path / str(size), tokens=200, domains=2, batch_size=size, seq_length=S
        )
        found = collected(_model(), sample, NAMES)
        states.append({f"{n}/{k}": v for n, c in found.items() for k, v in c.state().items()})
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        for name, value in states[0].items():
            if value.dtype == np.float64:
                np.testing.assert_allclose(other[name], value, rtol=1e-12, err_msg=name)
            else:
                np.testing.assert_array_equal(other[name], value, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_collector_goes_on(name: str, tmp_path: Path) -> None:
    model, sample = (
        _model(),
        random_sample(tmp_path, tokens=400, domains=2, seq_length=S, batch_size=3),
    )
    setting = Setting(sizes=model.sizes, sample=sample, layers=(1, 3), seed=1)
    runner = model.load("cpu", torch.float32)
    first, second = make_collector(name, setting), make_collector(name, setting)
    for batch in sample.batches():
        if batch.number == 7:
            second.restore({k: v.copy() for k, v in first.state().items()})
        each = first if batch.number < 7 else second
        each.add(runner.run(batch, predictions=True), runner)
    expected = collected(model, sample, [name])[name].state()
    assert second.state().keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(second.state()[key], value, err_msg=key)


def test_every_sum_against_loops(tmp_path: Path) -> None:
    model, sample = _model(), random_sample(tmp_path, tokens=500, domains=2, vocab=9, seq_length=S)
    found = {name: c.state() for name, c in collected(model, sample, NAMES).items()}
    runner, own = model.load("cpu", torch.float32), _Loops(found)
    for batch in sample.batches():
        seen = runner.run(batch, predictions=True)
        ids_LTK = np.stack([layer.ids_TK.numpy() for layer in seen.layers])
        kept_LTK = np.stack([layer.kept_TK.numpy() for layer in seen.layers])
        assert seen.predicted_T is not None
        for t in range(batch.size):
            own.add(batch, t, ids_LTK[:, t], kept_LTK[:, t], int(seen.predicted_T[t]))
    for place, counted in own.sums.items():
        name, key = place.split("/")
        np.testing.assert_array_equal(counted, found[name][key], err_msg=place)


class _Loops:
    """The same sums, one token at a time."""

    def __init__(self, found: dict[str, dict[str, np.ndarray]]) -> None:
        self.ids = found["tokens"]["ids_V"].tolist()
        self.sums = {
            f"{name}/{key}": np.zeros_like(value)
            for name, state in found.items()
            if name not in ("choices", "locality")
            for key, value in state.items()
            if value.dtype != np.float64
            and key not in ("ids_V", "tokens_DG")
            and not key.endswith("DGE")
        }

    def add(self, batch: TokenBatch, t: int, ids: Ids, kept: Ids, predicted: int) -> None:
        sums, d = self.sums, batch.domain
        p = t % S
        sums["positions/tokens_DP"][d, p] += 1
        sums["coactivation/tokens_1"] += 1
        sums["load/tokens_1"] += 1
        flat = (batch.tokens_BS.reshape(-1), batch.next_BS.reshape(-1))
        kinds = {"input": flat[0][t], "next": flat[1][t], "predicted": predicted}
        rows = {k: self.ids.index(v) if v in self.ids else len(self.ids) for k, v in kinds.items()}
        for kind, row in rows.items():
            sums[f"tokens/{kind}_V"][row] += 1
        for layer in range(len(ids)):
            gone = [r for r in range(K) if not kept[layer, r]]
            sums["positions/any_LDP"][layer, d, p] += len(gone) > 0
            sums["positions/all_LDP"][layer, d, p] += len(gone) == K
            for rank in gone:
                sums["positions/dropped_LDK"][layer, d, rank] += 1
            for rank, e in enumerate(ids[layer]):
                sums["positions/chosen_LPE"][layer, p, e] += 1
                sums["domains/kept_LDE"][layer, d, e] += kept[layer, rank]
                sums["load/kept_LE"][layer, e] += kept[layer, rank]
                sums["load/chosen_LE"][layer, e] += 1
                sums["load/first_LE"][layer, e] += rank == 0
                for kind, row in rows.items():
                    sums[f"tokens/{kind}_chosen_LVE"][layer, row, e] += 1
                    sums[f"tokens/{kind}_first_LVE"][layer, row, e] += rank == 0
                for other_rank, other in enumerate(ids[layer]):
                    sums["coactivation/pairs_LEE"][layer, e, other] += 1
                    sums["coactivation/adjacent_LEE"][layer, e, other] += other_rank == rank + 1
                if layer == 0:
                    for other_rank, other in enumerate(ids[1]):
                        sums["flow/all_MEE"][0, e, other] += 1
                        sums["flow/slots_MEE"][0, e, other] += other_rank == rank
                        sums["flow/first_MEE"][0, e, other] += other_rank == rank == 0


def test_blocks_of_a_domain_add_up_to_it(tmp_path: Path) -> None:
    """At most 64 blocks of 70 rows: two rows each. Three rows: one and a half."""
    texts = {"long": [[1] * (70 * S + 1)], "short": [[2] * (3 * S + 1)]}
    found = collected(_model(), sample_of(tmp_path, texts, seq_length=S), ["domains", "load"])
    blocks, load = found["domains"].state(), found["load"].state()
    assert blocks["tokens_DG"][1].tolist() == [2 * S, S] + [0] * 33
    assert blocks["tokens_DG"][0].tolist() == [2 * S] * 35
    assert blocks["tokens_DG"].sum(1).tolist() == [70 * S, 3 * S]
    np.testing.assert_array_equal(blocks["chosen_LDGE"].sum((1, 2)), load["chosen_LE"])
    np.testing.assert_array_equal(blocks["first_LDGE"].sum((1, 2)), load["first_LE"])
    np.testing.assert_array_equal(
        blocks["chosen_LDGE"].sum(3), K * np.tile(blocks["tokens_DG"], (2, 1, 1))
    )


def test_blocks_are_neighbouring_rows(tmp_path: Path) -> None:
    """Rows have ids 1 to 70; the first 36 choose expert 0 and fill the first 18 of 35 blocks."""

    def rule(batch: TokenBatch, layer: int) -> Ids:
        return (batch.tokens_BS.reshape(-1, 1) > 36).astype(np.int64)

    texts = {"long": [[1 + i // S for i in range(70 * S + 1)]]}
    sample = sample_of(tmp_path, texts, seq_length=S)
    found = collected(PlantedModel(rule, experts=2, topk=1), sample, ["domains"])["domains"]
    first_GE = found.state()["first_LDGE"][0, 0]
    assert (first_GE[:18, 0] > 0).all() and not first_GE[:18, 1].any()
    assert (first_GE[18:, 1] > 0).all() and not first_GE[18:, 0].any()


def test_stored_choices_are_those_of_evenly_spread_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 rows, 16 of which may be stored: every third row of each domain."""
    monkeypatch.setattr(choices, "MOST_TOKENS", 16 * S)
    texts = {"a": [list(range(25 * S + 1))], "b": [list(range(300, 300 + 15 * S + 1))]}
    sample = sample_of(tmp_path, texts, seq_length=S, batch_size=4)
    rule = random_rule(E, K)
    found = collected(PlantedModel(rule, experts=E, topk=K), sample, ["choices"])["choices"].state()
    rows = [*range(0, 25, 3)], [*range(0, 15, 3)]
    expected = [r * S + i for r in rows[0] for i in range(S)]
    expected += [300 + r * S + i for r in rows[1] for i in range(S)]
    assert found["tokens_T"].tolist() == expected
    assert found["domains_T"].tolist() == [0] * len(rows[0]) * S + [1] * len(rows[1]) * S
    assert found["ids_LTK"].dtype == np.uint8
    whole = [rule(batch, 1) for batch in sample.batches()]
    every = np.concatenate(whole).reshape(40, S, K)
    own = every[[*rows[0], *(25 + r for r in rows[1])]].reshape(-1, K)
    np.testing.assert_array_equal(found["ids_LTK"][1], own)


def test_locality_of_a_row_worked_by_hand(tmp_path: Path) -> None:
    """Experts {0, 1} four times, then {2, 3} four times; a document ends after six tokens.

    Distance 1: 6 pairs within documents (5 and 1). All but tokens 3 and 4 share both experts, so 10
    experts are shared.
    """
    texts = {"a": [[1, 2, 3, 4, 5, 6], [7, 8, 9]]}

    def rule(batch: TokenBatch, layer: int) -> Ids:
        return np.array([[0, 1]] * 4 + [[2, 3]] * 4)

    model = PlantedModel(rule, experts=E, topk=K)
    found = collected(model, sample_of(tmp_path, texts), ["locality"])["locality"].state()
    assert found["pairs_J"].tolist() == [6, 4, 2, 0, 0, 0, 0]
    assert found["shared_LJ"][0].tolist() == [10, 4, 0, 0, 0, 0, 0]
    # Ordered pairs: 6 * 5 + 2 * 1. Shared: 4 * 3 * 2 experts, and twice 2 * 1 * 2.
    assert found["any_pairs_1"].tolist() == [32]
    assert found["any_shared_L"].tolist() == [32, 32]
    assert found["segment_choices_Q"].tolist() == [16, 0, 0]
    assert found["covered_LQC"][0].tolist() == [[16, 16], [0, 0], [0, 0]]


def test_rows_of_one_document_are_apart(tmp_path: Path) -> None:
    """Two rows: 8 * 7 ordered pairs in each, and none between them."""

    def rule(batch: TokenBatch, layer: int) -> Ids:
        return np.tile([0, 1], (batch.size, 1))

    sample = sample_of(tmp_path, {"a": [[1] * 17]}, seq_length=S)
    found = collected(PlantedModel(rule, experts=E, topk=K), sample, ["locality"])["locality"]
    assert found.state()["any_pairs_1"].tolist() == [2 * 8 * 7]
    assert found.state()["any_shared_L"].tolist() == [2 * 8 * 7 * K] * 2
    assert found.state()["pairs_J"].tolist() == [2 * 7, 2 * 6, 2 * 4, 0, 0, 0, 0]


def test_large_tables_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ids have rows, the most frequent ones; two positions share a bucket."""
    monkeypatch.setattr(tokens, "MOST_BYTES", 24 * 2 * E * 4)
    monkeypatch.setattr(positions, "MOST_BYTES", 8 * 2 * E * (S // 2))
    texts = {"a": [[5] * 9 + [3] * 8 + [7] * 6 + [1] * 5 + [2] * 5]}
    found = collected(_model(), sample_of(tmp_path, texts, seq_length=S), ["tokens", "positions"])
    assert found["tokens"].state()["ids_V"].tolist() == [3, 5, 7]
    assert found["tokens"].state()["input_V"].tolist() == [8, 9, 6, 9]
    assert found["positions"].state()["tokens_DP"].tolist() == [[8, 8, 8, 8]]

"""Every value of the papers' figures and tables, counted again from the rows of a trace.

Two checkpoints of a planted run choose by token id, position and domain, and drop some choices. The
trace is written as tools/analyze_moe.py writes it and read row by row with pyarrow; only what
follows a token and what is predicted, which a trace does not have, is taken from the sample.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pyarrow.parquet
import pytest
import torch

from megatron_moe.analysis.base import all_analyses
from megatron_moe.analysis.figures.olmoe_vocabulary import EXPERTS as SHOWN
from megatron_moe.analysis.model import MoEModel
from megatron_moe.analysis.observation import TokenBatch
from megatron_moe.analysis.paper import Drawn, Given, papers
from megatron_moe.analysis.plot import Bars, Flow, Lines, Radar
from megatron_moe.analysis.result import Result
from megatron_moe.analysis.sample import Sample
from megatron_moe.analysis.traces import write_traces
from tests.analysis.planted import Ids, PlantedModel, random_rule, result_of, sample_of

E, K, S, LAYERS = 62, 3, 16, (1, 3, 5, 7)
THIRD = LAYERS[2]
NAMES = ("web", "books", "language/de", "programming/python", "task/math", "task/writing")


@dataclass(frozen=True)
class _Row:
    """A token in a layer."""

    sample: int
    position: int
    id: int
    next: int
    predicted: int
    experts: tuple[int, ...]
    kept: tuple[bool, ...]
    domain: str


Trace = dict[int, list[_Row]]
"""Rows by layer, in the order of the sample."""


def _model(label: str, step: int) -> PlantedModel:
    """Half of the tokens go where their id says, the others anywhere; later steps, more of them."""
    any_of = random_rule(E, K)

    def rule(batch: TokenBatch, layer: int) -> Ids:
        ids = batch.tokens_BS.reshape(-1)
        ids_TK = any_of(batch, layer)
        fixed = (ids[:, None] * 7 + layer + 5 * np.arange(K)) % E
        follows = (np.arange(batch.size) * 7 + ids) % 4 < 1 + step // 100
        return np.where(follows[:, None], fixed, ids_TK)

    def kept(batch: TokenBatch, layer: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        place = np.tile(np.arange(S), len(batch.tokens_BS))
        ids = batch.tokens_BS.reshape(-1)
        drops = (ids * 3 + batch.domain)[:, None] % (S + np.arange(K)) < (place // 4)[:, None]
        return np.asarray(~drops)

    return PlantedModel(rule, experts=E, topk=K, layers=LAYERS, step=step, label=label, kept=kept)


MODELS = [_model("run@100", 100), _model("run@200", 200)]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    rng = np.random.default_rng(2)
    texts = {
        name.replace("/", "-"): [(rng.integers(14, size=40 * S + 1) ** 2 // 9 + 4 * i).tolist()]
        for i, name in enumerate(NAMES)
    }
    found = sample_of(tmp_path_factory.mktemp("data"), texts, seq_length=S, batch_size=7)
    named = [replace(d, name=name) for d, name in zip(found.domains, NAMES, strict=True)]
    return replace(found, domains=tuple(named))


@pytest.fixture(scope="module")
def given(sample: Sample) -> Given:
    known = all_analyses()
    keys = {key for name in ("openmoe", "olmoe") for key in papers()[name].needs}
    results: dict[str, Mapping[str, Result]] = {
        key: {model.label: result_of(known[key], model, sample, draws=2) for model in MODELS}
        for key in keys
    }
    models = cast("list[MoEModel]", MODELS)
    return Given(models=models, sample=sample, results=results, analyses=known)


@pytest.fixture(scope="module")
def traces(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trace]:
    """By label of the checkpoint."""
    after = np.concatenate([batch.next_BS for batch in sample.batches()])
    found = {}
    for model in MODELS:
        folder, runner = tmp_path_factory.mktemp("trace"), model.load("cpu", torch.float32)
        write_traces(folder, model, runner, sample, torch.float32, lambda _: None)
        rows: Trace = defaultdict(list)
        for path in sorted(folder.iterdir()):
            for one in pyarrow.parquet.read_table(path).to_pylist():
                following = int(after[one["sample"], one["position"]])
                row = _Row(
                    sample=one["sample"],
                    position=one["position"],
                    id=one["token_id"],
                    next=following,
                    predicted=(following + 1) % 1000,  # as the planted model predicts
                    experts=tuple(one["experts"]),
                    kept=tuple(one["kept"]),
                    domain=one["domain"],
                )
                rows[one["layer"]].append(row)
        found[model.label] = rows
    return found


def _drawn(given: Given, paper: str, number: str) -> Drawn:
    (entry,) = (each for each in papers()[paper].entries if each.number == number)
    return entry.draw(given)


def _percent(rows: list[_Row], first: bool = False) -> list[float]:
    """Tokens of each expert."""
    counts = Counter(e for row in rows for e in row.experts[: 1 if first else None])
    return [100 * counts[e] / len(rows) for e in range(E)]


def _of(rows: list[_Row], name: str, value: Any) -> list[_Row]:
    return [row for row in rows if getattr(row, name) == value]


def _frequent(rows: list[_Row]) -> dict[int, int]:
    """Ids that occur more than 128 times, or less if fewer than ten do, and how often."""
    counts = Counter(row.id for row in rows)
    levels = (129, 64, 32, 16)
    least = next((n for n in levels if sum(c >= n for c in counts.values()) >= 10), 16)
    return {i: n for i, n in counts.items() if n >= least}


@pytest.mark.parametrize(
    ("number", "names"),
    [
        ("Figure 5", ("web", "books")),
        ("Figure 6", ("programming/python",)),
        ("Figure 7", ("language/de",)),
        ("Figure 8", ("task/math", "task/writing")),
    ],
)
def test_datasets_of_openmoe(
    given: Given, traces: dict[str, Trace], number: str, names: tuple[str, ...]
) -> None:
    figures = _drawn(given, "openmoe", number).figures
    for (_, trace), figure in zip(traces.items(), figures, strict=True):
        panel = figure.panels[f"layer {THIRD}"]
        assert isinstance(panel, Radar)
        assert [each.name for each in panel.series] == [name.split("/")[-1] for name in names]
        for name, series in zip(names, panel.series, strict=True):
            np.testing.assert_allclose(series.y, _percent(_of(trace[THIRD], "domain", name)))


def test_token_ids_of_openmoe(given: Given, traces: dict[str, Trace]) -> None:
    """Figure 10: the eight ids with the largest deviation of the 30 most frequent."""
    for (_, trace), figure in zip(
        traces.items(), _drawn(given, "openmoe", "Figure 10").figures, strict=True
    ):
        rows = trace[THIRD]
        counts = _frequent(rows)
        frequent = sorted(counts, key=lambda i: (-counts[i], i))[:30]
        share = {i: np.array(_percent(_of(rows, "id", i))) / K for i in frequent}
        panel = figure.panels[f"layer {THIRD}"]
        assert isinstance(panel, Radar)
        shown = {int(each.name.strip("“<>”")): np.asarray(each.y) for each in panel.series}
        assert len(shown) == 8
        for i, values in shown.items():
            np.testing.assert_allclose(values, share[i])
        least = min(np.std(share[i]) for i in shown)
        assert all(np.std(share[i]) <= least + 1e-9 for i in frequent if i not in shown)


def test_training_of_openmoe(given: Given, traces: dict[str, Trace]) -> None:
    """Figure 11: two ids, and a line of each for every checkpoint."""
    (figure,) = _drawn(given, "openmoe", "Figure 11").figures
    assert len(figure.panels) == 2
    for name, panel in figure.panels.items():
        assert isinstance(panel, Radar)
        i = int(name.strip("“<>”"))
        assert [series.name for series in panel.series] == list(traces)
        for series, trace in zip(panel.series, traces.values(), strict=True):
            own = np.array(_percent(_of(trace[THIRD], "id", i)))
            np.testing.assert_allclose(series.y, own / K)
        assert not np.allclose(panel.series[0].y, panel.series[1].y)


def test_drops_of_openmoe(given: Given, traces: dict[str, Trace]) -> None:
    """Figure 12: a line for each dataset, and for each checkpoint the mean of the datasets."""
    *single, together = _drawn(given, "openmoe", "Figure 12").figures
    rules = {"at least one choice dropped": all, "all choices dropped": any}
    for words, rule in rules.items():
        for at, ((_, trace), figure) in enumerate(zip(traces.items(), single, strict=True)):
            panel, means = figure.panels[words], together.panels[words]
            assert isinstance(panel, Lines) and isinstance(means, Lines)
            assert list(panel.series[0].x) == list(range(S))
            expected = []
            for series in panel.series:
                rows = _of(trace[THIRD], "domain", series.name)
                lost = [[not rule(row.kept) for row in _of(rows, "position", p)] for p in range(S)]
                expected.append([100 * np.mean(each) for each in lost])
                np.testing.assert_allclose(series.y, expected[-1])
            assert len(expected) == len(NAMES) and np.any(expected)
            np.testing.assert_allclose(means.series[at].y, np.mean(expected, axis=0))


@pytest.mark.parametrize(("number", "name"), [("Figure 13", "position"), ("Figure 14", "id")])
def test_deviations_of_openmoe(
    given: Given, traces: dict[str, Trace], number: str, name: str
) -> None:
    """Of every position, and of every frequent id."""
    for (_, trace), figure in zip(
        traces.items(), _drawn(given, "openmoe", number).figures, strict=True
    ):
        rows = trace[THIRD]
        used = list(range(S)) if name == "position" else sorted(_frequent(rows))
        expected = [np.std(_percent(_of(rows, name, v))) / (100 * K) for v in used]
        panel = figure.panels[f"layer {THIRD}"]
        assert isinstance(panel, Lines)
        np.testing.assert_allclose(panel.series[0].y, expected)
        assert [each.value for each in panel.references] == pytest.approx([0, np.mean(expected)])


def test_top_tokens_of_openmoe(given: Given, traces: dict[str, Trace]) -> None:
    """Tables 9 and 15: the ten ids that make up most of an expert's choices."""
    tables = _drawn(given, "openmoe", "Table 9 and table 15").tables
    for (_, trace), table in zip(traces.items(), tables, strict=True):
        counts: dict[int, Counter[int]] = defaultdict(Counter)
        for row in trace[THIRD]:
            for expert in row.experts:
                counts[expert][row.id] += 1
        assert table.columns["expert"] == sorted(counts)
        listed = zip(table.columns["expert"], table.columns["top_tokens"], strict=True)
        for expert, text in listed:
            order = sorted(counts[expert].items(), key=lambda item: (-item[1], item[0]))[:10]
            assert text == ", ".join(f"“<{i}>”" for i, _ in order)


def test_saturation_of_olmoe(given: Given, traces: dict[str, Trace]) -> None:
    """Figure 20, for the first choice and for all."""
    panels = _drawn(given, "olmoe", "Figure 20").figures[0].panels
    early, late = traces.values()
    for count in (1, K):
        panel = panels[f"Top-k={count}"]
        assert isinstance(panel, Lines)
        for layer, series in zip(LAYERS, panel.series, strict=True):
            same = [
                len(set(a.experts[:count]) & set(b.experts[:count])) / count
                for a, b in zip(early[layer], late[layer], strict=True)
            ]
            assert list(series.x) == [50.0] and 0.2 < np.mean(same) < 0.9
            np.testing.assert_allclose(series.y, [100 * np.mean(same)])


@pytest.mark.parametrize(
    ("number", "first"), [("Figure 22", False), ("Figures 33 to 36, domains", True)]
)
def test_domains_of_olmoe(given: Given, traces: dict[str, Trace], number: str, first: bool) -> None:
    for (_, trace), figure in zip(
        traces.items(), _drawn(given, "olmoe", number).figures, strict=True
    ):
        assert list(figure.panels) == [f"Layer {LAYERS[i]}" for i in (0, 1, 3)]
        for name, panel in figure.panels.items():
            assert isinstance(panel, Bars)
            assert [series.name for series in panel.series] == list(NAMES)
            for series in panel.series:
                rows = _of(trace[int(name.split()[1])], "domain", series.name)
                np.testing.assert_allclose(series.y, _percent(rows, first))


def test_flows_of_olmoe(given: Given, traces: dict[str, Trace]) -> None:
    """The 40 largest of each kind."""
    figures = iter(_drawn(given, "olmoe", "Figures 33 to 36, flow").figures)
    for trace in traces.values():
        for what in ("slots", "all", "first"):
            for at, panel in enumerate(next(figures).panels.values()):
                assert isinstance(panel, Flow)
                counts: Counter[tuple[int, int]] = Counter()
                pairs = zip(trace[LAYERS[at]], trace[LAYERS[at + 1]], strict=True)
                for one, other in pairs:
                    if what == "all":
                        counts.update((i, j) for i in one.experts for j in other.experts)
                    else:
                        same = list(zip(one.experts, other.experts, strict=True))
                        counts.update(same if what == "slots" else same[:1])
                (found,) = panel.flows
                least = sorted(counts.values())[-40]
                expected = {pair: n for pair, n in counts.items() if n >= least}
                assert {pair: n for pair, n in np.ndenumerate(found) if n} == expected
    assert next(figures, None) is None


def _favourites(rows: list[_Row], name: str, first: bool, least: int) -> dict[int, list[float]]:
    """Shares of the ids that have an expert as their favourite, by expert."""
    listed = {row.id for row in rows}
    chosen: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for row in rows:
        if getattr(row, name) in listed:
            chosen[getattr(row, name)].append(row.experts[: 1 if first else None])
    found: dict[int, list[float]] = defaultdict(list)
    for each in chosen.values():
        if len(each) >= least:
            counts = Counter(e for experts in each for e in experts)
            best = min(counts, key=lambda e: (-counts[e], e))
            found[best].append(counts[best] / len(each))
    return found


@pytest.mark.parametrize(("number", "first"), [("Figure 23", True), ("Figures 30 and 31", False)])
def test_vocabulary_of_olmoe(
    given: Given, traces: dict[str, Trace], number: str, first: bool
) -> None:
    figures = iter(_drawn(given, "olmoe", number).figures)
    kinds = {
        "Input token ID": "id",
        "Ground-truth output token ID": "next",
        "Predicted output token ID": "predicted",
    }
    for trace in traces.values():
        by_layer, by_expert = next(figures).panels, next(figures).panels
        for (name, panel), least in zip(by_layer.items(), (1, 10), strict=True):
            assert isinstance(panel, Lines) and ("10" in name) == (least == 10)
            for series in panel.series[::2]:
                expected = [
                    100
                    * np.mean(
                        [
                            share
                            for shares in _favourites(
                                trace[layer], kinds[series.name], first, least
                            ).values()
                            for share in shares
                        ]
                    )
                    for layer in LAYERS
                ]
                np.testing.assert_allclose(series.y, expected)
        published, own, exact = by_expert.values()
        for panel, least in ((published, 1), (own, 1), (exact, 10)):
            assert isinstance(panel, Bars)
            for series in panel.series:
                assert list(series.x) == [str(expert) for expert in SHOWN]
                found = _favourites(trace[LAYERS[1]], kinds[series.name], first, least)
                means = {e: 100 * np.mean(shares) for e, shares in found.items()}
                every = [share for shares in found.values() for share in shares]
                (line,) = (r for r in panel.references if r.label == f"mean, {series.name}")
                assert line.value == pytest.approx(100 * np.mean(every))
                # As published, bars of outputs are those of experts 0 to 11.
                outputs = panel is published and series.name != "Input token ID"
                experts = range(len(SHOWN)) if outputs else SHOWN
                np.testing.assert_allclose(series.y, [means.get(e, np.nan) for e in experts])
        for at in (1, 2):
            bars = [np.asarray(panel.series[at].y) for panel in (published, own)]  # type: ignore
            assert not np.array_equal(*bars, equal_nan=True)


def test_shares_of_ids_of_olmoe(given: Given, traces: dict[str, Trace]) -> None:
    """Figure 32, in the last layer."""
    for (_, trace), figure in zip(
        traces.items(), _drawn(given, "olmoe", "Figure 32").figures, strict=True
    ):
        rows = trace[LAYERS[-1]]
        occurrences = Counter(row.id for row in rows)
        assert list(figure.panels) == ["Expert 0", "Expert 4", "Expert 7"]
        for name, panel in figure.panels.items():
            assert isinstance(panel, Bars)
            chosen = Counter(row.id for row in rows if int(name.split()[1]) in row.experts)
            bins = [min(n * 20 // occurrences[i], 19) for i, n in chosen.items() if n >= 8]
            expected = [100 * bins.count(b) / max(1, len(bins)) for b in range(20)]
            np.testing.assert_allclose(panel.series[0].y, expected)
        assert any(np.any(panel.series[0].y) for panel in figure.panels.values())  # type: ignore


def test_tokens_of_experts_of_olmoe(given: Given, traces: dict[str, Trace]) -> None:
    """Table 8: the five most faithful ids with at least 10 occurrences."""
    tables = _drawn(given, "olmoe", "Table 8").tables
    for (_, trace), table in zip(traces.items(), tables, strict=True):
        rows = trace[LAYERS[1]]
        listed = {row.id for row in rows}
        for column, name in (("input_token_ids", "id"), ("predicted_token_ids", "predicted")):
            number = Counter(v for row in rows if (v := getattr(row, name)) in listed)
            for expert, text in zip(table.columns["expert"], table.columns[column], strict=True):
                counts = Counter(getattr(r, name) for r in rows if expert in r.experts)
                share = {i: n / number[i] for i, n in counts.items() if number[i] >= 10}
                order = sorted(share.items(), key=lambda item: (-item[1], item[0]))[:5]
                assert text == ", ".join(f"“<{i}>” ({100 * each:.0f}%)" for i, each in order)

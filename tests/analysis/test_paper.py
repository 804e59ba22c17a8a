"""The papers' figures: values against counts by hand, and what is said where data are missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from megatron_moe.analysis.base import all_analyses
from megatron_moe.analysis.figures.olmoe import strongest
from megatron_moe.analysis.figures.olmoe_vocabulary import named_figure, shown_layers
from megatron_moe.analysis.model import MoEModel
from megatron_moe.analysis.observation import TokenBatch
from megatron_moe.analysis.paper import Drawn, Given, Missing, papers
from megatron_moe.analysis.plot import Bars, Flow, Heatmap, Lines, Radar
from megatron_moe.analysis.report import write_report
from megatron_moe.analysis.result import Result
from megatron_moe.analysis.sample import Sample
from tests.analysis.planted import Ids, PlantedModel, result_of, sample_of, token_rule

EXPERTS, TOPK, LAYERS = 8, 3, (1, 3, 5, 7)
ROUTING = ("domains", "coactivation", "flow", "positions", "tokens", "drops", "vocabulary")


def planted(label: str = "run@100", step: int = 100) -> PlantedModel:
    """A model with four MoE layers that drops the last choice of later positions."""

    def kept(batch: TokenBatch, layer: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        found = np.ones((batch.size, TOPK), bool)
        late = np.tile(np.arange(batch.tokens_BS.shape[1]) >= 8, len(batch.tokens_BS))
        found[late, TOPK - 1] = False
        return found

    rule = token_rule(EXPERTS, TOPK)
    return PlantedModel(
        rule, experts=EXPERTS, topk=TOPK, layers=LAYERS, step=step, label=label, kept=kept
    )


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Three domains of few ids each, one of them a language."""
    rng = np.random.default_rng(2)
    documents = {
        name: (rng.integers(12, size=(30, 40)) + shift).tolist()
        for name, shift in (("web", 0), ("books", 3), ("de", 6))
    }
    found = sample_of(tmp_path_factory.mktemp("data"), documents, seq_length=16)
    named = [replace(d, name="language/de") if d.name == "de" else d for d in found.domains]
    return replace(found, domains=tuple(named))


@pytest.fixture(scope="module")
def given(sample: Sample) -> Given:
    models = [planted(), planted("run@200", 200)]
    known = all_analyses()
    results: dict[str, Mapping[str, Result]] = {
        key: {model.label: result_of(known[key], model, sample) for model in models}
        for key in (*ROUTING, "saturation")
    }
    listed = cast("list[MoEModel]", models)
    return Given(models=listed, sample=sample, results=results, analyses=known)


def drawn(given: Given, paper: str, number: str) -> Drawn:
    (entry,) = (each for each in papers()[paper].entries if each.number == number)
    return entry.draw(given)


def choices(sample: Sample, layer: int) -> list[tuple[int, int, int, Ids]]:
    """Domain, position, token id and chosen experts of every token."""
    rule = token_rule(EXPERTS, TOPK)
    found = []
    for batch in sample.batches():
        length = batch.tokens_BS.shape[1]
        ids = batch.tokens_BS.reshape(-1)
        for place, (token, chosen) in enumerate(zip(ids, rule(batch, layer), strict=True)):
            found.append((batch.domain, place % length, int(token), chosen))
    return found


def test_every_entry_needs_analyses_that_exist() -> None:
    known = all_analyses()
    assert list(papers()) == ["closer-look", "olmoe", "openmoe"]
    for paper in papers().values():
        assert [key for key in paper.needs if key not in known] == []
        numbers = [entry.number for entry in paper.entries]
        assert len(numbers) == len(set(numbers))


def test_domains_of_openmoe_are_the_third_layer(given: Given, sample: Sample) -> None:
    figure = drawn(given, "openmoe", "Figure 5").figures[0]
    (name,) = figure.panels
    assert name == f"layer {LAYERS[2]}"
    radar = figure.panels[name]
    assert isinstance(radar, Radar)
    assert [each.name for each in radar.series] == ["web", "books"]
    tokens = [each for each in choices(sample, LAYERS[2]) if each[0] == 1]
    for expert in range(EXPERTS):
        share = sum(expert in chosen for *_, chosen in tokens) / len(tokens)
        assert radar.series[1].y[expert] == pytest.approx(100 * share)
    assert radar.reference is not None
    assert radar.reference.value == pytest.approx(100 * TOPK / EXPERTS)
    language = drawn(given, "openmoe", "Figure 7").figures[0].panels[name]
    assert isinstance(language, Radar)
    assert [each.name for each in language.series] == ["de"]


def test_datasets_without_a_name_of_the_kind_are_asked_for(given: Given) -> None:
    with pytest.raises(Missing, match=r"programming/python"):
        drawn(given, "openmoe", "Figure 6")


def test_positions_of_openmoe(given: Given, sample: Sample) -> None:
    panels = drawn(given, "openmoe", "Figure 9").figures[0].panels
    spaced, consecutive = panels.values()
    assert isinstance(spaced, Radar)
    assert isinstance(consecutive, Radar)
    assert [s.name for s in spaced.series] == [f"Position {2 * i}" for i in range(1, 8)]
    assert [s.name for s in consecutive.series] == [f"Position {i}" for i in (2, 3, 4, 5)]
    at_four = [chosen for _, place, _, chosen in choices(sample, LAYERS[2]) if place == 4]
    counts = np.bincount(np.concatenate(at_four), minlength=EXPERTS)
    np.testing.assert_allclose(spaced.series[1].y, 100 * counts / counts.sum())


def test_drops_of_openmoe_begin_at_the_planted_position(given: Given) -> None:
    figures = drawn(given, "openmoe", "Figure 12").figures
    panel = figures[0].panels["at least one choice dropped"]
    assert isinstance(panel, Lines)
    for series in panel.series:
        expected = [0.0 if place < 8 else 100.0 for place in series.x]
        np.testing.assert_allclose(series.y, expected)
    every = figures[0].panels["all choices dropped"]
    assert isinstance(every, Lines)
    assert not any(np.any(np.asarray(series.y)) for series in every.series)


def test_standard_deviation_of_a_token_rule_is_that_of_fixed_experts(given: Given) -> None:
    panel = next(iter(drawn(given, "openmoe", "Figure 14").figures[0].panels.values()))
    assert isinstance(panel, Lines)
    fixed = np.sqrt(1 / (TOPK * EXPERTS) - 1 / EXPERTS**2)
    np.testing.assert_allclose(panel.series[0].y, fixed)
    assert [round(each.value, 6) for each in panel.references] == [0.0, round(fixed, 6)]


def test_table_10_counts_tokens_and_ids(given: Given, sample: Sample) -> None:
    (table,) = drawn(given, "openmoe", "Table 10").tables
    assert table.columns["dataset"] == ["web", "books", "language/de"]
    assert table.columns["vocab_used"] == [12, 12, 12]
    assert sum(table.columns["tokens"]) == sample.tokens


def test_one_checkpoint_shows_no_training(given: Given) -> None:
    alone = replace(
        given,
        models=given.models[:1],
        results={k: dict(list(v.items())[:1]) for k, v in given.results.items()},
    )
    for paper, number in (("openmoe", "Figure 11"), ("olmoe", "Figure 20")):
        with pytest.raises(Missing, match="several checkpoints"):
            drawn(alone, paper, number)
    with pytest.raises(Missing, match="needs the analysis flow"):
        drawn(replace(given, results={}), "olmoe", "Figures 33 to 36, flow")


def test_equal_checkpoints_are_saturated(given: Given) -> None:
    panels = drawn(given, "olmoe", "Figure 20").figures[0].panels
    assert list(panels) == ["Top-k=1", f"Top-k={TOPK}"]
    for panel in panels.values():
        assert isinstance(panel, Lines)
        assert [series.name for series in panel.series] == [f"layer {layer}" for layer in LAYERS]
        assert [list(series.x) for series in panel.series] == [[50.0]] * len(LAYERS)
        assert [list(series.y) for series in panel.series] == [[100.0]] * len(LAYERS)


def test_coactivation_as_published_misses_pairs(given: Given, sample: Sample) -> None:
    """Of three choices, two of three pairs are of consecutive ranks."""
    found = drawn(given, "olmoe", "Figure 21").figures
    published, exact = (found[i].panels[f"Layer {LAYERS[1]}"] for i in (0, 1))
    assert isinstance(published, Heatmap)
    assert isinstance(exact, Heatmap)
    tokens = [chosen for *_, chosen in choices(sample, LAYERS[1])]
    for panel, ranks in ((published, [(0, 1), (1, 2)]), (exact, [(0, 1), (1, 2), (0, 2)])):
        for row, one in enumerate(map(int, panel.rows)):
            mine = [chosen for chosen in tokens if one in chosen]
            for column, other in enumerate(map(int, panel.columns)):
                if one == other:
                    assert np.isnan(panel.values[row, column])
                    continue
                pairs = sum(
                    {int(chosen[a]), int(chosen[b])} == {one, other}
                    for chosen in mine
                    for a, b in ranks
                )
                assert panel.values[row, column] == pytest.approx(100 * pairs / len(mine))


def test_the_strongest_pairs_name_the_experts() -> None:
    values = np.full((4, 4), np.nan)
    values[2, 1], values[1, 2], values[0, 3] = 5.0, 4.0, 6.0
    assert strongest(values)[:4] == [0, 3, 2, 1]
    assert shown_layers(16) == [0, 7, 15]
    assert shown_layers(1) == [0]


def test_flow_as_published_pairs_equal_ranks(given: Given, sample: Sample) -> None:
    totals = {}
    for figure in drawn(given, "olmoe", "Figures 33 to 36, flow").figures[:3]:
        panel = next(iter(figure.panels.values()))
        assert isinstance(panel, Flow)
        totals[figure.title.split(", ")[2]] = panel.flows[0].sum()
    assert totals["first choices"] == sample.tokens
    assert totals["as published"] == TOPK * sample.tokens
    assert totals["exact"] <= TOPK**2 * sample.tokens  # the largest flows only
    assert totals["exact"] > totals["as published"]


def test_domains_of_olmoe_have_all_and_first_choices(given: Given) -> None:
    for number, level in (("Figure 22", TOPK), ("Figures 33 to 36, domains", 1)):
        figure = drawn(given, "olmoe", number).figures[0]
        assert list(figure.panels) == [f"Layer {LAYERS[i]}" for i in (0, 1, 3)]
        for panel in figure.panels.values():
            assert isinstance(panel, Bars)
            assert panel.references[0].value == pytest.approx(100 * level / EXPERTS)
            for series in panel.series:
                assert np.sum(series.y) == pytest.approx(100 * level)


def test_vocabulary_of_a_token_rule_is_complete(given: Given) -> None:
    figures = drawn(given, "olmoe", "Figure 23").figures
    for panel in figures[0].panels.values():
        assert isinstance(panel, Lines)
        np.testing.assert_allclose(panel.series[0].y, 100)
    published, own, exact = figures[1].panels.values()
    for panel in (published, own, exact):
        assert isinstance(panel, Bars)
        assert list(panel.series[0].x) == [str(expert) for expert in range(EXPERTS)]
    # With up to 12 experts all are shown, so that the published bars are their own.
    for one, other in zip(published.series, own.series, strict=True):  # type: ignore[union-attr]
        np.testing.assert_array_equal(one.y, other.y)
    assert "are equal" in drawn(given, "olmoe", "Figure 23").notes[0]
    (table, _) = drawn(given, "olmoe", "Table 8").tables
    assert "(100%)" in table.columns["input_token_ids"][0]


def test_the_report_has_the_paper(given: Given, sample: Sample, tmp_path: Path) -> None:
    """One entry is drawn, and others say what they need."""
    results = {"run@100": {"domains": given.results["domains"]["run@100"]}}
    paper = papers()["openmoe"]
    path = write_report(tmp_path, given.models[:1], sample, results, paper=paper)
    text = path.read_text()
    assert "Figures of OpenMoE" in text
    assert (tmp_path / "figures" / "openmoe" / "figure-5-run@100.svg").is_file()
    assert (tmp_path / "figures" / "openmoe" / "table-10.csv").is_file()
    assert "Not drawn: needs the analysis tokens." in text


def test_names_of_figures_are_alike() -> None:
    assert named_figure("Figure 22", "Run", "", {}).key == "figure-22-Run"
    assert named_figure("Figures 1 to 2, flow", "Run", "exact", {}).key == (
        "figures-1-to-2-flow-exact-Run"
    )

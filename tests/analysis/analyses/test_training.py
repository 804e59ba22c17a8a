"""Analyses of several checkpoints: saturation and early routing learning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from megatron_moe.analysis.analyses.early_routing import EarlyRouting, between_ids, distance, noise
from megatron_moe.analysis.analyses.saturation import RouterSaturation, agreement
from megatron_moe.analysis.observation import TokenBatch
from megatron_moe.analysis.report import write_report
from megatron_moe.analysis.result import Result
from megatron_moe.analysis.run import COMPARED, compare
from megatron_moe.analysis.sample import Sample
from tests.analysis.planted import (
    Ids,
    PlantedModel,
    Rule,
    random_rule,
    random_sample,
    result_of,
    token_rule,
)


def _results(
    analysis: RouterSaturation | EarlyRouting,
    rules: Mapping[str, tuple[Rule, int | None]],
    sample: Sample,
    experts: int = 8,
    run: str = "run",
) -> dict[str, Result]:
    return {
        label: result_of(
            analysis,
            PlantedModel(
                rule, experts=experts, topk=2, layers=(0, 2, 4), step=step, label=label, run=run
            ),
            sample,
        )
        for label, (rule, step) in rules.items()
    }


def _mixed(early: Rule, late: Rule, share: float) -> Rule:
    """The choices of ``late`` for some tokens, of ``early`` for the others."""

    def rule(batch: TokenBatch, layer: int) -> Ids:
        chosen = np.random.default_rng([3, batch.number, layer]).random((batch.size, 1)) < share
        return np.where(chosen, late(batch, layer), early(batch, layer))

    return rule


def test_a_checkpoint_agrees_with_itself(tmp_path: Path) -> None:
    rule = random_rule(8, 2)
    results = _results(
        RouterSaturation(), {"a": (rule, 1), "b": (rule, 2)}, random_sample(tmp_path)
    )
    combined = RouterSaturation().combine(results)
    assert combined is not None
    assert (combined.arrays["top-1_NL"] == 1).all() and (combined.arrays["top-k_NL"] == 1).all()
    np.testing.assert_allclose(combined.arrays["top-k_null_NL"], 0.25, atol=0.01)
    np.testing.assert_allclose(combined.arrays["top-1_null_NL"], 0.125, atol=0.01)
    assert "settled early" in RouterSaturation().reading(results)


def test_random_checkpoints_agree_by_chance(tmp_path: Path) -> None:
    results = _results(
        RouterSaturation(),
        {"a": (random_rule(8, 2, 1), 1), "b": (random_rule(8, 2, 2), 2)},
        random_sample(tmp_path, tokens=8000),
    )
    combined = RouterSaturation().combine(results)
    assert combined is not None
    for rule in ("top-1", "top-k"):
        np.testing.assert_allclose(
            combined.arrays[f"{rule}_NL"], combined.arrays[f"{rule}_null_NL"], atol=0.015
        )
    assert "nothing is settled" in RouterSaturation().reading(results)


def test_saturation_grows_along_training_in_the_order_of_steps(tmp_path: Path) -> None:
    """Given in another order; a quarter and half of the choices are the final ones already."""
    first, last = random_rule(8, 2, 1), random_rule(8, 2, 2)
    rules = {
        "end": (last, 1000),
        "half": (_mixed(first, last, 0.5), 400),
        "start": (_mixed(first, last, 0.25), 100),
    }
    results = _results(RouterSaturation(), rules, random_sample(tmp_path, tokens=8000))
    combined = RouterSaturation().combine(results)
    assert combined is not None
    assert combined.arrays["labels"].tolist() == ["start", "half"]
    assert combined.arrays["axis_N"].tolist() == [10.0, 40.0]
    expected = np.array([[0.25 + 0.75 * 0.25], [0.5 + 0.5 * 0.25]])
    np.testing.assert_allclose(
        combined.arrays["top-k_NL"], np.broadcast_to(expected, (2, 3)), atol=0.03
    )
    figures = RouterSaturation().figures(results)
    assert [figure.key for figure in figures] == ["saturation", "layers"]
    written = compare(
        [RouterSaturation()], {k: {"saturation": r} for k, r in results.items()}, tmp_path
    )
    assert list(written) == ["saturation"]
    lines = (tmp_path / COMPARED / "saturation" / "saturation.csv").read_text().splitlines()
    assert lines[0] == "checkpoint,layer,top_1,top_1_chance,top_k,top_k_chance" and len(lines) == 7


def test_agreement_by_hand() -> None:
    """{0,1} and {1,0} share both, {2,3} and {3,0} one."""
    early, late = np.array([[0, 1], [2, 3]]), np.array([[1, 0], [3, 0]])
    shared, chance = agreement(early, late, 4)
    assert shared == 0.75
    # Loads 1/2 each, and 1, 1/2, 0, 1/2.
    assert chance == pytest.approx((0.5 + 0.25 + 0 + 0.25) / 2)
    assert agreement(early[:, :1], late[:, :1], 4)[0] == 0


def test_what_cannot_be_compared_is_left_out(tmp_path: Path) -> None:
    rule = random_rule(8, 2)
    (tmp_path / "other").mkdir()
    sample, other = random_sample(tmp_path), random_sample(tmp_path / "other", tokens=2000)
    one = _results(RouterSaturation(), {"a": (rule, None), "b": (rule, 5)}, sample)
    stray = _results(RouterSaturation(), {"c": (rule, 1)}, other)
    combined = RouterSaturation().combine({**stray, **one})
    assert combined is not None and combined.arrays["labels"].tolist() == ["a"]
    assert combined.notes[0].startswith("c read other tokens") and "unknown" in combined.notes[1]
    assert RouterSaturation().combine({**stray, "b": one["b"]}) is None
    assert RouterSaturation().combine({"a": one["a"]}) is None
    assert "several" in RouterSaturation().reading({"a": one["a"]})
    assert RouterSaturation().figures({"a": one["a"]}) == []


@pytest.mark.parametrize("analysis", [RouterSaturation(), EarlyRouting()])
def test_models_of_two_runs_are_not_compared(
    analysis: RouterSaturation | EarlyRouting, tmp_path: Path
) -> None:
    """Expert 3 of one run has nothing to do with expert 3 of another."""
    sample, rule = random_sample(tmp_path, vocab=20), random_rule(8, 2)
    one = _results(analysis, {"a": (rule, 1), "b": (rule, 2)}, sample)
    other = _results(analysis, {"c": (random_rule(8, 2, 5), 3)}, sample, run="elsewhere")
    assert analysis.combine({"b": one["b"], **other}) is None
    said = analysis.reading({"b": one["b"], **other})
    assert "b is in another directory" in said and "final" not in said
    other = _results(analysis, {"c": (random_rule(8, 2, 5), 0)}, sample, run="elsewhere")
    combined = analysis.combine({**one, **other})
    assert combined is not None and combined.arrays["labels"].tolist() == ["a"]
    assert combined.notes[0].startswith("c is in another directory")


def test_early_routing_of_ids(tmp_path: Path) -> None:
    """From the first checkpoint on ids have their experts; or only at the last one."""
    sample = random_sample(tmp_path, vocab=20)
    settled, wild = token_rule(8, 2), random_rule(8, 2)
    analysis = EarlyRouting()
    early = _results(analysis, {"a": (settled, 1), "b": (settled, 2)}, sample)
    combined = analysis.combine(early)
    assert combined is not None and not combined.arrays["distance_NL"].any()
    assert combined.numbers["choices that differ between ids"] > 0.5
    assert "As in OpenMoE" in analysis.reading(early)
    late = _results(analysis, {"a": (wild, 1), "b": (settled, 2)}, sample)
    assert "learned later" in analysis.reading(late)
    never = _results(analysis, {"a": (wild, 1), "b": (random_rule(8, 2, 7), 2)}, sample)
    combined = analysis.combine(never)
    assert combined is not None
    np.testing.assert_allclose(
        combined.arrays["distance_NL"].mean(), combined.arrays["noise_L"].mean(), rtol=0.1
    )
    np.testing.assert_allclose(
        combined.arrays["others_L"].mean(), combined.arrays["noise_L"].mean(), rtol=0.1
    )
    assert "hardly any experts of their own" in analysis.reading(never)
    figures = analysis.figures(late)
    assert [f.key for f in figures] == ["distance", *(f"token-{i}" for i in range(1, 5))]
    assert len(figures[1].panels["layer 2"].series) == 2  # type: ignore[union-attr]


def test_distances_by_hand() -> None:
    one = np.array([[[1.0, 0, 0], [0.5, 0.5, 0]]])
    other = np.array([[[0.5, 0.5, 0], [0.5, 0.5, 0]]])
    assert distance(one, other).tolist() == [0.25]
    assert between_ids(one).tolist() == [0.5]
    assert between_ids(one[:, :1]).tolist() == [0.0]
    # A coin thrown 50 times, twice.
    rng = np.random.default_rng(0)
    drawn = rng.binomial(50, 0.5, size=(2, 20_000)) / 50
    expected = np.abs(drawn[0] - drawn[1]).mean()
    coin = np.array([[[0.5, 0.5]]])
    assert noise(coin, np.array([50]), 1)[0] == pytest.approx(expected, rel=0.03)


def test_rare_ids_cannot_be_compared(tmp_path: Path) -> None:
    sample = random_sample(tmp_path, tokens=200, vocab=900)
    results = _results(
        EarlyRouting(), {"a": (token_rule(8, 2), 1), "b": (token_rule(8, 2), 2)}, sample
    )
    assert EarlyRouting().combine(results) is None and "32 times" in results["a"].notes[0]
    assert "occur often" in EarlyRouting().reading(results)


def test_the_report_shows_what_checkpoints_show_together(tmp_path: Path) -> None:
    analysis, sample = RouterSaturation(), random_sample(tmp_path, tokens=1000)
    rule = random_rule(8, 2)
    results = _results(analysis, {"a": (rule, 1), "b": (rule, 2)}, sample)
    by_label = {label: {"saturation": result} for label, result in results.items()}
    both = compare([analysis], by_label, tmp_path)
    known = {"saturation": analysis}
    page = write_report(tmp_path, [], sample, by_label, compared=both, analyses=known)
    assert "compared/saturation/saturation.csv" in page.read_text()
    assert "by chance, all k choices" in page.read_text()

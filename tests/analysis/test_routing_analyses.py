"""What all analyses of routing choices share: stored results, order of tokens, too few tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_moe.analysis.base import Analysis, all_analyses
from megatron_moe.analysis.draw_files import write_figure
from megatron_moe.analysis.draw_web import web_figure
from megatron_moe.analysis.result import read_result
from megatron_moe.analysis.run import RunOptions, analyse, check_all
from megatron_moe.errors import UsageError
from tests.analysis.planted import (
    PlantedModel,
    random_rule,
    random_sample,
    result_of,
    token_rule,
)
from tools.analyze_moe import analyse_all

KEYS = (
    *("coactivation", "collapse", "committee", "context", "domains", "drops", "flow", "locality"),
    *("positions", "predictability", "tokens", "vocabulary", "early_routing", "saturation"),
)


def _analyses() -> list[Analysis]:
    known = all_analyses()
    return [known[key] for key in KEYS]


@pytest.mark.parametrize("key", KEYS)
def test_the_batch_size_changes_nothing(key: str, tmp_path: Path) -> None:
    analysis, found = all_analyses()[key], []
    model = PlantedModel(random_rule(6, 2), experts=6, topk=2)
    for size in (3, 1000):
        (tmp_path / str(size)).mkdir()
        sample = random_sample(tmp_path / str(size), tokens=600, domains=2, batch_size=size)
        found.append(result_of(analysis, model, sample, draws=20))
    one, other = found
    assert one.numbers.keys() == other.numbers.keys() and one.arrays.keys() == other.arrays.keys()
    for name, value in one.numbers.items():
        np.testing.assert_allclose(other.numbers[name], value, rtol=1e-9, err_msg=name)
    for name, array in one.arrays.items():
        if array.dtype.kind in "biuf":
            np.testing.assert_allclose(other.arrays[name], array, rtol=1e-9, err_msg=name)
    assert [t.name for t in one.tables] == [t.name for t in other.tables]


def test_all_in_one_pass_written_read_and_drawn(tmp_path: Path) -> None:
    """Two checkpoints of one run: results, their files, every figure in both forms."""
    sample = random_sample(tmp_path, tokens=1200, domains=2, seq_length=32)
    analyses = _analyses()
    results = {}
    for label, rule, step in (("early", random_rule(6, 2), 10), ("late", token_rule(6, 2), 100)):
        model = PlantedModel(rule, experts=6, topk=2, step=step, label=label)
        options = RunOptions(out=tmp_path / "out", draws=20)
        results[label] = analyse(model, sample, analyses, options, lambda n: None)
        again = analyse(model, sample, analyses, options, lambda n: None)
        for key in KEYS:
            folder = tmp_path / "out" / label / key
            assert read_result(folder, "another fingerprint") is None
            stored, fresh = again[key], results[label][key]
            assert [t.columns.keys() for t in stored.tables] == [
                t.columns.keys() for t in fresh.tables
            ]
            assert all((folder / f"{table.name}.csv").is_file() for table in fresh.tables)
    for analysis in analyses:
        both = {label: found[analysis.key] for label, found in results.items()}
        figures = analysis.figures(both)
        assert len({figure.key for figure in figures}) == len(figures) > 0, analysis.key
        text = analysis.reading(both)
        assert text.endswith(".") and "nan" not in text, analysis.key
        for figure in figures:
            assert web_figure(figure)["panels"]


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_figures_are_drawn_as_files(key: str, tmp_path: Path) -> None:
    sample = random_sample(tmp_path, tokens=600, domains=2, seq_length=32)
    analysis = all_analyses()[key]
    results = {
        label: result_of(
            analysis,
            PlantedModel(random_rule(6, 2), experts=6, topk=2, step=step, label=label),
            sample,
            draws=20,
        )
        for label, step in (("early", 10), ("late", 100))
    }
    for figure in analysis.figures(results):
        for name in write_figure(figure, tmp_path, figure.key).values():
            assert (tmp_path / f"{name}.png").stat().st_size > 1000
            assert (tmp_path / f"{name}.svg").stat().st_size > 1000


@pytest.mark.parametrize("key", KEYS)
def test_too_few_tokens_are_refused_before_the_pass(key: str, tmp_path: Path) -> None:
    """64 experts, 2 choices: 320 tokens give each expert ten choices."""

    def never(*_: object) -> np.ndarray:
        raise AssertionError("the pass has begun")

    model = PlantedModel(never, experts=64, topk=2)
    sample = random_sample(tmp_path, tokens=300)
    with pytest.raises(UsageError, match="320, 10 choices for each of 64 experts"):
        analyse(
            model, sample, [all_analyses()[key]], RunOptions(out=tmp_path / "o"), lambda n: None
        )


def test_every_checkpoint_is_checked_before_the_first_is_analysed(tmp_path: Path) -> None:
    """400 tokens are enough for 6 experts, but not for the 100 of the second."""

    def never(*_: object) -> np.ndarray:
        raise AssertionError("an analysis has begun")

    models = [
        PlantedModel(never, experts=experts, topk=2, label=f"{experts} experts")
        for experts in (6, 100)
    ]
    options, drops = RunOptions(out=tmp_path / "o"), [all_analyses()["drops"]]
    sample = random_sample(tmp_path, tokens=400)
    check_all(models[:1], sample, drops, options)
    with pytest.raises(UsageError, match="500, 10 choices for each of 100 experts"):
        analyse_all(models, sample, drops, options, None)

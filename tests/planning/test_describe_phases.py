"""`--describe` shows the phases as they will run."""

from __future__ import annotations

import json

import pytest

from megatron_moe.config.cli import parse_args
from megatron_moe.errors import UsageError
from megatron_moe.planning.describe import describe
from tests.training.phase_tables import TABLE
from tests.training.tiny import MODEL


@pytest.fixture
def flags(tmp_path) -> list[str]:
    path = tmp_path / "phases.toml"
    path.write_text(TABLE + 'data-path = [3, "a", 1, "b"]')
    return [*MODEL, "--train-iters", "20", "--data-path", "corpus", "--phases", str(path)]


def test_the_text_shows_when_each_phase_runs_and_what_it_changes(flags):
    lines = describe(parse_args(flags).config, "text", 2).splitlines()
    start = lines.index("Phases")
    section = lines[start : lines.index("", start)]
    assert [line for line in section if line.startswith("  phase")] == [
        "  phase 1/3 first: steps 1 to 8, prefix-lm, 8 sequences of 32, 0 to 2048 tokens,"
        " lr 0.003 cosine by the run's steps",
        "  phase 2/3 second: steps 9 to 14, causal, 4 sequences of 64, 2048 to 3584 tokens,"
        " lr 0.002 linear by the phase's steps, dropout 0.2 hidden 0 attention",
        "  phase 3/3 third: steps 15 to 20, prefix-lm, 12 sequences of 32, 3584 to 5888 tokens,"
        " lr 0.003 cosine by the run's steps",
    ]
    assert "    --seq-length was 32, is 64" in section
    assert any("75.00%" in line and line.rstrip().endswith("a") for line in section)


def test_the_json_has_every_phase(flags):
    found = json.loads(describe(parse_args(flags).config, "json", 2))
    phases = found["stages"]
    assert [phase["name"] for phase in phases] == ["first", "second", "third"]
    assert [phase["last_iteration"] for phase in phases] == [8, 14, 20]
    assert [phase["layout"]["num_microbatches"] for phase in phases] == [2, 2, 3]
    assert [phase["config"]["data"]["seq_length"] for phase in phases] == [32, 64, 32]
    assert found["layout"] == phases[0]["layout"]
    assert found["config"]["train"]["stages"] == flags[-1]
    assert "stages" not in json.loads(describe(parse_args(flags[:-2]).config, "json", 2))


def test_an_impossible_phase_is_rejected(flags):
    with pytest.raises(
        UsageError, match=r"phase 'third' of .*: --global-batch-size must be a multiple"
    ):
        describe(parse_args(flags).config, "text", 4)

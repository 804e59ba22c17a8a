"""`--describe` shows the stage table as it would be run."""

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
    path = tmp_path / "stages.toml"
    path.write_text(TABLE + 'data-path = [3, "a", 1, "b"]')
    return [*MODEL, "--train-iters", "20", "--data-path", "corpus", "--stages", str(path)]


def test_the_text_says_when_each_stage_runs_and_what_it_changes(flags):
    lines = describe(parse_args(flags).config, "text", 2).splitlines()
    start = lines.index("Stages")
    section = lines[start : lines.index("", start)]
    assert [line for line in section if line.startswith("  stage")] == [
        "  stage 1/3 first: steps 1 to 8, prefix-lm, 8 sequences of 32, 0 to 2048 tokens,"
        " lr 0.003 cosine by the run's steps",
        "  stage 2/3 second: steps 9 to 14, causal, 4 sequences of 64, 2048 to 3584 tokens,"
        " lr 0.002 linear by the stage's steps, dropout 0.2 hidden 0 attention",
        "  stage 3/3 third: steps 15 to 20, prefix-lm, 12 sequences of 32, 3584 to 5888 tokens,"
        " lr 0.003 cosine by the run's steps",
    ]
    assert "    --seq-length was 32, is 64" in section
    assert any("75.00%" in line and line.rstrip().endswith("a") for line in section)


def test_the_json_has_every_stage(flags):
    found = json.loads(describe(parse_args(flags).config, "json", 2))
    stages = found["stages"]
    assert [stage["name"] for stage in stages] == ["first", "second", "third"]
    assert [stage["last_iteration"] for stage in stages] == [8, 14, 20]
    assert [stage["layout"]["num_microbatches"] for stage in stages] == [2, 2, 3]
    assert [stage["config"]["data"]["seq_length"] for stage in stages] == [32, 64, 32]
    assert found["layout"] == stages[0]["layout"]
    assert found["config"]["train"]["stages"] == flags[-1]
    assert "stages" not in json.loads(describe(parse_args(flags[:-2]).config, "json", 2))


def test_a_stage_that_cannot_be_is_refused(flags):
    with pytest.raises(UsageError, match=r"stage 'third' of .*: --global-batch-size is 12"):
        describe(parse_args(flags).config, "text", 4)

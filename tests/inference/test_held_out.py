"""Which stage is evaluated: what cannot be meant, and checkpoints that say nothing of stages.

`tests/tools/test_evaluate_phases.py` compares what is measured with a run's own numbers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_moe.errors import UsageError
from megatron_moe.inference.held_out import select_phase
from tests.inference.cases import CONFIG, save

TABLE = """
[[stage]]
name = "ul2"
until-iteration = 5
objective = "ul2"

[[stage]]
name = "causal"
seq-length = 64
"""


@pytest.fixture
def silent(tmp_path: Path) -> Path:
    """A checkpoint that was converted: of a run in stages, without what they have done."""
    (tmp_path / "stages.toml").write_text(TABLE)
    train = replace(CONFIG.train, stages=str(tmp_path / "stages.toml"))
    return save(tmp_path / "checkpoint", replace(CONFIG, train=train))


def test_a_run_without_stages_has_none_to_choose(tmp_path: Path) -> None:
    checkpoint = save(tmp_path)
    assert select_phase(checkpoint, None, None) is None
    with pytest.raises(UsageError, match="--stage is '1', expected no value: the run has no"):
        select_phase(checkpoint, None, "1")


@pytest.mark.parametrize("stage", ["causal", "2"])
def test_where_the_checkpoint_says_nothing_the_stage_has_to_be_chosen(
    silent: Path, stage: str
) -> None:
    with pytest.raises(UsageError, match="--stage is None, expected one of ul2, causal"):
        select_phase(silent, None, None)
    found = select_phase(silent, None, stage)
    assert found is not None
    assert (found.name, found.number) == ("causal", 2)
    config = found.config
    assert (config.objective.objective, config.data.seq_length) == ("causal", 64)
    assert config.train.stages is None


def test_a_stage_that_is_not_there(silent: Path) -> None:
    with pytest.raises(UsageError, match=r"'chat', expected one of ul2, causal, or .* 1 to 2"):
        select_phase(silent, None, "chat")
    (silent.parent / "stages.toml").unlink()
    with pytest.raises(UsageError, match=r"--stages is .*stages\.toml', expected a readable"):
        select_phase(silent, None, "chat")


def test_the_tokenizer_may_have_moved(silent: Path) -> None:
    found = select_phase(silent, None, "causal")
    assert found is not None
    moved = replace(CONFIG, data=replace(CONFIG.data, tokenizer_model="there", seq_length=7))
    data = found.with_tokenizer_of(moved).data
    assert (data.tokenizer_model, data.seq_length) == ("there", 64)

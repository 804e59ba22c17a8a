"""Selection of the phase to evaluate: usage errors, and checkpoints that do not record phases.

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
    """A converted checkpoint of a run with phases, which does not record their progress."""
    (tmp_path / "stages.toml").write_text(TABLE)
    train = replace(CONFIG.train, stages=str(tmp_path / "stages.toml"))
    return save(tmp_path / "checkpoint", replace(CONFIG, train=train))


def test_a_run_without_phases_has_none_to_select(tmp_path: Path) -> None:
    checkpoint = save(tmp_path)
    assert select_phase(checkpoint, None, None) is None
    with pytest.raises(
        UsageError, match=r"--phase must be absent for a run without .* \(got '1'\)"
    ):
        select_phase(checkpoint, None, "1")


@pytest.mark.parametrize("phase", ["causal", "2"])
def test_without_a_record_the_phase_has_to_be_given(silent: Path, phase: str) -> None:
    with pytest.raises(UsageError, match=r"--phase must be one of ul2, causal \(got None\)"):
        select_phase(silent, None, None)
    found = select_phase(silent, None, phase)
    assert found is not None
    assert (found.name, found.number) == ("causal", 2)
    config = found.config
    assert (config.objective.objective, config.data.seq_length) == ("causal", 64)
    assert config.train.stages is None


def test_a_phase_that_does_not_exist(silent: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--phase must be one of ul2, causal, or .* 1 to 2 \(got 'chat'\)"
    ):
        select_phase(silent, None, "chat")
    (silent.parent / "stages.toml").unlink()
    with pytest.raises(UsageError, match=r"must be a readable TOML file \(got .*stages\.toml'\)"):
        select_phase(silent, None, "chat")


def test_the_tokenizer_may_have_moved(silent: Path) -> None:
    found = select_phase(silent, None, "causal")
    assert found is not None
    moved = replace(CONFIG, data=replace(CONFIG.data, tokenizer_model="there", seq_length=7))
    data = found.with_tokenizer_of(moved).data
    assert (data.tokenizer_model, data.seq_length) == ("there", 64)

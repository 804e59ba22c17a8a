"""Resuming checks what was consumed: phase tables that begin, change or end during a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_moe.checkpoint import TrainState
from megatron_moe.config.phases import FLAG, read_phases
from megatron_moe.training.consumed import PhaseRecord, has_records, saved_extra
from tests.support.pool import Pool
from tests.training.phase_tables import FIRST, SECOND, TABLE, steps_of
from tests.training.tiny import MODEL, pretrain_rank, write_corpus


class Runs:
    """Runs of one rank in one directory, which also has the table."""

    def __init__(self, pool: Pool, corpus: str, directory: Path) -> None:
        self.pool, self.corpus, self.directory = pool, corpus, directory
        self.table = directory / "stages.toml"

    def go(self, flags: list[str], table: str | None = None) -> str:
        """Train; returns the log, or the text of the usage error."""
        argv = [*MODEL, "--data-path", self.corpus, "--split", "80,20,0"]
        argv += ["--save", str(self.directory)]
        argv += ["--metrics-file", str(self.directory / "metrics.jsonl"), *flags]
        if table is not None:
            self.table.write_text(table)
            argv += ["--stages", str(self.table)]
        ((code, out, error),) = self.pool.run(pretrain_rank, 1, argv=argv)
        assert (code == 2) == bool(error)
        return error or out

    def steps(self) -> list[dict[str, object]]:
        """All steps so far."""
        return steps_of(self.directory)

    @property
    def load(self) -> list[str]:
        """Flags to resume."""
        return ["--load", str(self.directory)]


TWENTY = ["--train-iters", "20"]
_RATE = ["--lr-decay-iters", "20"]


@pytest.fixture
def runs(pool, corpus, tmp_path) -> Runs:
    return Runs(pool, corpus, tmp_path)


@pytest.fixture(scope="module")
def at_ten(pool, corpus, tmp_path_factory) -> Runs:
    """A run with phases after 10 of 20 steps: the first phase and 2 steps of the second."""
    found = Runs(pool, corpus, tmp_path_factory.mktemp("ten"))
    found.go([*TWENTY, "--exit-interval", "10"], TABLE)
    return found


@pytest.mark.parametrize("stop", ["4", "8"])
def test_a_plain_run_resumes_with_phases_as_if_it_had_begun_with_them(
    stop, runs, pool, corpus, tmp_path
):
    whole = Runs(pool, corpus, tmp_path / "whole")
    whole.directory.mkdir()
    whole.go(TWENTY, TABLE)
    runs.go([*TWENTY, *FIRST, "--exit-interval", stop])
    log = runs.go([*TWENTY, *runs.load], TABLE)
    assert runs.steps() == whole.steps()
    assert f" resuming from iteration {stop} of {runs.directory}, phase " in log


def test_the_first_phase_resumes_without_a_table(runs, tmp_path):
    runs.go([*TWENTY, "--exit-interval", "4"], TABLE)
    log = runs.go([*TWENTY, *FIRST, *runs.load, "--exit-interval", "12"])
    assert " exiting at iteration 12: --exit-interval 12" in log
    other = Runs(runs.pool, runs.corpus, tmp_path / "plain")
    other.directory.mkdir()
    other.go([*TWENTY, *FIRST, "--exit-interval", "12"])
    assert runs.steps() == other.steps()


REJECTED = {
    "no table": (
        None,
        [*SECOND],
        "{flag} must be the phase table of the run to resume: first, second (got None)",
    ),
    "another objective": (
        TABLE.replace('objective = "prefix-lm"', 'objective = "causal"', 1),
        [],
        "{first}: --objective must be prefix-lm, as recorded in the checkpoint (got 'causal')",
    ),
    "a later end of a completed phase": (
        TABLE.replace("until-iteration = 8", "until-iteration = 9"),
        [],
        "{first}: iterations must be 1 to 8, as recorded in the checkpoint (got '1 to 9')",
    ),
    "an earlier end of the phase in progress": (
        TABLE.replace("until-iteration = 14", "until-iteration = 9").replace(
            "iters = 2", "iters = 0"
        ),
        [],
        "{second}: iterations must be 9 to 10 or later, as recorded in the"
        " checkpoint (got '9 to 9')",
    ),
    "another batch": (
        TABLE.replace("global-batch-size = 4", "global-batch-size = 2"),
        [],
        "{second}: samples after 10 iterations must be 72, as recorded in the"
        " checkpoint (got 68); use another phase for another batch size",
    ),
    "another order": (
        TABLE.replace("seq-length = 64", "seq-length = 64\nseed = 6"),
        [],
        "{second}: --seed must be 1234, as recorded in the checkpoint (got 6)",
    ),
    "fewer phases": (
        TABLE.split('[[stage]]\nname = "second"')[0].replace("until-iteration = 8", ""),
        [],
        "iterations must be 1 to 8, as recorded in the checkpoint (got ",
    ),
}


def _labels(table: Path) -> dict[str, str]:
    """How error texts name the phases of a table, by name."""
    return {spec.name: spec.label for spec in read_phases(str(table))}


@pytest.mark.parametrize("name", list(REJECTED))
def test_a_table_that_contradicts_completed_steps_is_rejected(name, at_ten):
    table, flags, expected = REJECTED[name]
    error = at_ten.go([*TWENTY, *flags, *at_ten.load], table)
    labels = _labels(at_ten.table) if table is not None else {}
    assert expected.format(flag=FLAG, **labels) in error
    assert "\n" not in error


def test_the_data_of_the_phase_in_progress_must_be_the_same(at_ten, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    moved = write_corpus(other / "counting")
    same = TABLE.replace("lr = 2e-3", f'lr = 2e-3\ndata-path = ["{moved}"]')
    kept = ["--save", str(tmp_path), "--metrics-file", str(tmp_path / "metrics.jsonl")]
    log = at_ten.go(["--train-iters", "15", *at_ten.load, *kept], same)
    assert "done at iteration 15" in log, "another place, the same data"
    weighted = same.replace(f'"{moved}"', f'0.5, "{moved}", 0.5, "{at_ten.corpus}"')
    error = at_ten.go([*TWENTY, *at_ten.load], weighted)
    # The same content twice, with weights.
    assert error.splitlines() == [
        "number of sources: 1 in the checkpoint, 2 in this run",
        "weights of the sources: None in the checkpoint, 0.5 0.5 in this run",
        f"{_labels(at_ten.table)['second']}: training data must be that of the checkpoint"
        " (got '2 differences')",
    ]


def test_later_steps_may_change_and_the_log_shows_it(at_ten, tmp_path):
    table = TABLE.replace("until-iteration = 14", "until-iteration = 12")
    table = table.replace("lr = 2e-3", "lr = 3e-3").replace("seed = 5", "seed = 6")
    kept = ["--save", str(tmp_path), "--metrics-file", str(tmp_path / "metrics.jsonl")]
    log = at_ten.go([*TWENTY, *at_ten.load, *kept], table)
    assert " since the checkpoint: --lr was 0.002, is 0.003" in log
    assert " resuming from iteration 10 of " in log
    assert " phase 3 third begins after iteration 12 (80 samples, " in log
    batches = [step["batch_size"] for step in steps_of(tmp_path)]
    assert batches == [4] * 2 + [12] * 8


def test_the_data_of_completed_phases_need_not_exist(runs, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    path = write_corpus(gone / "counting")
    table = TABLE.replace("until-iteration = 8", f'until-iteration = 8\ndata-path = ["{path}"]')
    runs.go([*TWENTY, "--exit-interval", "8"], table)
    for file in gone.glob("counting.*"):
        file.unlink()
    assert "done at iteration 20" in runs.go([*TWENTY, *runs.load], table)
    early = [*TWENTY, *runs.load, "--ckpt-step", "8", "--finetune", "--save", str(tmp_path / "new")]
    assert f"{_labels(runs.table)['first']}: data path" in runs.go(early, table), (
        "from the start it is needed"
    )


def test_finetune_starts_any_table(at_ten, tmp_path):
    kept = ["--save", str(tmp_path), "--metrics-file", str(tmp_path / "metrics.jsonl")]
    table = TABLE.replace("until-iteration = 8", "until-iteration = 2")
    at_ten.go(["--train-iters", "15", *at_ten.load, "--finetune", *kept], table)
    assert [step["batch_size"] for step in steps_of(tmp_path)] == [8] * 2 + [4] * 12 + [12]


def test_what_a_checkpoint_holds_besides_steps_and_samples() -> None:
    """The data, and `stages` with a phase table: the keys are part of the format."""
    record = PhaseRecord(
        name="ul2",
        first_iteration=0,
        iterations=8,
        first_sample=0,
        samples=32,
        fingerprint="f",
        config={"train": {"seed": 1}},
    )
    data = {"fingerprint": "f", "seed": 1}
    assert saved_extra([record], has_phases=False, data=data) == {"data": data}
    extra = saved_extra([record], has_phases=True, data=data)
    assert list(extra) == ["stages", "data"]
    assert extra["stages"] == [asdict(record)]
    # Keys of other state do not matter to the records.
    state = TrainState(iteration=8, consumed_train_samples=32, extra=extra | {"other": 1})
    assert has_records(state)

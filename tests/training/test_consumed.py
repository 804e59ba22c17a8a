"""What was consumed is not contradicted: stage tables that begin, change or end in mid-run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.pool import Pool
from tests.training.phase_tables import FIRST, SECOND, TABLE, steps_of
from tests.training.tiny import MODEL, pretrain_rank, write_corpus


class Runs:
    """Runs of one rank in one directory, with a table beside it."""

    def __init__(self, pool: Pool, corpus: str, directory: Path) -> None:
        self.pool, self.corpus, self.directory = pool, corpus, directory
        self.table = directory / "stages.toml"

    def go(self, flags: list[str], table: str | None = None) -> str:
        """Train, or be refused; returns the log or the mistake."""
        argv = [*MODEL, "--data-path", self.corpus, "--split", "80,20,0"]
        argv += ["--save", str(self.directory)]
        argv += ["--metrics-file", str(self.directory / "metrics.jsonl"), *flags]
        if table is not None:
            self.table.write_text(table)
            argv += ["--stages", str(self.table)]
        ((code, out, mistake),) = self.pool.run(pretrain_rank, 1, argv=argv)
        assert (code == 2) == bool(mistake)
        return mistake or out

    def steps(self) -> list[dict[str, object]]:
        """All steps so far."""
        return steps_of(self.directory)

    @property
    def load(self) -> list[str]:
        """Flags to go on."""
        return ["--load", str(self.directory)]


TWENTY = ["--train-iters", "20"]
_RATE = ["--lr-decay-iters", "20"]


@pytest.fixture
def runs(pool, corpus, tmp_path) -> Runs:
    return Runs(pool, corpus, tmp_path)


@pytest.fixture(scope="module")
def at_ten(pool, corpus, tmp_path_factory) -> Runs:
    """A run in stages that has done 10 of 20 steps: the first stage and 2 steps of the second."""
    found = Runs(pool, corpus, tmp_path_factory.mktemp("ten"))
    found.go([*TWENTY, "--exit-interval", "10"], TABLE)
    return found


@pytest.mark.parametrize("stop", ["4", "8"])
def test_a_plain_run_goes_on_in_stages_as_if_it_had_begun_so(stop, runs, pool, corpus, tmp_path):
    whole = Runs(pool, corpus, tmp_path / "whole")
    whole.directory.mkdir()
    whole.go(TWENTY, TABLE)
    runs.go([*TWENTY, *FIRST, "--exit-interval", stop])
    log = runs.go([*TWENTY, *runs.load], TABLE)
    assert runs.steps() == whole.steps()
    assert f"going on from iteration {stop}" in log


def test_the_first_stage_goes_on_without_a_table(runs, tmp_path):
    runs.go([*TWENTY, "--exit-interval", "4"], TABLE)
    log = runs.go([*TWENTY, *FIRST, *runs.load, "--exit-interval", "12"])
    assert "leaving at iteration 12" in log
    other = Runs(runs.pool, runs.corpus, tmp_path / "plain")
    other.directory.mkdir()
    other.go([*TWENTY, *FIRST, "--exit-interval", "12"])
    assert runs.steps() == other.steps()


REFUSED = {
    "no table": (None, [*SECOND], "--stages is None, expected the table of the run"),
    "another objective": (
        TABLE.replace('objective = "prefix-lm"', 'objective = "causal"', 1),
        [],
        "stage 'first' of {table}: --objective is 'causal', expected prefix-lm, as for the steps",
    ),
    "a later end of what is over": (
        TABLE.replace("until-iteration = 8", "until-iteration = 9"),
        [],
        "stage 'first' of {table} is 'steps 1 to 9', expected steps 1 to 8, which the checkpoint",
    ),
    "an earlier end of what is under way": (
        TABLE.replace("until-iteration = 14", "until-iteration = 9").replace(
            "iters = 2", "iters = 0"
        ),
        [],
        "stage 'second' of {table} is 'steps 9 to 9', expected steps 9 to 10 within it",
    ),
    "another batch": (
        TABLE.replace("global-batch-size = 4", "global-batch-size = 2"),
        [],
        "stage 'second' of {table}: samples is 68, expected 72 after 10 steps, as in the checkpoint"
        "; another batch size needs a stage of its own",
    ),
    "another order": (
        TABLE.replace("seq-length = 64", "seq-length = 64\nseed = 6"),
        [],
        "stage 'second' of {table}: --seed is 6, expected 1234, as for the steps",
    ),
    "fewer stages": (
        TABLE.split('[[stage]]\nname = "second"')[0].replace("until-iteration = 8", ""),
        [],
        "expected steps 1 to 8, which the checkpoint has done",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_was_done_is_not_contradicted(name, at_ten):
    table, flags, expected = REFUSED[name]
    mistake = at_ten.go([*TWENTY, *flags, *at_ten.load], table)
    assert expected.format(table=at_ten.table) in mistake
    assert "\n" not in mistake


def test_the_data_of_the_stage_under_way_must_be_the_same(at_ten, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    moved = write_corpus(other / "counting")
    same = TABLE.replace("lr = 2e-3", f'lr = 2e-3\ndata-path = ["{moved}"]')
    kept = ["--save", str(tmp_path), "--metrics-file", str(tmp_path / "metrics.jsonl")]
    log = at_ten.go(["--train-iters", "15", *at_ten.load, *kept], same)
    assert "done at iteration 15" in log, "another place, the same data"
    weighted = same.replace(f'"{moved}"', f'0.5, "{moved}", 0.5, "{at_ten.corpus}"')
    mistake = at_ten.go([*TWENTY, *at_ten.load], weighted)
    assert f"stage 'second' of {at_ten.table}: training data is" in mistake
    assert "as for the steps that the checkpoint has done" in mistake


def test_what_is_to_come_may_change_and_is_told(at_ten, tmp_path):
    table = TABLE.replace("until-iteration = 14", "until-iteration = 12")
    table = table.replace("lr = 2e-3", "lr = 3e-3").replace("seed = 5", "seed = 6")
    kept = ["--save", str(tmp_path), "--metrics-file", str(tmp_path / "metrics.jsonl")]
    log = at_ten.go([*TWENTY, *at_ten.load, *kept], table)
    assert " since the checkpoint: --lr was 0.002, is 0.003" in log
    assert " going on from iteration 10" in log
    assert " stage 3 third begins after iteration 12, 80 samples" in log
    batches = [step["batch_size"] for step in steps_of(tmp_path)]
    assert batches == [4] * 2 + [12] * 8


def test_data_of_stages_that_are_over_need_not_exist(runs, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    path = write_corpus(gone / "counting")
    table = TABLE.replace("until-iteration = 8", f'until-iteration = 8\ndata-path = ["{path}"]')
    runs.go([*TWENTY, "--exit-interval", "8"], table)
    for file in gone.glob("counting.*"):
        file.unlink()
    assert "done at iteration 20" in runs.go([*TWENTY, *runs.load], table)
    early = [*TWENTY, *runs.load, "--ckpt-step", "8", "--finetune"]
    assert "stage 'first' of" in runs.go(early, table), "from the start it is needed"


def test_weights_alone_begin_any_table(at_ten, tmp_path):
    kept = ["--save", str(tmp_path), "--metrics-file", str(tmp_path / "metrics.jsonl")]
    table = TABLE.replace("until-iteration = 8", "until-iteration = 2")
    at_ten.go(["--train-iters", "15", *at_ten.load, "--finetune", *kept], table)
    assert [step["batch_size"] for step in steps_of(tmp_path)] == [8] * 2 + [4] * 12 + [12]

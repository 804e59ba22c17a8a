"""A run does not save among the checkpoints of another one."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import pytest

from megatron_moe.checkpoint.lock import WriterLock
from tests.faults.killing import start_fork
from tests.training.tiny import MODEL, pretrain_rank


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def steps_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("iter_*"))


class Runs:
    """Single-process runs on one corpus; the first one has saved steps 2 and 4 in ``saved``."""

    def __init__(self, pool, corpus: str, directory: Path) -> None:
        self.pool, self.corpus, self.saved = pool, corpus, directory / "saved"
        self.go("--train-iters 4 --save-interval 2", "--save", str(self.saved))
        self.other = directory / "other"
        self.go("--train-iters 1", "--save", str(self.other))

    def go(self, line: str, *more: str, code: int = 0, ranks: int = 1) -> str:
        """The log of a run, or the usage error if it must end with one."""
        argv = [*MODEL, "--data-path", self.corpus, "--lr-warmup-iters", "0", *line.split(), *more]
        results = self.pool.run(pretrain_rank, ranks, argv=argv)
        assert [found for found, _, _ in results] == [code] * ranks, results
        return results[0][2] or results[0][1]


@pytest.fixture(scope="module")
def runs(pool, corpus, tmp_path_factory) -> Runs:
    return Runs(pool, corpus, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_restart_without_load_changes_nothing(runs, ranks):
    before = contents(runs.saved)
    error = runs.go("--train-iters 3", "--save", str(runs.saved), code=2, ranks=ranks)
    assert error == (
        "--save must be a directory without checkpoints, or the one that --load resumes"
        f" (got '{runs.saved} with steps 2, 4'); --load {runs.saved} continues that run,"
        " --save-overwrite starts a new one and deletes those checkpoints after its first save"
    )
    assert contents(runs.saved) == before


def test_a_run_from_other_checkpoints_changes_nothing(runs, tmp_path):
    before, save = contents(runs.saved), ("--save", str(runs.saved))
    for load in (
        ("--load", str(runs.other)),
        ("--load", str(runs.other), "--finetune"),
        ("--load", str(tmp_path / "missing"), "--allow-missing-load"),
        ("--load", str(runs.saved), "--finetune"),
    ):
        error = runs.go("--train-iters 3", *save, *load, code=2)
        assert error.startswith("--save must be a directory without checkpoints, or the one that")
        assert (f"--load {runs.saved} without --finetune" in error) == ("--finetune" in load)
    assert contents(runs.saved) == before


def test_a_tracker_alone_counts(runs, tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    error = runs.go("--train-iters 1", "--save", str(tmp_path), code=2)
    assert f"(got '{tmp_path} with latest_checkpointed_iteration.txt')" in error


def test_load_may_spell_the_directory_of_save_differently(runs, tmp_path):
    (tmp_path / "link").symlink_to(runs.saved)
    for load in (f"{runs.saved}/", str(tmp_path / "link"), os.path.relpath(runs.saved)):
        log = runs.go("--train-iters 4", "--save", str(runs.saved), "--load", load)
        assert " done at iteration 4" in log and " saved iteration" not in log
    assert steps_in(runs.saved) == ["iter_0000002", "iter_0000004"]


def test_save_overwrite_replaces_the_checkpoints_once_its_first_is_complete(runs, tmp_path):
    save = ("--save", str(tmp_path))
    runs.go("--train-iters 4 --save-interval 2", *save)
    before = contents(tmp_path)
    runs.go("--train-iters 3 --save-overwrite --data-path missing", *save, code=2)
    assert contents(tmp_path) == before
    log = runs.go("--train-iters 3 --save-interval 2 --save-overwrite --seed 5", *save)
    assert log.count(" saved iteration ") == 2
    assert steps_in(tmp_path) == ["iter_0000002-1", "iter_0000003"]
    runs.go("--train-iters 5", *save, "--load", str(tmp_path), "--seed", "5")
    assert steps_in(tmp_path) == ["iter_0000002-1", "iter_0000003", "iter_0000005"]


def test_save_overwrite_contradicts_resuming(runs):
    words = ("--save", str(runs.saved), "--load", str(runs.saved))
    before = contents(runs.saved)
    error = runs.go("--train-iters 5 --save-overwrite", *words, code=2)
    assert error.startswith(f"--save-overwrite must be unset with --load {runs.saved}")
    assert contents(runs.saved) == before


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_directory_that_another_run_writes_to_is_an_error_on_every_rank(runs, tmp_path, ranks):
    ready, told = os.pipe()

    def hold() -> None:
        WriterLock(tmp_path).acquire()
        os.write(told, b".")
        signal.pause()

    other = start_fork(hold)
    os.read(ready, 1)
    before = contents(tmp_path)
    try:
        error = runs.go("--train-iters 1", "--save", str(tmp_path), code=2, ranks=ranks)
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    assert f"(got '{tmp_path}, written by process {other} of " in error
    assert contents(tmp_path) == before
    log = runs.go("--train-iters 1", "--save", str(tmp_path))
    assert " saved iteration 1 " in log, "it is dead, so nothing is in the way"
    assert ".lock" not in os.listdir(tmp_path)


def test_a_run_that_fails_before_it_starts_leaves_no_lock_and_no_directory(runs, tmp_path):
    save = tmp_path / "a" / "save"
    runs.go("--train-iters 1 --data-path missing", "--save", str(save), code=2)
    assert os.listdir(tmp_path) == []

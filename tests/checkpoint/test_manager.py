"""The saves of a run: one at a time, logged when they are complete, old ones removed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint import CheckpointError, CheckpointManager, load_logical, verify
from megatron_moe.checkpoint.directory import revisions
from megatron_moe.checkpoint.lock import WriterLock
from tests.checkpoint.gate import hold_writers
from tests.checkpoint.layouts import IDENTITY, STATE, Case, Run, build

ONE, EP2 = Case(1, {}), Case(2, {"expert_model_parallel_size": 2})


def manager_of(run: Run, directory: Path, **settings: Any) -> tuple[CheckpointManager, list[str]]:
    """A manager that saves to a directory, and the lines that it logs."""
    log: list[str] = []
    checkpoint = replace(run.config.checkpoint, save=str(directory), **settings)
    config = replace(run.config, checkpoint=checkpoint)
    return CheckpointManager(config, run.ctx, log.append), log


def save(manager: CheckpointManager, run: Run, step: int) -> None:
    state = replace(STATE, iteration=step)
    manager.save(state, chunks=run.wrapped, optimizer=run.optimizer, identity=IDENTITY)


def _save_several(rank: int, world_size: int, *, directory: Path, asynchronous: bool) -> Any:
    """What was logged after each save and at the end."""
    run = build(EP2)
    manager, log = manager_of(
        run, directory, async_save=asynchronous, keep_last=2, keep_every=4, no_save_optim=True
    )
    for idle in (manager.poll, manager.finish, manager.abandon):
        idle()
    logged = []
    for step in (2, 4, 6, 8, 9):
        save(manager, run, step)
        logged.append(len(log))
    manager.finish()
    manager.finish()
    return logged, log


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saves_are_complete_in_order_and_old_ones_are_removed(pool, tmp_path, asynchronous):
    results = pool.run(_save_several, 2, directory=tmp_path, asynchronous=asynchronous)
    assert results[0] == results[1]
    logged, log = results[0]
    # A synchronous save is complete when `save` returns, an asynchronous one before the next.
    assert logged == ([0, 1, 2, 3, 4] if asynchronous else [1, 2, 3, 4, 5])
    how = " asynchronously" if asynchronous else ""
    steps = (2, 4, 6, 8, 9)
    assert log == [f" saved iteration {n} to {tmp_path / f'iter_{n:07d}'}{how}" for n in steps]
    assert list(revisions(tmp_path)) == [4, 8, 9]
    for step in (4, 8, 9):
        verify(tmp_path, step)
    assert list(load_logical(tmp_path, kind="exp_avg")) == []


def _nothing() -> None:
    """For a rank that holds no lock."""


def _ignore(line: str) -> None:
    """No log."""


def _asynchronous(run: Run, directory: Path, **arguments: Any) -> CheckpointManager:
    settings = {"save": str(directory), "async_save": True, "no_save_optim": True}
    checkpoint = replace(run.config.checkpoint, **settings)
    config = replace(run.config, checkpoint=checkpoint)
    return CheckpointManager(config, run.ctx, _ignore, **arguments)


def _taken_over(rank: int, world_size: int, *, directory: Path, when: str) -> str:
    """A save of a run whose lock another run has by then: its error."""
    run, lock = build(EP2), WriterLock(directory)
    if rank == 0:
        lock.acquire()

    def take_over() -> None:
        if rank == 0:
            (directory / ".lock").write_text("{}")
            (directory / ".saving-iter_0000009-theirs").mkdir(exist_ok=True)

    manager = _asynchronous(run, directory, check_writer=lock.check if rank == 0 else _nothing)
    try:
        if when == "before the save":
            take_over()
        save(manager, run, 2)
        take_over()
        manager.finish()
    except CheckpointError as error:
        lock.release()
        return str(error)
    return ""


@pytest.mark.parametrize("when", ["before the save", "before its commit"])
def test_a_run_whose_directory_was_taken_over_ends_and_deletes_nothing(pool, tmp_path, when):
    for error in pool.run(_taken_over, 2, directory=tmp_path, when=when):
        assert error.startswith(f"writer of --save {tmp_path} must be this run (got 'nobody')")
    left = [".lock", ".saving-iter_0000009-theirs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def _replacing(rank: int, world_size: int, *, directory: Path) -> list[list[int]]:
    run = build(ONE)
    earlier, _ = manager_of(run, directory)
    for step in (2, 4, 6):
        save(earlier, run, step)
    found = [path for paths in revisions(directory).values() for path in paths]
    manager = _asynchronous(run, directory, replaced=found)
    save(manager, run, 4)
    steps = [list(revisions(directory))]  # nothing is committed before the ranks meet again
    manager.finish()
    steps.append(list(revisions(directory)))
    save(manager, run, 5)
    manager.finish()
    return [*steps, list(revisions(directory))]


def test_checkpoints_of_another_run_go_once_the_first_save_is_complete(pool, tmp_path):
    (steps,) = pool.run(_replacing, 1, directory=tmp_path)
    assert steps == [[2, 4, 6], [4], [4, 5]]
    assert (tmp_path / "iter_0000004-1").is_dir()
    verify(tmp_path)


def _abandon(rank: int, world_size: int, *, directory: Path) -> list[str]:
    run = build(ONE)
    manager, log = manager_of(run, directory, async_save=True)
    save(manager, run, 2)
    manager.finish()
    gate = hold_writers(directory)
    save(manager, run, 4)
    manager.poll()
    manager.abandon()
    gate.set()
    manager.finish()
    return log


def test_an_abandoned_save_is_not_waited_for_and_does_not_count(pool, tmp_path):
    (log,) = pool.run(_abandon, 1, directory=tmp_path)
    assert log == [f" saved iteration 2 to {tmp_path / 'iter_0000002'} asynchronously"]
    assert list(revisions(tmp_path)) == [2]


def _unremovable(rank: int, world_size: int, *, directory: Path) -> list[str]:
    import megatron_moe.checkpoint.manager as module

    def fail(*_: Any) -> None:
        raise OSError("read-only")

    run = build(ONE)
    manager, log = manager_of(run, directory, keep_last=1)
    removing, module.prune = module.prune, fail  # type: ignore[assignment]
    try:
        with pytest.warns(UserWarning, match=r"could not remove old checkpoints of .*: read-only"):
            save(manager, run, 2)
    finally:
        module.prune = removing
    return log


def test_checkpoints_that_cannot_be_removed_are_a_warning(pool, tmp_path):
    ((line,),) = pool.run(_unremovable, 1, directory=tmp_path)
    assert line == f" saved iteration 2 to {tmp_path / 'iter_0000002'}"

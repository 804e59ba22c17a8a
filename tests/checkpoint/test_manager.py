"""The saves of a run: one at a time, logged when they are complete, old ones removed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint import CheckpointManager, load_logical, verify
from megatron_moe.checkpoint.directory import revisions
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

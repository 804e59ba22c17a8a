"""Saves that are killed or run out of space, at every point: the old checkpoint always survives.

Synchronous and asynchronous ones alike.

Each child process is a fork, so that torch is imported once. Kill points are Python's own audit
events (every open, rename, mkdir and removal below the directory) and the kernel's limit on file
sizes, which ends a process in the middle of a write; nothing in the code under test is replaced.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from megatron_moe.checkpoint import CheckpointError, contents, latest_step, verify
from megatron_moe.checkpoint.directory import remove, revisions
from megatron_moe.parallel.collectives import RankGroup
from tests.checkpoint import toy
from tests.faults.killing import POINTS, Save, check_whole, fork, fork_ranks, kill_at

both_ways = pytest.mark.parametrize("save", [toy.save, toy.save_async])
"""Synchronously, and asynchronously while training overwrites every tensor."""


@pytest.fixture(
    params=[1, pytest.param(3, marks=pytest.mark.slow)],
    ids=["one file", "three files"],
    autouse=True,
)
def files(request, monkeypatch):
    """Files of a rank."""
    if request.param > 1:
        monkeypatch.setattr(contents, "FILE_BYTES", 200)
    return request.param


def _killed_save(save: Save, event: int, directory: Path, step: int) -> None:
    kill_at(event, directory)
    save(directory, step)


def _kill_everywhere(save: Save, directory: Path, step: int) -> list[int]:
    """Save ``step`` to copies of a directory, killed at each point; the steps then found."""
    found = []
    for event in range(POINTS):
        copy = directory.with_name(f"copy-{event}")
        shutil.copytree(directory, copy)
        status = fork(partial(_killed_save, save, event, copy, step))
        if status == 0:
            assert latest_step(copy) == step
            return found
        assert status == -signal.SIGKILL
        found.append(check_whole(copy, 10, step))
        toy.save(copy, step)  # the next run saves over what is left
        assert check_whole(copy, step, step) == step
        assert not [p for p in copy.iterdir() if p.name.startswith(".")]
        shutil.rmtree(copy)
    raise AssertionError("the save never survived")


@both_ways
def test_a_kill_at_any_point_of_a_save_leaves_a_complete_checkpoint(tmp_path, save):
    directory = tmp_path / "run"
    toy.save(directory, 10)
    found = _kill_everywhere(save, directory, 20)
    assert len(found) > 10 and set(found) == {10, 20}
    assert found == sorted(found)


@both_ways
def test_a_kill_while_a_step_is_saved_again_never_harms_the_old_one(tmp_path, save):
    """Both hold the same step; whichever is found must be whole at every point."""
    directory = tmp_path / "run"
    toy.save(directory, 10)
    assert len(_kill_everywhere(save, directory, 10)) > 10


def test_a_kill_while_a_checkpoint_is_removed_leaves_it_whole_or_gone(tmp_path):
    directory = tmp_path / "run"
    toy.save(directory, 10)
    path = toy.save(directory, 20)

    def body(event: int) -> None:
        kill_at(event, directory)
        remove(path)

    for event in range(POINTS):
        status = fork(partial(body, event))
        if 20 not in revisions(directory):
            break
        verify(directory, 20)
    assert event > 0 and status in (0, -signal.SIGKILL)
    verify(directory, 10)


@both_ways
def test_a_kill_in_the_middle_of_any_write_leaves_the_old_checkpoint(tmp_path, save):
    """The limit on file sizes sends SIGXFSZ, whose default is to end the process at once."""
    directory = tmp_path / "run"
    path = toy.save(directory, 10)
    sizes = {p.name: p.stat().st_size for p in path.iterdir()}
    for limit in {1, *(size - 1 for size in sizes.values())}:

        def body(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            save(directory, 20)

        largest = max(sizes.values())
        status = fork(body)
        assert limit >= largest or status == -signal.SIGXFSZ, limit
        assert check_whole(directory, 10, 20) == 10


def _limited_save(save: Save, directory: Path, step: int, limit: int, message: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save(directory, step)
    except CheckpointError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        message.write_text(str(error))
        os._exit(2)


@both_ways
@pytest.mark.parametrize("limit", [0, 100, 1500])
def test_a_write_that_fails_reports_step_and_bytes_and_leaves_nothing(tmp_path, save, limit):
    directory, message = tmp_path / "run", tmp_path / "message"
    toy.save(directory, 10)
    before = sorted(p.name for p in directory.iterdir())
    assert fork(lambda: _limited_save(save, directory, 20, limit, message)) == 2
    text = message.read_text()
    # Weights and two moments, 54 fp32 elements each.
    assert f"save of step 20 to {directory}" in text and "648 bytes" in text
    assert "\n" not in text
    assert sorted(p.name for p in directory.iterdir()) == before
    assert check_whole(directory, 10, 20) == 10


@both_ways
def test_a_full_disk_is_an_error_and_the_old_checkpoint_stays(scarce, save):
    directory, room = scarce
    toy.save(directory, 10)
    message = f"save of step 20 to {directory} must be enough for 648 bytes .* intact"
    for free in (0, 1, 4, 8, 12):  # KiB: from nothing at all to all files but the last
        with room(free), pytest.raises(CheckpointError, match=message) as error:
            save(directory, 20)
        assert "No space left" in str(error.value) or "File too large" in str(error.value)
        assert check_whole(directory, 10, 10) == 10
        assert list(revisions(directory)) == [10]
    toy.save(directory, 20)
    assert check_whole(directory, 20, 20) == 20


@both_ways
def test_a_rank_that_cannot_write_stops_the_save_on_all(tmp_path, save):
    directory = tmp_path / "run"

    def body(ranks: RankGroup) -> None:
        toy.save(directory, 10, ranks)
        if ranks.rank == 1:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
        try:
            save(directory, 20, ranks)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
            text = str(sys.exc_info()[1])
            (tmp_path / f"message-{ranks.rank}").write_text(text)

    assert fork_ranks(body, tmp_path / "store") == [3, 3]
    messages = [(tmp_path / f"message-{rank}").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert f"save of step 20 to {directory} must be" in messages[0]
    assert list(revisions(directory)) == [10]
    assert check_whole(directory, 10, 20) == 10


@both_ways
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_at_any_point_ends_the_other_and_loses_nothing(tmp_path, save, victim):
    directory, store = tmp_path / "run", tmp_path / "store"
    assert fork_ranks(lambda ranks: toy.save(directory, 10, ranks) and None, store) == [0, 0]
    found = []
    for event in range(POINTS):
        copy = tmp_path / f"copy-{event}"
        shutil.copytree(directory, copy)

        def body(ranks: RankGroup, event: int = event, copy: Path = copy) -> None:
            if ranks.rank == victim:
                kill_at(event, copy)
            save(copy, 20, ranks)

        statuses = fork_ranks(body, store)
        if statuses == [0, 0]:
            break
        assert statuses[victim] == -signal.SIGKILL
        assert statuses[1 - victim] == 3
        found.append(check_whole(copy, 10, 20))
    assert found == sorted(found) and found[0] == 10
    assert len(found) > (10 if victim == 0 else 0)

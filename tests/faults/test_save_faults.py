"""Saves that are killed or run out of space, at every point: the old checkpoint always survives.

Each child process is a fork, so that torch is imported once. Kill points are Python's own audit
events (every open, rename, mkdir and removal below the directory) and the kernel's limit on file
sizes, which ends a process in the middle of a write; nothing in the code under test is replaced.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_moe.checkpoint import CheckpointError, latest_step, verify
from megatron_moe.checkpoint.directory import remove, revisions, step_directory
from megatron_moe.checkpoint.ranks import Ranks
from tests.checkpoint import toy

POINTS = 200
"""More than a save has; the loop ends when a save survives."""


def fork(body: Callable[[], None]) -> int:
    """Run ``body`` in a child; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(start_fork(body), 0)[1])


def start_fork(body: Callable[[], None]) -> int:
    """Run ``body`` in a child; its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return child


def kill_at(event: int, directory: Path) -> None:
    """From now on, be killed before the given change or opening of something below a directory."""
    seen = 0
    prefix = str(directory)

    def watch(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        watched = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if name not in watched or not str(arguments[0]).startswith(prefix):
            return
        if seen == event:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    sys.addaudithook(watch)


def check_whole(directory: Path, old: int, new: int) -> int:
    """The next start finds a complete checkpoint, the old or the new; which one."""
    step = latest_step(directory)
    assert step in (old, new)
    for present in revisions(directory):
        verify(directory, present)
    local, _ = toy.load(step_directory(directory)[1])
    for shard in local:
        assert torch.equal(shard.param, toy.logical(step)[shard.local_name])
    return step


def _killed_save(event: int, directory: Path, step: int) -> None:
    kill_at(event, directory)
    toy.save(directory, step)


def _kill_everywhere(directory: Path, step: int) -> list[int]:
    """Save ``step`` to copies of a directory, killed at each point; the steps then found."""
    found = []
    for event in range(POINTS):
        copy = directory.with_name(f"copy-{event}")
        shutil.copytree(directory, copy)
        status = fork(partial(_killed_save, event, copy, step))
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


def test_a_kill_at_any_point_of_a_save_leaves_a_complete_checkpoint(tmp_path):
    directory = tmp_path / "run"
    toy.save(directory, 10)
    found = _kill_everywhere(directory, 20)
    assert len(found) > 10 and set(found) == {10, 20}
    assert found == sorted(found)


def test_a_kill_while_a_step_is_saved_again_never_harms_the_old_one(tmp_path):
    """Both hold the same step; whichever is found must be whole at every point."""
    directory = tmp_path / "run"
    toy.save(directory, 10)
    assert len(_kill_everywhere(directory, 10)) > 10


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


def test_a_kill_in_the_middle_of_any_write_leaves_the_old_checkpoint(tmp_path):
    """The limit on file sizes sends SIGXFSZ, whose default is to end the process at once."""
    directory = tmp_path / "run"
    path = toy.save(directory, 10)
    sizes = {p.name: p.stat().st_size for p in path.iterdir()}
    for limit in {1, *(size - 1 for size in sizes.values())}:

        def body(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            toy.save(directory, 20)

        largest = max(sizes.values())
        status = fork(body)
        assert limit >= largest or status == -signal.SIGXFSZ, limit
        assert check_whole(directory, 10, 20) == 10


def _limited_save(directory: Path, step: int, limit: int, message: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        toy.save(directory, step)
    except CheckpointError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        message.write_text(str(error))
        os._exit(2)


@pytest.mark.parametrize("limit", [0, 100, 1500])
def test_a_write_that_fails_says_step_and_bytes_and_leaves_nothing(tmp_path, limit):
    directory, message = tmp_path / "run", tmp_path / "message"
    toy.save(directory, 10)
    before = sorted(p.name for p in directory.iterdir())
    assert fork(lambda: _limited_save(directory, 20, limit, message)) == 2
    text = message.read_text()
    # Weights and two moments, 54 fp32 elements each.
    assert f"save of step 20 to {directory}" in text and "648 bytes" in text
    assert "\n" not in text
    assert sorted(p.name for p in directory.iterdir()) == before
    assert check_whole(directory, 10, 20) == 10


@contextlib.contextmanager
def _ballast(mount: Path, free: int) -> Iterator[None]:
    """A mounted file system with so many KiB left."""
    path = mount / "ballast"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    with path.open("r+b") as file:
        file.truncate(max(path.stat().st_size - (free << 10), 0))
    yield
    path.unlink()


@contextlib.contextmanager
def _limit(free: int) -> Iterator[None]:
    """Files of at most half a KiB per KiB: the next best thing without the right to mount."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free << 9, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def scarce(tmp_path):
    """A directory, and a context in which it has little room."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(mount)]
    may_mount = (
        shutil.which("mount") and not subprocess.run(command, capture_output=True).returncode
    )
    if may_mount:
        yield mount / "run", lambda free: _ballast(mount, free)
        subprocess.run(["umount", "-l", str(mount)], check=True)
    else:
        yield mount / "run", _limit


def test_a_full_disk_is_an_error_and_the_old_checkpoint_stays(scarce):
    directory, room = scarce
    toy.save(directory, 10)
    message = f"save of step 20 to {directory} is .* room for 648 bytes .* intact"
    for free in (0, 1, 4, 8, 12):  # KiB: from nothing at all to all files but the last
        with room(free), pytest.raises(CheckpointError, match=message) as error:
            toy.save(directory, 20)
        assert "No space left" in str(error.value) or "File too large" in str(error.value)
        assert check_whole(directory, 10, 10) == 10
        assert list(revisions(directory)) == [10]
    toy.save(directory, 20)
    assert check_whole(directory, 20, 20) == 20


def fork_ranks(body: Callable[[Ranks], None], scratch: Path) -> list[int]:
    """Run ``body`` on two ranks of a gloo group; their exit statuses, 3 for an error."""

    def child(rank: int) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = torch.distributed.FileStore(str(scratch), 2)
        torch.distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30)
        )
        try:
            body(Ranks(rank, 2))
        except (CheckpointError, RuntimeError):
            os._exit(3)

    scratch.unlink(missing_ok=True)
    children = [start_fork(partial(child, rank)) for rank in range(2)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def test_a_rank_that_cannot_write_stops_the_save_on_all(tmp_path):
    directory = tmp_path / "run"

    def body(ranks: Ranks) -> None:
        toy.save(directory, 10, ranks)
        if ranks.rank == 1:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
        try:
            toy.save(directory, 20, ranks)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
            text = str(sys.exc_info()[1])
            (tmp_path / f"message-{ranks.rank}").write_text(text)

    assert fork_ranks(body, tmp_path / "store") == [3, 3]
    messages = [(tmp_path / f"message-{rank}").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert f"save of step 20 to {directory} is" in messages[0]
    assert list(revisions(directory)) == [10]
    assert check_whole(directory, 10, 20) == 10


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_at_any_point_ends_the_other_and_loses_nothing(tmp_path, victim):
    directory, store = tmp_path / "run", tmp_path / "store"
    assert fork_ranks(lambda ranks: toy.save(directory, 10, ranks) and None, store) == [0, 0]
    found = []
    for event in range(POINTS):
        copy = tmp_path / f"copy-{event}"
        shutil.copytree(directory, copy)

        def body(ranks: Ranks, event: int = event, copy: Path = copy) -> None:
            if ranks.rank == victim:
                kill_at(event, copy)
            toy.save(copy, 20, ranks)

        statuses = fork_ranks(body, store)
        if statuses == [0, 0]:
            break
        assert statuses[victim] == -signal.SIGKILL
        assert statuses[1 - victim] == 3
        found.append(check_whole(copy, 10, 20))
    assert found == sorted(found) and found[0] == 10
    assert len(found) > (10 if victim == 0 else 0)

"""One writer for each directory: who holds the lock, who may take it over, who finds out.

Owners on this host are real processes. An owner on another host is a file that the test writes,
with or without heartbeats.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_moe.checkpoint.lock import NAME, Timing, WriterLock
from megatron_moe.checkpoint.owner import Owner
from megatron_moe.errors import CheckpointError
from tests.faults.killing import fork, start_fork

NEVER = Timing(lease=1e6, grace=0.0, poll=0.01)
"""Nothing is taken over because it is silent."""
SOON = Timing(lease=0.6, grace=0.0, poll=0.01)
ELSEWHERE = replace(
    Owner.of_this_process(), key="theirs", host="other-node", boot="another", pid=1, ticks=1
)


def held(directory: Path) -> Owner | None:
    return Owner.from_json((directory / NAME).read_bytes())


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write_lock(directory: Path, owner: Owner, age: float = 0.0) -> None:
    """A lock as another run left it, with a heartbeat so many seconds ago."""
    path = directory / NAME
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - age,) * 2)


@contextmanager
def holder(directory: Path):
    """A process that holds the lock until it is killed; its number."""
    ready, told = os.pipe()

    def body() -> None:
        WriterLock(directory, NEVER).acquire()
        os.write(told, b".")
        signal.pause()

    child = start_fork(body)
    os.read(ready, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_lock_names_its_owner_and_goes_with_it(tmp_path):
    lock = WriterLock(tmp_path, NEVER)
    lock.acquire()
    lock.check()
    owner = held(tmp_path)
    assert (owner.host, owner.pid) == (socket.gethostname(), os.getpid())
    lock.release()
    lock.release()
    assert names(tmp_path) == []
    with pytest.raises(CheckpointError, match="nobody"):
        lock.check()


def test_directories_that_were_created_for_nothing_go_again(tmp_path):
    lock = WriterLock(tmp_path / "a" / "b", NEVER)
    lock.acquire()
    lock.release()
    assert names(tmp_path) == []
    lock = WriterLock(tmp_path / "a" / "b", NEVER)
    lock.acquire()
    (tmp_path / "a" / "b" / "iter_0000001").mkdir()
    lock.release()
    assert names(tmp_path / "a" / "b") == ["iter_0000001"]


def test_a_living_owner_is_an_error_that_names_it(tmp_path):
    with holder(tmp_path) as child:
        before = (tmp_path / NAME).read_bytes()
        with pytest.raises(CheckpointError) as error:
            WriterLock(tmp_path, NEVER).acquire()
        assert str(error.value).startswith(
            f"--save must be a directory that no other run writes to (got '{tmp_path}, written by"
            f" process {child} of "
        )
        assert f" on {socket.gethostname()}" in str(error.value)
        assert (tmp_path / NAME).read_bytes() == before
        assert names(tmp_path) == [NAME]


def test_a_killed_owner_on_this_host_is_replaced_at_once(tmp_path):
    """Also while it is a zombie, which it is until its launcher looks."""
    with holder(tmp_path) as child:
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        lock = WriterLock(tmp_path, NEVER)
        lock.acquire()
        assert held(tmp_path).pid == os.getpid()
        lock.check()
        lock.release()
    assert names(tmp_path) == []


def test_a_stopped_owner_on_this_host_lives(tmp_path):
    with holder(tmp_path) as child:
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        os.utime(tmp_path / NAME, (0, 0))
        with pytest.raises(CheckpointError, match="that no other run writes to"):
            WriterLock(tmp_path, SOON).acquire()


def test_an_owner_that_ends_in_time_is_waited_for(tmp_path):
    with holder(tmp_path) as child:
        ended = threading.Timer(0.3, lambda: os.kill(child, signal.SIGKILL))
        ended.start()
        lock = WriterLock(tmp_path, replace(NEVER, grace=60.0))
        lock.acquire()
        ended.join()
        lock.release()


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path):
    mine = Owner.of_this_process()
    write_lock(tmp_path, replace(mine, key="before", ticks=mine.ticks - 1))
    lock = WriterLock(tmp_path, NEVER)
    lock.acquire()
    lock.release()


def test_the_same_number_in_another_container_or_before_a_reboot_says_nothing(tmp_path):
    """This process has the number, so a comparison of numbers alone would find it alive."""
    mine = replace(Owner.of_this_process(), key="theirs")
    for elsewhere in (replace(mine, namespace="pid:[1]"), replace(mine, boot="before")):
        assert elsewhere.is_alive(Owner.of_this_process()) is None
        write_lock(tmp_path, elsewhere, age=5.0)
        lock = WriterLock(tmp_path, SOON)
        lock.acquire()
        lock.release()


def test_heartbeats_from_another_host_are_a_living_owner(tmp_path):
    write_lock(tmp_path, ELSEWHERE)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(tmp_path / NAME)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(CheckpointError, match=r"process 1 of .* on other-node"):
            WriterLock(tmp_path, SOON).acquire()
    finally:
        stop.set()
        thread.join()
    assert held(tmp_path) == ELSEWHERE


def test_silence_of_another_host_is_waited_for(tmp_path):
    write_lock(tmp_path, ELSEWHERE)
    log: list[str] = []
    lock, start = WriterLock(tmp_path, SOON), time.monotonic()
    lock.acquire(log.append)
    assert time.monotonic() - start >= 0.5, "the lease, but for the clock of the file system"
    assert held(tmp_path).pid == os.getpid()
    (line,) = log
    assert line.startswith(" waiting up to 0.6 s for a sign of life of process 1 of ")
    lock.release()


def test_silence_that_is_older_than_the_lease_is_not_waited_for(tmp_path):
    write_lock(tmp_path, ELSEWHERE, age=1000.0)
    log: list[str] = []
    lock = WriterLock(tmp_path, replace(NEVER, lease=900.0))
    lock.acquire(log.append)
    assert log == []
    lock.release()


def test_a_heartbeat_of_the_future_is_not_dead(tmp_path):
    """The clock of the file server was set back."""
    write_lock(tmp_path, ELSEWHERE, age=-1e5)
    child = start_fork(lambda: WriterLock(tmp_path, NEVER).acquire())
    time.sleep(0.3)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert held(tmp_path) == ELSEWHERE


JOB = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}
RUN = {"TORCHELASTIC_RUN_ID": "r", "TORCHELASTIC_RESTART_COUNT": "1"}


@pytest.mark.parametrize(
    ("environment", "before", "dead"),
    [
        (JOB, {"slurm_job": "77"}, True),
        (JOB, {"slurm_job": "77", "slurm_restarts": 1}, False),
        (JOB, {"slurm_job": "78"}, False),
        ({"SLURM_RESTART_COUNT": "1"}, {}, False),
        (RUN, {"torchrun_id": "r"}, True),
        (RUN, {"torchrun_id": "r", "torchrun_restarts": 1}, False),
        (RUN, {"torchrun_id": "s"}, False),
        ({**RUN, "TORCHELASTIC_RUN_ID": "none"}, {"torchrun_id": "none"}, False),
    ],
)
def test_a_job_that_starts_again_elsewhere_does_not_wait_for_its_own_past(
    tmp_path, monkeypatch, environment, before, dead
):
    for name in (*JOB, *RUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ELSEWHERE.slurm_job == ""
    write_lock(tmp_path, replace(ELSEWHERE, **before))
    here = Owner.of_this_process()
    assert held(tmp_path).is_alive(here) is (False if dead else None)
    if dead:
        lock = WriterLock(tmp_path, NEVER)
        lock.acquire()
        lock.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff" * 9, b"[" * 9999])
def test_a_lock_that_names_nobody_lives_for_the_lease(tmp_path, content):
    """Its process was killed between creating and writing it."""
    (tmp_path / NAME).write_bytes(content)
    lock, start = WriterLock(tmp_path, replace(SOON, lease=0.2)), time.monotonic()
    lock.acquire()
    assert time.monotonic() - start >= 0.1
    lock.release()


def _contend(directory: Path, timing: Timing, out: Path) -> None:
    """Write down the outcome, and live until all have."""
    lock = WriterLock(directory, timing)
    try:
        lock.acquire()
        lock.check()
        outcome = "writes"
    except CheckpointError:
        outcome = "error"
    with out.open("a") as file:
        file.write(f"{os.getpid()} {outcome}\n")
    signal.pause()


@pytest.mark.parametrize("before", ["nothing", "a dead process", "silence elsewhere"])
def test_of_several_runs_that_start_at_once_one_writes(tmp_path, before):
    directory, out = tmp_path / "run", tmp_path / "out"
    directory.mkdir()
    out.touch()
    if before == "a dead process":
        write_lock(directory, replace(Owner.of_this_process(), key="dead", ticks=1))
    elif before == "silence elsewhere":
        write_lock(directory, ELSEWHERE, age=1000.0)
    timing = Timing(lease=500.0, grace=0.0, poll=0.01)
    children = [start_fork(lambda: _contend(directory, timing, out)) for _ in range(6)]
    while len(out.read_text().splitlines()) < 6:
        time.sleep(0.02)
    owner = held(directory)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    outcomes = dict(line.split() for line in out.read_text().splitlines())
    assert sorted(outcomes.values()) == ["error"] * 5 + ["writes"]
    assert outcomes[str(owner.pid)] == "writes"
    assert names(directory) == [NAME]


def test_a_lock_that_another_run_took_over_a_moment_ago_is_not_replaced(tmp_path, monkeypatch):
    """It did so after this one found the owner dead, and before this one replaced the lock."""
    write_lock(tmp_path, replace(Owner.of_this_process(), key="dead", ticks=1))
    first, second = WriterLock(tmp_path, NEVER), WriterLock(tmp_path, NEVER)
    is_alive, looked = Owner.is_alive, []

    def look(owner: Owner, here: Owner) -> bool | None:
        alive = is_alive(owner, here)
        if not looked:
            looked.append(owner.key)
            first.acquire()
        return alive

    monkeypatch.setattr(Owner, "is_alive", look)
    with pytest.raises(CheckpointError, match="that no other run writes to"):
        second.acquire()
    assert looked == ["dead"]
    first.check()
    first.release()
    assert names(tmp_path) == []


def test_a_guard_of_a_killed_contender_is_removed_after_the_lease(tmp_path):
    write_lock(tmp_path, ELSEWHERE, age=1000.0)
    (tmp_path / f"{NAME}.taking").touch()
    lock = WriterLock(tmp_path, SOON)
    lock.acquire()
    lock.release()
    assert names(tmp_path) == []


@pytest.mark.parametrize("change", ["taken over", "unreadable"])
def test_an_owner_that_was_replaced_finds_out_and_leaves_the_other_alone(tmp_path, change):
    """As a machine that was suspended."""
    lock = WriterLock(tmp_path, replace(NEVER, heartbeat=0.01))
    lock.acquire()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    if change == "taken over":
        write_lock(scratch, ELSEWHERE)
    else:
        (scratch / NAME).write_bytes(b"")
    os.utime(scratch / NAME, (5, 5))
    (scratch / NAME).replace(tmp_path / NAME)
    scratch.rmdir()
    time.sleep(0.1)
    assert (tmp_path / NAME).stat().st_mtime == 5, "its heartbeats are not the other's"
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(CheckpointError, match=r"^writer of --save .* must be this run \(got"):
        lock.check()
    lock.release()
    assert (tmp_path / NAME).read_bytes() == before


def test_heartbeats_renew_the_modification_time(tmp_path):
    lock = WriterLock(tmp_path, replace(NEVER, heartbeat=0.01))
    lock.acquire()
    os.utime(tmp_path / NAME, (5, 5))
    for _ in range(500):
        if (tmp_path / NAME).stat().st_mtime != 5:
            break
        time.sleep(0.01)
    assert time.time() - (tmp_path / NAME).stat().st_mtime < 60
    lock.release()


@pytest.mark.parametrize("remove", ["lock", "directory"])
def test_a_lock_that_somebody_deleted_is_made_again_by_one_run(tmp_path, remove):
    directory = tmp_path / "run"
    lock = WriterLock(directory, NEVER)
    lock.acquire()
    (directory / NAME).unlink()
    if remove == "directory":
        directory.rmdir()
    lock.check()
    assert held(directory).pid == os.getpid()
    lock.check()
    lock.release()


def test_a_forked_process_does_not_release_it(tmp_path):
    lock = WriterLock(tmp_path, NEVER)
    lock.acquire()
    body: Callable[[], None] = lock.release
    assert fork(body) == 0
    lock.check()
    lock.release()

"""Saves in progress: the same bytes as a synchronous one, one at a time, failures on every rank."""

from __future__ import annotations

import resource
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_moe.checkpoint import CheckpointError, latest_step, verify
from megatron_moe.checkpoint.disk import Stopped, write_stream
from megatron_moe.checkpoint.save import start_save
from megatron_moe.checkpoint.tensor_files import HostMemory, TensorSource, write_tensors
from megatron_moe.parallel.collectives import RankGroup
from tests.checkpoint import toy


def contents_of(path: Path) -> dict[str, bytes]:
    """Every file of a checkpoint."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_copies_are_the_files_that_their_tensors_would_become(tmp_path, device):
    """Of all widths and memory layouts; the memory is used again, by larger and smaller ones."""
    memory = HostMemory(pinned=device == "cuda")
    for rows in (3, 40, 2):
        tensors = {
            "double": torch.randn(rows, dtype=torch.float64),
            "half": torch.randn(rows, 3).to(torch.bfloat16),
            "strided": torch.randn(rows, 6)[:, 1::2],
            "turned": torch.randn(5, rows).t(),
            "empty": torch.zeros(0, rows),
            "scalar": torch.tensor(float(rows)),
            "byte": torch.arange(rows, dtype=torch.uint8),
        }
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        items = [TensorSource.of(*item) for item in tensors.items()]
        files = {"one": items, "none": [], "odd": items[-1:], "two": items[:4]}
        expected = {
            name: write_tensors(tmp_path / f"{rows}.{name}", held, {"name": name})
            for name, held in files.items()
        }
        given = [(held, {"name": name}) for name, held in files.items()]
        copies = memory.copy(given)
        for tensor in tensors.values():
            tensor.zero_()
        for (name, record), copy in zip(expected.items(), copies, strict=True):
            path = tmp_path / f"{rows}.{name}"
            assert b"".join(copy.parts()) == path.read_bytes()
            assert write_stream(path.with_suffix(".copy"), copy.parts()) == record
            path.with_suffix(".copy").unlink()


def test_no_memory_for_a_copy_is_an_error(tmp_path):
    huge = TensorSource.of("x", torch.zeros(1).expand(1 << 50))
    with pytest.raises(CheckpointError, match=r"--async-save must be >= 4503599627370496 bytes"):
        HostMemory(pinned=False).copy([([huge], {})])


def _save_both(rank, world_size, *, directory):
    ranks = RankGroup(rank, world_size)
    toy.save(directory / "now", 10, ranks)
    return toy.save_async(directory / "async", 10, ranks)


def test_the_bytes_are_those_of_a_synchronous_save(pool, tmp_path):
    """Although the tensors are overwritten as soon as the copy is taken."""
    paths = pool.run(_save_both, 2, directory=tmp_path)
    assert paths == [tmp_path / "async" / "iter_0000010"] * 2
    expected = contents_of(tmp_path / "now" / "iter_0000010")
    assert len(expected) == 6
    assert contents_of(paths[0]) == expected
    assert latest_step(tmp_path / "async") == 10
    verify(tmp_path / "async")


def test_one_save_at_a_time(tmp_path):
    memory, done, ranks = HostMemory(pinned=False), [], RankGroup()
    assert memory.step is None
    first = start_save(
        tmp_path,
        10,
        toy.contents(10),
        ranks,
        memory=memory,
        on_commit=lambda: done.append(latest_step(tmp_path)),
    )
    assert first.step == memory.step == 10 and not first.done
    with pytest.raises(RuntimeError, match="step 10 is still being saved"):
        start_save(tmp_path, 20, toy.contents(20), ranks, memory=memory)
    assert first.finish() == tmp_path / "iter_0000010"
    assert done == [10]
    assert first.done and memory.step is None
    second = start_save(tmp_path, 20, toy.contents(20), ranks, memory=memory)
    assert second.finish() == tmp_path / "iter_0000020"
    for step in (10, 20):
        verify(tmp_path, step)


def test_a_write_stops_on_request(tmp_path):
    stop, written = threading.Event(), []

    def parts():
        for number in range(4):
            written.append(number)
            stop.set()
            yield memoryview(bytes(2 << 20))

    with pytest.raises(Stopped):
        write_stream(tmp_path / "file", parts(), stop)
    assert written == [0]


def _fail(rank, world_size, *, directory, victim):
    """Number of polls until the error, and the error."""
    ranks = RankGroup(rank, world_size)
    toy.save(directory, 10, ranks)
    memory, polls = HostMemory(pinned=False), 0
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    try:
        if rank == victim:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
        pending = start_save(directory, 20, toy.contents(20, ranks), ranks, memory=memory)
        while True:
            polls += 1
            pending.poll()
            torch.distributed.barrier()
    except CheckpointError as error:
        return polls, str(error), pending.done, memory.step
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_failed_writer_is_reported_on_every_rank_at_the_same_step(pool, tmp_path, victim):
    first, second = pool.run(_fail, 2, directory=tmp_path, victim=victim)
    assert first == second
    polls, text, done, step = first
    assert polls >= 1 and done and step is None
    assert text.startswith(f"space for the save of step 20 to {tmp_path} must be enough for ")
    assert "(got 'File too large, " in text
    assert "\n" not in text
    assert latest_step(tmp_path) == 10
    verify(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "iter_0000010",
        "latest_checkpointed_iteration.txt",
    ]


@pytest.mark.parametrize("memory", [None, HostMemory(pinned=False)])
def test_a_synchronous_save_runs_in_the_caller_s_thread(tmp_path, memory):
    """And is complete after two polls, without waiting in between."""
    threads = []
    pending = start_save(
        tmp_path,
        10,
        toy.contents(10),
        RankGroup(),
        memory=memory,
        on_commit=lambda: threads.append(threading.current_thread().name),
    )
    if memory is None:
        assert pending.poll() is None and not threads
        assert pending.poll() == tmp_path / "iter_0000010"
    else:
        assert pending.finish() == tmp_path / "iter_0000010"
    assert threads == ["MainThread" if memory is None else "checkpoint"]


def test_a_save_that_cannot_start_leaves_nothing(tmp_path):
    memory = HostMemory(pinned=False)
    what = toy.contents(10)
    huge = replace(what.parts[0], values=torch.zeros(1).expand(1 << 50))
    contents = replace(what, parts=[*what.parts, huge])
    with pytest.raises(CheckpointError, match="--async-save"):
        start_save(tmp_path, 10, contents, RankGroup(), memory=memory)
    assert list(tmp_path.iterdir()) == [] and memory.step is None

"""What one rank saves: blocks assigned to files of similar size, all or nothing."""

from __future__ import annotations

import resource
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_moe.checkpoint import CheckpointError, latest_step, verify
from megatron_moe.checkpoint import contents as module
from megatron_moe.checkpoint.contents import assign_to_files, rank_file
from megatron_moe.checkpoint.disk import Stopped, write_streams
from megatron_moe.checkpoint.save import start_save
from megatron_moe.checkpoint.tensor_files import HostMemory, TensorFiles
from megatron_moe.model.sharding.blocks import Block, Part
from megatron_moe.parallel.collectives import RankGroup
from tests.checkpoint import toy


def parts_of(*sizes: int) -> list[Part]:
    """Tensors of so many fp32 elements."""
    return [
        Part("model", f"t{i}", (size,), Block.whole((size,)), torch.zeros(size))
        for i, size in enumerate(sizes)
    ]


def sizes_of(parts: list[Part], rank: int = 0) -> dict[str, list[int]]:
    return {name: [p.values.numel() for p in held] for name, held in assign_to_files(parts, rank)}


def test_the_largest_goes_first_to_the_file_with_the_least(monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 40)  # 31 elements of 4 bytes: three files
    assert sizes_of(parts_of(3, 9, 7, 4, 8), 12) == {
        "rank-00012.safetensors": [9],
        "rank-00012-1.safetensors": [8, 3],
        "rank-00012-2.safetensors": [7, 4],
    }


def test_little_is_one_file_and_much_is_no_more_than_eight(monkeypatch):
    assert sizes_of([]) == {"rank-00000.safetensors": []}
    assert sizes_of(parts_of(3, 9)) == {"rank-00000.safetensors": [9, 3]}
    monkeypatch.setattr(module, "FILE_BYTES", 4)
    many = sizes_of(parts_of(*range(1, 40)))
    assert [*many] == [rank_file(0, number) for number in range(8)]
    assert sorted(n for held in many.values() for n in held) == list(range(1, 40))
    # One tensor is never cut, so there may be fewer files than bytes would fill.
    assert sizes_of(parts_of(100)) == {"rank-00000.safetensors": [100]}


def _save_both(rank, world_size, *, directory):
    module.FILE_BYTES = 64
    try:
        ranks = RankGroup(rank, world_size)
        toy.save(directory / "now", 10, ranks)
        toy.save_async(directory / "async", 10, ranks)
    finally:
        module.FILE_BYTES = 96 << 20


def test_files_of_several_ranks_load_at_any_cut(pool, tmp_path):
    pool.run(_save_both, 2, directory=tmp_path)
    whole, steps = toy.logical(10), [tmp_path / n / "iter_0000010" for n in ("now", "async")]
    files = [{f.name: f.read_bytes() for f in step.iterdir()} for step in steps]
    assert files[0] == files[1]
    names = sorted(name for name in files[0] if name.endswith(".safetensors"))
    assert len(names) > 4 and {rank_file(0, 1), rank_file(1, 2)} <= set(names)
    for parts in (1, 2, 4):
        for part in range(parts):
            local, states = toy.load(steps[0], part, parts)
            for shard in local:
                expected = shard.pieces[0].block_of(whole[shard.local_name])
                assert torch.equal(shard.param, expected)
                assert torch.equal(states[shard.param].tensors["exp_avg"], expected.flatten() * 2)


@pytest.mark.parametrize("save", [toy.save, toy.save_async])
def test_any_damaged_file_is_named(tmp_path, monkeypatch, save):
    monkeypatch.setattr(module, "FILE_BYTES", 200)
    step = save(tmp_path, 10)
    names = sorted(path.name for path in step.glob("*.safetensors"))
    assert names == [rank_file(0, 1), rank_file(0, 2), rank_file(0)]
    verify(tmp_path)
    for name in names:
        good = (step / name).read_bytes()
        (step / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            verify(tmp_path)
        (step / name).write_bytes(good)


def test_random_states_are_in_the_first_file_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_BYTES", 200)
    header = {"format": "pt", "random": "states"}
    what, ranks = replace(toy.contents(10), header=header), RankGroup()
    now = start_save(tmp_path / "now", 10, what, ranks)
    memory = HostMemory(pinned=False)
    later = start_save(tmp_path / "async", 10, what, ranks, memory=memory)
    for step in (now.finish(), later.finish()):
        found = {path.name: TensorFiles(step).metadata(path.name) for path in step.glob("rank-*")}
        plain = {rank_file(0, number): {"format": "pt"} for number in (1, 2)}
        assert found == {rank_file(0): header, **plain}


def test_if_one_file_fails_the_others_stop(tmp_path, monkeypatch):
    """And the error is the failure, not that the others were stopped."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    failed = threading.Event()

    def fails():
        yield memoryview(bytes(2 << 20))
        failed.set()
        raise OSError(28, "No space left on device")

    def unlimited():
        for _ in range(50):
            failed.wait(60)
            written.append(1)
            yield memoryview(bytes(2 << 20))

    written: list[int] = []
    for number, streams in enumerate(([unlimited, fails], [fails, unlimited])):
        directory = tmp_path / str(number)
        directory.mkdir()
        failed.clear()
        written.clear()
        with pytest.raises(OSError, match="No space left"):
            write_streams({directory / str(i): stream for i, stream in enumerate(streams)})
        assert len(written) < 50
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        write_streams({tmp_path / "x": unlimited}, stop)


@pytest.mark.parametrize("save", [toy.save, toy.save_async])
def test_one_file_too_large_is_no_checkpoint(tmp_path, monkeypatch, save):
    toy.save(tmp_path, 10)
    monkeypatch.setattr(module, "FILE_BYTES", 200)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
        with pytest.raises(
            CheckpointError, match=r"save of step 20 to .* must be .*'File too large, "
        ):
            save(tmp_path, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert latest_step(tmp_path) == 10
    assert [path for path in Path(tmp_path).iterdir() if path.name.startswith(".")] == []

"""Whole checkpoints of a toy model: what is saved is what is loaded, at any cut."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe.checkpoint import (
    CheckpointError,
    load_logical,
    read_config,
    read_identity,
    verify,
)
from megatron_moe.checkpoint.contents import SaveContents
from megatron_moe.checkpoint.directory import TRACKER
from megatron_moe.checkpoint.save import start_save
from megatron_moe.config import RunConfig
from megatron_moe.model.sharding.parts import Part, Replicas, save_plan
from megatron_moe.parallel.collectives import RankGroup
from tests.checkpoint import toy


def test_a_checkpoint_holds_logical_tensors_in_plain_files(tmp_path):
    path = toy.save(tmp_path, 10)
    assert path == tmp_path / "iter_0000010"
    names = {"config.json", "index.json", "manifest.json", "state.json", "rank-00000.safetensors"}
    assert {p.name for p in path.iterdir()} == names
    blocks = load_file(path / "rank-00000.safetensors")
    assert torch.equal(blocks["model/ffn.weight@0.0"], toy.logical(10)["ffn.weight"])
    assert torch.equal(blocks["exp_avg/ffn.weight@0.0"], toy.logical(10)["ffn.weight"] * 2)
    state = json.loads((path / "state.json").read_text())
    assert state["train"]["consumed_train_samples"] == 80
    verify(tmp_path)
    assert read_config(tmp_path) == RunConfig()
    assert read_identity(tmp_path).padded_vocab_size == 128
    loaded = dict(load_logical(tmp_path))
    assert loaded.keys() == toy.logical().keys()
    assert all(torch.equal(loaded[name], t) for name, t in toy.logical(10).items())


def _save(rank, world_size, *, directory, steps):
    for step in steps:
        toy.save(directory, step, RankGroup(rank, world_size))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_two_ranks_save_what_any_number_loads(pool, tmp_path, parts):
    pool.run(_save, 2, directory=tmp_path, steps=[10])
    verify(tmp_path)
    whole = toy.logical(10)
    for part in range(parts):
        local, states = toy.load(tmp_path / "iter_0000010", part, parts)
        for shard in local:
            expected = shard.pieces[0].block_of(whole[shard.local_name])
            assert torch.equal(shard.param, expected)
            assert torch.equal(states[shard.param].tensors["exp_avg"], expected.flatten() * 2)


def test_replicas_share_the_work_and_write_everything_once(tmp_path):
    """Three data-parallel ranks: weights go to one each; sharded state stays where it is."""
    cuts = [0, 5, 11, 48]
    shares: list[list[Part]] = []
    for rank in range(3):
        local = toy.shards(toy.logical(10))
        states = toy.adam_state(local, cuts[rank], cuts[rank + 1])
        shares.append(list(save_plan(local, states, Replicas((rank, 3), (0, 1)))))
    written = [(p.kind, p.name, p.block) for share in shares for p in share]
    assert len(written) == len(set(written))
    weights = [[p.name for p in share if p.kind == "model"] for share in shares]
    assert weights == [["ffn.weight"], ["norm.weight"], []]
    for name, tensor in toy.logical(10).items():
        moments = [p for share in shares for p in share if (p.kind, p.name) == ("exp_avg", name)]
        assert sum(p.values.numel() for p in moments) == tensor.numel()
    other_files = {"config.json": {}, "state.json": {}}
    parts = [part for share in shares for part in share]
    contents = SaveContents(parts=parts, other_files=other_files, header={})
    assert start_save(tmp_path, 1, contents, RankGroup()).finish().exists()


@pytest.mark.parametrize("fault", ["twice", "missing"])
def test_a_block_written_twice_or_not_at_all_never_becomes_a_checkpoint(tmp_path, fault):
    local = toy.shards(toy.logical(10), 0, 2) if fault == "missing" else toy.shards(toy.logical(10))
    parts = list(save_plan(local, None, Replicas()))
    if fault == "twice":
        first = parts[0]
        half = type(first.block)(first.block.view, (4, 0), (4, 6))
        parts.append(Part(first.kind, first.name, first.shape, half, first.values[4:]))
    contents = SaveContents(parts=parts, other_files={}, header={})
    with pytest.raises(CheckpointError, match=r"ffn\.weight: blocks hold"):
        start_save(tmp_path, 1, contents, RankGroup()).finish()
    assert list(tmp_path.iterdir()) == []


DAMAGE = {
    "flipped bit": lambda p: _flip(p),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "missing": lambda p: p.unlink(),
    "swapped": lambda p: shutil.copy(p.parents[1] / "iter_0000020" / p.name, p),
}


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", ["rank-00000.safetensors", "index.json", "state.json", "config.json"]
)
def test_damage_to_any_file_is_an_error_that_names_it(tmp_path, damage, name):
    toy.save(tmp_path, 20)
    toy.save(tmp_path, 10)
    path = tmp_path / "iter_0000010" / name
    before = path.read_bytes()
    DAMAGE[damage](path)
    if path.exists() and path.read_bytes() == before:
        return  # two steps of one run share their configuration
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        verify(tmp_path)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        list(load_logical(tmp_path))
    verify(tmp_path, 20)


def test_everything_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """Order of syncs and renames: files and their directory, the final name, the tracker."""
    events = []
    sync = os.fsync

    def spy(handle):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        sync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    renames = []
    sys.addaudithook(
        lambda name, args: renames and name == "os.rename" and events.append(("rename", args[1]))
    )
    renames.append(True)
    path = toy.save(tmp_path / "run", 10)
    renames.clear()
    named = [(what, Path(str(where)).name) for what, where in events]
    final, tracker = named.index(("rename", path.name)), named.index(("rename", TRACKER))
    assert {name for _, name in named[: final - 1]} == {p.name for p in path.iterdir()}
    assert named[final - 1][1].startswith(".saving-")
    assert named[final + 1 : tracker] == [("sync", "run"), ("sync", f".{TRACKER}.new")]
    assert named[tracker + 1 :] == [("sync", "run")]


def test_every_damaged_file_is_named_at_once(pool, tmp_path):
    pool.run(_save, 2, directory=tmp_path, steps=[10])
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        _flip(tmp_path / "iter_0000010" / name)
    with pytest.raises(CheckpointError) as error:
        verify(tmp_path)
    assert "rank-00000" in str(error.value) and "rank-00001" in str(error.value)
    assert str(error.value).splitlines()[-1].startswith(str(tmp_path / "iter_0000010"))

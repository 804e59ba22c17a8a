"""Which step is selected: the tracker's, or with a fallback the newest intact one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint import CheckpointError
from megatron_moe.checkpoint.directory import TRACKER
from megatron_moe.checkpoint.select import select_checkpoint
from megatron_moe.parallel.collectives import RankGroup
from tests.checkpoint import toy


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "flipped bit": _flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "missing": lambda path: path.unlink(),
}


def _save(rank: int, world_size: int, *, directory: Path, steps: list[int]) -> None:
    for step in steps:
        toy.save(directory, step, RankGroup(rank, world_size))


def _select(rank: int, world_size: int, *, directory: Path, fallback: bool = True) -> Any:
    try:
        selected, opened = select_checkpoint(
            directory, None, fallback=fallback, ranks=RankGroup(rank, world_size)
        )
    except CheckpointError as error:
        return type(error).__name__, str(error)
    return selected.path.name, selected.verified, selected.skipped, opened.train.iteration


@pytest.fixture
def saved(pool, tmp_path):
    pool.run(_save, 2, directory=tmp_path, steps=[10, 20, 30])
    return tmp_path


def _all(pool: Any, directory: Path, **options: Any) -> Any:
    """The same result on both ranks; the tracker is unchanged."""
    before = (directory / TRACKER).read_bytes() if (directory / TRACKER).exists() else None
    first, second = pool.run(_select, 2, directory=directory, **options)
    assert first == second
    assert before is None or (directory / TRACKER).read_bytes() == before
    return first


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_selects_the_previous_step(pool, saved, damage):
    names = ["rank-00001.safetensors", "index.json", "state.json", "config.json", "manifest.json"]
    for name in names:
        path = saved / "iter_0000030" / name
        whole = path.read_bytes()
        DAMAGE[damage](path)
        step, verified, skipped, iteration = _all(pool, saved)
        assert (step, verified, iteration) == ("iter_0000020", True, 20)
        assert len(skipped) == 1
        assert skipped[0].startswith("iter_0000030 is damaged and was skipped: ")
        assert str(path) in skipped[0]
        path.write_bytes(whole)
    assert _all(pool, saved) == ("iter_0000030", True, (), 30)


def test_a_step_in_the_place_of_another_is_skipped(pool, saved):
    shutil.rmtree(saved / "iter_0000030")
    shutil.copytree(saved / "iter_0000010", saved / "iter_0000030")
    step, _, (skipped,), iteration = _all(pool, saved)
    assert (step, iteration) == ("iter_0000020", 20)
    assert skipped.startswith("iter_0000030 is damaged and was skipped: step in ")


def test_several_damaged_steps_are_all_reported(pool, saved):
    _flip(saved / "iter_0000030" / "rank-00000.safetensors")
    _flip(saved / "iter_0000020" / "index.json")
    step, _, skipped, _ = _all(pool, saved)
    assert step == "iter_0000010"
    assert [line.split()[0] for line in skipped] == ["iter_0000030", "iter_0000020"]
    _flip(saved / "iter_0000010" / "rank-00001.safetensors")
    kind, text = _all(pool, saved)
    assert kind == "CheckpointError"
    assert text.splitlines()[-1] == (
        f"at least one checkpoint in {saved} must be intact (got '3 damaged')"
    )
    assert [line.split()[0] for line in text.splitlines()[:-1]] == [
        "iter_0000030",
        "iter_0000020",
        "iter_0000010",
    ]


@pytest.mark.parametrize("text", [None, "", "garbage", "40"])
def test_a_broken_tracker_selects_the_newest_intact_step(pool, saved, text):
    tracker = saved / TRACKER
    tracker.unlink() if text is None else tracker.write_text(text)
    _flip(saved / "iter_0000030" / "rank-00000.safetensors")
    step, _, skipped, _ = _all(pool, saved)
    assert step == "iter_0000020"
    assert skipped[0].startswith(f"step in tracker {tracker} must be ")
    assert skipped[1].startswith("iter_0000030 is damaged")


def test_steps_after_the_tracker_s_are_never_selected(pool, saved):
    (saved / TRACKER).write_text("20\n")
    assert _all(pool, saved)[0] == "iter_0000020"
    _flip(saved / "iter_0000020" / "rank-00000.safetensors")
    assert _all(pool, saved)[0] == "iter_0000010"


def test_without_fallback_damage_is_an_error_with_a_fix(pool, saved):
    _flip(saved / "iter_0000030" / "state.json")
    kind, text = _all(pool, saved, fallback=False)
    assert kind == "Corrupt"
    last = text.splitlines()[-1]
    assert "iter_0000030 must be intact (got 'damage in state.json')" in last
    assert "--ckpt-step" in last and "--checkpoint-fallback" in last


def test_an_empty_directory_is_still_an_error(pool, tmp_path):
    kind, text = _all(pool, tmp_path)
    assert kind == "NoCheckpoint" and "--allow-missing-load" in text

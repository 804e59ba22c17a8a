"""Opening checkpoints that someone has tampered with: a typed error or a result, nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint import CheckpointError, TrainState, load_logical, verify
from megatron_moe.checkpoint.directory import MANIFEST, write_manifest
from megatron_moe.checkpoint.disk import FileRecord, hash_of
from megatron_moe.checkpoint.metadata import open_checkpoint
from megatron_moe.errors import UsageError
from tests.checkpoint import toy

NASTY: list[Any] = [
    None, True, -1, 0, 2**63, 10**40, 1.5, "", "../../etc/passwd", [], {}, [[]], [None], {"": 1}
]  # fmt: skip
"""Values that replace others."""
JSON_FILES = ["config.json", "state.json", "index.json", MANIFEST]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key in it."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    found = [(value, key) for key in keys]
    return found + [place for key in keys for place in _places(value[key])]


def _sealed(path: Path) -> None:
    """Make checksums right again, so that what reads the files is reached."""
    (path / MANIFEST).unlink()
    records = {}
    for file in path.iterdir():
        with file.open("rb") as handle:
            records[file.name] = FileRecord(hash_of(handle), file.stat().st_size)
    write_manifest(path, 10, records)


@pytest.mark.parametrize("name", JSON_FILES)
def test_tampered_values_give_typed_errors(tmp_path, name):
    path = toy.save(tmp_path, 10)
    original = (path / name).read_text()
    generator = random.Random(name)
    rejected = 0
    for _ in range(150):
        content = json.loads(original)
        container, key = generator.choice(_places(content))
        container[key] = generator.choice(NASTY)
        (path / name).write_text(json.dumps(content))
        if name != MANIFEST:
            _sealed(path)
        try:
            verify(tmp_path)
            dict(load_logical(tmp_path))
        except UsageError:
            rejected += 1
    assert rejected > 5  # the reader was reached, and did read


@pytest.mark.parametrize("name", [*JSON_FILES, "rank-00000.safetensors"])
def test_tampered_bytes_give_typed_errors(tmp_path, name):
    path = toy.save(tmp_path, 10)
    original = (path / name).read_bytes()
    generator = random.Random(name)
    for _ in range(100):
        data = bytearray(original)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(min(len(data), 2000))] = generator.randrange(256)
        cut = generator.choice([len(data), generator.randrange(len(data))])
        (path / name).write_bytes(data[:cut])
        if name != MANIFEST:
            _sealed(path)
        try:
            verify(tmp_path)
            dict(load_logical(tmp_path))
        except UsageError:
            continue


def test_progress_is_read_back_exactly(tmp_path):
    opened = open_checkpoint(toy.save(tmp_path, 10))
    assert opened.train == TrainState(iteration=10, consumed_train_samples=80)
    assert opened.optimizer == {"step": 10}


@pytest.mark.parametrize(
    ("key", "value"),
    [("iteration", "10"), ("iteration", True), ("iteration", 10.0), ("extra", []), ("extra", 3)],
)
def test_progress_of_another_type_is_rejected(tmp_path, key, value):
    """Otherwise it would be an error, or another step, somewhere in the run that resumes."""
    path = toy.save(tmp_path, 10)
    state = json.loads((path / "state.json").read_text())
    state["train"][key] = value
    (path / "state.json").write_text(json.dumps(state))
    _sealed(path)
    with pytest.raises(CheckpointError, match=rf"{key} in .* must be of type \w+ \(got "):
        open_checkpoint(path)


@pytest.mark.parametrize("optimizer", [{"step": "7"}, {"step": -1}, {"step": 10**40}, 3, [1]])
def test_a_step_count_that_is_none_is_rejected(tmp_path, optimizer):
    path = toy.save(tmp_path, 10)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "optimizer": optimizer}))
    _sealed(path)
    with pytest.raises(CheckpointError, match="a number of steps"):
        open_checkpoint(path)


def test_only_tensors_that_are_there_are_read(tmp_path):
    toy.save(tmp_path, 10)
    assert [name for name, _ in load_logical(tmp_path, names=["norm.weight"])] == ["norm.weight"]
    moments = dict(load_logical(tmp_path, kind="exp_avg"))
    assert moments.keys() == toy.logical().keys()
    with pytest.raises(CheckpointError, match="absent"):
        list(load_logical(tmp_path, names=["norm.weight", "absent"]))


def test_a_step_that_is_not_there_is_an_error_that_lists_the_steps(tmp_path):
    toy.save(tmp_path, 10)
    with pytest.raises(
        CheckpointError, match=r"--ckpt-step must be a complete step of .*: 10 \(got 11\)"
    ):
        list(load_logical(tmp_path, 11))

"""Data of a run that differs from the checkpoint's is named by what differs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_moe.data.identity import data_differences
from megatron_moe.data.pipeline import Data, build_data
from tests.data.corpus import random_documents, run_config, write
from tests.data.test_pipeline import data_of, rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources, and `moved/a` with the content of `a`."""
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate("abc"):
        write(folder / name, random_documents(40, seed))
    (folder / "moved").mkdir()
    write(folder / "moved" / "a", random_documents(40, 0))
    return folder


def _data(folder: Path, words: str, **changes: Any) -> Data:
    paths = [w if w.replace(".", "").isdigit() else str(folder / w) for w in words.split()]
    return build_data(
        run_config(*paths, **changes),
        dp_rank=0,
        dp_size=1,
        num_microbatches=1,
        consumed_train_samples=0,
        reads_data=False,
    )


def _lines(before: Data, now: Data) -> list[str]:
    return data_differences(before.described, now.described, before.fingerprint)


CASES = {
    "a source more": ("a b", "a b c", {}, ["{f}/c: a source in this run, not in the checkpoint"]),
    "a source less": ("a b", "b", {}, ["{f}/a: a source in the checkpoint, not in this run"]),
    "another source": (
        "a b",
        "c b",
        {},
        [
            "{f}/c: a source in this run, not in the checkpoint",
            "{f}/a: a source in the checkpoint, not in this run",
        ],
    ),
    "order": (
        "a b",
        "b moved/a",
        {},
        ["order of the sources: {f}/a {f}/b in the checkpoint, {f}/b {f}/moved/a in this run"],
    ),
    "the same one twice": (
        "a b",
        "a b moved/a",
        {},
        ["number of sources: 2 in the checkpoint, 3 in this run"],
    ),
    "weights": (
        "1 a 3 b",
        "1 a 2 b",
        {},
        ["weights of the sources: 1.0 3.0 in the checkpoint, 1.0 2.0 in this run"],
    ),
    "seed": ("a", "moved/a", {"seed": 7}, ["--seed: 1234 in the checkpoint, 7 in this run"]),
    "several": (
        "a",
        "a",
        {"seed": 7, "split": "1,1,0", "seq_length": 8},
        [
            "part of each source's documents for training (--split): 0.0 1.0 in the checkpoint,"
            " 0.0 0.5 in this run",
            "--seed: 1234 in the checkpoint, 7 in this run",
            "--seq-length: 16 in the checkpoint, 8 in this run",
        ],
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_each_part_is_named(folder: Path, name: str) -> None:
    before, now, changes, expected = CASES[name]
    lines = _lines(_data(folder, before), _data(folder, now, **changes))
    assert lines == [line.format(f=folder) for line in expected]


def test_a_source_whose_files_moved_does_not_differ(folder: Path) -> None:
    before, now = _data(folder, "a b"), _data(folder, "moved/a b")
    assert before.fingerprint == now.fingerprint


def test_new_content_at_the_old_path_is_named(folder: Path, tmp_path: Path) -> None:
    for name in "ab":
        for end in ("bin", "idx"):
            shutil.copy(folder / f"{name}.{end}", tmp_path / f"{name}.{end}")
    before = _data(tmp_path, "a b")
    write(tmp_path / "b", random_documents(40, 9))
    assert _lines(before, _data(tmp_path, "a b")) == [
        f"{tmp_path}/b: it has other content than in the checkpoint"
    ]


@pytest.mark.parametrize("saved", [None, {}, [], {"fingerprint": "other"}, "x"])
def test_a_checkpoint_that_did_not_record_it_gives_the_hashes(folder: Path, saved: Any) -> None:
    ours = _data(folder, "a")
    assert data_differences(saved, ours.described, "f" * 32) == [
        f"training data: {'f' * 32} in the checkpoint, {ours.fingerprint} in this run"
    ]


@pytest.mark.parametrize("change", [{"sources": 3}, {"prefixes": None}, {"seed": [[1]]}])
def test_malformed_records_are_no_traceback(folder: Path, change: dict[str, Any]) -> None:
    ours = _data(folder, "a").described
    assert data_differences({**ours, **change}, ours, ours["fingerprint"])


def test_an_order_that_was_changed_in_the_cache_is_never_trained_on(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", random_documents(200))
    before = rows(data_of(prefix).train)
    changed = 0
    for path in (tmp_path / "cache").glob("samples-*/*.npy"):
        values = np.load(path)
        if values.ndim == 1 and len(values) > 1:
            np.save(path, values[::-1])
            changed += 1
    assert changed
    assert rows(data_of(prefix).train) == before

"""The writer against Megatron-Core's own builder and reader, and its refusals."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_moe.data.indexed import writer as indexed_writer
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.errors import UsageError
from tests.data.corpus import read_with_megatron_core, write

# Documents as lists of sequences; one has none, as the tool writes for a text without ids.
DOCUMENTS = [[[1, 2, 3]], [], [[4], [5, 6]], [[7] * 50], [[8]]]


def engine_writes(prefix: Path, vocab_size: int) -> tuple[bytes, bytes]:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for sequences in DOCUMENTS:
        builder.add_document([i for ids in sequences for i in ids], [len(ids) for ids in sequences])
    builder.finalize(f"{prefix}.idx")
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("vocab_size", [100, 65499, 65500, 65536, 70000])
@pytest.mark.parametrize("chunk", [2, 1 << 20])
def test_bytes_equal_megatron_core(
    tmp_path: Path, vocab_size: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed_writer, "_CHUNK", chunk)
    with IndexedWriter(str(tmp_path / "ours"), vocab_size) as writer:
        for sequences in DOCUMENTS:
            flat = [i for ids in sequences for i in ids]
            writer.add_document(flat, [len(ids) for ids in sequences])
    ours = [(tmp_path / f"ours.{kind}").read_bytes() for kind in ("bin", "idx")]
    assert tuple(ours) == engine_writes(tmp_path / "engine", vocab_size)
    assert (writer.documents, writer.tokens) == (5, 57)
    assert read_with_megatron_core(tmp_path / "ours") == [ids for doc in DOCUMENTS for ids in doc]


def test_many_at_once_equal_one_by_one(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [], [3]])
    with IndexedWriter(str(tmp_path / "b"), 1000) as writer:
        writer.add_documents(np.array([1, 2, 3]), np.array([2, 1]), np.array([1, 0, 1]))
    for kind in ("bin", "idx"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_no_documents(tmp_path: Path) -> None:
    write(tmp_path / "none", [])
    assert (tmp_path / "none.bin").read_bytes() == b""
    assert len((tmp_path / "none.idx").read_bytes()) == 34 + 8


@pytest.mark.parametrize(("bad", "found"), [(1000, "1000"), (70000, "70000"), (-1, "-1")])
def test_id_beyond_the_vocabulary(tmp_path: Path, bad: int, found: str) -> None:
    with pytest.raises(UsageError, match=rf"document 3 .*must be >= 0 and <= 999 \(got {found}\)"):
        write(tmp_path / "x", [[1], [2, 3], [], [4, bad], [5]])
    assert list(tmp_path.iterdir()) == []


def test_megatron_core_writes_such_an_id_as_another(tmp_path: Path) -> None:
    """The defect that the writer guards against; if this fails, the guard has lost its reason."""
    builder = IndexedDatasetBuilder(str(tmp_path / "e.bin"), dtype=np.uint16)
    builder.add_item(torch.tensor([70000]))
    builder.end_document()
    builder.finalize(str(tmp_path / "e.idx"))
    assert read_with_megatron_core(tmp_path / "e") == [[4464]]


def test_an_exception_leaves_the_old_pair(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3]])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail() -> None:
        with IndexedWriter(str(tmp_path / "x"), 1000) as writer:
            writer.add_document([4])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_killed_writer_leaves_the_old_pair(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3]])
    before = [(tmp_path / f"x.{kind}").read_bytes() for kind in ("bin", "idx")]
    child = os.fork()
    if child == 0:
        writer = IndexedWriter(str(tmp_path / "x"), 1000)
        writer.add_document(list(range(900)) * 100)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [(tmp_path / f"x.{kind}").read_bytes() for kind in ("bin", "idx")] == before


def test_an_index_is_never_beside_other_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between the two renames: tokens without an index, which is an error at open."""
    write(tmp_path / "x", [[1, 2, 3]])
    replace, calls = os.replace, []

    def once(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", [[4, 5, 6]])
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="output prefix must be a writable path"):
        write(tmp_path / "file" / "x", [[1]])

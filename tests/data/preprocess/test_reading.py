"""Every kind of input gives the same documents, in bounded batches, and says where one is bad."""

from __future__ import annotations

import builtins
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megatron_moe.data.preprocess import reading
from megatron_moe.data.preprocess.inputs import TextDocuments, cut, find_inputs
from megatron_moe.data.preprocess.reading import DocumentBatch, read_batches
from megatron_moe.errors import UsageError

TEXTS = [f"text {i} wörd\n" * (i % 40) for i in range(300)]
LINES = b"".join(
    json.dumps({"text": text}, ensure_ascii=i % 2 == 0).encode() + b"\n\n"[: i % 3 // 2 + 1]
    for i, text in enumerate(TEXTS)
)


def write_all(folder: Path) -> list[Path]:
    """The same documents in every kind; the .zst has two frames, the .gz two members."""
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    packers = {"gz": gzip.compress, "zst": zstandard.compress}
    made = {"a.jsonl": LINES}
    made |= {f"a.jsonl.{k}": pack(LINES[:half]) + pack(LINES[half:]) for k, pack in packers.items()}
    for name, content in made.items():
        (folder / name).write_bytes(content)
    table = pyarrow.table({"n": range(300), "text": TEXTS})
    parquet.write_table(table, folder / "a.parquet", row_group_size=70)
    return [*(folder / name for name in made), folder / "a.parquet"]


def batches_of(path: Path, text: TextDocuments = "file") -> list[DocumentBatch]:
    (slices,) = cut(find_inputs([str(path)]), 1)
    return [batch for s in slices for batch in read_batches(s, ["text"], text)]


def texts_in(batches: list[DocumentBatch]) -> list[str]:
    return [field[0].decode() for batch in batches for (field,) in batch.documents(["text"])]


def test_every_kind_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH", 5000)
    for path in write_all(tmp_path):
        batches = batches_of(path)
        assert texts_in(batches) == TEXTS, path
        assert len(batches) > 4
        assert sum(batch.taken for batch in batches) == path.stat().st_size, path


def test_batches_are_bounded(tmp_path: Path) -> None:
    """Whatever the size of the file, a batch holds about `BATCH` bytes."""
    line = json.dumps({"text": "x" * 999}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(line * 3000)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line * 3000))
    (tmp_path / "c.txt").write_bytes((b"x" * 999 + b"\n\n") * 3000)
    for name in ("a.jsonl", "b.jsonl.gz", "c.txt"):
        sizes = [
            sum(len(text) for (field,) in batch.documents(["text"]) for text in field)
            for batch in batches_of(tmp_path / name, "block")
        ]
        assert len(sizes) > 4
        assert max(sizes) <= reading.BATCH + 1100


def test_lines_are_counted_over_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH", 100)
    lines = b"".join(b'{"text": "%d"}\n' % i + b"\n" * (i % 2) for i in range(100))
    bad = lines.splitlines().index(b'{"text": "77"}') + 1
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("a.jsonl", "b.jsonl.gz"):
        (batch,) = [b for b in batches_of(tmp_path / name) if "77" in texts_in([b])]
        index = texts_in([batch]).index("77")
        assert batch.place(index) == f"line {bad} of {tmp_path / name}"


def test_text_files(tmp_path: Path) -> None:
    content = "\n\na\nb\n\n \t\nc é\n\r\n\nd"
    (tmp_path / "a.txt").write_text(content, newline="")
    assert texts_in(batches_of(tmp_path / "a.txt")) == [content]
    assert texts_in(batches_of(tmp_path / "a.txt", "block")) == ["a\nb\n", "c é\n", "d"]
    (tmp_path / "b.txt").write_text("")
    assert batches_of(tmp_path / "b.txt") == batches_of(tmp_path / "b.txt", "block") == []


def test_a_large_text_file_is_no_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LARGEST_TEXT", 10)
    (tmp_path / "a.txt").write_text("x" * 11)
    with pytest.raises(
        UsageError, match=r"must be a text file of <= 10 bytes.*--text-documents block"
    ):
        batches_of(tmp_path / "a.txt")


def damaged(folder: Path, name: str) -> Path:
    whole = {path.suffix: path for path in write_all(folder)}
    kind = Path(name).suffix
    content = whole[kind].read_bytes()
    if name.startswith("cut"):
        content = content[: int(len(content) * 0.8)]
    elif name.startswith("flipped"):
        middle = len(content) // 2
        content = content[:middle] + bytes(b ^ 0xFF for b in content[middle : middle + 20])
    else:
        content = b"not of this kind at all, but long enough to be read"
    path = folder / (name.split(".")[0] + ".json" * (kind != ".parquet") + kind)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name",
    [
        f"{fault}{kind}"
        for fault in ("cut", "flipped", "other")
        for kind in (".gz", ".zst", ".parquet")
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    path = damaged(tmp_path, name)
    with pytest.raises(UsageError) as caught:
        texts_in(batches_of(path))
    assert str(path) in str(caught.value)
    assert "readable" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_column(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(
        UsageError, match=r"--json-keys must be columns of .* body, n \(got 'text'\)"
    ):
        batches_of(tmp_path / "a.parquet")


def test_a_column_of_lists_and_an_empty_value(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [["a", "b"], [], None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (batch,) = batches_of(tmp_path / "a.parquet")
    documents = batch.documents(["text"])
    assert [next(documents), next(documents)] == [[[b"a", b"b"]], [[]]]
    with pytest.raises(UsageError, match=r"--json-keys text must be the key of a text .*got None"):
        next(documents)
    assert batch.place(2) == f"row 2 of {tmp_path}/a.parquet"


@pytest.mark.parametrize(
    ("name", "library"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")]
)
def test_without_the_library(
    tmp_path: Path, name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path)
    real = builtins.__import__

    def without(wanted: str, *rest: Any) -> Any:
        if wanted.split(".")[0] == library:
            raise ImportError(wanted)
        return real(wanted, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UsageError, match=rf"{library} installed .*pip install 'megatron-moe\[data\]'"
    ):
        batches_of(tmp_path / name)

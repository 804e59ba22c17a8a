"""Every kind of input gives the same documents, in bounded batches, and says where one is bad."""

from __future__ import annotations

import builtins
import gzip
import json
import re
import subprocess
import sys
import zlib
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
from megatron_moe.text import LONGEST_RECORD

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


def batches_of(
    path: Path, text: TextDocuments = "file", most: int = LONGEST_RECORD
) -> list[DocumentBatch]:
    (slices,) = cut(find_inputs([str(path)]), 1)
    return [batch for s in slices for batch in read_batches(s, ["text"], text, most)]


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


MARK = b"\xef\xbb\xbf"


def test_marks_and_separators_of_other_programs(tmp_path: Path) -> None:
    """A BOM begins each of two joined files, and lines end in CR LF; no other character does."""
    texts = ["one", "a\u2028b\x85c\x0cd", "two"]
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    joined = MARK + b"\r\n".join([lines[0], MARK + lines[1], b"", MARK, lines[2], b""])
    for name, content in {"a.jsonl": joined, "b.ndjson.GZ": gzip.compress(joined)}.items():
        (tmp_path / name).write_bytes(content)
        (batch,) = batches_of(tmp_path / name)
        assert texts_in([batch]) == texts
        assert batch.place(2) == f"line 5 of {tmp_path / name}"
    (tmp_path / "a.txt").write_bytes(MARK + b"Hello\r\n\r\n" + MARK + b"World\r\n")
    assert texts_in(batches_of(tmp_path / "a.txt", "block")) == ["Hello\r\n", "World\r\n"]
    (tmp_path / "b.txt").write_bytes(MARK + b"Hello")
    assert texts_in(batches_of(tmp_path / "b.txt")) == ["Hello"]


def test_a_mark_within_joined_texts_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "joined.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n\xef\xbb\xbf\nthree\n")
    assert texts_in(batches_of(path)) == ["one\ntwo\n\nthree\n"]
    assert texts_in(batches_of(path, "block")) == ["one\ntwo\n", "three\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path: Path, name: str, encoding: str) -> None:
    content = '{"text": "one"}\n{"text": "two"}\n'.encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(UsageError, match=r"must be UTF-8 \(got 'UTF-(16|32)(LE|BE)?'\).*iconv"):
        texts_in(batches_of(path))


@pytest.mark.parametrize("log", [27, 28, 31])
def test_zstd_windows_up_to_two_gib(tmp_path: Path, log: int) -> None:
    """The window that `zstd --long` writes into the header of a frame of unknown size.

    More than 128 MiB need the flag: a frame of some KB can make the library fill all of it.
    """
    params = zstandard.ZstdCompressionParameters.from_level(3, window_log=log, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=params).compressobj()
    content = packer.compress(b'{"text": "abc"}\n' * 5) + packer.flush()
    assert zstandard.get_frame_parameters(content).window_size == 1 << log
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(content)
    assert texts_in(batches_of(path, most=1 << log)) == ["abc"] * 5
    if log > 27:
        says = (
            rf"window of {1 << log} bytes is larger than 134217728; .*--max-record-bytes {1 << log}"
        )
        with pytest.raises(UsageError, match=says):
            batches_of(path)


def test_frames_of_every_form(tmp_path: Path) -> None:
    """With and without the size of the content and a checksum; skippable frames; all cuts fail."""
    line = b'{"text": "%s"}\n' % (b"ab" * 100)
    frames = b"".join(
        zstandard.ZstdCompressor(write_content_size=size, write_checksum=check).compress(line * n)
        for size in (True, False)
        for check in (True, False)
        for n in (1, 5000)
    )
    skippable = b"\x53\x2a\x4d\x18" + (9).to_bytes(4, "little") + b"\0" * 9
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skippable + frames + skippable)
    assert texts_in(batches_of(path)) == ["ab" * 100] * 20004
    path.write_bytes(frames[:-1] + b"\0\0")
    with pytest.raises(UsageError, match="a readable zstd file"):
        batches_of(path)
    one = zstandard.ZstdCompressor(write_checksum=True).compress(line)
    for cut_at in range(1, len(one)):
        path.write_bytes(one[:cut_at])
        with pytest.raises(UsageError, match="ends within a Zstandard frame"):
            batches_of(path)


_PEAK = """
import resource, sys
from megatron_moe.data.preprocess.inputs import cut, find_inputs
from megatron_moe.data.preprocess.reading import read_batches
from megatron_moe.errors import UsageError
(slices,) = cut(find_inputs([sys.argv[1]]), 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for batch in read_batches(slices[0], ["text"], "block"):
        pass
    print("read")
except UsageError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def bomb(name: str) -> bytes:
    """600 MB in one line, or in lines of 100 KB, in less than 1 MB, or plain."""
    if name.endswith("gz"):
        packer = zlib.compressobj(1, wbits=31)
        return b"".join(packer.compress(bytes(1 << 20)) for _ in range(600)) + packer.flush()
    if name == "lines.jsonl.zst":
        return zstandard.compress((b"\n" + bytes(100_000)) * 6000)
    return zstandard.compress(bytes(600 << 20)) if name.endswith("zst") else bytes(600 << 20)


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.zst", "lines.jsonl.zst", "a.jsonl", "a.txt"]
)
def test_bombs_take_bounded_memory(tmp_path: Path, name: str) -> None:
    """MB of a process of its own, whose peak is that of this reading alone."""
    path = tmp_path / name
    if name in ("a.jsonl", "a.txt"):
        with path.open("wb") as stream:  # no blocks on the disk
            stream.truncate(600 << 20)
    else:
        path.write_bytes(bomb(name))
    command = [sys.executable, "-c", _PEAK, str(path)]
    said, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )[:2]
    if name == "lines.jsonl.zst":
        assert said == "read"
    else:
        assert re.search(r"size of line 1 of .* must be <= 67108864 bytes", said), said
    assert int(peak) < 330, peak


def test_rows_of_parquet_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["x" * 3_000_000, "y"]}), path, use_dictionary=False)
    assert [len(text) for text in texts_in(batches_of(path))] == [3_000_000, 1]
    with pytest.raises(UsageError, match=r"size of a row of row group 0 .* <= 1000000 bytes"):
        batches_of(path, most=1_000_000)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    fields = [("text", pyarrow.string()), ("n", pyarrow.int64()), ("n", pyarrow.int64())]
    rows = [pyarrow.array(["a"]), pyarrow.array([1]), pyarrow.array([2])]
    table = pyarrow.Table.from_arrays(rows, schema=pyarrow.schema(fields))
    parquet.write_table(table, tmp_path / "a.parquet")
    assert texts_in(batches_of(tmp_path / "a.parquet")) == ["a"], "the others do not matter"
    twice = table.rename_columns(["text", "text", "n"])
    parquet.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"columns of different names .*got 'text'\); 2 have it"):
        batches_of(tmp_path / "b.parquet")


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_strings_that_are_not_utf8(tmp_path: Path, nested: bool) -> None:
    """Some writers do not check. Row 70 is in the second batch of rows."""
    texts = [b"fine"] * 70 + [b"caf\xe9", b"fine"]
    column = pyarrow.array(texts).view(pyarrow.string())
    if nested:
        bounds = pyarrow.array(range(len(texts) + 1), pyarrow.int32())
        column = pyarrow.ListArray.from_arrays(bounds, column)
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    says = r"--json-keys text in row 70 of .*a\.parquet must be UTF-8 \(got b'\\xe9'\)"
    with pytest.raises(UsageError, match=says):
        batches_of(tmp_path / "a.parquet")


LONG = f'{{"id": "{"0f3c9a52-" * 8}", "source": "web", '


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ('"text": null}', r"\(got None\); its keys are id, source, text$"),
        ('"text": ["a", 3]}', r"\(got 3\); its keys are id, source, text$"),
        (
            '"raw_content": "x"}',
            r"a key of the record .*; its keys are id, source, raw_content$",
        ),
        ('"text": tru}', r"\(got '\.\.\..*\"text\": tru\}'\); Expecting value"),
        ('"text": "x"', r"\(got '\.\.\..*\"text\": \"x\"'\); Expecting ',' delimiter"),
        ('"text": "caf\\udcb2"}', r"\(got 'caf\\udcb2'\); U\+DCB2 is half of a surrogate pair$"),
    ],
)
def test_errors_show_what_is_wrong_and_not_the_start_of_a_line(
    tmp_path: Path, rest: str, says: str
) -> None:
    (tmp_path / "a.jsonl").write_text(LONG + rest + "\n")
    with pytest.raises(UsageError, match=says):
        texts_in(batches_of(tmp_path / "a.jsonl"))


def test_a_name_of_a_parquet_column_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"], "other": ["b"]}), path, store_schema=False)
    content = path.read_bytes()
    assert content.count(b"other") >= 2
    path.write_bytes(content.replace(b"other", b"oth\xffr"))
    with pytest.raises(UsageError, match=r"--input must be a readable Parquet .* can't decode"):
        batches_of(path)

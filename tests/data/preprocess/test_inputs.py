"""Which files go in, and how they are cut: every line once, in order, for any number of parts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_moe.data.preprocess.inputs import (
    check_unchanged,
    content_hash,
    cut,
    find_inputs,
    lines_before,
)
from megatron_moe.errors import UsageError


def bytes_of(parts: list[list]) -> list[bytes]:
    return [
        b"".join(Path(s.file.path).read_bytes()[s.start : s.end] for s in part) for part in parts
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_parts_are_whole_lines_and_all_of_them(tmp_path: Path, count: int) -> None:
    texts = {
        "a.jsonl": b"".join(b"%d " % i + b"x" * (i % 17) + b"\n" for i in range(50)),
        "b.jsonl": b"",
        "c.jsonl": b"one long line " * 30,  # no line end
        "d.jsonl": b"\n\nz\n",
        "e.jsonl.gz": b"any bytes, never cut\n" * 20,
        "f.jsonl": b"\n".join(b"%d" % i for i in range(100)),
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    files = find_inputs([str(tmp_path / "*")])
    parts = cut(files, count)
    assert len(parts) == count
    pieces = bytes_of(parts)
    assert b"".join(pieces) == b"".join(texts.values())
    for piece in (piece for part in parts for piece in part):
        content = texts[Path(piece.file.path).name]
        assert piece.start == 0 or content[piece.start - 1 : piece.start] == b"\n"
        if piece.file.format != "lines":
            assert (piece.start, piece.end) == (0, len(content))
    if count == 3:
        total = sum(map(len, pieces))
        assert max(map(len, pieces)) < total / 3 + 450, "about equal, but for the longest file"


def test_the_example_of_a_cut(tmp_path: Path) -> None:
    """100 and 50 bytes in three partitions; a compressed file cannot be cut."""
    for name, size in (("a.jsonl", 100), ("b.jsonl", 50), ("c.jsonl.gz", 100)):
        (tmp_path / name).write_bytes(b"123456789\n" * (size // 10))

    def bounds(*names: str) -> list[list[tuple[str, int, int]]]:
        parts = cut(find_inputs([str(tmp_path / name) for name in names]), 3)
        return [[(Path(s.file.path).name, s.start, s.end) for s in part] for part in parts]

    assert bounds("a.jsonl", "b.jsonl") == [
        [("a.jsonl", 0, 50)],
        [("a.jsonl", 50, 100)],
        [("b.jsonl", 0, 50)],
    ]
    assert bounds("c.jsonl.gz", "b.jsonl") == [
        [("c.jsonl.gz", 0, 100)],
        [],
        [("b.jsonl", 0, 50)],
    ]


def test_order_globs_and_formats(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.txt", "d.parquet", "e.json.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_inputs(
        [str(tmp_path / "d.parquet"), f"{tmp_path}/*.jsonl", f"{tmp_path}/**/*.txt"]
    )
    assert [(Path(f.path).name, f.format) for f in found] == [
        ("d.parquet", "parquet"),
        ("a.jsonl", "lines"),
        ("b.jsonl", "lines"),
        ("c.txt", "text"),
    ]
    assert find_inputs([str(tmp_path / "e.json.zst")])[0].format == "zstd"


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (["/no/such.jsonl"], "--input must be a readable file or a glob .*got '/no/such.jsonl'"),
        (["*.json"], "must be a readable file or a glob that matches files"),
        (["a.bin"], "must be a name that ends in one of .jsonl .json .jsonl.gz"),
        (["a.txt", "./a.txt"], "must be given once .*got 'a.txt'"),
        (["folder.jsonl"], "must be a readable file .*; .*Is a directory"),
    ],
)
def test_refusals(
    tmp_path: Path, patterns: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.bin").write_text("x")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UsageError, match=says):
        find_inputs(patterns)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_git_lfs_pointers_and_pipes_are_no_data(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4309802\n")
    with pytest.raises(UsageError, match=r"--input must be the data itself .*git lfs pull"):
        find_inputs([str(path)])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match=r"--input must be a regular file .*it is a named pipe"):
        find_inputs([str(path)])


def test_a_change_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * (17 << 20))
    files = find_inputs([str(path)])
    check_unchanged(files)
    with path.open("r+b") as stream:
        stream.seek((17 << 20) - 5)
        stream.write(b"y")
    assert content_hash(str(path)) != files[0].hash
    with pytest.raises(
        UsageError, match=r"hash of .*a\.jsonl must be .*the file changed while it was read"
    ):
        check_unchanged(files)


def test_lines_before(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"a\nb\n" * 600_000)
    assert lines_before(str(path), 0) == 0
    assert lines_before(str(path), 2_200_001) == 1_100_000

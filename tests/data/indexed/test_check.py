"""Broken indexed data is refused at open, by name and in one line."""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_moe.data.indexed import check as indexed_check
from megatron_moe.data.indexed import scan as indexed_scan
from megatron_moe.data.indexed.cache import IndexCache
from megatron_moe.data.indexed.check import inspect_source
from megatron_moe.data.indexed.scan import TokenRange, check_range, scan_source, source_range
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.errors import UsageError
from tests.data.corpus import read_with_megatron_core, write

DOCUMENTS = [[5, 6, 7], [], [8, 9], [900], [3, 4]]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4309802\n"


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def poke(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def swap(bin_path: Path, other: Path) -> None:
    shutil.copy(other, bin_path)


# name of the fault: (what to do with .bin, .idx and another .bin; what the line must say)
FAULTS: dict[str, tuple[Callable[[Path, Path, Path], object], str]] = {
    "truncated bin": (lambda b, i, o: cut(b, 14), r"x.bin must be the 16 bytes .*got 14"),
    "longer bin": (
        lambda b, i, o: b.write_bytes(b.read_bytes() + b"\0\0"),
        r"x.bin must be the 16 bytes .*got 18",
    ),
    "empty bin": (lambda b, i, o: cut(b, 0), r"x.bin must be the 16 bytes .*got 0"),
    "swapped bin": (lambda b, i, o: swap(b, o), r"x.bin must be the 16 bytes .*got 200"),
    "missing bin": (lambda b, i, o: b.unlink(), "No such file"),
    "missing idx": (lambda b, i, o: i.unlink(), "No such file"),
    "directory": (lambda b, i, o: (i.unlink(), i.mkdir()), "Is a directory"),
    "empty idx": (lambda b, i, o: cut(i, 0), r"x.idx must be >= 34 bytes, a header \(got 0\)"),
    "header only": (lambda b, i, o: cut(i, 34), r"x.idx must be 130 bytes .*got 34"),
    "half a header": (
        lambda b, i, o: cut(i, 20),
        r"x.idx must be >= 34 bytes, a header \(got 20\)",
    ),
    "truncated idx": (lambda b, i, o: cut(i, 129), r"x.idx must be 130 bytes .*got 129"),
    "bin as idx": (lambda b, i, o: shutil.copy(o, i), "start of"),
    "pointer as idx": (
        lambda b, i, o: i.write_bytes(POINTER),
        "x.idx'\\); it is a Git LFS pointer",
    ),
    "pointer as bin": (
        lambda b, i, o: b.write_bytes(POINTER),
        "x.bin'\\); it is a Git LFS pointer",
    ),
    "pipe as bin": (lambda b, i, o: (b.unlink(), os.mkfifo(b)), "x.bin'\\); it is a named pipe"),
    "magic": (lambda b, i, o: poke(i, 0, b"PK"), "start of"),
    "version": (lambda b, i, o: poke(i, 9, b"\2"), "version of"),
    "float ids": (lambda b, i, o: poke(i, 17, b"\7"), "token type of"),
    "huge count": (lambda b, i, o: poke(i, 18, struct.pack("<Q", 1 << 60)), "size of"),
    "no bounds": (
        lambda b, i, o: (poke(i, 26, struct.pack("<Q", 0)), cut(i, 34 + 48)),
        r"number of document bounds of .* must be >= 1 \(got 0\)",
    ),
}
# faults that only a scan of everything sees
DEEP: dict[str, tuple[Callable[[Path, Path, Path], object], str]] = {
    "negative length": (lambda b, i, o: poke(i, 34, struct.pack("<i", -3)), "length of sequence 0"),
    "offset": (lambda b, i, o: poke(i, 34 + 16 + 8, struct.pack("<q", 8)), "offset of sequence 1"),
    "lengths": (lambda b, i, o: poke(i, 34, struct.pack("<i", 4)), "offset of sequence 1"),
    "first bound": (
        lambda b, i, o: poke(i, 34 + 48, struct.pack("<q", 1)),
        "bound of document 0",
    ),
    "falling bound": (
        lambda b, i, o: poke(i, 34 + 48 + 16, struct.pack("<q", 9)),
        "bound of document 3",
    ),
    "last bound": (
        lambda b, i, o: poke(i, 34 + 48 + 40, struct.pack("<q", 5)),
        "last document bound",
    ),
}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    write(tmp_path / "x", DOCUMENTS)
    write(tmp_path / "other", [[1] * 100])
    return tmp_path / "x.bin", tmp_path / "x.idx", tmp_path / "other.bin"


@pytest.mark.parametrize("name", FAULTS)
def test_refused_at_open(files: tuple[Path, Path, Path], name: str) -> None:
    damage, says = FAULTS[name]
    damage(*files)
    with pytest.raises(UsageError) as caught:
        inspect_source(str(files[0].with_suffix("")))
    assert re.search(says, str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
def test_refused_by_the_scan(
    files: tuple[Path, Path, Path], name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed_scan, "_CHUNK", chunk)
    damage, says = DEEP[name]
    damage(*files)
    source = inspect_source(str(files[0].with_suffix("")))
    with pytest.raises(UsageError) as caught:
        scan_source(source)
    assert re.search(says, str(caught.value))
    assert "\n" not in str(caught.value)


def test_megatron_core_takes_a_swapped_pair(files: tuple[Path, Path, Path]) -> None:
    """The defect that the check guards against."""
    swap(files[0], files[2])
    assert read_with_megatron_core(files[0].with_suffix(""))[0] == [1, 1, 1]


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_range_and_documents(
    files: tuple[Path, Path, Path], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed_scan, "_CHUNK", chunk)
    source = inspect_source(str(files[0].with_suffix("")))
    assert (source.sequences, source.documents, source.tokens) == (4, 5, 8)
    found = scan_source(source)
    # 3 is in the fifth document and 900 in the fourth: the second has no sequence
    assert found == TokenRange(smallest=3, smallest_document=4, largest=900, largest_document=3)
    check_range(source, found, 901)
    with pytest.raises(UsageError, match=r"document 3 of .*x must be >= 0 and <= 899 \(got 900\)"):
        check_range(source, found, 900)


def test_negative_ids(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2], [3, 70000]], vocab_size=80000)
    poke(tmp_path / "x.bin", 8, struct.pack("<i", -7))
    source = inspect_source(str(tmp_path / "x"))
    with pytest.raises(UsageError, match=r"document 1 .*must be >= 0 and <= 79999 \(got -7\)"):
        check_range(source, scan_source(source), 80000)


def test_sequences_of_one_document(tmp_path: Path) -> None:
    with IndexedWriter(str(tmp_path / "x"), 1000) as writer:
        writer.add_document([1, 2, 3], [1, 2])
        writer.add_document([4, 999], [1, 1])
    found = scan_source(inspect_source(str(tmp_path / "x")))
    assert (found.largest_document, found.smallest_document) == (1, 0)


def test_no_tokens(tmp_path: Path) -> None:
    write(tmp_path / "x", [[], []])
    with pytest.raises(UsageError, match=r"x\.bin must be > 0 \(got 0\)"):
        inspect_source(str(tmp_path / "x"))


@pytest.mark.parametrize("whole", [1 << 24, 10])
def test_fingerprint(tmp_path: Path, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the content, not of the path; hashed whole or by samples."""
    monkeypatch.setattr(indexed_check, "_HASHED_WHOLE", whole)
    monkeypatch.setattr(indexed_check, "_SAMPLE", 8)
    documents = [[i % 900 for i in range(n)] for n in range(1, 60)]

    def fingerprint(name: str) -> str:
        return inspect_source(str(tmp_path / name)).fingerprint

    write(tmp_path / "a", documents)
    (tmp_path / "b.bin").write_bytes((tmp_path / "a.bin").read_bytes())
    (tmp_path / "b.idx").write_bytes((tmp_path / "a.idx").read_bytes())
    assert fingerprint("a") == fingerprint("b")
    write(tmp_path / "c", documents[::-1])  # same sizes, other order
    assert fingerprint("c") != fingerprint("a")
    poke(tmp_path / "b.bin", (tmp_path / "b.bin").stat().st_size - 2, b"\1\1")
    assert fingerprint("b") != fingerprint("a")


def test_scan_is_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = IndexCache(str(tmp_path / "cache"))
    write(tmp_path / "x", [[1, 2]])
    assert source_range(inspect_source(str(tmp_path / "x")), cache).largest == 2
    write(tmp_path / "x", [[1, 7]])
    assert source_range(inspect_source(str(tmp_path / "x")), cache).largest == 7
    monkeypatch.setattr(indexed_scan, "_scan_tokens", lambda source: pytest.fail("scanned again"))
    assert source_range(inspect_source(str(tmp_path / "x")), cache).largest == 7


def test_fuzzed_index(files: tuple[Path, Path, Path]) -> None:
    """Any bytes in the index: a typed error, or data that Megatron-Core reads as its documents."""
    bin_path, idx_path, _ = files
    good, rng = idx_path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(400):
        content = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.choice([0, 1, 127, 128, 255])
        if rng.random() < 0.3:
            content = content[: rng.randrange(len(content))]
        idx_path.write_bytes(content)
        try:
            source = inspect_source(str(bin_path.with_suffix("")))
            scan_source(source)
        except UsageError:
            refused += 1
            continue
        assert sum(map(len, read_with_megatron_core(source.prefix))) == source.tokens
    assert refused > 350

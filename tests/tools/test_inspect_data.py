"""Looking into indexed data: numbers worked by hand, every kind of damage, exit codes."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_moe.data.indexed import inspection
from megatron_moe.data.indexed.writer import IndexedWriter
from tests.data.corpus import write
from tools import preprocess_data
from tools.inspect_data import main


@pytest.fixture
def made(tmp_path: Path) -> str:
    """Four documents: two sequences, none, three ids and one."""
    lines = '{"text": ["ab", "c"]}\n{"text": ""}\n{"text": "xyz"}\n{"text": "é"}\n'
    (tmp_path / "x.jsonl").write_text(lines)
    words = f"--input {tmp_path}/x.jsonl --output-prefix {tmp_path}/out --domain d --append-eod"
    preprocess_data.main([*words.split(), "--tokenizer-type", "ByteTokenizer"])
    return f"{tmp_path}/out_text_document"


def run(words: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """What the command prints, on either stream."""
    capsys.readouterr()
    if code == 0:
        main(words.split())
    else:
        with pytest.raises(SystemExit) as caught:
            main(words.split())
        assert caught.value.code == code
    found = capsys.readouterr()
    assert found.err.count("\n") == (1 if found.err else 0)
    return found.out + found.err


def test_statistics(made: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(made, capsys).splitlines() == [
        "documents    4, 1 of them empty",
        "sequences    4",
        "tokens       11, uint16",
        "length       3 to 4, median 4",
        "tokenizer    ByteTokenizer bytes+3",
        "vocabulary   259",
        "domain       d",
        "text         8 bytes, 1.3750 tokens per byte",
        f"from         1 files, first {Path(made).parent}/x.jsonl",
    ]
    Path(f"{made}.json").unlink()
    assert run(f"{made}.idx", capsys).splitlines()[4:] == ["manifest     none"]


def test_a_document(made: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = "--tokenizer-type ByteTokenizer"
    assert run(f"{made} --document 0 {text}", capsys) == "ab\nc\n"
    assert run(f"{made} --document 1 {text}", capsys) == ""
    assert run(f"{made} --document 3 {text}", capsys) == "é\n"
    assert run(f"{made} --document 2", capsys) == "123 124 125 1\n"
    assert "--document must be >= 0 and <= 3 (got 4)" in run(f"{made} --document 4", capsys, 2)
    other = "--tokenizer-type NullTokenizer --vocab-size 259"
    expected = "tokenizer must be that of the data, ByteTokenizer with hash bytes+3 (got 'Null"
    assert expected in run(f"{made} --document 0 {other}", capsys, 2)


def test_whole_data_is_verified(made: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{made} --verify", capsys) == "no fault: 11 ids from 1 to 198\n"
    found = run(f"{made} --verify --vocab-size 150", capsys, 1)
    assert "token id in document 3" in found
    assert "must be >= 0 and <= 149 (got 198)" in found


def patch(path: str, offset: int, content: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


@pytest.mark.parametrize(
    ("end", "offset", "content", "says"),
    [
        (".idx", 0, b"X", "must be the magic"),
        (".idx", 34, struct.pack("<i", 7), "offset of sequence 1"),
        (".idx", 34 + 16 + 8, struct.pack("<q", 2), "offset of sequence 1"),
        (".idx", 34 + 48 + 8, struct.pack("<q", 9), "bound of document 2"),
        (".bin", 4, struct.pack("<H", 300), "token id in document 0"),
    ],
)
def test_damage_is_found(
    made: str,
    end: str,
    offset: int,
    content: bytes,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    patch(made + end, offset, content)
    assert says in run(f"{made} --verify", capsys, 1)


def test_cut_missing_and_swapped_files(
    made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "the prefix of a readable pair" in run(f"{made}x", capsys, 2)
    write(tmp_path / "other", [[1, 2], [3]], 259)
    for end in (".bin", ".idx"):
        Path(f"{made}{end}").write_bytes((tmp_path / f"other{end}").read_bytes())
    assert "must be that of its manifest, 4 documents and 11 tokens (got " in run(
        f"{made} --verify", capsys, 1
    )
    with open(f"{made}.bin", "ab") as stream:
        stream.write(b"x")
    assert "size of" in run(made, capsys, 1)


def test_comparison(
    made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_CHUNK", 2)
    sets = {
        "same": [[[1, 2, 3], [4, 5]], [], [[6, 7]]],
        "token": [[[1, 2, 3], [4, 5]], [], [[6, 8]]],
        "length": [[[1, 2], [3, 4, 5]], [], [[6, 7]]],
        "bounds": [[[1, 2, 3]], [[4, 5]], [[6, 7]]],
        "fewer": [[[1, 2, 3], [4, 5]], [[6, 7]]],
    }
    for name, documents in {"one": sets["same"], **sets}.items():
        with IndexedWriter(str(tmp_path / name), 70000 if name == "same" else 1000) as writer:
            for sequences in documents:
                flat = np.array([i for ids in sequences for i in ids], np.int64)
                writer.add_document(flat, [len(ids) for ids in sequences])
    compare = f"{tmp_path}/one --compare {tmp_path}/"
    assert run(compare + "same", capsys) == "the same 3 documents\n", "in 16 and in 32 bits"
    for name, says in {
        "token": "token 6 (in document 2): 7 and 8",
        "length": "length of sequence 0: 3 and 2",
        "bounds": "bounds of document 1: 2 and 1",
        "fewer": "3 and 2 documents",
    }.items():
        assert run(compare + name, capsys, 1) == f"different: {says}\n"
    assert "data path must be the prefix" in run(compare + "none", capsys, 2)

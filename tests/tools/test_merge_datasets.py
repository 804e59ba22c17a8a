"""The command line of merging: folders, prefixes, globs; a missing partition is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.corpus import read_with_megatron_core, write
from tests.support.usage_errors import usage_error
from tools import preprocess_data
from tools.merge_datasets import main


def partitions(folder: Path, count: int = 3) -> None:
    lines = "".join(f'{{"text": "{letter}", "note": "n"}}\n' for letter in "abcdef")
    (folder / "x.jsonl").write_text(lines)
    words = f"--input {folder}/x.jsonl --output-prefix {folder}/parts/x --json-keys text note"
    words += f" --tokenizer-type ByteTokenizer --partitions {count} --partition"
    for number in range(count):
        preprocess_data.main([*words.split(), str(number)])


def not_merged(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    error = usage_error(main, words.split(), capsys)
    assert error.startswith("merge_datasets.py: error: ")
    return error


def test_partitions_of_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tasks and their merge give what one process gives."""
    partitions(tmp_path)
    main(f"--input {tmp_path}/parts/x_part*_text_document --output-prefix {tmp_path}/all".split())
    report = capsys.readouterr().out
    assert "merging 3 datasets ..." in report
    assert "6 documents, 0.0 MB of ids" in report
    words = f"--input {tmp_path}/x.jsonl --output-prefix {tmp_path}/one"
    preprocess_data.main([*words.split(), "--tokenizer-type", "ByteTokenizer"])
    for kind in ("bin", "idx", "json"):
        ours = (tmp_path / f"all.{kind}").read_bytes()
        assert ours == (tmp_path / f"one_text_document.{kind}").read_bytes()


def test_a_missing_partition_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partitions(tmp_path)
    for kind in ("bin", "idx"):
        (tmp_path / f"parts/x_part00001of00003_text_document.{kind}").unlink()
    pattern = f"{tmp_path}/parts/x_part*_text_document"
    error = not_merged(f"--input {pattern} --output-prefix {tmp_path}/all", capsys)
    assert "--input must be all 3 partitions" in error
    assert "x_part00001of00003_text_document is missing (got '2 partitions'); make it with" in error
    assert "--partition 1" in error
    assert not list(tmp_path.glob("all*"))


def test_a_folder_is_taken_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate("cab"):
        write(tmp_path / "in" / name, [[number]])
    (tmp_path / "in" / "notes.txt").write_text("not data")
    main(f"--input {tmp_path}/in --output-prefix {tmp_path}/all".split())
    assert read_with_megatron_core(tmp_path / "all") == [[1], [2], [0]]
    assert "(no manifest, because not every part has one)" in capsys.readouterr().out
    main(f"--input {tmp_path}/in/c {tmp_path}/in/a --output-prefix {tmp_path}/all".split())
    assert read_with_megatron_core(tmp_path / "all") == [[0], [1]]


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, out = write(tmp_path / "a", [[1]]), f"--output-prefix {tmp_path}/all"
    assert (
        "--input must be a folder, prefix or glob of PREFIX.bin and .idx (got '/no/such')"
        in not_merged(f"--input /no/such {out}", capsys)
    )
    assert "--input must be given once (got " in not_merged(f"--input {a} {a} {out}", capsys)
    (tmp_path / "b.bin").write_bytes(b"xx")
    assert f"{tmp_path}/b.idx is missing" in not_merged(f"--input {tmp_path} {out}", capsys)
    partitions(tmp_path)
    text = [f"{tmp_path}/parts/x_part0000{n}of00003_text_document" for n in (0, 2, 1)]
    assert "--input must be in order (got " in not_merged(f"--input {' '.join(text)} {out}", capsys)
    write(f"{tmp_path}/parts/x_part00000of00001_text_document", [[1]])
    pattern = f"{tmp_path}/parts/x_part*_text_document"
    assert "--input must be one set of partitions (got " in not_merged(
        f"--input {pattern} {out}", capsys
    )

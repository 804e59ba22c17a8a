"""Runs that end early: what is finished is kept, what has changed is made again."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config import DataConfig
from megatron_moe.data.indexed.manifest import read_manifest
from megatron_moe.data.preprocess import corpus as module
from megatron_moe.data.preprocess.corpus import PreprocessOptions, preprocess
from megatron_moe.errors import UsageError

BYTES = DataConfig(tokenizer_type="ByteTokenizer")
LAST = "out_text_document"


def corpus(folder: Path, count: int = 400) -> Path:
    path = folder / "x.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(count))
    )
    return path


def run(folder: Path, data: DataConfig = BYTES, **more: Any) -> list[str]:
    said: list[str] = []
    options = PreprocessOptions(
        input=more.pop("input", (str(folder / "x.jsonl"),)),
        output_prefix=str(folder / "out"),
        **({"partitions": 4} | more),
    )
    preprocess(options, data, progress=False, report=said.append)
    return said


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("out*")}


def test_started_again_it_does_nothing(tmp_path: Path) -> None:
    corpus(tmp_path)
    assert run(tmp_path) == []
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*")}
    assert run(tmp_path) == ["output: already finished, kept"]
    assert run(tmp_path, partitions=1, workers=2) == ["output: already finished, kept"]
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "x.jsonl").rename(moved)
    assert run(tmp_path, input=(str(moved),)) == ["output: already finished, kept"]
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*")}


def test_finished_partitions_are_kept(tmp_path: Path) -> None:
    """A bad line near the end, then fixed: only the last partition is made again."""
    path = corpus(tmp_path)
    good = path.read_bytes()
    path.write_bytes(good[:-3] + b"!!\n")
    with pytest.raises(UsageError, match=r"content in line 400 of .* must be a JSON object"):
        run(tmp_path)
    assert len(list(tmp_path.glob("out_part*.json"))) == 3
    kept = [f"partition {i} of 4: already finished, kept" for i in range(3)]
    said: list[str] = []
    options = PreprocessOptions(
        input=(str(path),), output_prefix=str(tmp_path / "out"), partitions=4
    )
    with pytest.raises(UsageError, match=r"content in line 400 of .* must be a JSON object"):
        preprocess(options, BYTES, progress=False, report=said.append)
    assert said == kept
    path.write_bytes(good)
    said = run(tmp_path)
    assert len(said) == 3
    assert all("made again, the content of" in line for line in said), "the file's hash is new"
    again = content(tmp_path)
    (tmp_path / "fresh").mkdir()
    corpus(tmp_path / "fresh")
    run(tmp_path / "fresh", partitions=1)
    fresh = content(tmp_path / "fresh")
    assert {k: v for k, v in again.items() if "json" not in k} == {
        k: v for k, v in fresh.items() if "json" not in k
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"append_eod": True}, "--append-eod was False and is True"),
        ({"domain": "code"}, "--domain was None and is 'code'"),
        ({"data": DataConfig(tokenizer_type="ByteTokenizer", vocab_size=300)}, "vocabulary size"),
        (
            {"data": DataConfig(tokenizer_type="NullTokenizer", vocab_size=259)},
            "the tokenizer was 'bytes+3' and is 'null 259'",
        ),
    ],
)
def test_a_changed_setting_makes_it_again(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "1 2 3"}\n')
    run(tmp_path)
    before = read_manifest(str(tmp_path / LAST))
    (said,) = run(tmp_path, partitions=1, **change)
    assert said.startswith("output: made again, ")
    assert says in said
    assert read_manifest(str(tmp_path / LAST)) != before


def test_a_changed_corpus_and_a_cut_output_are_made_again(tmp_path: Path) -> None:
    path = corpus(tmp_path)
    run(tmp_path)
    before = content(tmp_path)
    (tmp_path / f"{LAST}.bin").write_bytes(before[f"{LAST}.bin"][:-1])
    assert run(tmp_path) == ["output: made again, files are missing or of another size"]
    assert content(tmp_path) == before
    path.write_text(path.read_text().replace("document 7 ", "documents 7"))
    (said,) = run(tmp_path)
    assert said == f"output: made again, the content of {path} has changed"
    assert content(tmp_path)[f"{LAST}.bin"] != before[f"{LAST}.bin"]


def test_a_garbage_manifest_is_named(tmp_path: Path) -> None:
    corpus(tmp_path)
    (tmp_path / f"{LAST}.json").write_text("{}")
    with pytest.raises(
        UsageError, match=rf"manifest must be .*got '.*{LAST}\.json'\); .*remove it"
    ):
        run(tmp_path)


def test_an_input_that_changes_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus(tmp_path)
    real = module.read_batches

    def growing(*arguments: Any) -> Any:
        yield from real(*arguments)
        with path.open("a") as stream:
            stream.write('{"text": "more"}\n')

    monkeypatch.setattr(module, "read_batches", growing)
    with pytest.raises(
        UsageError, match=r"hash of .*x\.jsonl must be .*; the file changed while it was read"
    ):
        run(tmp_path, partitions=1)
    assert content(tmp_path) == {}


def in_a_child(folder: Path, limit: int | None = None) -> int:
    """Start the command in a process that may be killed or limited; its process id."""
    child = os.fork()
    if child == 0:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        flags = "--tokenizer-type ByteTokenizer --partitions 3 --workers 1 --no-word-cache"
        tool = Path(__file__).resolve().parents[3] / "tools" / "preprocess_data.py"
        words = ["--input", str(folder / "x.jsonl"), "--output-prefix", str(folder / "out")]
        with (folder / "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.execv(sys.executable, [sys.executable, str(tool), *words, *flags.split()])
    return child


def test_a_killed_run_is_resumed(tmp_path: Path) -> None:
    """SIGKILL in the second partition: the first is kept, leftovers go, the result is complete."""
    big = tmp_path / "x.jsonl"
    line = json.dumps({"text": "some words " * 1000}) + "\n"
    big.write_text(line * 12_000)
    child = in_a_child(tmp_path)
    waits = 0
    while not list(tmp_path.glob("out_part00001of*.partial-*")):
        time.sleep(0.002)
        waits += 1
        assert waits < 20_000, (tmp_path / "log").read_text()
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert list(tmp_path.glob("*.partial-*")), "killed while writing"
    assert not (tmp_path / f"{LAST}.idx").exists()
    said = run(tmp_path, partitions=3)
    assert said == ["partition 0 of 3: already finished, kept"]
    assert sorted(content(tmp_path)) == [f"{LAST}.bin", f"{LAST}.idx", f"{LAST}.json"]
    manifest = read_manifest(str(tmp_path / LAST))
    assert manifest is not None
    assert (manifest.documents, manifest.tokens) == (12_000, 12_000 * 11_000)


@pytest.mark.parametrize(("limit", "count"), [(900, 30), (5_000, 400), (50_000, 400)])
def test_a_full_disk_is_one_line(tmp_path: Path, limit: int, count: int) -> None:
    """A limit on file sizes fails the last, or any write of a partition, or the merge (50 kB)."""
    corpus(tmp_path, count)
    child = in_a_child(tmp_path, limit)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert not list(tmp_path.glob("*.partial-*"))
    assert not (tmp_path / f"{LAST}.idx").exists()
    log = (tmp_path / "log").read_text()
    assert "--output-prefix must be a writable path with free space" in log
    assert "Traceback" not in log
    assert run(tmp_path, partitions=3) == [
        f"partition {i} of 3: already finished, kept" for i in range(3 if limit == 50_000 else 0)
    ]

"""Text to indexed data: equal to Megatron-Core's builder for all numbers of workers and parts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_moe.config import DataConfig
from megatron_moe.data.indexed.manifest import read_manifest
from megatron_moe.data.preprocess import encoding, reading
from megatron_moe.data.preprocess.corpus import PreprocessOptions, preprocess
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.simple import ByteTokenizer
from tests.data.corpus import read_with_megatron_core
from tests.data.preprocess.death import die

BYTES = DataConfig(tokenizer_type="ByteTokenizer")


def records(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "text": "" if i % 7 == 3 else "wörd\n " * int(rng.integers(1, 30)) + str(i),
            "parts": [f"one {i}", "", "three"][: i % 4],
        }
        for i in range(count)
    ]


def write_lines(path: Path, values: list[Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def expected(
    prefix: Path, values: list[dict[str, Any]], key: str, eod: bool
) -> tuple[bytes, bytes]:
    """As Megatron-LM's tool builds it."""
    tokenizer = ByteTokenizer()
    builder = IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size)
    )
    for value in values:
        texts = value[key] if isinstance(value[key], list) else [value[key]]
        sequences = [ids for ids in map(tokenizer.tokenize, texts) if ids]
        if sequences and eod:
            sequences[-1].append(tokenizer.eod)
        builder.add_document([i for ids in sequences for i in ids], [len(s) for s in sequences])
    builder.finalize(f"{prefix}.idx")
    return read(f"{prefix}")


def read(prefix: str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def run(folder: Path, *inputs: Path | str, data: DataConfig = BYTES, **more: Any) -> Any:
    options = PreprocessOptions(
        input=tuple(map(str, inputs)), output_prefix=str(folder / "out"), **more
    )
    return preprocess(options, data, progress=False)


@pytest.mark.parametrize(("workers", "partitions"), [(1, 1), (2, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize("eod", [True, False])
def test_equals_megatron_cores_files(
    tmp_path: Path, workers: int, partitions: int, eod: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH", 500)
    values = records(200)
    halves = [
        write_lines(tmp_path / "a.jsonl", values[:90]),
        write_lines(tmp_path / "b.jsonl", values[90:]),
    ]
    made = run(
        tmp_path / "new",
        *halves,
        json_keys=("text", "parts"),
        append_eod=eod,
        workers=workers,
        partitions=partitions,
    )
    for key, manifest in zip(("text", "parts"), made, strict=True):
        prefix = f"{tmp_path}/new/out_{key}_document"
        assert read(prefix) == expected(tmp_path / key, values, key, eod)
        texts = [t for v in values for t in ([v[key]] if key == "text" else v[key])]
        assert manifest == read_manifest(prefix)
        assert (manifest.documents, manifest.key) == (200, key)
        assert manifest.sequences == sum(map(bool, texts))
        assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
        assert manifest.tokens == manifest.text_bytes + eod * sum(
            any(v[key]) if key == "parts" else bool(v[key]) for v in values
        )
        assert [(Path(o.path).name, o.start, o.end) for o in manifest.inputs] == [
            (Path(half).name, 0, Path(half).stat().st_size) for half in halves
        ]
    texts = read_with_megatron_core(f"{tmp_path}/new/out_text_document")
    decoded = [ByteTokenizer().detokenize(ids) for ids in texts]
    assert decoded == [v["text"] for v in values if v["text"]]
    names = {f"out_{k}_document.{s}" for k in ("text", "parts") for s in ("bin", "idx", "json")}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names, "partitions are gone"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{oops\n", r"content in line 3 of .* must be a JSON object"),
        (
            b'{"other": "x"}\n',
            r"--json-keys text in line 3 of .* must be a key of the record .* its keys are other$",
        ),
        (b'{"text": 7}\n', r"--json-keys text in line 3 of .* must be the key of a text"),
        (b'{"text": ["a", null]}\n', r"--json-keys text in line 3 of .* must be the key of a text"),
        (b'["text"]\n', r"content in line 3 of .* must be a JSON object \(got \['text'\]\)"),
        (b'{"text": "\xff"}\n', r"content in line 3 of .* must be UTF-8 .*got b'\\xff"),
        (
            b'{"text": "\\ud800"}\n',
            r"--json-keys text in line 3 of .* must be text that UTF-8 can encode .*ud800",
        ),
        (b"[" * 100_000 + b"\n", r"content in line 3 of .* must be a JSON object"),
    ],
)
@pytest.mark.parametrize(("workers", "partitions"), [(1, 1), (2, 1), (1, 3)])
def test_a_bad_line(tmp_path: Path, line: bytes, says: str, workers: int, partitions: int) -> None:
    good = b'{"text": "fine"}\n'
    (tmp_path / "x.jsonl").write_bytes(good + b"\n" + line + good)
    with pytest.raises(UsageError, match=says) as caught:
        run(tmp_path, tmp_path / "x.jsonl", workers=workers, partitions=partitions)
    assert "\n" not in str(caught.value)
    left = {path.name for path in tmp_path.iterdir() if "part" not in path.name}
    assert left == {"x.jsonl"}, "nothing but finished partitions is left"
    assert not list(tmp_path.glob("*.partial-*"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x.txt", r"text in .*x\.txt must be UTF-8 \(got b'\\xff'\)"),
        ("x.jsonl.gz", r"--json-keys text in line 2 of .*x\.jsonl\.gz"),
    ],
)
def test_bad_content_of_other_kinds(tmp_path: Path, name: str, says: str) -> None:
    import gzip

    lines = b'{"text": "a"}\n{"text": 1}\n'
    content = b"ok \xff" if name == "x.txt" else gzip.compress(lines)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=says):
        run(tmp_path, tmp_path / name)


def test_ids_beyond_the_vocabulary_and_blank_lines(tmp_path: Path) -> None:
    """Documents are counted from 0 and blank lines are none."""
    (tmp_path / "x.jsonl").write_text('{"text": "1 2"}\n\n  \n{"text": "3"}\n{"text": "4 10"}\n')
    null = DataConfig(tokenizer_type="NullTokenizer", vocab_size=10)
    with pytest.raises(
        UsageError, match=r"token id in document 2 .*must be >= 0 and <= 9 \(got 10\)"
    ):
        run(tmp_path, tmp_path / "x.jsonl", data=null)
    (tmp_path / "x.jsonl").write_text('{"text": "1"}\n{"text": "70000"}\n')
    null = DataConfig(tokenizer_type="NullTokenizer", vocab_size=65000)
    with pytest.raises(UsageError, match=r"document 1 .*must be >= 0 and <= 64999 \(got 70000\)"):
        run(tmp_path, tmp_path / "x.jsonl", data=null)
    (tmp_path / "x.jsonl").write_text('{"text": "4294967300"}\n')
    with pytest.raises(
        UsageError, match=r"token id in line 1 of .*must be an id of at most 31 bits"
    ):
        run(tmp_path, tmp_path / "x.jsonl", data=null)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n{"text": []}\n'])
@pytest.mark.parametrize("partitions", [1, 2])
def test_nothing_to_train_on_is_refused(tmp_path: Path, content: str, partitions: int) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(
        UsageError,
        match=r"--input must be one or more documents with text in 'text' .*without a token",
    ):
        run(tmp_path, tmp_path / "x.jsonl", partitions=partitions)
    assert not (tmp_path / "out_text_document.idx").exists()


def test_an_empty_file_among_others_adds_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}')
    (made,) = run(tmp_path, tmp_path / "a.jsonl", tmp_path / "b.jsonl", partitions=3)
    assert (made.documents, made.tokens) == (1, 1)


def test_text_files_have_one_key(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    with pytest.raises(UsageError, match=r"--json-keys must be one key, .*got 'text note'"):
        run(tmp_path, tmp_path / "a.txt", json_keys=("text", "note"))
    run(tmp_path, tmp_path / "a.txt", text_documents="block", json_keys=("body",))
    found = [
        ByteTokenizer().detokenize(i)
        for i in read_with_megatron_core(tmp_path / "out_body_document")
    ]
    assert found == ["one\n", "two"]


def test_missing_input(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--input must be a readable file .*got '/no/such'"):
        run(tmp_path, "/no/such")


def test_workers_are_forked_with_their_imports_done() -> None:
    """The fork server imports the module of the worker's functions, and all that it names."""
    assert encoding.__name__ in encoding._PRELOADED
    assert encoding._encode_in_worker.__module__ == encoding.__name__
    for name in encoding._PRELOADED:
        assert name == "__main__" or importlib.util.find_spec(name) is not None, name


def test_a_killed_worker_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_encode_in_worker", die)
    path = write_lines(tmp_path / "x.jsonl", records(3))
    with pytest.raises(UsageError, match=r"--workers must be .*got 2\); a worker was killed"):
        run(tmp_path, path, workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]

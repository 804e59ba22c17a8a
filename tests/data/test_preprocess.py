"""JSON Lines to indexed data: against the engine's builder, for any number of workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_moe.config import DataConfig
from megatron_moe.data import preprocess as module
from megatron_moe.data.preprocess import PreprocessOptions, preprocess
from megatron_moe.data.tokenizer import ByteTokenizer
from megatron_moe.errors import UsageError
from tests.data.corpus import engine_reads
from tests.data.death import die

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


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("eod", [True, False])
def test_equals_the_engines_files(
    tmp_path: Path, workers: int, eod: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH", 500)
    values = records(200)
    halves = [
        write_lines(tmp_path / "a.jsonl", values[:90]),
        write_lines(tmp_path / "b.jsonl", values[90:]),
    ]
    options = PreprocessOptions(
        input=tuple(halves),
        output_prefix=str(tmp_path / "new" / "out"),
        json_keys=("text", "parts"),
        append_eod=eod,
        workers=workers,
    )
    assert preprocess(options, BYTES, progress=False) == 200
    for key in ("text", "parts"):
        ours = read(f"{options.output_prefix}_{key}_document")
        assert ours == expected(tmp_path / key, values, key, eod)
    texts = engine_reads(f"{options.output_prefix}_text_document")
    tokenizer = ByteTokenizer()
    assert [tokenizer.detokenize(ids) for ids in texts] == [v["text"] for v in values if v["text"]]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{oops\n", "JSON, line 3 of"),
        (b'{"other": "x"}\n', "--json-keys text, line 3 of"),
        (b'{"text": 7}\n', "--json-keys text, line 3 of"),
        (b'{"text": ["a", null]}\n', "--json-keys text, line 3 of"),
        (b'["text"]\n', "--json-keys text, line 3 of"),
        (b'{"text": "\xff"}\n', "JSON, line 3 of"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line(tmp_path: Path, line: bytes, says: str, workers: int) -> None:
    good = b'{"text": "fine"}\n'
    (tmp_path / "x.jsonl").write_bytes(good + b"\n" + line + good)
    options = PreprocessOptions(
        input=(str(tmp_path / "x.jsonl"),), output_prefix=str(tmp_path / "out"), workers=workers
    )
    with pytest.raises(UsageError) as caught:
        preprocess(options, BYTES, progress=False)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_ids_beyond_the_vocabulary_and_blank_lines(tmp_path: Path) -> None:
    """Documents are counted from 0 and blank lines are none."""
    (tmp_path / "x.jsonl").write_text('{"text": "1 2"}\n\n  \n{"text": "3"}\n{"text": "4 10"}\n')
    options = PreprocessOptions(
        input=(str(tmp_path / "x.jsonl"),), output_prefix=str(tmp_path / "out")
    )
    null = DataConfig(tokenizer_type="NullTokenizer", vocab_size=10)
    with pytest.raises(UsageError, match=r"token id in document 2 .*is 10, expected .* 0 to 9"):
        preprocess(options, null, progress=False)


def test_missing_input(tmp_path: Path) -> None:
    options = PreprocessOptions(input=("/no/such",), output_prefix=str(tmp_path / "out"))
    with pytest.raises(UsageError, match="--input is '/no/such'"):
        preprocess(options, BYTES, progress=False)


def test_a_killed_worker_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_work", die)
    path = write_lines(tmp_path / "x.jsonl", records(3))
    options = PreprocessOptions(input=(path,), output_prefix=str(tmp_path / "out"), workers=2)
    with pytest.raises(UsageError, match="one was killed"):
        preprocess(options, BYTES, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Batches of lines are bounded, whatever the size of the file."""
    path = write_lines(tmp_path / "x.jsonl", [{"text": "x" * 999}] * 3000)
    batches = list(module.read_batches([path]))
    assert len(batches) > 8
    assert max(sum(map(len, lines.content)) for lines in batches) <= module._BATCH + 1100
    assert [lines.first for lines in batches][1] == len(batches[0].content) + 1

"""Tokenizing a corpus: the command against `SentencePieceProcessor.encode` in one process.

The corpus is the Python installation's sources, library and packages, each text once: up to
`MEGABYTES`, and as many as there are if there are fewer (the record `corpus` says). The two models
are trained on it. Every id of both models is compared with what the library gives for whole texts.

Megatron-LM's own tool is not installed here. As a whole process with 2 workers it made 0.38 to 0.40
times the raw rate of the machine it was measured on (64 MB of Python sources, 8192 unigram pieces:
12.2 s, where `encode` in one process made 13 MB/s, and this command took 2.7 s for the same bytes);
0.4, times the raw rate of this run, is what `whole_process` is held against.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import sentencepiece

from bench.record import Record
from megatron_moe.config import DataConfig
from megatron_moe.data.encoding import Refusal
from megatron_moe.data.indexed_writer import IndexedWriter
from megatron_moe.data.reading import read_batches
from megatron_moe.data.sources import cut, find_inputs
from megatron_moe.data.workers import Workers
from tools.train_tokenizer import train

ROOT = Path(__file__).resolve().parents[1]
MEGABYTES, WORKERS, PIECES = 60, 2, 8192
SLICES = 4
"""Of the corpus; each is encoded by the library and by the workers in turn."""
SHARE = 0.85
"""Of `WORKERS` times the raw rate, that has to be reached without a word cache."""
CACHED = 2.0
"""Times the raw rate, that has to be reached with it."""
MEGATRON, LEAD = 0.4, 3.0
"""Megatron-LM's tool in raw rates, and how many times as fast the command has to be."""
MEMORY = 400
"""MB of resident memory that a worker may have."""


@dataclass(frozen=True)
class Slice:
    """A JSON Lines file, and the size of its texts in UTF-8."""

    path: Path
    megabytes: float


def records() -> list[Record]:
    """Rates of both models, checked against the library, and memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slices = _corpus(folder)
        size = sum(piece.megabytes for piece in slices)
        found = [Record(name="tokenize/corpus", value=size, unit="MB")]
        for kind in ("unigram", "bpe"):
            found += _of_model(kind, slices, folder)
    return found


def _texts() -> Iterator[str]:
    seen: set[str] = set()
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(root).rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text and text not in seen:
                seen.add(text)
                yield text


def _corpus(folder: Path) -> list[Slice]:
    texts, slices = _texts(), []
    for number in range(SLICES):
        path, size = folder / f"corpus-{number}.jsonl", 0
        with path.open("w") as stream:
            for text in texts:
                stream.write(json.dumps({"text": text}) + "\n")
                size += len(text.encode())
                if size > MEGABYTES / SLICES * 1e6:
                    break
        slices.append(Slice(path, size / 1e6))
    return slices


def _of_model(kind: str, slices: Sequence[Slice], folder: Path) -> list[Record]:
    """Slice by slice the library, then the workers with each way; medians of the ratios."""
    model = _train(kind, slices, folder)
    data = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    raws: list[float] = []
    expected: list[bytes] = []
    ratios: dict[str, list[float]] = (
        {"plain": [], "word_cache": []} if kind == "bpe" else {"plain": []}
    )
    with ExitStack() as stack:
        pools = {
            way: stack.enter_context(Workers(WORKERS, data, ["text"], True, way != "plain"))
            for way in ratios
        }
        for pool in pools.values():  # start them
            _encode(pool, slices[0], folder)
        for piece in slices:
            rate, ids = _raw(model, piece)
            raws.append(rate)
            expected.append(ids)
            for way, pool in pools.items():
                rate, found = _encode(pool, piece, folder)
                _refuse(f"{kind}, {way}", found, ids)
                ratios[way].append(rate / raws[-1])
        memory = max(_peak(child.pid) for child in multiprocessing.active_children())
    rate, found = _command(model, slices, folder)
    _refuse(f"{kind}, command", found, b"".join(expected))
    name, workers = f"tokenize/{kind}", f"{WORKERS}_workers"
    made = [Record(name=f"{name}/raw_1_process", value=median(raws), unit="MB/s")]
    for way, values in ratios.items():
        needed = SHARE * WORKERS if way == "plain" else CACHED
        made.append(_reached(f"{name}/{way}_{workers}", median(values), "x raw", needed))
    made.append(Record(name=f"{name}/whole_process_{workers}", value=rate, unit="MB/s"))
    lead = rate / median(raws) / MEGATRON
    made.append(_reached(f"{name}/whole_process_to_megatron", lead, "x 0.4 raw", LEAD))
    return [*made, _bounded(f"{name}/memory_of_a_worker", memory, "MB", MEMORY)]


def _train(kind: str, slices: Sequence[Slice], folder: Path) -> Path:
    model = folder / f"{kind}.model"
    options = argparse.Namespace(
        input=[str(piece.path) for piece in slices],
        json_key="text",
        megabytes=2.0,
        vocab_size=PIECES,
        model_type=kind,
    )
    model.write_bytes(train(options))
    return model


def _refuse(what: str, found: bytes, expected: bytes) -> None:
    if found != expected:
        raise AssertionError(f"{what}: the ids are not the library's")


def _raw(model: Path, piece: Slice) -> tuple[float, bytes]:
    """MB/s of `encode` alone, and its ids, with an end of document after each text."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    parts, seconds = [], 0.0
    with piece.path.open("rb") as stream:
        for line in stream:
            text = json.loads(line)["text"]
            start = time.perf_counter()
            ids = library.encode(text)
            seconds += time.perf_counter() - start
            parts.append(np.array([*ids, library.eos_id()], "<u2").tobytes())
    return piece.megabytes / seconds, b"".join(parts)


def _encode(pool: Workers, piece: Slice, folder: Path) -> tuple[float, bytes]:
    """MB/s of the workers from file to file, and the ids."""
    ((stretch,),) = cut(find_inputs([str(piece.path)]), 1)
    start = time.perf_counter()
    with IndexedWriter(str(folder / "workers"), PIECES) as writer:
        for _, result in pool.encode(read_batches(stretch, ["text"], "file")):
            if isinstance(result, Refusal):
                raise AssertionError(result.arguments)
            writer.add_documents(result[0].ids, result[0].lengths, result[0].sequences)
    rate = piece.megabytes / (time.perf_counter() - start)
    return rate, (folder / "workers.bin").read_bytes()


def _command(model: Path, slices: Sequence[Slice], folder: Path) -> tuple[float, bytes]:
    """MB/s of the command from its start to its end, and the ids."""
    prefix = str(folder / model.stem)
    command = [
        sys.executable,
        str(ROOT / "tools" / "preprocess_data.py"),
        "--output-prefix",
        prefix,
    ]
    command += ["--input", *(str(piece.path) for piece in slices), "--workers", str(WORKERS)]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    start = time.perf_counter()
    subprocess.run([*command, "--append-eod"], check=True, capture_output=True)
    rate = sum(piece.megabytes for piece in slices) / (time.perf_counter() - start)
    return rate, Path(f"{prefix}_text_document.bin").read_bytes()


def _peak(process: int | None) -> float:
    """The most MB that a process has had in memory."""
    status = Path(f"/proc/{process}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


def _reached(name: str, value: float, unit: str, needed: float) -> Record:
    return Record(name=name, value=value, unit=unit, target=f">= {needed:g}", met=value >= needed)


def _bounded(name: str, value: float, unit: str, limit: float) -> Record:
    return Record(name=name, value=value, unit=unit, target=f"<= {limit:g}", met=value <= limit)

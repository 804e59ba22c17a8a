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
import hashlib
import json
import multiprocessing
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
SHARE = 0.85
"""Of `WORKERS` times the raw rate, that has to be reached without a word cache."""
CACHED = 2.0
"""Times the raw rate, that has to be reached with it."""
MEGATRON, LEAD = 0.4, 3.0
"""Megatron-LM's tool in raw rates, and how many times as fast the command has to be."""
MEMORY = 400
"""MB of resident memory that a worker may have."""


@dataclass(frozen=True)
class Corpus:
    """A JSON Lines file."""

    path: Path
    megabytes: float
    """Of its texts in UTF-8."""


def records() -> list[Record]:
    """Rates of both models, checked against the library, and memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = _corpus(folder)
        found = [Record(name="tokenize/corpus", value=corpus.megabytes, unit="MB")]
        for kind in ("unigram", "bpe"):
            found += _of_model(kind, corpus, folder)
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


def _corpus(folder: Path) -> Corpus:
    path, size = folder / "corpus.jsonl", 0
    with path.open("w") as stream:
        for text in _texts():
            stream.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
            if size > MEGABYTES * 1e6:
                break
    return Corpus(path, size / 1e6)


def _of_model(kind: str, corpus: Corpus, folder: Path) -> list[Record]:
    model = folder / f"{kind}.model"
    options = argparse.Namespace(
        input=[str(corpus.path)],
        json_key="text",
        megabytes=2.0,
        vocab_size=PIECES,
        model_type=kind,
    )
    model.write_bytes(train(options))
    raw, expected = _raw(model, corpus)
    name = f"tokenize/{kind}"
    found = [Record(name=f"{name}/raw_1_process", value=raw, unit="MB/s")]
    for cache in (False, True) if kind == "bpe" else (False,):
        rate, ids, memory = _workers(model, corpus, folder, cache)
        if ids != expected:
            raise AssertionError(f"{kind}: the ids of {WORKERS} workers are not the library's")
        way = "word_cache" if cache else "plain"
        needed = CACHED if cache else SHARE * WORKERS
        found.append(_reached(f"{name}/{way}_{WORKERS}_workers", rate / raw, "x raw", needed))
        found.append(_bounded(f"{name}/{way}_memory_of_a_worker", memory, "MB", MEMORY))
    rate, ids = _command(model, corpus, folder)
    if ids != expected:
        raise AssertionError(f"{kind}: the ids of the command are not the library's")
    found.append(Record(name=f"{name}/whole_process_{WORKERS}_workers", value=rate, unit="MB/s"))
    lead = rate / raw / MEGATRON
    found.append(_reached(f"{name}/whole_process_to_megatron", lead, "x 0.4 raw", LEAD))
    return found


def _raw(model: Path, corpus: Corpus) -> tuple[float, str]:
    """MB/s of `encode` alone, and a hash of its ids, with an end of document after each text."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    digest, seconds = hashlib.sha256(), 0.0
    with corpus.path.open("rb") as stream:
        for line in stream:
            text = json.loads(line)["text"]
            start = time.perf_counter()
            ids = library.encode(text)
            seconds += time.perf_counter() - start
            digest.update(np.array([*ids, library.eos_id()], "<u2").tobytes())
    return corpus.megabytes / seconds, digest.hexdigest()


def _workers(model: Path, corpus: Corpus, folder: Path, cache: bool) -> tuple[float, str, float]:
    """MB/s from file to file once the workers have started, a hash of the ids, and the MB that the
    largest worker had at most.
    """
    data = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    ((stretch,),) = cut(find_inputs([str(corpus.path)]), 1)
    batches = list(read_batches(stretch, ["text"], "file"))
    prefix = str(folder / "workers")
    with Workers(WORKERS, data, ["text"], True, cache) as workers:
        for _ in workers.encode(iter(batches[:WORKERS])):
            pass
        start = time.perf_counter()
        with IndexedWriter(prefix, PIECES) as writer:
            for _, result in workers.encode(read_batches(stretch, ["text"], "file")):
                if isinstance(result, Refusal):
                    raise AssertionError(result.arguments)
                writer.add_documents(result[0].ids, result[0].lengths, result[0].sequences)
        seconds = time.perf_counter() - start
        memory = max(_peak(child.pid) for child in multiprocessing.active_children())
    return corpus.megabytes / seconds, _hash(prefix), memory


def _command(model: Path, corpus: Corpus, folder: Path) -> tuple[float, str]:
    """MB/s of the command from its start to its end, and the hash of the ids."""
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
    command += ["--input", str(corpus.path), "--output-prefix", str(folder / f"out-{model.stem}")]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    command += ["--append-eod", "--workers", str(WORKERS)]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    rate = corpus.megabytes / (time.perf_counter() - start)
    return rate, _hash(str(folder / f"out-{model.stem}_text_document"))


def _peak(process: int | None) -> float:
    """The most MB that a process has had in memory."""
    status = Path(f"/proc/{process}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e6


def _hash(prefix: str) -> str:
    with open(f"{prefix}.bin", "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def _reached(name: str, value: float, unit: str, needed: float) -> Record:
    return Record(name=name, value=value, unit=unit, target=f">= {needed:g}", met=value >= needed)


def _bounded(name: str, value: float, unit: str, limit: float) -> Record:
    return Record(name=name, value=value, unit=unit, target=f"<= {limit:g}", met=value <= limit)

"""Tokenizing a corpus: the command against `SentencePieceProcessor.encode` in one process.

The corpus is the Python installation's sources, library and packages, each text once: up to
`MEGABYTES`, and as many as there are if there are fewer (the record `corpus` says). The two models
are trained on it. Every id of both models is compared with what the library gives for whole texts.

Megatron-LM's own tool is not installed here. Version 0.16.1, as a whole process on the same 100 MB
and models with 2 workers on two idle cores, wrote the same bytes in

    13.9 s (unigram, where `encode` reached 14.9 MB/s) and 26.3 s (byte pairs: 3.44 MB/s),

that is 0.48 and 1.10 times the raw rate; this command took 3.6 s and 6.3 s, run in turn with it.
`whole_process` is held against `LEAD` times these shares of the raw rate of this run.

Where other programs hold the cores, two workers cannot be twice as fast as one process, and rates
differ from one moment to the next. `..._by_cpu_time` is the same ratio from processor time, that of
this process included, which is what idle cores would make of it.
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
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.data.preprocess.encoding import EncodeError, EncoderPool
from megatron_moe.data.preprocess.inputs import cut, find_inputs
from megatron_moe.data.preprocess.reading import read_batches
from tools.train_tokenizer import Corpus, train

ROOT = Path(__file__).resolve().parents[1]
MEGABYTES, WORKERS, PIECES = 100, 2, 8192
SLICES = 4
"""Of the corpus; each is encoded by the library and by the workers in turn."""
WARM_UP = 3
"""MB of other texts, with which workers start."""
SHARE = 0.85
"""Of `WORKERS` times the raw rate, that has to be reached without a word cache."""
CACHED = 2.0
"""Times the raw rate, that has to be reached with it."""
MEGATRON, LEAD = {"unigram": 0.48, "bpe": 1.10}, 3.0
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
        *slices, warm_up = _corpus(folder)
        size = sum(piece.megabytes for piece in slices)
        found = [Record(name="tokenize/corpus", value=size, unit="MB")]
        for kind in ("unigram", "bpe"):
            found += _of_model(kind, slices, warm_up, folder)
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
    """The slices, and a small one of other texts."""
    texts, slices = _texts(), []
    for number in range(SLICES + 1):
        enough = 1e6 * (MEGABYTES / SLICES if number < SLICES else WARM_UP)
        path, size = folder / f"corpus-{number}.jsonl", 0
        with path.open("w") as stream:
            for text in texts:
                stream.write(json.dumps({"text": text}) + "\n")
                size += len(text.encode())
                if size > enough:
                    break
        slices.append(Slice(path, size / 1e6))
    return slices


def _of_model(kind: str, slices: Sequence[Slice], warm_up: Slice, folder: Path) -> list[Record]:
    """Slice by slice the library, then the workers with each way; medians of the ratios."""
    model = _train(kind, slices, folder)
    data = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    raws: list[float] = []
    expected: list[bytes] = []
    ways = ("plain", "word_cache") if kind == "bpe" else ("plain",)
    ratios: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with ExitStack() as stack:
        pools = {
            way: stack.enter_context(
                EncoderPool(WORKERS, data, ["text"], append_eod=True, word_cache=way != "plain")
            )
            for way in ways
        }
        for pool in pools.values():  # start them, with text that is not measured
            _encode(pool, warm_up, folder)
        for piece in slices:
            rate, busy, ids = _raw(model, piece)
            raws.append(rate)
            expected.append(ids)
            for way, pool in pools.items():
                reached, taken, found = _encode(pool, piece, folder)
                _refuse(f"{kind}, {way}", found, ids)
                ratios[way].append((reached / rate, WORKERS * busy / taken))
        memory = max(_peak(child.pid) for child in multiprocessing.active_children())
    rate, found = _command(model, slices, folder)
    _refuse(f"{kind}, command", found, b"".join(expected))
    name, workers = f"tokenize/{kind}", f"{WORKERS}_workers"
    made = [Record(name=f"{name}/raw_1_process", value=median(raws), unit="MB/s")]
    for way, values in ratios.items():
        needed = SHARE * WORKERS if way == "plain" else CACHED
        for suffix, of_one in zip(("", "_by_cpu_time"), zip(*values, strict=True), strict=True):
            made.append(
                _reached(f"{name}/{way}_{workers}{suffix}", median(of_one), "x raw", needed)
            )
    made.append(Record(name=f"{name}/whole_process_{workers}", value=rate, unit="MB/s"))
    lead, unit = rate / median(raws) / MEGATRON[kind], f"x {MEGATRON[kind]} raw"
    made.append(_reached(f"{name}/whole_process_to_megatron", lead, unit, LEAD))
    return [*made, _bounded(f"{name}/memory_of_a_worker", memory, "MB", MEMORY)]


def _train(kind: str, slices: Sequence[Slice], folder: Path) -> Path:
    model = folder / f"{kind}.model"
    options = argparse.Namespace(vocab_size=PIECES, model_type=kind, character_coverage=0.9995)
    corpus = Corpus([str(piece.path) for piece in slices], "text", 2e6)
    model.write_bytes(train(options, corpus))
    return model


def _refuse(what: str, found: bytes, expected: bytes) -> None:
    if found != expected:
        raise AssertionError(f"{what}: the ids are not the library's")


def _raw(model: Path, piece: Slice) -> tuple[float, float, bytes]:
    """MB/s of `encode` alone, its processor time, and its ids, with an end after each text."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    parts, seconds, busy = [], 0.0, 0.0
    with piece.path.open("rb") as stream:
        for line in stream:
            text = json.loads(line)["text"]
            start, begun = time.perf_counter(), time.process_time()
            ids = library.encode(text)
            busy += time.process_time() - begun
            seconds += time.perf_counter() - start
            parts.append(np.array([*ids, library.eos_id()], "<u2").tobytes())
    return piece.megabytes / seconds, busy, b"".join(parts)


def _encode(pool: EncoderPool, piece: Slice, folder: Path) -> tuple[float, float, bytes]:
    """MB/s of the workers from file to file, all processor time that it took, and the ids."""
    ((whole,),) = cut(find_inputs([str(piece.path)]), 1)
    start, begun = time.perf_counter(), _busy()
    with IndexedWriter(str(folder / "workers"), PIECES) as writer:
        for _, result in pool.encode(read_batches(whole, ["text"], "file")):
            if isinstance(result, EncodeError):
                raise AssertionError(result.arguments)
            writer.add_documents(result[0].ids, result[0].lengths, result[0].sequences)
    rate, taken = piece.megabytes / (time.perf_counter() - start), _busy() - begun
    return rate, taken, (folder / "workers.bin").read_bytes()


def _busy() -> float:
    """Processor time of this process and all workers so far."""
    tasks = (Path(f"/proc/{child.pid}/task") for child in multiprocessing.active_children())
    of_workers = (
        int((task / "schedstat").read_text().split()[0]) for t in tasks for task in t.iterdir()
    )
    return time.process_time() + sum(of_workers) / 1e9


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

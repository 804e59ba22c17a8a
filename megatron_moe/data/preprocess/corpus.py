"""Preprocesses a corpus, as Megatron-LM's `tools/preprocess_data.py` does, and resumes.

The input is cut into partitions. Each partition becomes a dataset of its own, atomically and with a
manifest; then they are merged. A run that is started again makes only what is missing or was made
from something else: a task is finished if its files exist with the manifest that this run would
write. The output depends neither on the number of partitions nor on that of workers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from megatron_moe.config import DataConfig
from megatron_moe.data.indexed.format import paths_of
from megatron_moe.data.indexed.manifest import (
    Manifest,
    Origin,
    difference,
    files_fit,
    manifest_path,
    read_manifest,
    write_manifest,
)
from megatron_moe.data.indexed.merge import merge
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.data.preprocess.encoding import EncoderPool, start_fork_server, write_documents
from megatron_moe.data.preprocess.inputs import (
    FileSlice,
    InputFile,
    TextDocuments,
    check_unchanged,
    cut,
    find_inputs,
)
from megatron_moe.data.preprocess.reading import DocumentBatch, read_batches
from megatron_moe.data.progress import progress_bar
from megatron_moe.errors import UsageError
from megatron_moe.text import LONGEST_RECORD
from megatron_moe.tokenizer.build import build_tokenizer, unpadded_vocab_size

PARTITION = 1 << 30
"""Bytes of input in a partition, if their number is not given."""

Report = Callable[[str], None]
"""Called with a line about what is kept or made again."""


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """What to tokenize and where to write it."""

    input: tuple[str, ...]
    """Files and globs, in order."""
    output_prefix: str
    """Files are named `{output_prefix}_{key}_document.bin`, `.idx` and `.json`."""
    json_keys: tuple[str, ...] = ("text",)
    """Fields to tokenize, each into files of its own."""
    append_eod: bool = False
    """End every document that is not empty with the tokenizer's end-of-document id."""
    workers: int = 1
    """Processes that tokenize; 1 tokenizes in the calling process."""
    partitions: int | None = None
    """Number of partitions; `None`: one for each GiB of input."""
    partition: int | None = None
    """Make only this partition, counted from 0, and merge nothing: one task of a cluster."""
    domain: str | None = None
    """Domain of the text, for the manifest."""
    text_documents: TextDocuments = "file"
    """A document of a text file: the file, or a block between blank lines."""
    word_cache: bool = True
    """Cache the ids of words where this changes no id."""
    max_record_bytes: int = LONGEST_RECORD
    """Longest line, block or row that is read: a compressed file of some MB may hold one of GB."""
    log_interval: int = 1000
    """Documents between updates of the progress line."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One partition, or the whole input."""

    name: str
    prefixes: tuple[str, ...]
    """One for each key."""
    slices: tuple[FileSlice, ...]
    expected: tuple[Manifest, ...]
    """The manifest of each key, except for the counts."""

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(piece.end - piece.start for piece in self.slices)


def output_prefixes(options: PreprocessOptions, part: str = "") -> tuple[str, ...]:
    """Return the prefix of each key's files, of the whole or of a partition."""
    return tuple(f"{options.output_prefix}{part}_{key}_document" for key in options.json_keys)


def plan_tasks(
    options: PreprocessOptions, data: DataConfig, files: Sequence[InputFile]
) -> tuple[Task | None, list[Task]]:
    """Return the whole input as a task (`None` for a single partition), and the partitions."""
    if any(file.format == "text" for file in files) and len(options.json_keys) > 1:
        expected = "one key, which names the output, for text files"
        raise UsageError("--json-keys", " ".join(options.json_keys), expected)
    tokenizer = build_tokenizer(data)
    common = Manifest(
        tokenizer=data.tokenizer_type,
        tokenizer_hash=tokenizer.identity,
        vocab_size=unpadded_vocab_size(data, tokenizer),
        key="",
        append_eod=options.append_eod,
        text_documents=options.text_documents,
        domain=options.domain,
        inputs=(),
    )

    def task(name: str, part: str, slices: Sequence[FileSlice]) -> Task:
        expected = [replace(common, key=k, inputs=_origins(slices)) for k in options.json_keys]
        return Task(
            name=name,
            prefixes=output_prefixes(options, part),
            slices=tuple(slices),
            expected=tuple(expected),
        )

    size = sum(file.size for file in files)
    count = options.partitions or max(1, -(-size // PARTITION))
    whole = task("output", "", cut(files, 1)[0])
    if count == 1 and options.partition is None:
        return whole, [whole]
    tasks = [
        task(f"partition {number} of {count}", f"_part{number:05d}of{count:05d}", slices)
        for number, slices in enumerate(cut(files, count))
    ]
    return (whole if options.partition is None else None), tasks


def check_same_cut(options: PreprocessOptions) -> None:
    """Check that no other task has cut the same output into another number of partitions.

    An array of which one task is submitted again would otherwise tokenize the whole corpus as one
    partition, and the merge would find two cuts.

    Raises:
        UsageError: names the other number.
    """
    folder, stem = os.path.split(options.output_prefix)
    keys = "|".join(map(re.escape, options.json_keys))
    finished_part = re.compile(
        rf"{re.escape(stem)}_part\d{{5}}of(\d{{5}})_(?:{keys})_document\.json"
    )
    names = sorted(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else []
    for match in filter(None, map(finished_part.fullmatch, names)):
        if int(match[1]) != options.partitions:
            fix = f"{match[0]} is one of them; remove these partitions to make another number"
            expected = f"{int(match[1])}, as the partitions that exist"
            raise UsageError("--partitions", options.partitions, expected, fix)


def _origins(slices: Sequence[FileSlice]) -> tuple[Origin, ...]:
    """Return where slices are read from, in order, for a manifest."""
    return tuple(
        Origin(path=s.file.path, size=s.file.size, hash=s.file.hash, start=s.start, end=s.end)
        for s in slices
    )


def finished(task: Task, report: Report) -> list[Manifest]:
    """Return the manifests of a task that an earlier run finished; empty if it is to be made."""
    found = [read_manifest(prefix) for prefix in task.prefixes]
    for prefix, manifest, expected in zip(task.prefixes, found, task.expected, strict=True):
        if manifest is None:
            return []
        reason = difference(manifest, expected)
        if not reason and not files_fit(prefix, manifest):
            reason = "files are missing or of another size"
        if reason:
            report(f"{task.name}: made again, {reason}")
            return []
    report(f"{task.name}: already finished, kept")
    return [manifest for manifest in found if manifest is not None]


def remove_leftovers(prefix: str) -> list[str]:
    """Remove partial files of a prefix whose process no longer exists, because it was killed.

    Returns:
        Their paths.
    """
    removed = []
    for path in (*paths_of(prefix), str(manifest_path(prefix))):
        for partial in Path(path).parent.glob(Path(path).name + ".partial-*"):
            process = partial.name.rpartition("-")[2]
            if process.isdigit() and not os.path.exists(f"/proc/{process}"):
                partial.unlink(missing_ok=True)
                removed.append(str(partial))
    return removed


def preprocess(
    options: PreprocessOptions,
    data: DataConfig,
    *,
    progress: bool = True,
    report: Report = lambda _: None,
) -> list[Manifest]:
    """Tokenize files into indexed datasets, one for each key.

    Args:
        options: what and where.
        data: names the tokenizer and the vocabulary size.
        progress: show a progress line on standard error.
        report: called with a line about what is kept or made again.

    Returns:
        The manifest of each key.

    Raises:
        UsageError: a file cannot be read or changes meanwhile, a line is not a JSON object with the
            keys, an id is outside the vocabulary, or the disk is full. Existing output is unchanged
            then, and finished partitions are kept.
    """
    if options.workers > 1:
        start_fork_server()
    if options.partition is not None:
        check_same_cut(options)
    files = find_inputs(options.input)
    whole, parts = plan_tasks(options, data, files)
    if whole is not None and (made := finished(whole, report)):
        return made
    wanted = parts if options.partition is None else [parts[options.partition]]
    missing = [task for task in wanted if task is whole or not finished(task, report)]
    with ExitStack() as stack:
        size = sum(task.size for task in missing)
        bar = stack.enter_context(progress_bar(size, "B", progress))
        pool = EncoderPool(
            options.workers,
            data,
            options.json_keys,
            append_eod=options.append_eod,
            word_cache=options.word_cache,
        )
        stack.enter_context(pool)
        for task in missing:
            _make(task, options, pool, bar)
    if whole is None or wanted == [whole]:
        return [_manifest(prefix) for prefix in wanted[0].prefixes]
    return _merge_partitions(wanted, whole)


def _make(task: Task, options: PreprocessOptions, pool: EncoderPool, bar: tqdm[None]) -> None:
    """Tokenize one task into its files and manifests."""
    for prefix in task.prefixes:
        remove_leftovers(prefix)
        manifest_path(prefix).unlink(missing_ok=True)
    try:
        with ExitStack() as stack:
            limit = task.expected[0].vocab_size
            writers = [stack.enter_context(IndexedWriter(p, limit)) for p in task.prefixes]
            advance = _progress_of(bar, writers[0], options.log_interval)
            text_bytes = write_documents(writers, _batches(task, options), pool, advance)
            check_unchanged(list({s.file.path: s.file for s in task.slices}.values()))
            if task.name == "output":
                for key, writer in zip(options.json_keys, writers, strict=True):
                    _check_not_empty(key, writer.documents, writer.tokens)
            bar.set_postfix_str(f"{writers[0].documents} documents")
        for expected, writer, size in zip(task.expected, writers, text_bytes, strict=True):
            manifest = replace(
                expected,
                documents=writer.documents,
                sequences=writer.sequences,
                tokens=writer.tokens,
                text_bytes=size,
            )
            write_manifest(writer.prefix, manifest)
    except OSError as error:  # errors of reading are `UsageError`s already, so this is the output
        expected_place = f"a writable path with free space ({error.strerror})"
        fix = "finished partitions are kept; free space and run again"
        raise UsageError("--output-prefix", options.output_prefix, expected_place, fix) from None


def _batches(task: Task, options: PreprocessOptions) -> Iterator[DocumentBatch]:
    for piece in task.slices:
        yield from read_batches(
            piece, options.json_keys, options.text_documents, options.max_record_bytes
        )


def _progress_of(
    bar: tqdm[None], writer: IndexedWriter, interval: int
) -> Callable[[DocumentBatch], None]:
    """Return a function that advances the bar by a batch and shows the number of documents."""
    due = interval

    def advance(batch: DocumentBatch) -> None:
        nonlocal due
        if writer.documents >= due:
            bar.set_postfix_str(f"{writer.documents} documents", refresh=False)
            due = writer.documents + interval
        bar.update(batch.taken)

    return advance


def _check_not_empty(key: str, documents: int, tokens: int) -> None:
    if tokens == 0:
        found = f"{documents} documents without a token"
        raise UsageError("--input", found, f"one or more documents with text in {key!r}")


def _merge_partitions(tasks: Sequence[Task], whole: Task) -> list[Manifest]:
    """Merge the partitions of each key, then remove them."""
    for number, prefix in enumerate(whole.prefixes):
        remove_leftovers(prefix)
        parts = [task.prefixes[number] for task in tasks]
        manifests = [_manifest(part) for part in parts]
        # A partition may be empty, the whole may not: nothing could be trained on it.
        documents, tokens = sum(m.documents for m in manifests), sum(m.tokens for m in manifests)
        _check_not_empty(manifests[0].key, documents, tokens)
        merge(parts, prefix)
    for prefix in (prefix for task in tasks for prefix in task.prefixes):
        for path in (*paths_of(prefix), manifest_path(prefix)):
            Path(path).unlink(missing_ok=True)
    return [_manifest(prefix) for prefix in whole.prefixes]


def _manifest(prefix: str) -> Manifest:
    manifest = read_manifest(prefix)
    if manifest is None:
        raise UsageError(f"manifest of {prefix}", None, "present after it was written", "run again")
    return manifest

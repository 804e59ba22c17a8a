"""Text to indexed data: what Megatron-LM's `tools/preprocess_data.py` does, as a library.

The input is cut into partitions, each of which becomes a data set of its own, atomically and with a
manifest; then they are merged. A run that is started again redoes only what is not finished, or was
made from something else. What is written depends neither on the number of partitions nor on that of
workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from megatron_moe.config import DataConfig
from megatron_moe.data.indexed.format import paths_of
from megatron_moe.data.indexed.manifest import (
    Manifest,
    manifest_path,
    read_manifest,
    write_manifest,
)
from megatron_moe.data.indexed.merge import merge
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.data.preprocess.encoding import EncodeError
from megatron_moe.data.preprocess.progress import progress_bar
from megatron_moe.data.preprocess.reading import Batch, read_batches
from megatron_moe.data.preprocess.sources import find_inputs, refuse_changed
from megatron_moe.data.preprocess.tasks import (
    PreprocessOptions,
    Say,
    Task,
    finished,
    plan_tasks,
    remove_leftovers,
)
from megatron_moe.data.preprocess.workers import Workers, start_early
from megatron_moe.errors import UsageError


def preprocess(
    options: PreprocessOptions,
    data: DataConfig,
    *,
    progress: bool = True,
    say: Say = lambda _: None,
) -> list[Manifest]:
    """Tokenize the files into indexed data.

    Args:
        options: what and where.
        data: names the tokenizer and the vocabulary size.
        progress: show a progress line on standard error.
        say: takes a line about what is kept, or made again.

    Returns:
        The manifest of each key.

    Raises:
        UsageError: a file cannot be read or changes meanwhile, a line is not a JSON object with the
            keys, an id is outside the vocabulary, the disk is full. What was there stays then, and
            partitions that were finished are kept.
    """
    if options.workers > 1:
        start_early()
    files = find_inputs(options.input)
    whole, parts = plan_tasks(options, data, files)
    if whole is not None and (made := finished(whole, say)):
        return made
    wanted = parts if options.partition is None else [parts[options.partition]]
    missing = [task for task in wanted if task is whole or not finished(task, say)]
    with ExitStack() as stack:
        size = sum(task.size for task in missing)
        bar = stack.enter_context(progress_bar(size, "B", progress))
        workers = stack.enter_context(
            Workers(
                options.workers, data, options.json_keys, options.append_eod, options.word_cache
            )
        )
        for task in missing:
            _make(task, options, workers, bar)
    if whole is None or wanted == [whole]:
        return [_manifest(prefix) for prefix in wanted[0].prefixes]
    return _join(wanted, whole)


def _make(task: Task, options: PreprocessOptions, workers: Workers, bar: tqdm[None]) -> None:
    """Tokenize one task into its files and manifests."""
    for prefix in task.prefixes:
        remove_leftovers(prefix)
        manifest_path(prefix).unlink(missing_ok=True)
    try:
        with ExitStack() as stack:
            limit = task.recipes[0].vocab_size
            writers = [stack.enter_context(IndexedWriter(p, limit)) for p in task.prefixes]
            text_bytes = _fill(writers, task, options, workers, bar)
            refuse_changed(list({s.file.path: s.file for s in task.stretches}.values()))
            if task.name == "output":
                _refuse_empty(writers, options)
            bar.set_postfix_str(f"{writers[0].documents} documents")
        for recipe, writer, size in zip(task.recipes, writers, text_bytes, strict=True):
            manifest = replace(
                recipe,
                documents=writer.documents,
                sequences=writer.sequences,
                tokens=writer.tokens,
                text_bytes=size,
            )
            write_manifest(writer.prefix, manifest)
    except OSError as error:  # what is read has its own message
        fix = "finished partitions are kept; make room and run it again"
        raise UsageError(
            "--output-prefix", options.output_prefix, f"a place with room ({error.strerror})", fix
        ) from None


def _fill(
    writers: Sequence[IndexedWriter],
    task: Task,
    options: PreprocessOptions,
    workers: Workers,
    bar: tqdm[None],
) -> list[int]:
    """Tokenize into the writers; the bytes of text that each has taken."""
    text_bytes = [0 for _ in writers]
    due = options.log_interval
    for batch, result in workers.encode(_batches(task, options)):
        if isinstance(result, EncodeError):
            raise UsageError(*result.arguments)
        for number, (writer, encoded) in enumerate(zip(writers, result, strict=True)):
            writer.add_documents(encoded.ids, encoded.lengths, encoded.sequences)
            text_bytes[number] += encoded.text_bytes
        if writers[0].documents >= due:
            bar.set_postfix_str(f"{writers[0].documents} documents", refresh=False)
            due = writers[0].documents + options.log_interval
        bar.update(batch.taken)
    return text_bytes


def _batches(task: Task, options: PreprocessOptions) -> Iterator[Batch]:
    for stretch in task.stretches:
        yield from read_batches(stretch, options.json_keys, options.text_documents)


def _refuse_empty(writers: Sequence[IndexedWriter], options: PreprocessOptions) -> None:
    for key, writer in zip(options.json_keys, writers, strict=True):
        if writer.tokens == 0:
            found = f"{writer.documents} documents without a token in {key!r}"
            raise UsageError("--input", found, "at least one document with text")


def _join(tasks: Sequence[Task], whole: Task) -> list[Manifest]:
    """Merge the partitions of each key, then remove them."""
    for number, prefix in enumerate(whole.prefixes):
        remove_leftovers(prefix)
        parts = [task.prefixes[number] for task in tasks]
        if sum(_manifest(part).tokens for part in parts) == 0:
            found = f"{sum(_manifest(part).documents for part in parts)} documents without a token"
            raise UsageError("--input", found, "at least one document with text")
        merge(parts, prefix)
    for prefix in (prefix for task in tasks for prefix in task.prefixes):
        for path in (*paths_of(prefix), manifest_path(prefix)):
            Path(path).unlink(missing_ok=True)
    return [_manifest(prefix) for prefix in whole.prefixes]


def _manifest(prefix: str) -> Manifest:
    manifest = read_manifest(prefix)
    if manifest is None:
        raise UsageError("manifest of " + prefix, None, "what was just written", "run it again")
    return manifest

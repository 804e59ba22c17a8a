"""Text to indexed data: what Megatron-LM's `tools/preprocess_data.py` does, as a library.

The input is cut into partitions, each of which becomes a data set of its own, atomically and with a
manifest; then they are merged. A run that is started again redoes only what is not finished, or was
made from something else. What is written depends neither on the number of partitions nor on that of
workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from megatron_moe.config import DataConfig
from megatron_moe.data.encoding import Refusal
from megatron_moe.data.indexed_format import paths_of
from megatron_moe.data.indexed_writer import IndexedWriter
from megatron_moe.data.manifest import (
    Manifest,
    difference,
    files_fit,
    manifest_path,
    origins,
    read_manifest,
    write_manifest,
)
from megatron_moe.data.merge import merge
from megatron_moe.data.reading import Batch, read_batches
from megatron_moe.data.sources import (
    InputFile,
    Stretch,
    TextDocuments,
    cut,
    find_inputs,
    refuse_changed,
)
from megatron_moe.data.tokenizer import build_tokenizer, unpadded_vocab_size
from megatron_moe.data.workers import Workers
from megatron_moe.errors import UsageError

PARTITION = 1 << 30
"""Bytes of input in a partition, where their number is not given."""


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """What to tokenize and where to write it."""

    input: tuple[str, ...]
    """Files and globs, read one after the other."""
    output_prefix: str
    """Files are named `{output_prefix}_{key}_document.bin`, `.idx` and `.json`."""
    json_keys: tuple[str, ...] = ("text",)
    """Fields to tokenize, each into files of its own."""
    append_eod: bool = False
    """End every document that is not empty with the tokenizer's end-of-document id."""
    workers: int = 1
    """Processes that tokenize; 1 tokenizes in this one."""
    partitions: int | None = None
    """Into how many the input is cut; `None`: one for each GiB."""
    partition: int | None = None
    """Make this one alone, counted from 0, and merge nothing: a task of a cluster."""
    domain: str | None = None
    """What the text is, for the manifest."""
    text_documents: TextDocuments = "file"
    """A document of a text file: all of it, or a block between blank lines."""
    word_cache: bool = True
    """Remember the ids of words, where that changes none."""
    log_interval: int = 1000
    """Documents between updates of the progress line."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One partition, or all of the input."""

    name: str
    prefixes: tuple[str, ...]
    """One for each key."""
    stretches: tuple[Stretch, ...]
    recipes: tuple[Manifest, ...]
    """What the manifests are to say, but for the counts."""

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(stretch.end - stretch.start for stretch in self.stretches)


Say = Callable[[str], None]


def output_prefixes(options: PreprocessOptions, part: str = "") -> tuple[str, ...]:
    """The prefix of each key's files, of all or of a part."""
    return tuple(f"{options.output_prefix}{part}_{key}_document" for key in options.json_keys)


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
    files = find_inputs(options.input)
    whole, parts = _plan(options, data, files)
    if whole is not None and (made := _already(whole, say)):
        return made
    wanted = parts if options.partition is None else [parts[options.partition]]
    missing = [task for task in wanted if task is whole or not _already(task, say)]
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(
                total=sum(task.size for task in missing),
                unit="B",
                unit_scale=True,
                disable=not progress,
                mininterval=1.0,
            )
        )
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


def _plan(
    options: PreprocessOptions, data: DataConfig, files: Sequence[InputFile]
) -> tuple[Task | None, list[Task]]:
    """All of the input, unless a partition is asked for, and the partitions."""
    tokenizer = build_tokenizer(data)
    recipe = Manifest(
        tokenizer=data.tokenizer_type,
        tokenizer_hash=tokenizer.identity,
        vocab_size=unpadded_vocab_size(data, tokenizer),
        key="",
        append_eod=options.append_eod,
        text_documents=options.text_documents,
        domain=options.domain,
        inputs=(),
    )
    if any(file.kind == "text" for file in files) and len(options.json_keys) > 1:
        expected = "one key, which names the output, for text files"
        raise UsageError("--json-keys", " ".join(options.json_keys), expected)

    def task(name: str, part: str, stretches: Sequence[Stretch]) -> Task:
        return Task(
            name=name,
            prefixes=output_prefixes(options, part),
            stretches=tuple(stretches),
            recipes=tuple(
                replace(recipe, key=key, inputs=origins(stretches)) for key in options.json_keys
            ),
        )

    size = sum(file.size for file in files)
    count = options.partitions or max(1, -(-size // PARTITION))
    whole = task("output", "", cut(files, 1)[0])
    if count == 1 and options.partition is None:
        return whole, [whole]
    tasks = [
        task(f"partition {number} of {count}", f"_part{number:05d}of{count:05d}", stretches)
        for number, stretches in enumerate(cut(files, count))
    ]
    return (whole if options.partition is None else None), tasks


def _already(task: Task, say: Say) -> list[Manifest]:
    """The manifests of what an earlier run has finished; none if it has to be made."""
    found = [read_manifest(prefix) for prefix in task.prefixes]
    for prefix, manifest, recipe in zip(task.prefixes, found, task.recipes, strict=True):
        if manifest is None:
            return []
        reason = difference(manifest, recipe)
        if not reason and not files_fit(prefix, manifest):
            reason = "files are missing or of another size"
        if reason:
            say(f"{task.name}: made again, {reason}")
            return []
    say(f"{task.name}: finished before, kept")
    return [manifest for manifest in found if manifest is not None]


def _make(task: Task, options: PreprocessOptions, workers: Workers, bar: tqdm[None]) -> None:
    """Tokenize one task into its files and manifests."""
    for prefix in task.prefixes:
        remove_leftovers(prefix)
        manifest_path(prefix).unlink(missing_ok=True)
    text_bytes = [0 for _ in task.prefixes]
    try:
        with ExitStack() as stack:
            limit = task.recipes[0].vocab_size
            writers = [stack.enter_context(IndexedWriter(p, limit)) for p in task.prefixes]
            due = options.log_interval
            for batch, result in workers.encode(_batches(task, options)):
                if isinstance(result, Refusal):
                    raise UsageError(*result.arguments)
                for number, (writer, encoded) in enumerate(zip(writers, result, strict=True)):
                    writer.add_documents(encoded.ids, encoded.lengths, encoded.sequences)
                    text_bytes[number] += encoded.text_bytes
                if writers[0].documents >= due:
                    bar.set_postfix_str(f"{writers[0].documents} documents", refresh=False)
                    due = writers[0].documents + options.log_interval
                bar.update(batch.taken)
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


def remove_leftovers(prefix: str) -> list[str]:
    """Remove unfinished files of this prefix whose process is gone: it was killed.

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

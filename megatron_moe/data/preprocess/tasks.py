"""What a preprocessing run has to make, and what of it an earlier run has finished.

The whole input is one task; its partitions are tasks of their own. A task is finished if its files
are there with a manifest that says what this run would make.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_moe.config import DataConfig
from megatron_moe.data.indexed.format import paths_of
from megatron_moe.data.indexed.manifest import (
    Manifest,
    difference,
    files_fit,
    manifest_path,
    origins,
    read_manifest,
)
from megatron_moe.data.preprocess.sources import InputFile, Stretch, TextDocuments, cut
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.build import build_tokenizer, unpadded_vocab_size

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
"""Takes a line about what is kept, or made again."""


def output_prefixes(options: PreprocessOptions, part: str = "") -> tuple[str, ...]:
    """The prefix of each key's files, of all or of a part."""
    return tuple(f"{options.output_prefix}{part}_{key}_document" for key in options.json_keys)


def plan_tasks(
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


def finished(task: Task, say: Say) -> list[Manifest]:
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

"""The JSON file beside an indexed data set that says what it was made from: `PREFIX.json`.

A preprocessing run recognises by it what an earlier one has finished; a merge, what must not be
mixed; a reader, how many tokens of which domain there are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron_moe.data.indexed.format import HEADER, TYPES, paths_of, type_code_for
from megatron_moe.data.preprocess.sources import Stretch
from megatron_moe.errors import UsageError

FORMAT = "megatron_moe indexed data 1"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A file, or a range of one, that documents were read from."""

    path: str
    size: int
    """Bytes of the file."""
    hash: str
    """Of the file; see `sources.InputFile`."""
    start: int
    end: int

    @property
    def content(self) -> tuple[object, ...]:
        """Equal where the documents are, wherever the file lies."""
        return (self.size, self.hash, self.start, self.end)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a data set holds and how it was made."""

    tokenizer: str
    """`--tokenizer-type`."""
    tokenizer_hash: str
    """`Tokenizer.identity`."""
    vocab_size: int
    """No id reaches it; it decides the type of the ids."""
    key: str
    append_eod: bool
    text_documents: str
    """What is a document of a text file."""
    domain: str | None
    inputs: tuple[Origin, ...]
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """Of the texts in UTF-8."""

    @property
    def tokens_per_byte(self) -> float:
        """How far the tokenizer compresses; 0 without text."""
        return self.tokens / self.text_bytes if self.text_bytes else 0.0


def origins(stretches: Sequence[Stretch]) -> tuple[Origin, ...]:
    """What the stretches are read from, in order."""
    return tuple(
        Origin(path=s.file.path, size=s.file.size, hash=s.file.hash, start=s.start, end=s.end)
        for s in stretches
    )


def manifest_path(prefix: str) -> Path:
    """Where the manifest of a data set lies."""
    return Path(f"{prefix}.json")


def write_manifest(prefix: str, manifest: Manifest) -> None:
    """Write it whole or not at all."""
    values = {"format": FORMAT} | asdict(manifest)
    values |= {"dtype": TYPES[type_code_for(manifest.vocab_size)].name}
    values |= {"tokens_per_byte": round(manifest.tokens_per_byte, 6)}
    path = manifest_path(prefix)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("w") as stream:
            stream.write(json.dumps(values, indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_manifest(prefix: str) -> Manifest | None:
    """The manifest of a data set, if it has one.

    Raises:
        UsageError: the file is no manifest.
    """
    path = manifest_path(prefix)
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']!r}")
        known = {field.name: values[field.name] for field in fields(Manifest)}
        known["inputs"] = tuple(Origin(**origin) for origin in known["inputs"])
        return Manifest(**known)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError("manifest", str(path), FORMAT, f"{reason}; remove it") from None


def difference(old: Manifest, new: Manifest) -> str:
    """What would make other files of ``new`` than of ``old``, in words; empty if nothing would."""
    for name, words in (
        ("tokenizer_hash", "the tokenizer"),
        ("vocab_size", "the vocabulary size"),
        ("key", "the key"),
        ("append_eod", "--append-eod"),
        ("text_documents", "--text-documents"),
        ("domain", "--domain"),
    ):
        if getattr(old, name) != getattr(new, name):
            return f"{words} was {getattr(old, name)!r}, is {getattr(new, name)!r}"
    if [o.content for o in old.inputs] == [o.content for o in new.inputs]:
        return ""
    if len(old.inputs) != len(new.inputs):
        return f"the input was {len(old.inputs)} files, is {len(new.inputs)}"
    pairs = zip(old.inputs, new.inputs, strict=True)
    changed = next(n for o, n in pairs if o.content != n.content)
    return f"the content of {changed.path} has changed"


def files_fit(prefix: str, manifest: Manifest) -> bool:
    """Whether both files are there, in the sizes that the manifest implies."""
    item = TYPES[type_code_for(manifest.vocab_size)].itemsize
    index = HEADER.size + 12 * manifest.sequences + 8 * (manifest.documents + 1)
    try:
        found = [os.stat(path).st_size for path in paths_of(prefix)]
    except OSError:
        return False
    return found == [item * manifest.tokens, index]


def merged(manifests: Sequence[Manifest]) -> Manifest:
    """The manifest of the data sets one after the other. They differ in their inputs alone."""
    inputs: list[Origin] = []
    for origin in (origin for manifest in manifests for origin in manifest.inputs):
        last = inputs[-1] if inputs else None
        if last and (last.hash, last.size, last.end) == (origin.hash, origin.size, origin.start):
            inputs[-1] = replace(last, end=origin.end)
        else:
            inputs.append(origin)
    domains = {manifest.domain for manifest in manifests}
    return replace(
        manifests[0],
        inputs=tuple(inputs),
        domain=domains.pop() if len(domains) == 1 else None,
        documents=sum(manifest.documents for manifest in manifests),
        sequences=sum(manifest.sequences for manifest in manifests),
        tokens=sum(manifest.tokens for manifest in manifests),
        text_bytes=sum(manifest.text_bytes for manifest in manifests),
    )

"""The manifest of an indexed dataset, `PREFIX.json`: what it was made from, and how.

Preprocessing uses it to skip what an earlier run has finished, merging to reject datasets of
different tokenizers, and training to reject data that does not suit the run. Datasets without a
manifest (Megatron-LM writes none) are accepted as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from megatron_moe.data.indexed.format import TYPES, index_size, paths_of, type_code_for
from megatron_moe.errors import UsageError, echoed
from megatron_moe.files import read_small
from megatron_moe.text import json_value
from megatron_moe.tokenizer.base import vocabulary_of

FORMAT = "megatron_moe indexed data 1"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A file, or a range of one, that documents were read from."""

    path: str
    size: int
    """Bytes of the file."""
    hash: str
    """Of the file; see `preprocess.inputs.InputFile`."""
    start: int
    end: int

    @property
    def content(self) -> tuple[object, ...]:
        """Equal if the documents are equal; independent of the path of the file."""
        return (self.size, self.hash, self.start, self.end)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset contains and how it was made."""

    tokenizer: str
    """`--tokenizer-type`."""
    tokenizer_hash: str
    """`Tokenizer.identity`."""
    vocab_size: int
    """All ids are below it; it decides the type of the ids."""
    key: str
    append_eod: bool
    text_documents: str
    """What a document of a text file is: `file` or `block`."""
    domain: str | None
    inputs: tuple[Origin, ...]
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """Size of the texts in UTF-8."""

    @property
    def tokens_per_byte(self) -> float:
        """Compression by the tokenizer; 0 without text."""
        return self.tokens / self.text_bytes if self.text_bytes else 0.0


_Part = TypeVar("_Part", Origin, Manifest)
_TYPES: dict[str, tuple[type[Any], ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "str | None": (str, type(None)),
    "tuple[Origin, ...]": (tuple,),
}
"""Types of JSON values by the annotation of a field; true is no number."""


def manifest_path(prefix: str) -> Path:
    """Return the path of the manifest of a dataset."""
    return Path(f"{prefix}.json")


def write_manifest(prefix: str, manifest: Manifest) -> None:
    """Write a manifest atomically, by rename."""
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
    """Return the manifest of a dataset, `None` if it has none.

    Raises:
        UsageError: the file is not a manifest.
    """
    path = manifest_path(prefix)
    try:
        values: dict[str, Any] = json_value(read_small(path))
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']!r}")
        known = {field.name: values[field.name] for field in fields(Manifest)}
        known["inputs"] = tuple(_typed(Origin, origin) for origin in known["inputs"])
        return _typed(Manifest, known)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        expected = f"of the format {FORMAT!r}"
        raise UsageError("manifest", str(path), expected, f"{reason}; remove it") from None


def _typed(kind: type[_Part], values: dict[str, Any]) -> _Part:
    """A part of a manifest whose values have the types that it declares; numbers are >= 0.

    Raises:
        TypeError: a key is unknown or missing, or a value is of another type.
        ValueError: a number is negative or has more than 63 bits.
    """
    made = kind(**values)
    for field in fields(made):
        value, expected = getattr(made, field.name), _TYPES[str(field.type)]
        if type(value) not in expected:
            raise TypeError(f"{field.name} is {echoed(value)}")
        if type(value) is int and not 0 <= value < 1 << 63:
            raise ValueError(f"{field.name} is {echoed(value)}")
    return made


def difference(old: Manifest, new: Manifest) -> str:
    """Describe why ``new`` would make other files than ``old``; empty if it would not."""
    for name, words in (
        ("tokenizer_hash", "the tokenizer"),
        ("vocab_size", "the vocabulary size"),
        ("key", "the key"),
        ("append_eod", "--append-eod"),
        ("text_documents", "--text-documents"),
        ("domain", "--domain"),
    ):
        if getattr(old, name) != getattr(new, name):
            return f"{words} was {getattr(old, name)!r} and is {getattr(new, name)!r}"
    if [o.content for o in old.inputs] == [o.content for o in new.inputs]:
        return ""
    if len(old.inputs) != len(new.inputs):
        return f"the input was {len(old.inputs)} files and is {len(new.inputs)}"
    pairs = zip(old.inputs, new.inputs, strict=True)
    changed = next(n for o, n in pairs if o.content != n.content)
    return f"the content of {changed.path} has changed"


def files_fit(prefix: str, manifest: Manifest) -> bool:
    """Whether both files exist with the sizes that the manifest implies."""
    item = TYPES[type_code_for(manifest.vocab_size)].itemsize
    index = index_size(manifest.sequences, manifest.documents + 1)
    try:
        found = [os.stat(path).st_size for path in paths_of(prefix)]
    except OSError:
        return False
    return found == [item * manifest.tokens, index]


def merged(manifests: Sequence[Manifest]) -> Manifest:
    """Return the manifest of the concatenated datasets, which differ in their inputs alone.

    Adjacent ranges of one file become one, so that the manifest does not depend on the number of
    partitions: bytes 0-500 and 500-900 of a file are recorded as 0-900.
    """
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


def check_compatibility(
    prefix: str, *, tokenizer_type: str, tokenizer_hash: str, needs_eod: bool
) -> None:
    """Reject data that a run would misread without any error.

    Args:
        prefix: of the dataset; without a manifest nothing is checked.
        tokenizer_type: the run's `--tokenizer-type`. `NullTokenizer` has no text and accepts the
            ids of every tokenizer.
        tokenizer_hash: `Tokenizer.identity` of the run.
        needs_eod: whether documents in a row are kept apart, by their end-of-document ids.

    Raises:
        UsageError: the file is not a manifest or describes other files, the ids are another
            tokenizer's, or end-of-document ids are missing.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        return
    if not files_fit(prefix, manifest):
        raise UsageError(
            "manifest",
            str(manifest_path(prefix)),
            f"that of {prefix}.bin and {prefix}.idx, whose sizes it does not match",
            "preprocess again, or remove the manifest if the files are correct",
        )
    same = vocabulary_of(manifest.tokenizer_hash) == vocabulary_of(tokenizer_hash)
    if tokenizer_type != "NullTokenizer" and not same:
        raise UsageError(
            f"tokenizer of {prefix}",
            f"{manifest.tokenizer} {manifest.tokenizer_hash}",
            f"this run's {tokenizer_type} {tokenizer_hash}",
            "use the tokenizer that the data was made with, or preprocess again",
        )
    if needs_eod and not manifest.append_eod:
        raise UsageError(
            f"documents of {prefix}",
            "no end-of-document ids",
            "terminated by end-of-document ids for --reset-position-ids and --reset-attention-mask",
            "preprocess with --append-eod",
        )

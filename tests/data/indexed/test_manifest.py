"""Data whose manifest says that it was not made for this run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.data.blend import domains_of
from megatron_moe.data.indexed.manifest import write_manifest
from megatron_moe.errors import UsageError
from tests.data.corpus import MANIFEST, write
from tests.data.objectives.runs import data_of

DOCUMENTS = [[70, 80, 90, 1]] * 20
BYTES = {"tokenizer_type": "ByteTokenizer", "vocab_size": None}
MADE = replace(MANIFEST, domain="web", documents=20, sequences=20, tokens=80, text_bytes=60)


def made(folder: Path, name: str = "x", **changes: Any) -> str:
    prefix = write(folder / name, DOCUMENTS, 259)
    write_manifest(prefix, replace(MADE, **changes))
    return prefix


def test_what_was_made_for_the_run_is_taken(tmp_path: Path) -> None:
    prefix = made(tmp_path)
    for flags in ({}, {"reset_position_ids": True}, {"objective": "prefix-lm"}):
        assert next(data_of(prefix, **BYTES, **flags).train) is not None  # type: ignore[arg-type]
    assert data_of(prefix, **BYTES).shares[0].domain == "web"
    made(tmp_path, append_eod=False, tokenizer_hash="another")
    assert data_of(prefix).train is not None, "NullTokenizer takes the ids of any"


ORIGIN = {"path": "a.jsonl", "size": 9, "hash": "00", "start": 0, "end": 9}

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "tokenizer": (
        {"tokenizer_hash": "another"},
        {},
        r"x must be this run's ByteTokenizer bytes.3 \(got 'ByteTokenizer another'\); use the",
    ),
    "no ends, mask": (
        {"append_eod": False},
        {"reset_attention_mask": True},
        "documents of .*x must be terminated by end-of-document ids for .*; .* --append-eod",
    ),
    "no ends, positions": (
        {"append_eod": False},
        {"reset_position_ids": True},
        r"documents of .*x must be .*\(got 'no end-of-document ids'\)",
    ),
    "other files": ({"tokens": 81}, {}, r"manifest must be that of .*x\.bin and .*got '.*x.json'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_not_is_refused(tmp_path: Path, name: str) -> None:
    manifest, flags, says = REFUSED[name]
    prefix = made(tmp_path, **manifest)
    with pytest.raises(UsageError, match=says) as caught:
        data_of(prefix, **BYTES, **flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{}", "{", "[]", "[" * 100_000], ids=lambda c: c[:9])
def test_garbage_is_no_manifest(tmp_path: Path, content: str) -> None:
    prefix = made(tmp_path)
    Path(f"{prefix}.json").write_text(content)
    with pytest.raises(
        UsageError, match=r"manifest must be of the format .*got '.*x\.json'.*remove it"
    ):
        data_of(prefix, **BYTES)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("tokens", "80", "TypeError: tokens is '80'"),
        ("documents", -1, "ValueError: documents is -1"),
        ("sequences", 1 << 63, "ValueError: sequences is 9223372036854775808"),
        ("append_eod", 1, "TypeError: append_eod is 1"),
        ("vocab_size", True, "TypeError: vocab_size is True"),
        ("domain", ["web"], r"TypeError: domain is \['web'\]"),
        ("tokenizer_hash", None, "TypeError: tokenizer_hash is None"),
        ("inputs", {"a": 1}, "TypeError"),
        ("inputs", [{**ORIGIN, "start": 0.5}], "TypeError: start is 0.5"),
        ("inputs", [{**ORIGIN, "path": None}], "TypeError: path is None"),
    ],
)
def test_values_of_a_manifest_have_their_types(
    tmp_path: Path, key: str, value: Any, says: str
) -> None:
    prefix = made(tmp_path)
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UsageError, match=f"manifest must be of the format .*{says}.*; remove it"):
        data_of(prefix, **BYTES)


def test_domains(tmp_path: Path) -> None:
    """Two data sets of one domain are one; one without a name goes by its file."""
    prefixes = [made(tmp_path, "a"), made(tmp_path, "b"), made(tmp_path, "c", domain=None)]
    assert domains_of([*prefixes, f"{tmp_path}/d_text_document"]) == ("web", "web", "c", "d")
    data = data_of(*prefixes, split="8,2,0", eval_iters=4, **BYTES)
    assert data.domains["valid"] == {"web": 2, "c": 2}

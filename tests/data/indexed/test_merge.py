"""Merging against Megatron-Core's own builder; what must not be mixed; memory and atomicity."""

from __future__ import annotations

import os
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_moe.data.indexed import merge as module
from megatron_moe.data.indexed.manifest import Origin, read_manifest, write_manifest
from megatron_moe.data.indexed.merge import merge
from megatron_moe.data.indexed.writer import IndexedWriter
from megatron_moe.errors import UsageError
from tests.data.corpus import MANIFEST, random_documents, read_with_megatron_core, write

PART = replace(
    MANIFEST,
    vocab_size=1000,
    domain="a",
    inputs=(Origin(path="x", size=10, hash="h", start=0, end=6),),
    documents=2,
    sequences=2,
    tokens=5,
    text_bytes=7,
)


def files(prefix: Path | str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def parts(folder: Path, vocab_size: int) -> list[str]:
    """Random documents, several sequences in one; a part without tokens, one without documents."""
    sets = [random_documents(30, 1), [[], []], random_documents(7, 2), [], random_documents(1, 3)]
    made = [write(folder / f"p{i}", documents, vocab_size) for i, documents in enumerate(sets)]
    with IndexedWriter(str(folder / "p9"), vocab_size) as writer:
        writer.add_document([1, 2, 3, 4], [3, 1])
        writer.add_document([])
        writer.add_document([5], [1])
    return [*made, str(folder / "p9")]


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("vocab_size", [1000, 70000])
def test_bytes_equal_megatron_core(
    tmp_path: Path, chunk: int, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    prefixes = parts(tmp_path, vocab_size)
    merge(prefixes, str(tmp_path / "new" / "ours"))
    builder = IndexedDatasetBuilder(f"{tmp_path}/engine.bin", dtype=DType.optimal_dtype(vocab_size))
    for prefix in prefixes:
        if os.stat(f"{prefix}.bin").st_size:  # Megatron-Core cannot map an empty file
            builder.add_index(prefix)
        else:
            for _ in range((os.stat(f"{prefix}.idx").st_size - 34) // 8 - 1):
                builder.end_document()
    builder.finalize(f"{tmp_path}/engine.idx")
    assert files(tmp_path / "new" / "ours") == files(tmp_path / "engine")
    expected = [
        ids for p in prefixes if os.stat(f"{p}.bin").st_size for ids in read_with_megatron_core(p)
    ]
    assert read_with_megatron_core(tmp_path / "new" / "ours") == expected


def test_manifests_are_added_up(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / name, [[1, 2], [3, 4, 5]]) for name in "abc"]
    rest = replace(PART, inputs=(replace(PART.inputs[0], start=6, end=10),))
    other = replace(PART, domain="b", inputs=(replace(PART.inputs[0], hash="i"),))
    for prefix, manifest in zip(prefixes, (PART, rest, other), strict=True):
        write_manifest(prefix, manifest)
    merge(prefixes[:2], str(tmp_path / "two"))
    found = read_manifest(str(tmp_path / "two"))
    whole = (replace(PART.inputs[0], end=10),)
    doubled = {"documents": 4, "sequences": 4, "tokens": 10, "text_bytes": 14}
    assert found == replace(PART, inputs=whole, **doubled)
    merge(prefixes, str(tmp_path / "three"))
    found = read_manifest(str(tmp_path / "three"))
    assert found is not None
    assert (found.domain, found.tokens, len(found.inputs)) == (None, 15, 2)
    (tmp_path / "b.json").unlink()
    merge(prefixes, str(tmp_path / "three"))
    assert read_manifest(str(tmp_path / "three")) is None, "no manifest is better than a wrong one"


@pytest.mark.parametrize(
    ("field", "value"), [("tokenizer_hash", "other"), ("vocab_size", 999), ("append_eod", False)]
)
def test_what_was_made_differently_is_refused(tmp_path: Path, field: str, value: object) -> None:
    prefixes = [write(tmp_path / name, [[1]]) for name in "ab"]
    write_manifest(prefixes[0], PART)
    write_manifest(prefixes[1], replace(PART, **{field: value}))
    with pytest.raises(UsageError, match=rf"{field} of .*b must be .* as in .*a \(got {value!r}\)"):
        merge(prefixes, str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_other_types_and_damage_are_refused(tmp_path: Path) -> None:
    small, large = write(tmp_path / "a", [[1]]), write(tmp_path / "b", [[1]], 70000)
    with pytest.raises(
        UsageError, match=r"token type of .*b must be uint16, as in .*a \(got 'int32'\)"
    ):
        merge([small, large], str(tmp_path / "out"))
    for prefix, cut in ((write(tmp_path / "c", [[1, 2, 3]]), 2), (write(tmp_path / "d", [[1]]), 0)):
        os.truncate(f"{prefix}.bin", cut)
        with pytest.raises(UsageError, match=r"size of .*\.bin must be .* \(got \d+\)"):
            merge([small, prefix], str(tmp_path / "out"))
    with pytest.raises(
        UsageError, match=r"--input must be the prefix of a readable pair .*got '/no/such'"
    ):
        merge([small, "/no/such"], str(tmp_path / "out"))
    with pytest.raises(
        UsageError, match="--output-prefix must be different from the prefix of every part"
    ):
        merge([small], str(tmp_path / "." / "a"))
    with pytest.raises(UsageError, match=r"--input must be one or more datasets \(got \[\]\)"):
        merge([], str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_leaves_the_old(tmp_path: Path) -> None:
    prefixes = [write(tmp_path / name, [[1] * 600]) for name in "ab"]
    write(tmp_path / "out", [[9, 9]])
    before = files(tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(
            UsageError, match="--output-prefix must be a writable path with free space"
        ):
            merge(prefixes, str(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path / "out") == before
    assert not list(tmp_path.glob("*.partial-*"))


def test_a_merge_stopped_between_the_renames_leaves_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes = [write(tmp_path / name, [[1] * 600]) for name in "ab"]
    write(tmp_path / "out", [[9, 9]])
    write_manifest(str(tmp_path / "out"), PART)
    real, calls = os.replace, []

    def once(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        merge(prefixes, str(tmp_path / "out"))
    assert [path.name for path in tmp_path.glob("out*")] == ["out.bin"]


def test_offsets_pass_two_to_the_31(tmp_path: Path) -> None:
    """Sparse files of 1.5 GB: the offsets of the second begin past 2^31 / 2 ids."""
    for name in "ab":
        with IndexedWriter(str(tmp_path / name), 1000) as writer:
            writer.add_document([1])
        lengths, size = 3 * 2**28, 3 * 2**29
        index = bytearray((tmp_path / f"{name}.idx").read_bytes())
        index[34:38] = lengths.to_bytes(4, "little")
        (tmp_path / f"{name}.idx").write_bytes(index)
        os.truncate(tmp_path / f"{name}.bin", size)
    stacked = [module._open_part(str(tmp_path / name)) for name in "ab"]
    with (tmp_path / "out.idx").open("wb") as stream:
        module._write_index(stacked, stream)
    found = np.fromfile(tmp_path / "out.idx", "<i8", 2, offset=34 + 8)
    assert found.tolist() == [0, 3 * 2**29]

"""The layout of the index: the example of the module, and reading in pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_moe.data.indexed.check import inspect_source
from megatron_moe.data.indexed.format import (
    HEADER,
    bounds_position,
    index_size,
    offsets_position,
    read_chunks,
)
from tests.data.corpus import write


def test_the_example_of_the_layout(tmp_path: Path) -> None:
    write(tmp_path / "x", [[5, 6], [], [7]])
    path = tmp_path / "x.idx"
    assert path.stat().st_size == index_size(2, 4)
    sections = (
        (HEADER.size, "<i4", [2, 1]),
        (offsets_position(2), "<i8", [0, 4]),
        (bounds_position(2), "<i8", [0, 1, 1, 2]),
    )
    for position, dtype, values in sections:
        assert np.fromfile(path, dtype, len(values), offset=position).tolist() == values


def test_places_in_a_source(tmp_path: Path) -> None:
    """Empty documents contain no sequence and no token."""
    write(tmp_path / "x", [[], [5, 6], [], [], [7], []])
    source = inspect_source(str(tmp_path / "x"))
    assert source.document_bounds().tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert source.token_ids().tolist() == [5, 6, 7]
    assert [source.document_of_sequence(n) for n in range(2)] == [1, 4]
    assert [source.document_of_token(n) for n in range(3)] == [1, 1, 4]


def test_chunks_are_the_array(tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    values = np.arange(10, dtype="<i8")
    Path(path).write_bytes(b"head" + values.tobytes() + b"tail" * 200)
    for chunk in (1, 3, 10, 99):
        found = list(read_chunks(path, "<i8", 4, 10, chunk))
        assert [first for first, _ in found] == list(range(0, 10, chunk))
        assert np.concatenate([piece for _, piece in found]).tolist() == values.tolist()
    assert list(read_chunks(path, "<i8", 4, 0, 3)) == []

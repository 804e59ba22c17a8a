"""Trace files: what other programs read, what comes back, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import parquet

from megatron_moe.errors import UsageError
from megatron_moe.moe.trace import (
    COLUMNS,
    Trace,
    TraceAbout,
    file_name,
    read_step,
    read_trace,
    trace_files,
    traced_steps,
    write_trace,
)

ABOUT = TraceAbout(experts=300, topk=2, layers=(1, 3), data="abc", producer="test")


def some_rows(layer: int = 1, first: int = 0, count: int = 5) -> Trace:
    place = np.arange(first, first + count)
    return Trace(
        layer=np.full(count, layer, np.int16),
        step=np.full(count, 7, np.int64),
        sample=(place // 3).astype(np.int64),
        position=(place % 3).astype(np.int32),
        document=(place % 2).astype(np.int32),
        token_id=(1000 + place).astype(np.int32),
        experts=np.stack((place, place + 256), 1).astype(np.int16),
        probabilities=np.stack((place / 7, place / 9), 1).astype(np.float32),
        kept=np.stack((place % 2 == 0, place % 3 == 0), 1),
        domain=np.array([f"d{n % 2}" if n else "" for n in place], dtype=object),
    )


def assert_equal(found: Trace, expected: Trace) -> None:
    for name in COLUMNS:
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype, name
        assert np.array_equal(one, other), name


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / file_name(7)
    write_trace(path, some_rows(), ABOUT)
    found, about = read_trace(path)
    assert about == ABOUT
    assert_equal(found, some_rows())
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no scratch file is left"


def test_other_programs_read_plain_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_trace(path, some_rows(), ABOUT)
    table = parquet.read_table(path)
    rows = table.to_pylist()
    assert rows[2] == {
        "layer": 1,
        "step": 7,
        "sample": 0,
        "position": 2,
        "document": 0,
        "token_id": 1002,
        "experts": [2, 258],
        "probabilities": [pytest.approx(2 / 7), pytest.approx(2 / 9)],
        "kept": [True, False],
        "domain": "d0",
    }
    frame = pandas.read_parquet(path)
    assert list(frame.columns) == list(COLUMNS)
    assert frame["experts"][4].tolist() == [4, 260]
    about = json.loads(table.schema.metadata[b"routing_trace"])
    assert about["format_version"] == 1
    assert about["layers"] == [1, 3]


def test_the_document_lists_every_column() -> None:
    text = (Path(__file__).parents[2] / "docs" / "routing_trace.md").read_text()
    for name, kind in COLUMNS.items():
        assert f"| `{name}` | `{kind.replace('float', 'float32')}` |" in text, name


def test_files_of_a_step_are_sorted_together(tmp_path: Path) -> None:
    about = replace(ABOUT, files=3)
    for index, (layer, first) in enumerate(((3, 0), (1, 5), (1, 0))):
        write_trace(tmp_path / file_name(7, index, 3), some_rows(layer, first), about)
    found, _ = read_step(tmp_path, 7)
    whole = [some_rows(1, 0, 10), some_rows(3, 0, 5)]
    assert_equal(found, Trace.concatenate(whole))
    assert_equal(read_step(tmp_path, 7, layers=[3])[0], whole[1])
    assert traced_steps(tmp_path) == [7]
    trace_files(tmp_path, 7)[1].unlink()
    with pytest.raises(UsageError, match=r"files of step 7 .* must be 3, all of its trace"):
        read_step(tmp_path, 7)


def test_a_trace_without_rows_has_its_columns(tmp_path: Path) -> None:
    path = tmp_path / file_name(1)
    write_trace(path, some_rows(count=0), ABOUT)
    assert len(read_trace(path)[0]) == 0
    assert parquet.read_schema(path).names == list(COLUMNS)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(UsageError, match="an existing file"):
        read_trace(path)
    path.write_bytes(b"PAR1 and something else")
    with pytest.raises(UsageError, match="a readable trace"):
        read_trace(path)
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(UsageError, match="other Parquet"):
        read_trace(path)
    write_trace(path, some_rows(), replace(ABOUT, format_version=2))
    with pytest.raises(UsageError, match=r"format version of .* must be 1"):
        read_trace(path)
    write_trace(path, some_rows(), ABOUT)
    table = parquet.read_table(path)
    parquet.write_table(table.drop_columns(["kept"]), path)
    with pytest.raises(UsageError, match="a readable trace"):
        read_trace(path)
    lists = pyarrow.array([[1], [2, 3], [4, 5], [6, 7], [8, 9]], pyarrow.list_(pyarrow.int16()))
    place = table.schema.get_field_index("experts")
    parquet.write_table(table.set_column(place, table.schema.field("experts"), lists), path)
    with pytest.raises(UsageError, match="experts must have 2 entries in each row"):
        read_trace(path)
    one, other = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write_trace(one, some_rows(), ABOUT)
    write_trace(other, some_rows(), replace(ABOUT, experts=8))
    with pytest.raises(UsageError, match=f"of the model of {one}"):
        read_trace([one, other])


def test_a_file_that_cannot_be_completed_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    broken = replace(some_rows(), domain=np.array([1, "a", 2, 3, 4], dtype=object))
    with pytest.raises(pyarrow.ArrowException):
        write_trace(path, broken, ABOUT)
    assert list(tmp_path.iterdir()) == []

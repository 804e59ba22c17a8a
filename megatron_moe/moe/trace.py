"""Routing traces: every choice of every token, as Parquet that any program can read.

A row is one token in one MoE layer. Columns and metadata are documented in docs/routing_trace.md,
and defined here alone: training writes traces of chosen steps, the analysis those of a checkpoint,
and `replay` forces their choices.

Shapes: N rows of a trace, K choices.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.errors import UsageError

FORMAT_VERSION = 1
METADATA = b"routing_trace"
"""Key of the metadata in the schema of a file; its value is the JSON of a `TraceAbout`."""
COLUMNS = {
    "layer": "int16",
    "step": "int64",
    "sample": "int64",
    "position": "int32",
    "document": "int32",
    "token_id": "int32",
    "experts": "list<int16>",
    "probabilities": "list<float>",
    "kept": "list<bool>",
    "domain": "string",
}
"""Names and Arrow types, in the order of a file; the lists have K entries, best choice first."""
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class TraceAbout:
    """What a trace is of; the same in all files of a step.

    Args:
        experts: E of each MoE layer, or the most of any.
        topk: K.
        layers: 0-based numbers of the MoE layers of the whole model.
        data: hash of the data; empty if there is none.
        producer: program and version.
        files: files of each step; a step with fewer is incomplete.
        format_version: of the columns.
    """

    experts: int
    topk: int
    layers: tuple[int, ...]
    data: str
    producer: str
    files: int = 1
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Rows of a trace.

    Args:
        layer: [N] 0-based number of the layer.
        step: [N] training step, from 1; of a checkpoint, its completed steps.
        sample: [N] number of the sequence, from 0: in the order of training, or of the analysis.
        position: [N] place in the sequence, from 0.
        document: [N] document of the sequence, from 0, within which attention stays; 0 where a
            sequence is one document to the model. In traces of the analysis, of the text.
        token_id: [N] input id.
        experts: [N, K] choices, best first.
        probabilities: [N, K] their probabilities by the softmax over all E experts; of other
            families, scores by their rule.
        kept: [N, K] whether an expert computed the choice.
        domain: [N] name of the source's domain; empty if it has none.
    """

    layer: Array
    step: Array
    sample: Array
    position: Array
    document: Array
    token_id: Array
    experts: Array
    probabilities: Array
    kept: Array
    domain: Array

    def __len__(self) -> int:
        return len(self.layer)

    def select(self, index: Any) -> Trace:
        """Some rows, or all of them in another order."""
        return Trace(**{name: getattr(self, name)[index] for name in COLUMNS})

    def sorted(self) -> Trace:
        """By layer, sequence and position: the order that does not depend on a layout."""
        return self.select(np.lexsort((self.position, self.sample, self.layer)))

    @classmethod
    def concatenate(cls, parts: Sequence[Trace]) -> Trace:
        """The rows of all parts, in their order; at least one part."""
        return cls(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in COLUMNS})


def require_pyarrow(flag: str, value: str) -> None:
    """Check that the library that reads and writes Parquet is installed.

    Raises:
        UsageError: it is not.
    """
    _arrow(flag, value)


def _arrow(flag: str, value: str) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        fix = "pip install 'megatron-moe[data]', or pip install pyarrow"
        raise UsageError(flag, value, "used with pyarrow installed", fix) from None
    return pyarrow, parquet


def file_name(step: int, index: int = 0, files: int = 1) -> str:
    """Name of one of the files of a step."""
    return f"step-{step:08d}-part-{index:05d}-of-{files:05d}.parquet"


def trace_files(directory: str | Path, step: int) -> list[Path]:
    """The files of a step, in order; none if there is no trace of it."""
    return sorted(Path(directory).glob(f"step-{step:08d}-part-*-of-*.parquet"))


def traced_steps(directory: str | Path) -> list[int]:
    """The steps that a directory has traces of."""
    names = [path.name.split("-")[1] for path in Path(directory).glob("step-*-part-*.parquet")]
    return sorted({int(name) for name in names if name.isdigit()})


def write_trace(path: Path, trace: Trace, about: TraceAbout) -> None:
    """Write one file; a reader sees all of it or none.

    Raises:
        OSError: it cannot be written.
    """
    pyarrow, parquet = _arrow("routing trace", str(path))
    scratch = path.with_name(path.name + ".tmp")
    try:
        parquet.write_table(_table(pyarrow, trace, about), scratch)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _table(pyarrow: Any, trace: Trace, about: TraceAbout) -> Any:
    schema = trace_schema(about)
    offsets = np.arange(len(trace) + 1, dtype=np.int32) * about.topk
    arrays = []
    for field in schema:
        values = getattr(trace, field.name)
        if pyarrow.types.is_list(field.type):
            flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1), field.type.value_type)
            arrays.append(pyarrow.ListArray.from_arrays(pyarrow.array(offsets), flat, field.type))
        else:
            arrays.append(pyarrow.array(values, field.type))
    return pyarrow.Table.from_arrays(arrays, schema=schema)


def trace_schema(about: TraceAbout) -> Any:
    """The Arrow schema of a file: `COLUMNS`, none of them null, and the metadata."""
    pyarrow, _ = _arrow("routing trace", "a schema")
    kinds = {
        "list<int16>": pyarrow.list_(pyarrow.int16()),
        "list<float>": pyarrow.list_(pyarrow.float32()),
        "list<bool>": pyarrow.list_(pyarrow.bool_()),
        "string": pyarrow.string(),
    }
    columns = [
        pyarrow.field(name, kinds[kind] if kind in kinds else pyarrow.type_for_alias(kind), False)
        for name, kind in COLUMNS.items()
    ]
    return pyarrow.schema(columns, metadata={METADATA: json.dumps(asdict(about))})


def read_trace(
    paths: str | Path | Iterable[Path], layers: Iterable[int] | None = None
) -> tuple[Trace, TraceAbout]:
    """Read files of a trace, sorted by layer, sequence and position.

    Args:
        paths: one file, or all files of one or several steps.
        layers: the layers to read; `None` for all.

    Raises:
        UsageError: a file is missing, no Parquet, no trace, of another format or model.
    """
    files = [Path(paths)] if isinstance(paths, str | Path) else sorted(paths)
    if not files:
        raise UsageError("routing trace", "no files", "at least one file")
    read = [_read_file(path, None if layers is None else list(layers)) for path in files]
    about = read[0][1]
    for path, (_, other) in zip(files, read, strict=True):
        if replace(other, files=about.files) != replace(about):
            raise UsageError(f"routing trace {path}", other, f"of the model of {files[0]}: {about}")
    return Trace.concatenate([part for part, _ in read]).sorted(), about


def read_step(
    directory: str | Path, step: int, layers: Iterable[int] | None = None
) -> tuple[Trace, TraceAbout]:
    """Read the trace of one step; see `read_trace`.

    Raises:
        UsageError: besides, some of its files are missing.
    """
    files = trace_files(directory, step)
    trace, about = read_trace(files, layers)
    if len(files) != about.files:
        what = f"files of step {step} in {directory}"
        raise UsageError(what, len(files), f"{about.files}, all of its trace")
    return trace, about


def read_about(path: Path) -> TraceAbout:
    """The metadata of a file, without its rows.

    Raises:
        UsageError: it does not exist, or is no trace.
    """
    with _readable(path) as parquet:
        return _about(path, parquet.read_schema(path).metadata or {})


def _read_file(path: Path, layers: list[int] | None) -> tuple[Trace, TraceAbout]:
    about = read_about(path)
    with _readable(path) as parquet:
        chosen = None if layers is None else [("layer", "in", layers)]
        table = parquet.read_table(path, columns=list(COLUMNS), filters=chosen)
        return _columns(table, about.topk), about


@contextmanager
def _readable(path: Path) -> Iterator[Any]:
    """The Parquet library; whatever it raises for a file is a usage error."""
    pyarrow, parquet = _arrow("routing trace", str(path))
    try:
        yield parquet
    except FileNotFoundError:
        raise UsageError("routing trace", path, "an existing file") from None
    except (pyarrow.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        found = " ".join(str(error).split())[:200]
        raise UsageError(f"routing trace {path}", found, "a readable trace") from None


def _about(path: Path, metadata: dict[bytes, bytes]) -> TraceAbout:
    if METADATA not in metadata:
        raise UsageError(f"routing trace {path}", "other Parquet", "a trace, with its metadata")
    value = json.loads(metadata[METADATA])
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise UsageError(f"format version of {path}", version, str(FORMAT_VERSION))
    known = {field.name: value[field.name] for field in fields(TraceAbout)}
    return TraceAbout(**{**known, "layers": tuple(known["layers"])})


def _columns(table: Any, topk: int) -> Trace:
    found: dict[str, Array] = {}
    for name, kind in COLUMNS.items():
        column = table.column(name).combine_chunks()
        if str(column.type).replace("element: ", "").replace("item: ", "") != kind:
            raise ValueError(f"column {name} is {column.type}, not {kind}")
        if not kind.startswith("list"):
            found[name] = column.to_numpy(zero_copy_only=False)
            continue
        flat = column.flatten().to_numpy(zero_copy_only=False)
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        if (lengths != topk).any():
            raise ValueError(f"{name} must have {topk} entries in each row")
        found[name] = flat.reshape(len(column), topk)
    return Trace(**found)

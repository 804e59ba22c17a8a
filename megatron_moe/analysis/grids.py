"""Tables and plots that several analyses arrange alike: by layer, by expert, by domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.plot import Axis, Lines, Reference, Series
from megatron_moe.analysis.result import Result, Table

Array = npt.NDArray[Any]


def grid_table(
    name: str, about: str, axes: Mapping[str, Sequence[Any]], values: Mapping[str, Array]
) -> Table:
    """A row for each cell of a grid.

    Args:
        name: see `Table`.
        about: see `Table`.
        axes: the values of each axis by the name of its column, outermost first.
        values: arrays of the shape of the grid, by column.
    """
    shape = tuple(len(axis) for axis in axes.values())
    columns: dict[str, list[Any]] = {}
    for place, (column, axis) in enumerate(axes.items()):
        index = np.indices(shape, sparse=True)[place]
        numbers = np.broadcast_to(index, shape).ravel().tolist()
        columns[column] = [axis[i] for i in numbers]
    for column, array in values.items():
        if array.shape != shape:
            raise ValueError(f"{column} of table {name} is {array.shape}, expected {shape}")
        columns[column] = array.ravel().tolist()
    return Table(name=name, about=about, columns=columns)


def series_name(name: str, label: str, results: Mapping[str, Result]) -> str:
    """Name of a series; the checkpoint is added where there are several."""
    return name if len(results) == 1 else f"{label}: {name}"


def figure_key(key: str, label: str, results: Mapping[str, Result]) -> str:
    """Key of a figure of one checkpoint."""
    return key if len(results) == 1 else f"{key}-{label}"


def figure_title(title: str, label: str, results: Mapping[str, Result]) -> str:
    """Title of a figure of one checkpoint."""
    return title if len(results) == 1 else f"{title}, {label}"


def layer_lines(
    results: Mapping[str, Result],
    solid: Mapping[str, str],
    dashed: Mapping[str, str],
    y: Axis,
    *,
    factor: float = 1.0,
    references: Sequence[Reference] = (),
) -> Lines:
    """Values by layer, of all checkpoints.

    Args:
        results: by label; the array `layers` has the x-axis, others are found by name.
        solid: array of each series, by its name; [L], drawn times ``factor``.
        dashed: the same, of secondary series.
        y: the axis.
        factor: 100 for percent.
        references: constant lines.
    """
    series = [
        Series(
            name=series_name(name, label, results),
            x=result.arrays["layers"],
            y=factor * result.arrays[array],
            dashed=parts is dashed,
            group=label,
        )
        for label, result in results.items()
        for parts in (solid, dashed)
        for name, array in parts.items()
        if array in result.arrays
    ]
    return Lines(series=series, x=Axis(title="layer"), y=y, references=references, markers=True)


def mean_of(result: Result, array: str) -> float:
    """Mean over the layers of an array; NaN without values."""
    values = result.arrays[array]
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")

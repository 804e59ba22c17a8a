"""Tables and plots that analyses of weights share.

Shapes: L layers, P projections, R rows of a comparison, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.plot import Axis, Figure, Heatmap, Lines, Panel, Reference, Series
from megatron_moe.analysis.result import Result, Table
from megatron_moe.analysis.weights.statistics import largest_of, mean_of
from megatron_moe.analysis.weights.survey import WeightSurvey

PANELS = 12
"""Most layers that a plot with a panel for each layer shows."""
CELLS = 100_000
"""Most cells or points of such a plot, unless three layers have more."""
HIGH = 0.5
"""Share of the largest cosine from which on the smallest one has the other end of the colours."""
TITLES = {
    "up": "up projection",
    "gate": "gate projection",
    "down": "down projection",
    "linear": "linear projection",
    "router": "router",
    "joint": "all projections together",
}
"""In titles of plots."""


def shown_layers(layers: Sequence[int], cells: int) -> list[int]:
    """Places of the layers that have a panel: evenly spread, the first and the last among them.

    A report of a model with many layers and experts would have more cells than a browser draws;
    tables and arrays have all layers, and `--layers` chooses others.

    Args:
        layers: indices.
        cells: cells or points of one panel.
    """
    most = min(PANELS, max(3, CELLS // max(1, cells)), len(layers))
    if most == 1:
        return [0]
    return [round(place * (len(layers) - 1) / (most - 1)) for place in range(most)]


def layer_table(
    name: str,
    about: str,
    layers: Sequence[int],
    projections: Sequence[str],
    columns: Mapping[str, npt.NDArray[Any]],
) -> Table:
    """A row per layer and projection.

    Args:
        name: of the file.
        about: what a row is, and the units.
        layers: indices.
        projections: names.
        columns: values [L, P] by name.
    """
    count = len(projections)
    table: dict[str, list[Any]] = {
        "layer": [layer for layer in layers for _ in range(count)],
        "projection": list(projections) * len(layers),
    }
    table.update({key: values.ravel().tolist() for key, values in columns.items()})
    return Table(name=name, about=about, columns=table)


def similarity_maps(
    result: Result,
    *,
    key: str,
    title: str,
    values_LPRR: npt.NDArray[Any],
    names_LR: npt.NDArray[Any],
    projections: Sequence[str],
    caption: str,
) -> list[Figure]:
    """A figure per projection with a heat map per layer, expert x expert.

    The diagonal is left blank: it is 1, and would hide the other values. Each layer has a colour
    scale of its own that is symmetric around 0.

    Args:
        result: with the array `layers`.
        key: beginning of the figures' keys.
        title: beginning of their titles.
        values_LPRR: cosines.
        names_LR: labels of rows and columns.
        projections: P names.
        caption: what to look at.
    """
    figures = []
    for place, projection in enumerate(projections):
        panels: dict[str, Panel] = {}
        layers = result.arrays["layers"].tolist()
        for row in shown_layers(layers, values_LPRR.shape[-1] ** 2):
            shown = values_LPRR[row, place].copy()
            np.fill_diagonal(shown, np.nan)
            panels[f"layer {layers[row]}"] = similarity_map(shown, [str(n) for n in names_LR[row]])
        figures.append(
            Figure(
                key=f"{key}-{projection}",
                title=f"{title}, {TITLES[projection]}",
                panels=panels,
                caption=caption,
            )
        )
    return figures


def similarity_map(values_RR: npt.NDArray[Any], names: Sequence[str]) -> Heatmap:
    """A heat map of cosines whose colours are symmetric around 0, unless all are far above it."""
    known = values_RR[~np.isnan(values_RR)]
    largest = float(np.abs(known).max()) if known.size and known.any() else 1.0
    is_high = known.size > 0 and known.min() > HIGH * largest
    return Heatmap(
        values=values_RR,
        rows=names,
        columns=names,
        x=Axis(title="expert"),
        y=Axis(title="expert"),
        colour="cosine similarity",
        range=(float(known.min()), largest) if is_high else (-largest, largest),
        centre=None if is_high else 0.0,
    )


def layer_lines(
    results: Mapping[str, Result],
    *,
    key: str,
    title: str,
    y: str,
    values: str,
    chance: Mapping[str, str] | None = None,
    projections: str = "projections",
    references: Sequence[Reference] = (),
    caption: str = "",
    y_range: tuple[float, float] | None = None,
) -> Figure:
    """Lines over the layers: a panel per projection, a line per checkpoint, its chance dashed.

    Args:
        results: by label.
        key: of the figure.
        title: of the figure.
        y: title of the y-axis.
        values: name of an array [L, P].
        chance: names of further ones, and what they are called in the legend.
        projections: name of the array with the P names.
        references: constant lines.
        caption: what to look at.
        y_range: ends of the y-axis.
    """
    names = dict.fromkeys(str(n) for r in results.values() for n in r.arrays[projections])
    panels: dict[str, Panel] = {}
    for name in names:
        series = []
        for label, result in results.items():
            known = [str(n) for n in result.arrays[projections]]
            if name not in known:
                continue
            place, layers = known.index(name), result.arrays["layers"].tolist()
            found = result.arrays[values][:, place]
            series.append(Series(name=label, x=layers, y=found, group=label))
            for array, words in (chance or {}).items():
                null = result.arrays[array][:, place]
                dashed = f"{label}, {words}"
                series.append(Series(name=dashed, x=layers, y=null, group=label, dashed=True))
        panels[TITLES.get(name, name)] = Lines(
            series=series,
            x=Axis(title="layer"),
            y=Axis(title=y, range=y_range),
            references=references,
            markers=True,
        )
    return Figure(key=key, title=title, panels=panels, selector="projection", caption=caption)


def others_table(
    survey: WeightSurvey, cosine_LPRR: npt.NDArray[Any]
) -> tuple[Table, dict[str, float]]:
    """Similarity of the experts to the shared expert and to dense layers.

    Args:
        survey: the weights.
        cosine_LPRR: similarities; NaN where there is none.

    Returns:
        A table, and the mean for each kind of network.
    """
    columns: dict[str, list[Any]] = {
        name: [] for name in ("layer", "projection", "network", "mean", "largest")
    }
    kinds: dict[str, list[float]] = {}
    for place, layer in enumerate(survey.layers):
        for row, kind in enumerate(layer.kinds, survey.num_experts):
            for p, projection in enumerate(survey.projections):
                found_E = cosine_LPRR[place, p, row, : survey.num_experts]
                mean = mean_of(found_E)
                if np.isnan(mean):
                    continue
                cells = (layer.layer, projection, layer.names[row], mean, largest_of(found_E))
                for column, cell in zip(columns.values(), cells, strict=True):
                    column.append(cell)
                kinds.setdefault(kind, []).append(mean)
    titles = {
        "shared": "the shared expert",
        "dense": "the nearest dense layer",
        "beside": "a layer of the dense model",
    }
    about = "cosines of the experts of a layer with another network: mean and largest"
    return Table(name="others", about=about, columns=columns), {
        f"mean cosine with {titles[kind]}": float(np.mean(each)) for kind, each in kinds.items()
    }

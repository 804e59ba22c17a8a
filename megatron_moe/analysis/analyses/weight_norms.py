"""Norms of routers and experts, and how many different experts there are in effect.

Shapes: L layers, P projections, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.plot import Axis, Bars, Figure, Panel, Series
from megatron_moe.analysis.result import Result, Table
from megatron_moe.analysis.weights.figures import TITLES, layer_lines, layer_table, shown_layers
from megatron_moe.analysis.weights.reading import listed, sentence_for_each
from megatron_moe.analysis.weights.statistics import (
    Array,
    effective_rank,
    largest_of,
    mean_of,
    random_effective_rank,
)
from megatron_moe.analysis.weights.survey import LayerSurvey

ROUTER = "router"
ROUTER_SPREAD = "spread of the router's norms"
EXPERT_SPREAD = "spread of the experts' norms"
"""Headline numbers: standard deviation over mean, averaged over the layers."""
SMALLEST = "smallest effective rank over that of random weights"
"""A headline number."""
COLLAPSED = 0.5
"""Share of the effective rank of random weights below which experts count as collapsed."""


@register
class WeightNorms(Analysis):
    """See the module."""

    key = "weight-norms"
    title = "Norms, and the effective number of experts"
    question = "Are experts of equal size, and how many different ones are there in effect?"
    definition = (
        "Norm of each row of the router, and root mean square of the elements of each expert's "
        "matrices. The effective rank of the E matrices of a projection, or of the router's rows, "
        "each scaled to length 1, is exp(-sum p log p) with p the eigenvalues of their cosine "
        "matrix over E: 1 if all are equal, E if they are orthogonal. Chance: m exp(-m / (2 n)), "
        "with m the smaller and n the larger of E and the number of elements."
    )
    source = "Effective rank: Roy and Vetterli (2007); its chance level: Page (1993)"
    group = "weights"
    needs_data = False

    def compute(self, material: Material) -> Result:
        """Norms and effective ranks by layer."""
        survey = material.survey
        layers, experts = [layer.layer for layer in survey.layers], survey.num_experts
        kinds = (*survey.projections, ROUTER)
        size_LXE = np.array([_sizes(layer, survey.size) for layer in survey.layers])
        rank_LX = np.array([_ranks(layer) for layer in survey.layers])
        random_X = [random_effective_rank(experts, survey.size)] * len(survey.projections)
        random_X.append(random_effective_rank(experts, survey.hidden))
        chance_LX = np.tile(np.array(random_X), (len(layers), 1))
        spread_LX = _spread(size_LXE)
        columns = {
            "effective_rank": rank_LX,
            "random_effective_rank": chance_LX,
            "spread": spread_LX,
        }
        about = (
            "effective number of experts, for random weights of the same sizes too, and standard "
            "deviation of the experts' norms over their mean"
        )
        ranks = {f"effective rank, {k}": mean_of(rank_LX[:, x]) for x, k in enumerate(kinds)}
        return Result(
            analysis=self.key,
            numbers={
                "experts": float(experts),
                **ranks,
                "effective rank of random experts": random_X[0],
                "effective rank of a random router": random_X[-1],
                SMALLEST: -largest_of(-rank_LX / chance_LX),
                ROUTER_SPREAD: mean_of(spread_LX[:, -1]),
                EXPERT_SPREAD: mean_of(spread_LX[:, :-1]),
            },
            tables=[
                layer_table("effective_rank", about, layers, kinds, columns),
                _norm_table(layers, kinds, size_LXE),
            ],
            arrays={
                "layers": np.array(layers),
                "kinds": np.array(kinds),
                "size_LXE": size_LXE,
                "rank_LX": rank_LX,
                "chance_LX": chance_LX,
                "spread_LX": spread_LX,
            },
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Effective ranks and spreads over depth; norms of each expert."""
        found = [
            layer_lines(
                results,
                key="effective-rank",
                title="Effective number of experts",
                y="effective rank",
                values="rank_LX",
                chance={"chance_LX": "random weights"},
                projections="kinds",
                caption="Dashed: random weights of the same sizes. 1 means that all are equal.",
            ),
            layer_lines(
                results,
                key="spread-of-norms",
                title="How unequal the norms of experts are",
                y="standard deviation over mean",
                values="spread_LX",
                projections="kinds",
                caption="0 means that all experts have the same norm.",
            ),
        ]
        return found + [_bars(results, x, str(kind)) for x, kind in _kinds(results)]

    def reading(self, results: Mapping[str, Result]) -> str:
        """Whether experts have collapsed."""
        return sentence_for_each({label: _reading(result) for label, result in results.items()})


def _sizes(layer: LayerSurvey, elements: int) -> list[Array]:
    """Of the experts: root mean squares of each projection, norms of the router's rows."""
    squares = [np.diag(each.gram_RR)[: layer.num_experts] for each in layer.projections.values()]
    return [
        *(np.sqrt(square_E / elements) for square_E in squares),
        np.sqrt(np.diag(layer.router_gram_EE)),
    ]


def _ranks(layer: LayerSurvey) -> list[float]:
    """Effective rank of each projection and of the router."""
    experts = slice(layer.num_experts)
    grams = [each.gram_RR[experts, experts] for each in layer.projections.values()]
    return [effective_rank(gram) for gram in (*grams, layer.router_gram_EE)]


def _spread(size_LXE: Array) -> Array:
    mean_LX = size_LXE.mean(2)
    found: Array = size_LXE.std(2) / np.where(mean_LX > 0, mean_LX, np.nan)
    return found


def _norm_table(layers: Sequence[int], kinds: Sequence[str], size_LXE: Array) -> Table:
    experts = size_LXE.shape[2]
    columns = {
        "layer": np.repeat(layers, len(kinds) * experts).tolist(),
        "weights": np.tile(np.repeat(kinds, experts), len(layers)).tolist(),
        "expert": np.tile(np.arange(experts), len(layers) * len(kinds)).tolist(),
        "size": size_LXE.ravel().tolist(),
    }
    about = "norm of the expert's row in the router; root mean square of its matrices' elements"
    return Table(name="norms", about=about, columns=columns)


def _kinds(results: Mapping[str, Result]) -> list[tuple[int, str]]:
    """The kinds of weights of the first checkpoint with most of them, with their places."""
    most = max(results.values(), key=lambda result: len(result.arrays["kinds"]))
    return list(enumerate(most.arrays["kinds"].tolist()))


def _bars(results: Mapping[str, Result], x: int, kind: str) -> Figure:
    layers = sorted({int(n) for r in results.values() for n in r.arrays["layers"]})
    panels: dict[str, Panel] = {}
    for layer in (layers[place] for place in shown_layers(layers, 1)):
        series = []
        for label, result in results.items():
            kinds, own = result.arrays["kinds"].tolist(), result.arrays["layers"].tolist()
            if kind in kinds and layer in own:
                size_E = result.arrays["size_LXE"][own.index(layer), kinds.index(kind)]
                experts = list(range(len(size_E)))
                series.append(Series(name=label, x=experts, y=size_E, group=label))
        y = "norm of the row" if kind == ROUTER else "root mean square of the elements"
        panels[f"layer {layer}"] = Bars(series=series, x=Axis(title="expert"), y=Axis(title=y))
    title = "Norms of the router's rows" if kind == ROUTER else f"Size of experts, {TITLES[kind]}"
    return Figure(key=f"norms-{kind}", title=title, panels=panels)


def _reading(result: Result) -> str:
    numbers = result.numbers
    smallest = numbers[SMALLEST]
    if math.isnan(smallest):
        return "An expert consists of zeros, so there is no effective number of experts."
    ranks = listed(numbers, "effective rank, ", ".1f")
    state = (
        "no sign of collapse"
        if smallest > 0.9
        else "experts have collapsed in part"
        if smallest < COLLAPSED
        else "some experts resemble each other"
    )
    return (
        f"Of {numbers['experts']:.0f} experts there are in effect, by their weights: {ranks}; the "
        f"least in any layer is {smallest:.0%} of random weights: {state}. Norms differ by "
        f"{numbers[ROUTER_SPREAD]:.0%} in the router and by "
        f"{numbers[EXPERT_SPREAD]:.0%} between experts."
    )

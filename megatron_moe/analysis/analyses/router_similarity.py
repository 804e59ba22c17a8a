"""Whether experts that the router treats alike have similar weights.

Shapes: L layers, P projections, E experts, N pairs of experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.plot import Axis, Figure, Panel, Scatter, Series
from megatron_moe.analysis.result import Result
from megatron_moe.analysis.weights.figures import (
    TITLES,
    layer_lines,
    layer_table,
    shown_layers,
    similarity_map,
)
from megatron_moe.analysis.weights.reading import listed, sentence_for_each
from megatron_moe.analysis.weights.statistics import (
    combined_p_value,
    cosines,
    mantel,
    mean_of,
)

LEVEL = 0.05
"""p-value below which router and experts count as associated."""
PAIRS = 1000
"""Most pairs of experts of a layer in a scatter plot."""
COMBINED = "p-value of all layers, "
"""Headline numbers: Fisher's, for one projection."""


@register
class RouterSimilarity(Analysis):
    """See the module."""

    key = "router-experts"
    title = "Router and experts"
    question = "Do experts with similar rows in the router have similar neurons?"
    definition = (
        "Pearson's r between two similarities of the pairs of experts of a layer: the cosine of "
        "their rows in the router, and the cosine of their average neurons. Chance: r^2 and its "
        "p-value when the experts of one side are named at random (Mantel's test); r^2 is then "
        "about 1 / (pairs - 1). Fisher's method combines the p-values of the layers."
    )
    source = "Lo et al., A Closer Look into Mixture-of-Experts (arXiv 2406.18219), section 3.3"
    group = "weights"
    needs_data = False

    def compute(self, material: Material) -> Result:
        """Correlations by layer and projection."""
        survey = material.survey
        names, layers = survey.projections, [layer.layer for layer in survey.layers]
        generator = np.random.default_rng(material.setting.seed)
        experts = survey.num_experts
        router_LEE = np.array([cosines(layer.router_gram_EE) for layer in survey.layers])
        mean_LPEE = np.array(
            [
                [cosines(each.mean_gram_RR)[:experts, :experts] for each in la.projections.values()]
                for la in survey.layers
            ]
        )
        found_LPX = np.array(
            [
                [mantel(router_EE, mean_EE, material.draws, generator) for mean_EE in mean_PEE]
                for router_EE, mean_PEE in zip(router_LEE, mean_LPEE, strict=True)
            ]
        )
        r_LP, p_LP, null_LP = (found_LPX[:, :, i] for i in range(3))
        columns = {"r": r_LP, "r_squared": r_LP**2, "p_value": p_LP, "r_squared_chance": null_LP}
        about = "Pearson's r over the pairs of experts, with Mantel's p-value, and r^2 by chance"
        squares = {f"mean r^2, {n}": mean_of(r_LP[:, p] ** 2) for p, n in enumerate(names)}
        significant = {
            f"{COMBINED}{name}": combined_p_value(p_LP[:, p]) for p, name in enumerate(names)
        }
        return Result(
            analysis=self.key,
            numbers={**squares, "mean r^2 by chance": mean_of(null_LP), **significant},
            tables=[layer_table("correlation", about, layers, names, columns)],
            arrays={
                "layers": np.array(layers),
                "projections": np.array(names),
                "router_LEE": router_LEE,
                "mean_LPEE": mean_LPEE,
                "r_LP": r_LP,
                "square_LP": r_LP**2,
                "chance_LP": null_LP,
            },
            notes=_notes(experts, material.draws),
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """r^2 over depth; the pairs of each layer; heat maps of the router's rows."""
        found = [
            layer_lines(
                results,
                key="router-experts-by-layer",
                title="Agreement of router and experts",
                y="squared correlation r^2",
                values="square_LP",
                chance={"chance_LP": "by chance"},
                caption="Dashed: the mean over random names of the experts.",
            )
        ]
        for label, result in results.items():
            found += [self._scatter(label, result), self._map(label, result)]
        return found

    def _scatter(self, label: str, result: Result) -> Figure:
        names = [str(name) for name in result.arrays["projections"]]
        panels: dict[str, Panel] = {}
        layers, experts = result.arrays["layers"].tolist(), result.arrays["router_LEE"].shape[1]
        rows, columns = np.triu_indices(experts, 1)
        # Evenly spread, without a pattern that repeats with the experts.
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), PAIRS)).astype(int))
        rows, columns = rows[chosen], columns[chosen]
        texts = [f"experts {i} and {j}" for i, j in zip(rows, columns, strict=True)]
        for place in shown_layers(layers, len(rows) * len(names)):
            router_EE = result.arrays["router_LEE"][place]
            series = [
                Series(
                    name=name,
                    x=router_EE[rows, columns],
                    y=result.arrays["mean_LPEE"][place, p][rows, columns],
                    text=texts,
                )
                for p, name in enumerate(names)
            ]
            panels[f"layer {layers[place]}"] = Scatter(
                series=series,
                x=Axis(title="cosine of rows in the router"),
                y=Axis(title="cosine of average neurons"),
            )
        return Figure(
            key=f"router-experts-{label}",
            title=f"Pairs of experts in router and weights, {label}",
            panels=panels,
            caption="Each point is a pair of experts. A slope means that the router and the "
            "neurons draw the same distinctions; the table `correlation` has r of each layer."
            + (f" {PAIRS} of the pairs, evenly spread." if len(rows) == PAIRS else ""),
        )

    def _map(self, label: str, result: Result) -> Figure:
        layers, router_LEE = result.arrays["layers"].tolist(), result.arrays["router_LEE"]
        panels: dict[str, Panel] = {}
        for place in shown_layers(layers, router_LEE[0].size):
            shown = router_LEE[place].copy()
            np.fill_diagonal(shown, np.nan)
            names = [str(e) for e in range(len(shown))]
            panels[f"layer {layers[place]}"] = similarity_map(shown, names)
        return Figure(
            key=f"router-rows-{label}",
            title=f"Similarity of the router's rows, {label}",
            panels=panels,
        )

    def reading(self, results: Mapping[str, Result]) -> str:
        """Which projection goes with the router, and whether more than by chance."""
        return sentence_for_each({label: _reading(result) for label, result in results.items()})


def _notes(experts: int, draws: int) -> list[str]:
    pairs = experts * (experts - 1) // 2
    if pairs < 3:
        return [f"{experts} experts have {pairs} pairs; a correlation needs 3."]
    notes = [f"The smallest p-value that {draws} permutations can show is {1 / (1 + draws):.2g}."]
    orders = math.factorial(experts)
    if orders < 1 / LEVEL:
        notes.append(
            f"{experts} experts have only {orders} orders, so no p-value is below {LEVEL}."
        )
    return notes


def _reading(result: Result) -> str:
    prefix, chance = "mean r^2, ", result.numbers["mean r^2 by chance"]
    squares = {k[len(prefix) :]: v for k, v in result.numbers.items() if k.startswith(prefix)}
    if all(math.isnan(value) for value in squares.values()):
        return "There are too few experts for a correlation."
    values = listed(result.numbers, prefix)
    p_values = {name: result.numbers[f"{COMBINED}{name}"] for name in squares}
    # The best of several projections is looked for.
    found = {k: len(squares) * v for k, v in p_values.items() if len(squares) * v < LEVEL}
    if not found:
        return (
            f"The router's rows do not go with the experts' neurons (r^2: {values}; by chance "
            f"{chance:.2f}): no association as in the paper shows here."
        )
    best = max(found, key=lambda name: squares[name])
    place = result.arrays["projections"].tolist().index(best)
    alike = mean_of(result.arrays["r_LP"][:, place]) > 0
    return (
        f"Experts with similar rows in the router have {'similar' if alike else 'different'} "
        f"neurons, most of all in the {TITLES[best]} (r^2: {values}; by chance {chance:.2f}; "
        f"p = {found[best]:.1g}): "
        + ("as in the paper, which concludes" if alike else "unlike in the paper, which concludes")
        + " that neurons act like fine-grained experts."
    )

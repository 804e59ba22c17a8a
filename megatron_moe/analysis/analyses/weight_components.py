"""Principal components of the experts' matrices, and of their neurons.

Shapes: L layers, P projections, E experts, G sampled neurons of an expert, C components.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.plot import Axis, Figure, Panel, Scatter, Series
from megatron_moe.analysis.result import Result
from megatron_moe.analysis.weights.figures import TITLES, layer_lines, layer_table, shown_layers
from megatron_moe.analysis.weights.reading import sentence_for_each
from megatron_moe.analysis.weights.statistics import Array, mean_of, random_first_share


@register
class WeightComponents(Analysis):
    """See the module."""

    key = "components"
    title = "Principal components of weights"
    question = "Do the experts of a layer form groups, and do neurons cluster by expert?"
    definition = (
        "Principal components of the E matrices of a layer, from their inner products (E x E), and "
        "of a sample of neurons, equally many of each expert. Chance: E random matrices have E - 1 "
        "components of equal variance; of n random neurons with H elements, the first component "
        "has a share of (1 + sqrt(H / (n - 1)))^2 / H."
    )
    source = "Lo et al., A Closer Look into Mixture-of-Experts (arXiv 2406.18219), appendix"
    group = "weights"
    needs_data = False

    def compute(self, material: Material) -> Result:
        """Coordinates and shares of variance by layer and projection."""
        survey = material.survey
        names, layers = survey.projections, [layer.layer for layer in survey.layers]
        experts = survey.num_experts
        found = [list(layer.projections.values()) for layer in survey.layers]
        matrices_LPEC = np.array([[each.matrices_EC for each in layer] for layer in found])
        neurons_LPEGC = np.array([[each.neurons_EGC for each in layer] for layer in found])
        first_LP = np.array([[_first(each.matrices_share) for each in layer] for layer in found])
        neurons_LP = np.array([[_first(each.neurons_share) for each in layer] for layer in found])
        count = experts * neurons_LPEGC.shape[3]
        chance = 1 / (experts - 1) if experts > 1 else math.nan
        neurons_chance = random_first_share(count, survey.hidden)
        between_LP = _between(neurons_LPEGC)
        columns = {
            "matrices_first": first_LP,
            "matrices_first_chance": np.full_like(first_LP, chance),
            "neurons_first": neurons_LP,
            "neurons_first_chance": np.full_like(neurons_LP, neurons_chance),
            "neurons_between_experts": between_LP,
        }
        about = (
            "share of the variance of the first component, of matrices and of neurons, and by "
            "chance; share of the variance of neurons in the plane of the first two components "
            "that lies between the experts"
        )
        bound = f"Components of neurons are those of {count} neurons of a layer"
        return Result(
            analysis=self.key,
            numbers={
                "mean share of the first component of matrices": mean_of(first_LP),
                "share for random matrices": chance,
                "mean share of the first component of neurons": mean_of(neurons_LP),
                "share for random neurons": neurons_chance,
                "mean share of neurons' variance between experts": mean_of(between_LP),
                "share between experts for random neurons": (experts - 1) / max(1, count - 1),
            },
            tables=[layer_table("components", about, layers, names, columns)],
            arrays={
                "layers": np.array(layers),
                "projections": np.array(names),
                "matrices_LPEC": matrices_LPEC,
                "neurons_LPEGC": neurons_LPEGC,
                "matrices_first_LP": first_LP,
                "matrices_chance_LP": columns["matrices_first_chance"],
                "neurons_first_LP": neurons_LP,
                "neurons_chance_LP": columns["neurons_first_chance"],
            },
            notes=[f"{bound}, {count // experts} of {survey.width} of each expert."],
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Scatter plots of matrices and neurons; shares over depth."""
        found = [
            layer_lines(
                results,
                key=f"components-{kind}-by-layer",
                title=f"First component of {kind}",
                y="share of the variance",
                values=f"{kind}_first_LP",
                chance={f"{kind}_chance_LP": "random weights"},
                caption="Dashed: random weights of the same sizes.",
            )
            for kind in ("matrices", "neurons")
        ]
        for label, result in results.items():
            for p, name in enumerate(result.arrays["projections"]):
                found += [
                    _matrices(label, result, p, str(name)),
                    _neurons(label, result, p, str(name)),
                ]
        return found

    def reading(self, results: Mapping[str, Result]) -> str:
        """Whether there are groups at all."""
        return sentence_for_each({label: _reading(result) for label, result in results.items()})


def _first(share: Array) -> float:
    return float(share[0]) if len(share) else math.nan


def _between(place_LPEGC: Array) -> Array:
    """Share of the variance of the first two components that is between the means of experts."""
    total_LP = place_LPEGC.reshape(*place_LPEGC.shape[:2], -1, place_LPEGC.shape[4]).var(2).sum(-1)
    between_LP = place_LPEGC.mean(3).var(2).sum(-1)
    found: Array = between_LP / np.where(total_LP > 0, total_LP, np.nan)
    return found


def _matrices(label: str, result: Result, p: int, name: str) -> Figure:
    panels: dict[str, Panel] = {}
    layers = result.arrays["layers"].tolist()
    for row in shown_layers(layers, result.arrays["matrices_LPEC"].shape[2]):
        place_EC = result.arrays["matrices_LPEC"][row, p]
        series = Series(
            name="experts",
            x=place_EC[:, 0],
            y=place_EC[:, 1],
            text=[f"expert {e}" for e in range(len(place_EC))],
            marks=[str(e) for e in range(len(place_EC))],
        )
        panels[f"layer {layers[row]}"] = _plane([series])
    return Figure(
        key=f"matrices-{label}-{name}",
        title=f"Components of the experts' matrices, {TITLES[name]}, {label}",
        panels=panels,
        caption="Each point is an expert. Random matrices are all at the same distance from each "
        "other, which no plane shows.",
    )


def _neurons(label: str, result: Result, p: int, name: str) -> Figure:
    panels: dict[str, Panel] = {}
    layers, (_, _, experts, count, _) = result.arrays["layers"].tolist(), _neurons_of(result).shape
    for row in shown_layers(layers, experts * count):
        place_EGC = _neurons_of(result)[row, p]
        panels[f"layer {layers[row]}"] = _plane(
            [
                Series(name=f"expert {e}", x=place_GC[:, 0], y=place_GC[:, 1])
                for e, place_GC in enumerate(place_EGC)
            ]
        )
    return Figure(
        key=f"neurons-{label}-{name}",
        title=f"Components of neurons, {TITLES[name]}, {label}",
        panels=panels,
        caption="Each point is a neuron, coloured by its expert.",
    )


def _neurons_of(result: Result) -> Array:
    return result.arrays["neurons_LPEGC"]


def _plane(series: Sequence[Series]) -> Scatter:
    first, second = Axis(title="first component"), Axis(title="second component")
    return Scatter(series=series, x=first, y=second)


def _reading(result: Result) -> str:
    numbers = result.numbers
    first, chance = (
        numbers["mean share of the first component of matrices"],
        numbers["share for random matrices"],
    )
    if math.isnan(chance):
        return "There are no two experts to compare."
    if first == 0:
        return "The experts are identical: their matrices do not vary."
    ratio = first / chance
    matrices = (
        f"The first component of the experts' matrices has {first:.0%} of their variance, "
        f"{chance:.0%} for random ones: "
        + ("experts form no groups." if ratio < 1.2 else f"{ratio:.1f} times as much.")
    )
    between = numbers["mean share of neurons' variance between experts"]
    expected = numbers["share between experts for random neurons"]
    mixed = between < max(0.1, 3 * expected)
    return (
        f"{matrices} Neurons of different experts "
        + ("are mixed: " if mixed else "lie apart: ")
        + f"{between:.0%} of their variance in the plane is between experts, {expected:.0%} if "
        "they were assigned at random."
    )

"""Cosine similarity of the experts' average neurons.

Shapes: L layers, P projections, R rows (experts, then other networks), E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.plot import Figure, Reference
from megatron_moe.analysis.result import Result
from megatron_moe.analysis.weights.figures import (
    layer_lines,
    layer_table,
    others_table,
    similarity_maps,
)
from megatron_moe.analysis.weights.reading import depth_trend, listed, sentence_for_each
from megatron_moe.analysis.weights.statistics import (
    cosines,
    largest_by_chance,
    largest_of,
    mean_of,
    over_pairs,
)

DEVIATION = "standard deviation for random vectors"
"""A headline number."""


@register
class NeuronAverages(Analysis):
    """See the module."""

    key = "averages"
    title = "Similarity of average neurons"
    question = "How similar are experts whatever the order of their neurons?"
    definition = (
        "cos(m_i, m_j) with m_e the mean over the neurons of expert e: of the rows of its up or "
        "gate projection, or of the columns of its down projection. Reordering neurons does not "
        "change it, and networks of other widths can be compared. Chance: random vectors of H "
        "elements have cosines of mean 0 and standard deviation 1/sqrt(H)."
    )
    source = "Lo et al., A Closer Look into Mixture-of-Experts (arXiv 2406.18219), section 3.2"
    group = "weights"
    needs_data = False

    def compute(self, material: Material) -> Result:
        """Similarities by layer and projection."""
        survey = material.survey
        names, layers = survey.projections, [layer.layer for layer in survey.layers]
        cosine_LPRR = np.array(
            [[cosines(p.mean_gram_RR) for p in la.projections.values()] for la in survey.layers]
        )
        experts = survey.num_experts
        expert_LPEE = cosine_LPRR[:, :, :experts, :experts]
        columns = {
            "mean": over_pairs(expert_LPEE, mean_of),
            "largest": over_pairs(expert_LPEE, largest_of),
        }
        about = "cosines of the average neurons of two experts of a layer: mean and largest"
        means = {f"mean cosine, {n}": mean_of(columns["mean"][:, p]) for p, n in enumerate(names)}
        others, others_means = others_table(survey, cosine_LPRR)
        count = expert_LPEE.size // experts * (experts - 1) // 2
        return Result(
            analysis=self.key,
            numbers={
                **means,
                "mean cosine": mean_of(columns["mean"]),
                "largest cosine of two experts": largest_of(columns["largest"]),
                DEVIATION: 1 / math.sqrt(survey.hidden),
                "expected largest for random vectors": largest_by_chance(count, survey.hidden),
                "pairs": float(count),
                **others_means,
            },
            tables=[layer_table("averages", about, layers, names, columns), others],
            arrays={
                "layers": np.array(layers),
                "projections": np.array(names),
                "names_LR": np.array([layer.names for layer in survey.layers]),
                "cosine_LPRR": cosine_LPRR,
                "mean_LP": columns["mean"],
            },
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Means over depth, and heat maps of each checkpoint."""
        deviation = max(result.numbers[DEVIATION] for result in results.values())
        lines = layer_lines(
            results,
            key="averages-by-layer",
            title="Mean similarity of two average neurons",
            y="mean cosine similarity",
            values="mean_LP",
            references=[
                Reference(value=deviation, label="random vectors, one pair, +1 sd"),
                Reference(value=-deviation, label="random vectors, one pair, -1 sd"),
            ],
            caption="Above the lines, experts favour the same directions on average.",
        )
        maps = [
            figure
            for label, result in results.items()
            for figure in similarity_maps(
                result,
                key=f"averages-{label}",
                title=f"Similarity of average neurons, {label}",
                values_LPRR=result.arrays["cosine_LPRR"],
                names_LR=result.arrays["names_LR"],
                projections=result.arrays["projections"].tolist(),
                caption="Cosine of average neurons. Random vectors have a standard deviation of "
                f"{result.numbers[DEVIATION]:.1g}.",
            )
        ]
        return [lines, *maps]

    def reading(self, results: Mapping[str, Result]) -> str:
        """Beside random vectors."""
        return sentence_for_each({label: _reading(result) for label, result in results.items()})


def _reading(result: Result) -> str:
    mean, deviation = result.numbers["mean cosine"], result.numbers[DEVIATION]
    if math.isnan(mean):
        return "There are no two experts to compare."
    # Pairs of one layer share experts, so the mean varies more than with independent pairs.
    chance = 3 * deviation / math.sqrt(max(1.0, result.numbers["pairs"]))
    if abs(mean) <= chance:
        return (
            f"Average neurons of different experts are as different as random vectors: the mean "
            f"cosine is {mean:.2g}, and chance is within {chance:.2g} of 0."
        )
    parts = listed(result.numbers, "mean cosine, ")
    return (
        f"Average neurons of two experts have a mean cosine of {mean:.2f} ({parts}; random vectors "
        f"{deviation:.2f} for one pair), so experts lean in the same directions, which their whole "
        "matrices may hide since neurons are in any order."
        + depth_trend(np.nanmean(result.arrays["mean_LP"], axis=1))
    )

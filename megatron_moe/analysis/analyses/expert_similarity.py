"""Cosine similarity of the experts' matrices.

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
from megatron_moe.analysis.weights.reading import depth_trend, sentence_for_each
from megatron_moe.analysis.weights.statistics import (
    Array,
    cosines,
    largest_by_chance,
    largest_of,
    mean_of,
    over_pairs,
)
from megatron_moe.analysis.weights.survey import WeightSurvey

SHARED_START = 0.1
"""A mean cosine above this is not reached by matrices with independent random starts: those of
34B/32E have a standard deviation of 1.6e-4."""
DEVIATION = "standard deviation for random matrices"
"""A headline number."""


@register
class ExpertSimilarity(Analysis):
    """See the module."""

    key = "similarity"
    title = "Similarity of experts"
    question = "How similar are the matrices of different experts, and of experts and dense layers?"
    definition = (
        "cos(vec W_i, vec W_j) of the matrices of experts i and j of a layer, each projection on "
        "its own; the shared expert and the nearest dense layer are further rows if they have the "
        "same shape. Chance: independent random matrices of n elements have cosines of mean 0 and "
        "standard deviation 1/sqrt(n). If only the average neurons of two experts agreed, and "
        "their neurons were in random order, the expected cosine would be "
        "F <m_i, m_j> / (|W_i| |W_j|), with the average neurons m and F neurons."
    )
    source = "Lo et al., A Closer Look into Mixture-of-Experts (arXiv 2406.18219), section 3.1"
    group = "weights"
    needs_data = False

    def compute(self, material: Material) -> Result:
        """Similarities by layer and projection."""
        survey = material.survey
        names, layers = survey.projections, [layer.layer for layer in survey.layers]
        cosine_LPRR = np.array(
            [[cosines(p.gram_RR) for p in la.projections.values()] for la in survey.layers]
        )
        experts = survey.num_experts
        expert_LPEE = cosine_LPRR[:, :, :experts, :experts]
        columns = {
            "mean": over_pairs(expert_LPEE, mean_of),
            "largest": over_pairs(expert_LPEE, largest_of),
            "mean_random_order": over_pairs(_in_random_order(survey), mean_of),
        }
        about = (
            "cosines of the matrices of two experts of a layer: mean and largest over the pairs, "
            "and the mean if neurons were in random order"
        )
        means = {f"mean cosine, {n}": mean_of(columns["mean"][:, p]) for p, n in enumerate(names)}
        others, others_means = others_table(survey, cosine_LPRR)
        return Result(
            analysis=self.key,
            numbers={
                **means,
                "mean cosine": mean_of(columns["mean"]),
                "mean cosine with neurons in random order": mean_of(columns["mean_random_order"]),
                "largest cosine of two experts": largest_of(columns["largest"]),
                DEVIATION: 1 / math.sqrt(survey.size),
                "expected largest for random matrices": largest_by_chance(
                    expert_LPEE.size // experts * (experts - 1) // 2, survey.size
                ),
                **others_means,
            },
            tables=[layer_table("similarity", about, layers, names, columns), others],
            arrays={
                "layers": np.array(layers),
                "projections": np.array(names),
                "names_LR": np.array([layer.names for layer in survey.layers]),
                "cosine_LPRR": cosine_LPRR,
                "mean_LP": columns["mean"],
                "random_order_LP": columns["mean_random_order"],
            },
            notes=survey.notes(),
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Means over depth, and heat maps of each checkpoint."""
        deviation = max(r.numbers[DEVIATION] for r in results.values())
        lines = layer_lines(
            results,
            key="similarity-by-layer",
            title="Mean similarity of two experts",
            y="mean cosine similarity",
            values="mean_LP",
            chance={"random_order_LP": "in random order"},
            references=[Reference(value=3 * deviation, label="random matrices, 3 sd")],
            caption="Dashed: if the neurons of each expert were in random order.",
        )
        maps = [
            figure
            for label, result in results.items()
            for figure in similarity_maps(
                result,
                key=f"similarity-{label}",
                title=f"Similarity of experts, {label}",
                values_LPRR=result.arrays["cosine_LPRR"],
                names_LR=result.arrays["names_LR"],
                projections=result.arrays["projections"].tolist(),
                caption="Cosine of whole matrices. Random matrices are within "
                f"{3 * result.numbers[DEVIATION]:.1g} of 0.",
            )
        ]
        return [lines, *maps]

    def reading(self, results: Mapping[str, Result]) -> str:
        """Beside random matrices, models from scratch, and upcycled ones."""
        return sentence_for_each({label: _reading(result) for label, result in results.items()})


def _in_random_order(survey: WeightSurvey) -> Array:
    """Expected cosines [L, P, E, E] of experts whose neurons are put in random order."""
    experts = survey.num_experts
    found = []
    for layer in survey.layers:
        for each in layer.projections.values():
            norm_E = np.sqrt(np.diag(each.gram_RR)[:experts])
            norm_E = np.where(norm_E > 0, norm_E, np.nan)
            mean_EE = survey.width * each.mean_gram_RR[:experts, :experts]
            found.append(mean_EE / norm_E[:, None] / norm_E)
    return np.array(found).reshape(len(survey.layers), -1, experts, experts)


def _reading(result: Result) -> str:
    mean, deviation = result.numbers["mean cosine"], result.numbers[DEVIATION]
    ordered = result.numbers["mean cosine with neurons in random order"]
    if math.isnan(mean):
        return "There are no two experts to compare."
    if abs(mean) <= 3 * deviation:
        return (
            f"The matrices of different experts are as different as random ones: their mean cosine "
            f"is {mean:.2g}, and random matrices are within {3 * deviation:.2g} of 0."
        )
    if mean >= SHARED_START:
        place = "in the same place" if ordered < mean / 2 else "on average"
        text = (
            f"Experts share much of their weights (mean cosine {mean:.2f}; {ordered:.2f} if their "
            f"neurons were in random order, so neurons agree {place}). The paper sees the highest "
            "similarities in Mixtral, and takes them for a sign that its experts began as copies."
        )
    else:
        text = (
            f"Experts differ nearly as random matrices do (mean cosine {mean:.2g}, above the "
            f"{3 * deviation:.2g} of chance), as the paper finds for models trained from scratch."
        )
    return text + depth_trend(np.nanmean(result.arrays["mean_LP"], axis=1))

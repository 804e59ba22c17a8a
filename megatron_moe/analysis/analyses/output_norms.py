"""Do routers choose the experts with the largest outputs.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.collector import Setting
from megatron_moe.analysis.collectors.expert_passes import ExpertPasses, check_rows
from megatron_moe.analysis.grids import (
    figure_key,
    figure_title,
    grid_table,
    layer_lines,
    series_name,
)
from megatron_moe.analysis.plot import Axis, Figure, Heatmap, Reference, Scatter, Series
from megatron_moe.analysis.result import Result, Table
from megatron_moe.analysis.weights.reading import sentence_for_each

Array = npt.NDArray[Any]
_SMALL = 0.1
"""Rank correlations below this are not named: a few experts that differ in their mean norm for any
token reach it, whatever the router does."""


@register
class OutputNorms(Analysis):
    """See the module."""

    key = "norm-rank"
    title = "Output norm against gate score"
    question = "Do routers choose the experts whose outputs are largest?"
    definition = (
        "Each token goes through all experts of the layer. Its experts are ranked by score (over "
        "all E) and by the norm of their output before the combine weight; cell (i, j) counts "
        "tokens whose expert of score rank i has norm rank j. Summarised by the rank correlation "
        "of a token (Spearman), averaged over tokens, and by the share of the k experts with the "
        "largest norms among the k with the largest scores. Chance: 0 and k/E for ranks that "
        "are unrelated; what follows from experts with large norms and scores for any token is "
        "shown by the same with the scores of another token."
    )
    source = "Lo et al., A Closer Look into Mixture-of-Experts (arXiv 2406.18219), section 4.3"
    group = "experts"
    uses = ("expert_passes",)

    def check(self, setting: Setting) -> None:
        """See `Analysis.check`."""
        check_rows(setting)

    def compute(self, material: Material) -> Result:
        """Ranks, correlations and overlaps by layer."""
        passes = cast(ExpertPasses, material.collected["expert_passes"])
        sizes, layers = material.setting.sizes, material.setting.layers
        tokens, topk = int(passes.tokens[0]), sizes.topk
        by_layer = {
            "spearman_L": spearman(passes.ranks_LEE),
            "shuffled_spearman_L": spearman(passes.shuffled_LEE),
            "overlap_L": overlap(passes.ranks_LEE, topk),
            "shuffled_overlap_L": overlap(passes.shuffled_LEE, topk),
            "equal_L": passes.equal_L / tokens,
            "shuffled_equal_L": passes.shuffled_equal_L / tokens,
            "chosen_norm_L": _ratio(passes),
        }
        experts = sizes.num_experts
        numbers = {
            "rank correlation": by_layer["spearman_L"].mean(),
            "rank correlation with scores of other tokens": by_layer["shuffled_spearman_L"].mean(),
            "standard deviation of the correlation by chance": _deviation(experts, tokens),
            "overlap of the k largest": by_layer["overlap_L"].mean(),
            "overlap with scores of other tokens": by_layer["shuffled_overlap_L"].mean(),
            "overlap by chance": topk / experts,
            "tokens with the same k experts": by_layer["equal_L"].mean(),
            "tokens with the same k experts by chance": 1 / math.comb(experts, topk),
            "norm of chosen experts over that of all": float(np.nanmean(by_layer["chosen_norm_L"])),
            "tokens": tokens,
        }
        means = {"score": passes.score_LE / tokens, "norm": passes.norm_LE / tokens}
        return Result(
            analysis=self.key,
            numbers={name: float(value) for name, value in numbers.items()},
            tables=[
                _layer_table(layers, by_layer),
                grid_table(
                    "experts",
                    "mean score and mean output norm of each expert over the tokens",
                    {"layer": layers, "expert": range(experts)},
                    means,
                ),
            ],
            arrays={
                "layers": np.array(layers),
                "ranks_LEE": passes.ranks_LEE,
                "score_LE": means["score"],
                "norm_LE": means["norm"],
                **by_layer,
            },
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Lines by layer, rank against rank, and means of each expert."""
        chance = max(result.numbers["overlap by chance"] for result in results.values())
        correlation = layer_lines(
            results,
            {"score and norm": "spearman_L"},
            {"scores of other tokens": "shuffled_spearman_L"},
            Axis(title="rank correlation of a token"),
            references=[Reference(value=0.0, label="unrelated")],
        )
        shared = layer_lines(
            results,
            {"score and norm": "overlap_L"},
            {"scores of other tokens": "shuffled_overlap_L"},
            Axis(title="k largest norms among the k largest scores (%)"),
            factor=100,
            references=[Reference(value=100 * chance, label="k/E")],
        )
        return [
            Figure(
                key="norm-rank-correlation",
                title="Rank correlation of output norms and gate scores",
                panels={"all": correlation},
                caption="Dashed: what experts that are large for any token contribute.",
            ),
            Figure(
                key="norm-rank-overlap",
                title="Overlap of the k largest norms and scores",
                panels={"all": shared},
            ),
            *(_ranks(label, result, results) for label, result in results.items()),
            _means(results),
        ]

    def reading(self, results: Mapping[str, Result]) -> str:
        """Beside chance and the paper's finding."""
        return sentence_for_each({label: _reading(result) for label, result in results.items()})


def spearman(counts: Array) -> Array:
    """Mean rank correlation over tokens, from counts [..., E, E] of rank pairs; NaN for E = 1.

    With distinct ranks the correlation of a token is 1 - 6 sum d^2 / (E (E^2 - 1)).
    """
    experts = counts.shape[-1]
    if experts == 1:
        return np.full(counts.shape[:-2], np.nan)
    ranks = np.arange(experts)
    squares = (ranks[:, None] - ranks) ** 2
    tokens = counts.sum((-1, -2)) / experts
    worst = experts * (experts**2 - 1) / 6
    return np.asarray(1 - (counts * squares).sum((-1, -2)) / (tokens * worst))


def overlap(counts: Array, topk: int) -> Array:
    """Mean share of the K first ranks that agree, from counts [..., E, E] of rank pairs."""
    tokens = counts.sum((-1, -2)) / counts.shape[-1]
    return np.asarray(counts[..., :topk, :topk].sum((-1, -2)) / (tokens * topk))


def _deviation(experts: int, tokens: int) -> float:
    return 1 / math.sqrt(max(1, experts - 1) * tokens)


def _ratio(passes: ExpertPasses) -> Array:
    """Mean norm of the chosen experts over the mean of all, [L]."""
    chosen_L = passes.chosen_LE.sum(1)
    total_L = passes.chosen_norm_LE.sum(1)
    mean_L = np.divide(total_L, chosen_L, out=np.full(len(total_L), np.nan), where=chosen_L > 0)
    return np.asarray(mean_L / (passes.norm_LE.mean(1) / passes.tokens[0]))


def _layer_table(layers: Sequence[int], by_layer: Mapping[str, Array]) -> Table:
    return Table(
        name="norm_rank",
        about="rank correlation of score and norm, share of the k largest that agree, share of "
        "tokens for which all k agree; `shuffled`: with the scores of another token; norm of the "
        "chosen experts over the mean of all",
        columns={"layer": list(layers)}
        | {name.removesuffix("_L"): values.tolist() for name, values in by_layer.items()},
    )


def _ranks(label: str, result: Result, results: Mapping[str, Result]) -> Figure:
    counts_LEE = result.arrays["ranks_LEE"]
    panels = {"all layers": _map(counts_LEE.sum(0))} | {
        f"layer {layer}": _map(counts)
        for layer, counts in zip(result.arrays["layers"], counts_LEE, strict=True)
    }
    return Figure(
        key=figure_key("norm-rank", label, results),
        title=figure_title("Rank of the output norm against rank of the score", label, results),
        panels=panels,
        caption="Tokens (%) whose expert of a score rank has a norm rank; 1 is the largest. "
        "On the diagonal, ranks agree.",
    )


def _map(counts_EE: Array) -> Heatmap:
    experts = len(counts_EE)
    share = 100 * counts_EE / np.maximum(1, counts_EE.sum(1, keepdims=True))
    names = [str(rank + 1) for rank in range(experts)]
    return Heatmap(
        values=share,
        rows=names,
        columns=names,
        x=Axis(title="rank of the output norm"),
        y=Axis(title="rank of the score"),
        colour="tokens (%)",
        centre=100 / experts,
    )


def _means(results: Mapping[str, Result]) -> Figure:
    layers = next(iter(results.values())).arrays["layers"]
    panels = {}
    for place, layer in enumerate(layers):
        series = [
            Series(
                name=series_name("experts", label, results),
                x=result.arrays["score_LE"][place],
                y=result.arrays["norm_LE"][place],
                text=[f"expert {e}" for e in range(result.arrays["score_LE"].shape[1])],
                marks=[str(e) for e in range(result.arrays["score_LE"].shape[1])],
                group=label,
            )
            for label, result in results.items()
            if place < len(result.arrays["layers"])
        ]
        axes = Axis(title="mean score"), Axis(title="mean output norm")
        panels[f"layer {layer}"] = Scatter(series=series, x=axes[0], y=axes[1])
    return Figure(
        key="norm-score-experts",
        title="Mean output norm and mean score of each expert",
        panels=panels,
        caption="Each point is an expert, averaged over all tokens, chosen or not.",
    )


def _reading(result: Result) -> str:
    n = result.numbers
    found, other = n["rank correlation"], n["rank correlation with scores of other tokens"]
    noise = 3 * n["standard deviation of the correlation by chance"]
    overlap_words = (
        f"{100 * n['overlap of the k largest']:.0f}% of the k largest norms are among the k "
        f"largest scores (chance {100 * n['overlap by chance']:.0f}%)"
    )
    if math.isnan(found):
        return "With a single expert there is nothing to rank."
    if abs(found) <= max(noise, _SMALL):
        within = ", within chance" if abs(found) <= noise else ""
        return (
            f"Norms and scores are hardly related: rank correlation {found:.2f}{within}; "
            f"{overlap_words}. Unlike in the paper, the router does not favour large outputs."
        )
    if found < 0:
        return (
            f"The router favours experts with smaller outputs (rank correlation {found:.2f}), "
            f"unlike in the paper; {overlap_words}."
        )
    cause = (
        "most of it comes from experts that have large outputs for any token"
        if other > found / 2
        else "little of it comes from experts that have large outputs for any token"
    )
    return (
        f"The router favours experts with larger outputs, as in the paper: rank correlation "
        f"{found:.2f}, {overlap_words}; {cause} ({other:.2f} with the scores of other tokens)."
    )

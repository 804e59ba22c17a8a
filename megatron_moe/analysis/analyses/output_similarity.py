"""How similar are the outputs of two experts for the same token.

Shapes: L layers, D domains, E experts.
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
from megatron_moe.analysis.grids import figure_key, figure_title, layer_lines, mean_of
from megatron_moe.analysis.plot import Axis, Figure, Heatmap, Reference
from megatron_moe.analysis.result import Result, Table
from megatron_moe.analysis.weights.reading import depth_trend, sentence_for_each

Array = npt.NDArray[Any]
CHANCE = 0.5
"""Angular similarity of independent random directions."""
SHOWN = 64
"""Experts of a heat map, at most."""


@register
class OutputSimilarity(Analysis):
    """See the module."""

    key = "output-similarity"
    title = "Similarity of expert outputs"
    question = "Do different experts compute similar outputs for the same token?"
    definition = (
        "1 - arccos(cos(E_i(x), E_j(x))) / pi, averaged over tokens x, each of which goes through "
        "all experts of the layer: 1 for the same direction, 0 for the opposite one. Chance: 0.5 "
        "for independent random directions; what experts share whatever the token is shown by "
        "the same with the output of expert j for another token. Short text: the tokens after the "
        "first of one row; long text: tokens of rows spread over all domains."
    )
    source = "Lo et al., A Closer Look into Mixture-of-Experts (arXiv 2406.18219), section 4.2"
    group = "experts"
    uses = ("expert_passes",)

    def check(self, setting: Setting) -> None:
        """See `Analysis.check`."""
        check_rows(setting)

    def compute(self, material: Material) -> Result:
        """Similarities by layer."""
        passes = cast(ExpertPasses, material.collected["expert_passes"])
        setting, tokens = material.setting, int(passes.tokens[0])
        long_LEE = passes.angles_LEE / tokens
        other_LEE = passes.other_angles_LEE / tokens
        short_DLEE = passes.short_angles_DLEE / passes.short_D[:, None, None, None]
        mean_L, short_DL = _over_pairs(long_LEE), _over_pairs(short_DLEE)
        names, experts = setting.sample.names, setting.sizes.num_experts
        first, second = np.triu_indices(experts, 1)
        pairs_LP = long_LEE[:, first, second]
        deviation = 1 / (math.pi * math.sqrt(setting.sizes.hidden_size * tokens))
        return Result(
            analysis=self.key,
            numbers={
                "mean similarity": float(mean_L.mean()),
                "mean similarity, short texts": float(short_DL.mean()),
                "mean similarity for different tokens": float(_over_pairs(other_LEE).mean()),
                "largest similarity of two experts": float(pairs_LP.max()) if experts > 1 else 1.0,
                "chance": CHANCE,
                "standard deviation for random directions": deviation,
                "tokens": float(tokens),
            },
            tables=[
                _layer_table(setting, mean_L, _over_pairs(other_LEE), pairs_LP),
                _short_table(setting, short_DL),
            ],
            arrays={
                "layers": np.array(setting.layers),
                "domains": np.array(names),
                "similarity_LEE": long_LEE,
                "short_DLEE": short_DLEE,
                "mean_L": mean_L,
                "short_mean_L": short_DL.mean(0),
                "other_mean_L": _over_pairs(other_LEE),
            },
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Means over depth, then heat maps of each checkpoint."""
        lines = Figure(
            key="output-similarity-by-layer",
            title="Mean similarity of the outputs of two experts",
            panels={
                "all": layer_lines(
                    results,
                    {"same token": "mean_L", "same token, short texts": "short_mean_L"},
                    {"different tokens": "other_mean_L"},
                    Axis(title="angular similarity"),
                    references=[Reference(value=CHANCE, label="random directions")],
                )
            },
            caption="Dashed: what two experts share whatever the token is.",
        )
        return [lines, *(f for item in results.items() for f in _maps(*item, results))]

    def reading(self, results: Mapping[str, Result]) -> str:
        """Beside chance, and its trend over depth."""
        return sentence_for_each({label: _reading(result) for label, result in results.items()})


def _over_pairs(values: Array) -> Array:
    """Mean over pairs of different experts of [..., E, E]; 1 for a single expert."""
    experts = values.shape[-1]
    if experts == 1:
        return np.ones(values.shape[:-2])
    total = values.sum((-1, -2)) - np.trace(values, axis1=-2, axis2=-1)
    return np.asarray(total / (experts * (experts - 1)))


def _layer_table(setting: Setting, mean_L: Array, other_L: Array, pairs_LP: Array) -> Table:
    return Table(
        name="output_similarity",
        about="angular similarity of the outputs of two experts: mean over pairs and tokens, mean "
        "for different tokens, and the most similar pair",
        columns={
            "layer": list(setting.layers),
            "mean": mean_L.tolist(),
            "mean_different_tokens": other_L.tolist(),
            "largest": pairs_LP.max(1).tolist() if pairs_LP.size else [1.0] * len(mean_L),
        },
    )


def _short_table(setting: Setting, short_DL: Array) -> Table:
    cells = [(n, la) for n in setting.sample.names for la in setting.layers]
    return Table(
        name="short_texts",
        about="mean angular similarity over the tokens after the first of a row of each domain",
        columns={
            "domain": [name for name, _ in cells],
            "layer": [layer for _, layer in cells],
            "mean": short_DL.ravel().tolist(),
        },
    )


def _maps(label: str, result: Result, results: Mapping[str, Result]) -> list[Figure]:
    layers, domains = result.arrays["layers"], result.arrays["domains"]
    long_panels = {
        f"layer {layer}": _map(values)
        for layer, values in zip(layers, result.arrays["similarity_LEE"], strict=True)
    }
    short_panels = {
        f"{name}, layer {layer}": _map(result.arrays["short_DLEE"][d, place])
        for d, name in enumerate(domains)
        for place, layer in enumerate(layers)
    }
    texts = (
        ("long", long_panels, "layer", "rows spread over all domains"),
        ("short", short_panels, "text and layer", "a short text of each domain"),
    )
    return [
        Figure(
            key=figure_key(f"output-similarity-{name}", label, results),
            title=figure_title(f"Similarity of expert outputs, {name} text", label, results),
            panels=panels,
            selector=selector,
            caption=f"Averaged over the tokens of {about}. 0.5: unrelated directions.",
        )
        for name, panels, selector, about in texts
    ]


def _map(values_EE: Array) -> Heatmap:
    names = [str(e) for e in range(min(SHOWN, len(values_EE)))]
    shown = values_EE[: len(names), : len(names)].copy()
    np.fill_diagonal(shown, np.nan)
    return Heatmap(
        values=shown,
        rows=names,
        columns=names,
        x=Axis(title="expert"),
        y=Axis(title="expert"),
        colour="angular similarity",
        centre=CHANCE,
    )


def _reading(result: Result) -> str:
    mean, other = mean_of(result, "mean_L"), mean_of(result, "other_mean_L")
    noise = 3 * result.numbers["standard deviation for random directions"]
    if abs(mean - CHANCE) <= max(noise, 0.005):
        said = f"the outputs of two experts are unrelated on average ({mean:.3f}; chance 0.5)"
    elif abs(mean - CHANCE) < 0.05:
        said = f"the outputs of two experts are nearly unrelated ({mean:.3f}; chance 0.5)"
    elif mean > CHANCE:
        said = f"the outputs of two experts are alike ({mean:.3f}; chance 0.5)"
    else:
        said = f"the outputs of two experts are opposed on average ({mean:.3f}; chance 0.5)"
    part = ""
    if mean - CHANCE > 0.05:
        share = (other - CHANCE) / (mean - CHANCE)
        part = f"; for different tokens it is {other:.3f}, so that {100 * max(0, share):.0f}% of "
        part += "the excess does not depend on the token"
    trend = depth_trend(result.arrays["mean_L"])
    return f"{said[0].upper()}{said[1:]}{part}.{trend}"

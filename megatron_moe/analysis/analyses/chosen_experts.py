"""Which experts a text uses, token by token.

Shapes: D domains, L layers, N tokens of a passage, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.collectors.passages import Passages
from megatron_moe.analysis.grids import figure_key, figure_title
from megatron_moe.analysis.plot import Axis, Figure, Heatmap
from megatron_moe.analysis.result import Result, Table
from megatron_moe.analysis.weights.reading import sentence_for_each

Array = npt.NDArray[Any]
SHOWN = 64
"""Experts of a heat map, at most: those with the largest weights in the passage."""
_CLEAR = 3.0
"""Standard errors from which a difference to chance is named."""


@register
class ChosenExperts(Analysis):
    """See the module."""

    key = "chosen-experts"
    title = "Chosen experts along a text"
    question = "Which experts do the tokens of a text use?"
    definition = (
        "The combine weight of each expert for each token of the first row of a domain; choices "
        "that found no slot count as 0. Summarised by how often a token has the same first expert "
        "as the token before it. Chance: the tokens of the passage in random order, which gives "
        "(sum_e c_e (c_e - 1)) / (n (n - 1)) for an expert that is the first of c_e of n tokens."
    )
    source = "Lo et al., A Closer Look into Mixture-of-Experts (arXiv 2406.18219), appendix"
    group = "experts"
    uses = ("passages",)

    def compute(self, material: Material) -> Result:
        """Weights along the passage of each domain."""
        passages = cast(Passages, material.collected["passages"])
        setting, weights = material.setting, passages.weights_DLNE
        pieces = [[material.model.piece(int(i)) for i in row] for row in passages.ids_DN]
        used_DL = (weights > 0).any(2).mean(-1)
        same_DL, chance_DL = same_first(weights)
        cells = [(n, la) for n in setting.sample.names for la in setting.layers]
        return Result(
            analysis=self.key,
            numbers={
                "experts that a passage uses": float(used_DL.mean()),
                "same first expert as the token before": float(np.nanmean(same_DL)),
                "same first expert by chance": float(np.nanmean(chance_DL)),
                "pairs of tokens": float(same_DL.size * (weights.shape[2] - 1)),
            },
            tables=[
                Table(
                    name="passages",
                    about="share of the experts that a passage uses, share of tokens with the same "
                    "first expert as the token before, and with tokens in random order",
                    columns={
                        "domain": [name for name, _ in cells],
                        "layer": [layer for _, layer in cells],
                        "experts_used": used_DL.ravel().tolist(),
                        "same_first": same_DL.ravel().tolist(),
                        "same_first_chance": chance_DL.ravel().tolist(),
                    },
                )
            ],
            arrays={
                "layers": np.array(setting.layers),
                "domains": np.array(setting.sample.names),
                "pieces_DN": np.array(pieces),
                "weights_DLNE": weights,
            },
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Tokens against experts, for each domain and layer."""
        return [_figure(label, result, results) for label, result in results.items()]

    def reading(self, results: Mapping[str, Result]) -> str:
        """How many experts, and how long they stay."""
        return sentence_for_each({label: _reading(result) for label, result in results.items()})


def same_first(weights_DLNE: Array) -> tuple[Array, Array]:
    """Share of tokens with the first expert of the token before, and its chance level, [D, L].

    Tokens whose choices all found no slot have no first expert; pairs with one are left out.
    """
    experts = weights_DLNE.shape[-1]
    first = np.where(weights_DLNE.any(-1), weights_DLNE.argmax(-1), -1)
    both = (first[..., 1:] >= 0) & (first[..., :-1] >= 0)
    pairs = both.sum(-1)
    hits = ((first[..., 1:] == first[..., :-1]) & both).sum(-1)
    counts = (first[..., None] == np.arange(experts)).sum(-2)
    tokens = counts.sum(-1)
    expected = (counts * (counts - 1)).sum(-1)
    nothing = np.full(hits.shape, np.nan)
    return (
        np.divide(hits, pairs, out=nothing.copy(), where=pairs > 0),
        np.divide(expected, tokens * (tokens - 1), out=nothing, where=tokens > 1),
    )


def _figure(label: str, result: Result, results: Mapping[str, Result]) -> Figure:
    arrays = result.arrays
    panels = {
        f"{domain}, layer {layer}": _map(arrays["pieces_DN"][d], arrays["weights_DLNE"][d, place])
        for d, domain in enumerate(arrays["domains"])
        for place, layer in enumerate(arrays["layers"])
    }
    return Figure(
        key=figure_key("chosen-experts", label, results),
        title=figure_title("Experts along a text", label, results),
        panels=panels,
        selector="text and layer",
        caption="Combine weights of the choices that found a slot. Horizontal lines: an expert "
        "that stays over neighbouring tokens.",
    )


def _map(pieces_N: Array, weights_NE: Array) -> Heatmap:
    experts = np.arange(weights_NE.shape[1])
    if len(experts) > SHOWN:
        experts = np.sort(weights_NE.sum(0).argsort()[-SHOWN:])
    values = weights_NE[:, experts].astype(np.float64).T
    return Heatmap(
        values=np.where(values > 0, values, np.nan),
        rows=[str(e) for e in experts],
        columns=[f"{place} {piece}" for place, piece in enumerate(pieces_N)],
        x=Axis(title="token"),
        y=Axis(title="expert"),
        colour="combine weight",
    )


def _reading(result: Result) -> str:
    n = result.numbers
    found, chance = n["same first expert as the token before"], n["same first expert by chance"]
    used = f"A passage uses {100 * n['experts that a passage uses']:.0f}% of a layer's experts"
    error = (max(chance * (1 - chance), 1e-12) / max(1.0, n["pairs of tokens"])) ** 0.5
    if abs(found - chance) <= _CLEAR * error:
        return f"{used}; neighbouring tokens share their first expert as often as by chance."
    more = "more" if found > chance else "less"
    return (
        f"{used}; {100 * found:.0f}% of tokens have the first expert of the token before, {more} "
        f"than the {100 * chance:.0f}% of the same tokens in random order."
    )

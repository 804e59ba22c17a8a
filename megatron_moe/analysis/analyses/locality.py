"""Whether tokens near each other choose the same experts, which decides what a cache can hold.

Shapes: L layers, J distances, Q segment lengths, C cache sizes, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.collectors.locality import CACHES, DISTANCES, SEGMENTS
from megatron_moe.analysis.grids import figure_key, figure_title, grid_table, layer_lines, mean_of
from megatron_moe.analysis.nulls import drawn_shares
from megatron_moe.analysis.plot import Axis, Figure, Lines, Series
from megatron_moe.analysis.result import Result

Array = npt.NDArray[Any]


@register
class RoutingLocality(Analysis):
    """See the module."""

    key = "locality"
    title = "Local routing consistency"
    question = "Do neighbouring tokens choose the same experts?"
    definition = (
        "|E(t) n E(t + d)| / k for tokens d apart in one document. Chance: shuffled tokens, "
        "sum over e of pi(e)^2 / k with pi the share of tokens that choose e. Between the two lies "
        "the overlap of tokens of one document at any distance, which topics explain. Segment "
        "hit rate: the share of the choices in 4, 16 or 64 consecutive tokens that go to the best "
        "k, or 2 k, experts of the segment; chance: segments of shuffled tokens."
    )
    source = (
        "after the segment routing best performance of 'Not all models suit expert offloading' "
        "(arXiv 2505.16056); overlap by distance is not in a paper"
    )
    group = "routing"
    uses = ("locality", "choices", "load")
    least_choices = 10

    def compute(self, material: Material) -> Result:
        """Overlap by distance and hit rates by segment."""
        setting = material.setting
        sums = material.collected["locality"].state()
        load = material.collected["load"].state()
        pool_LTK = material.collected["choices"].state()["ids_LTK"]
        topk, experts = setting.sizes.topk, setting.sizes.num_experts
        rng = np.random.default_rng(setting.seed)
        pi_LE = load["chosen_LE"] / load["tokens_1"]
        hits_LQC = _ratio(sums["covered_LQC"], sums["segment_choices_Q"][:, None])
        caches = [min(c * topk, experts) for c in CACHES]
        null_LQC = np.array(
            [
                [
                    hit_rates_by_chance(pool, experts, tokens, caches, material.draws, rng)
                    for tokens in SEGMENTS
                ]
                for pool in pool_LTK
            ]
        )
        any_L = _ratio(sums["any_shared_L"], sums["any_pairs_1"] * topk)
        arrays = {
            "layers": np.array(setting.layers),
            "overlap_LJ": _ratio(sums["shared_LJ"], sums["pairs_J"] * topk),
            "null_L": (pi_LE**2).sum(1) / topk,
            "document_L": any_L,
            "pairs_J": sums["pairs_J"],
            "hits_LQC": hits_LQC,
            "hits_null_LQC": np.where(np.isnan(hits_LQC), np.nan, null_LQC),
        }
        arrays["neighbours_L"] = arrays["overlap_LJ"][:, 0]
        notes = []
        if setting.sample.seq_length <= max(SEGMENTS):
            notes.append(
                f"Rows have {setting.sample.seq_length} tokens, so longer distances and segments "
                "are empty."
            )
        numbers = {
            "overlap of neighbours": _mean(arrays["neighbours_L"]),
            "overlap within a document": _mean(any_L),
            "overlap by chance": _mean(arrays["null_L"]),
        }
        for q, tokens in enumerate(SEGMENTS):
            name = f"hit rate of the best k experts for {tokens} tokens"
            numbers[name] = _mean(arrays["hits_LQC"][:, q, 0])
            numbers[f"{name}, by chance"] = _mean(arrays["hits_null_LQC"][:, q, 0])
        layers = setting.layers
        by_distance = grid_table(
            "by_distance",
            "share of experts that two tokens of a document have in common",
            {"layer": layers, "distance": DISTANCES},
            {
                "overlap": arrays["overlap_LJ"],
                "document": _spread_out(any_L, len(DISTANCES)),
                "chance": _spread_out(arrays["null_L"], len(DISTANCES)),
            },
        )
        axes: dict[str, Sequence[Any]] = {"layer": layers, "tokens": SEGMENTS, "experts": caches}
        by_segment = grid_table(
            "by_segment",
            "share of the choices of a segment that go to its best experts",
            axes,
            {"hits": arrays["hits_LQC"], "chance": arrays["hits_null_LQC"]},
        )
        return Result(
            analysis=self.key,
            numbers=numbers,
            tables=[by_distance, by_segment],
            arrays=arrays,
            notes=notes,
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Neighbours by layer; overlap by distance; hit rates by segment length."""
        neighbours = layer_lines(
            results,
            {"neighbours": "neighbours_L"},
            {"same document": "document_L", "chance": "null_L"},
            Axis(title="experts in common (%)"),
            factor=100,
        )
        title = "Experts that neighbouring tokens have in common"
        found = [Figure(key="neighbours", title=title, panels={"all": neighbours})]
        for label, result in results.items():
            found.append(
                Figure(
                    key=figure_key("distance", label, results),
                    title=figure_title("Experts in common by distance", label, results),
                    panels={
                        f"layer {layer}": _by_distance(result, row)
                        for row, layer in enumerate(result.arrays["layers"])
                    },
                )
            )
            found.append(
                Figure(
                    key=figure_key("segments", label, results),
                    title=figure_title("Choices that a segment's best experts get", label, results),
                    panels={
                        f"layer {layer}": _by_segment(result, row)
                        for row, layer in enumerate(result.arrays["layers"])
                    },
                )
            )
        return found

    def reading(self, results: Mapping[str, Result]) -> str:
        """Neighbours against the document and chance."""
        return " ".join(_sentence(label, result) for label, result in results.items())


def hit_rates_by_chance(
    pool_TK: Array,
    experts: int,
    tokens: int,
    caches: Sequence[int],
    draws: int,
    rng: np.random.Generator,
) -> list[float]:
    """Hit rate of the best experts of a segment of shuffled tokens, for each cache size."""
    shares = drawn_shares(pool_TK, experts, tokens, max(draws, 2000 // tokens), rng)
    ranked = -np.sort(-shares, axis=1) / pool_TK.shape[1]
    return [float(ranked[:, :size].sum(1).mean()) for size in caches]


def _ratio(a: Array, b: Array) -> Array:
    b = np.broadcast_to(b, a.shape)
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


def _mean(values: Array) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _spread_out(values_L: Array, number: int) -> Array:
    return np.repeat(values_L[:, None], number, axis=1)


def _by_distance(result: Result, row: int) -> Lines:
    arrays = result.arrays
    flat = np.ones(len(DISTANCES))
    series = [
        Series(name="observed", x=list(DISTANCES), y=100 * arrays["overlap_LJ"][row]),
        Series(
            name="same document, any distance",
            x=list(DISTANCES),
            y=100 * arrays["document_L"][row] * flat,
            dashed=True,
        ),
        Series(name="chance", x=list(DISTANCES), y=100 * arrays["null_L"][row] * flat, dashed=True),
    ]
    x = Axis(title="tokens apart", log=True)
    return Lines(series=series, x=x, y=Axis(title="experts in common (%)"), markers=True)


def _by_segment(result: Result, row: int) -> Lines:
    series = [
        Series(
            name=f"best {'k' if cache == 1 else f'{cache} k'} experts" + suffix,
            x=list(SEGMENTS),
            y=100 * result.arrays[array][row, :, c],
            dashed=bool(suffix),
            group=str(cache),
        )
        for c, cache in enumerate(CACHES)
        for array, suffix in (("hits_LQC", ""), ("hits_null_LQC", ", chance"))
    ]
    x = Axis(title="tokens of a segment", log=True)
    return Lines(series=series, x=x, y=Axis(title="choices (%)", range=(0, 100)), markers=True)


def _sentence(label: str, result: Result) -> str:
    near, document, chance = (
        mean_of(result, name) for name in ("neighbours_L", "document_L", "null_L")
    )
    text = (
        f"{label}: neighbours have {100 * near:.0f}% of their experts in common, tokens of one "
        f"document {100 * document:.0f}%, shuffled ones {100 * chance:.0f}%"
    )
    if near - chance < 0.02:
        return f"{text}. A cache of experts gains nothing from the order of tokens."
    if near - chance < 0.1:
        return f"{text}. Routing is hardly local, so a cache of experts gains little."
    if near - document < 0.5 * (near - chance):
        return f"{text}. Most of it comes from what a document is about."
    return f"{text}. Most of it is local, so a cache of recently used experts gains from it."

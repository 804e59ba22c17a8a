"""Neurons of two experts assigned to each other.

Shapes: L layers, Q ways to match (each projection, and all together), X matched experts, F neurons
of an expert, S sampled ones, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.collector import Setting
from megatron_moe.analysis.model import LayerWeights
from megatron_moe.analysis.plot import Figure, Reference
from megatron_moe.analysis.result import Result
from megatron_moe.analysis.weights.figures import layer_lines, layer_table, similarity_maps
from megatron_moe.analysis.weights.matching import (
    JOINT,
    Match,
    assignment_solver,
    match,
    mixed_neurons,
    random_match,
)
from megatron_moe.analysis.weights.projections import neurons_of, projections_of
from megatron_moe.analysis.weights.reading import sentence_for_each
from megatron_moe.analysis.weights.statistics import (
    Array,
    kendall_deviation,
    largest_of,
    mean_of,
    over_pairs,
)
from megatron_moe.analysis.weights.survey import sampled_neurons

EXPERTS = 8
"""Most experts of a layer that are matched with each other: 28 pairs."""
NEURONS = 512
"""Most neurons of an expert that look for a partner among all of another."""
CLEAR = 0.05
"""Share of the way from chance to 1 from which experts are said to share neurons."""
SAME = 0.9
"""Mean cosine after matching above which two experts are said to be the same."""
KEPT_ORDER = 0.5
"""Kendall's tau above which experts are said to have kept the order of a common start."""
LARGEST = f"largest mean cosine of a pair after matching, {JOINT}"
"""A headline number."""
DEVIATION = "standard deviation of tau for random orders"
"""A headline number."""


@register
class NeuronMatching(Analysis):
    """See the module."""

    key = "matching"
    title = "Matched neurons"
    question = "Do two experts have the same neurons in another order?"
    definition = (
        "Each neuron of an expert gets a different neuron of another, so that the sum of their "
        "cosines is largest: for each projection alone, and for all together, [up; gate; down^T], "
        "the only order that leaves an expert's function as it is. Given are the mean cosine "
        "before (neurons at the same place) and after, and Kendall's tau between the places of "
        "matched neurons: 1 if none moved, 0 for random orders. Chance, since the best partner of "
        "many is never at 0: two experts of white noise of the same sizes; and one expert's "
        "neurons replaced by random mixtures of them, which keep the directions in which its "
        "weights are large."
    )
    source = "Lo et al., A Closer Look into Mixture-of-Experts (arXiv 2406.18219), section 3.2"
    group = "weights"
    needs_data = False

    def check(self, setting: Setting) -> None:
        """SciPy solves the assignment."""
        assignment_solver()

    def compute(self, material: Material) -> Result:
        """Matches by layer and pair of experts."""
        model, setting = material.model, material.setting
        experts = _evenly(model.sizes.num_experts, EXPERTS)
        width, hidden = model.sizes.expert_width, model.sizes.hidden_size
        places_S = sampled_neurons(width, NEURONS, setting.seed)
        layers = [
            _match_layer(model.weights(index), experts, places_S, setting.seed)
            for index in setting.layers
        ]
        kinds = layers[0].kinds
        noise = random_match(kinds[:-1], places_S, width, hidden, setting.seed)
        before, after, tau = (
            np.array([getattr(layer, name) for layer in layers])
            for name in ("before", "after", "tau")
        )
        noise_Q = np.array([noise[kind].after for kind in kinds])
        columns = {
            "before": over_pairs(before, mean_of),
            "after": over_pairs(after, mean_of),
            "after_white_noise": np.tile(noise_Q, (len(layers), 1)),
            "after_mixtures": np.array([layer.mixtures for layer in layers]),
            "tau": over_pairs(tau, mean_of),
        }
        about = (
            "mean over pairs of experts: cosine of neurons at the same place and of matched ones, "
            "and of matched ones by chance; Kendall's tau of the matched places"
        )
        return Result(
            analysis=self.key,
            numbers={
                **_numbers(kinds, columns, len(places_S)),
                LARGEST: largest_of(after[:, -1]),
            },
            tables=[layer_table("matching", about, setting.layers, kinds, columns)],
            arrays={
                "layers": np.array(setting.layers),
                "kinds": np.array(kinds),
                "experts": np.array(experts),
                "before_LQXX": before,
                "after_LQXX": after,
                "tau_LQXX": tau,
                **{f"{name}_LQ": values for name, values in columns.items()},
            },
            notes=_notes(len(experts), model.sizes.num_experts, len(places_S), width),
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Before, after and tau over depth; heat maps of matched similarity."""
        return [
            *_lines(results),
            *(each for label, result in results.items() for each in _maps(label, result)),
        ]

    def reading(self, results: Mapping[str, Result]) -> str:
        """Whether the order of neurons hides equal experts, and whether it was kept."""
        return sentence_for_each({label: _reading(result) for label, result in results.items()})


def _lines(results: Mapping[str, Result]) -> list[Figure]:
    return [
        layer_lines(
            results,
            key="matched-by-layer",
            title="Mean cosine of matched neurons",
            y="mean cosine similarity",
            values="after_LQ",
            chance={"after_mixtures_LQ": "mixtures", "after_white_noise_LQ": "white noise"},
            projections="kinds",
            caption="Dashed: chance, by mixtures of one expert's neurons and by white noise.",
        ),
        layer_lines(
            results,
            key="unmatched-by-layer",
            title="Mean cosine of neurons at the same place",
            y="mean cosine similarity",
            values="before_LQ",
            projections="kinds",
            references=[Reference(value=0.0, label="random orders")],
        ),
        layer_lines(
            results,
            key="tau-by-layer",
            title="How far matched neurons keep their place",
            y="Kendall's tau",
            values="tau_LQ",
            projections="kinds",
            references=[
                Reference(value=0.0, label="random orders"),
                Reference(value=0.75, label="Mixtral, in the paper"),
            ],
            caption="Experts that began as copies keep the order of their neurons.",
        ),
    ]


def _maps(label: str, result: Result) -> list[Figure]:
    return similarity_maps(
        result,
        key=f"matched-{label}",
        title=f"Mean cosine of matched neurons, {label}",
        values_LPRR=result.arrays["after_LQXX"],
        names_LR=np.tile(result.arrays["experts"], (len(result.arrays["layers"]), 1)),
        projections=result.arrays["kinds"].tolist(),
        caption="The mean over neurons of the cosine with the partner.",
    )


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """Matches of a layer: by kind, symmetric [X, X] with NaN on the diagonal; mixtures [Q]."""

    kinds: tuple[str, ...]
    before: npt.NDArray[np.float64]
    after: npt.NDArray[np.float64]
    tau: npt.NDArray[np.float64]
    mixtures: npt.NDArray[np.float64]


def _evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` numbers from 0 on, evenly spread."""
    kept = min(count, most)
    return [place * count // kept for place in range(kept)]


def _match_layer(
    layer: LayerWeights, experts: Sequence[int], places_S: Tensor, seed: int
) -> _Layer:
    names = projections_of(layer)
    kinds = (*names, JOINT)
    # In the dtype of the files; the second expert of a pair in fp32 as well, one at a time.
    own = [{name: neurons_of(layer.experts[e], name) for name in names} for e in experts]
    samples = [{name: each[name][places_S].float() for name in names} for each in own]
    shape = (len(kinds), len(experts), len(experts))
    found = {name: np.full(shape, np.nan) for name in ("before", "after", "tau")}
    mixtures = np.full(len(kinds), np.nan)
    for second in range(1, len(experts)):
        whole = {name: matrix.float() for name, matrix in own[second].items()}
        for first in range(second):
            _enter(found, kinds, first, second, match(samples[first], whole, places_S))
        if second == 1:
            generator = torch.Generator().manual_seed(seed)
            other = {name: matrix.float() for name, matrix in own[0].items()}
            mixed = mixed_neurons(other, len(places_S), generator)
            chance = match(mixed, whole, places_S)
            mixtures = np.array([chance[kind].after for kind in kinds])
    return _Layer(kinds=kinds, mixtures=mixtures, **found)


def _enter(
    found: Mapping[str, Array],
    kinds: Sequence[str],
    first: int,
    second: int,
    pair: Mapping[str, Match],
) -> None:
    for name, values in found.items():
        for place, kind in enumerate(kinds):
            values[place, first, second] = getattr(pair[kind], name)
            values[place, second, first] = values[place, first, second]


def _numbers(kinds: Sequence[str], columns: Mapping[str, Array], sampled: int) -> dict[str, float]:
    titles = {
        "before": "mean cosine before matching",
        "after": "mean cosine after matching",
        "after_white_noise": "mean cosine after matching white noise",
        "after_mixtures": "mean cosine after matching mixtures",
        "tau": "mean Kendall's tau",
    }
    numbers = {
        f"{title}, {kind}": mean_of(columns[name][:, q])
        for name, title in titles.items()
        for q, kind in enumerate(kinds)
    }
    return {**numbers, DEVIATION: kendall_deviation(sampled)}


def _notes(matched: int, experts: int, sampled: int, width: int) -> list[str]:
    notes = []
    if matched < 2:
        notes.append("There are no two experts to match.")
    if matched < experts:
        pairs = len(list(combinations(range(matched), 2)))
        notes.append(
            f"{matched} of {experts} experts, evenly spread, are matched with each other: {pairs} "
            f"of {experts * (experts - 1) // 2} pairs."
        )
    if sampled < width:
        notes.append(
            f"{sampled} of {width} neurons of the first expert of a pair choose among all {width} "
            "of the second, so cosines after matching are slightly above those of an assignment of "
            "all; chance levels have the same sizes."
        )
    return notes


def _reading(result: Result) -> str:
    numbers = result.numbers
    before, after, noise, mixtures, tau = (
        numbers[f"{name}, {JOINT}"]
        for name in (
            "mean cosine before matching",
            "mean cosine after matching",
            "mean cosine after matching white noise",
            "mean cosine after matching mixtures",
            "mean Kendall's tau",
        )
    )
    if math.isnan(after):
        return "There are no two experts to match."
    chance = max(noise, mixtures)
    cosines = (
        f"matched neurons have a mean cosine of {after:.3f}, neurons at the same place "
        f"{before:.3f}, and matched ones by chance {chance:.3f}"
    )
    order = (
        "in random order"
        if abs(tau) < 3 * numbers[DEVIATION]
        else f"in a partly kept order (Kendall's tau {tau:.2f})"
    )
    same = (
        f" One pair at least is the same up to order (mean cosine {numbers[LARGEST]:.3f})."
        if numbers[LARGEST] > SAME
        else ""
    )
    if tau > KEPT_ORDER:
        return (
            f"Neurons keep their place (Kendall's tau {tau:.2f}): experts began as copies, as Lo "
            f"et al. conclude for Mixtral from a tau of about 0.75; {cosines}."
        )
    if after - chance < CLEAR * (1 - chance):
        return (
            f"Most experts do not have the same neurons: {cosines}; matched places are {order}, "
            f"which is what Lo et al. see in models trained from scratch.{same}"
        )
    return f"Experts share neurons that lie {order}: {cosines}.{same}"

"""How early in training a token id has the experts that it has at the end.

Shapes: L layers, I ids that are shown and compared, E experts, N checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.grids import grid_table
from megatron_moe.analysis.plot import Axis, Bars, Figure, Lines, Reference, Series
from megatron_moe.analysis.result import Result
from megatron_moe.analysis.training import (
    axis_of,
    identity,
    in_order,
    left_out,
    none_to_compare,
    training_axis,
)

Array = npt.NDArray[Any]

COMPARED = 200
"""Most ids that are compared, by frequency."""
LEAST = 32
"""Occurrences of a compared id."""
DRAWN = 4
"""Ids that are drawn as bars."""


@register
class EarlyRouting(Analysis):
    """See the module."""

    key = "early_routing"
    title = "Early routing learning"
    question = "Are the experts of a token id fixed early in training?"
    definition = (
        "R[id, e], the share of an id's choices that go to expert e, at each checkpoint. Its "
        "distance to the last checkpoint is the share of choices that move (total variation), "
        "averaged over frequent ids. Two levels to compare with: the distance between different "
        "ids at the last checkpoint, which is where an id without experts of its own would be; "
        "and the noise of so many occurrences, two halves of which differ by about as much."
    )
    source = "Xue et al., OpenMoE (arXiv 2402.01739), section 4.3, figure 11"
    group = "training"
    uses = ("tokens",)
    least_choices = 10
    min_checkpoints = 2

    def compute(self, material: Material) -> Result:
        """Shares of the most frequent ids."""
        counts = material.collected["tokens"].state()
        number_V = counts["input_V"][:-1]
        order = np.argsort(-number_V, kind="stable")[:COMPARED]
        used = order[number_V[order] >= LEAST]
        chosen_LIE = counts["input_chosen_LVE"][:, used]
        total = np.maximum(chosen_LIE.sum(2, keepdims=True), 1)
        ids_I = counts["ids_V"][used]
        notes = []
        if not len(used):
            notes.append(f"No id occurs {LEAST} times; more tokens are needed to compare ids.")
        return Result(
            analysis=self.key,
            numbers={"ids compared": float(len(used))},
            arrays={
                **identity(material),
                "ids_I": ids_I,
                "occurrences_I": number_V[used],
                "pieces_I": np.array([material.model.piece(int(t)) for t in ids_I], str),
                "share_LIE": chosen_LIE / total,
            },
            notes=notes,
        )

    def combine(self, results: Mapping[str, Result]) -> Result | None:
        """Distance of each checkpoint to the last, by layer."""
        ordered = in_order(results)
        if len(ordered) < 2:
            return None
        *labels, last = ordered
        final = ordered[last].arrays
        if not len(final["ids_I"]):
            return None
        distance_NL = np.array(
            [distance(ordered[label].arrays["share_LIE"], final["share_LIE"]) for label in labels]
        )
        others_L = between_ids(final["share_LIE"])
        topk = int(final["shape"][1])
        noise_L = noise(final["share_LIE"], final["occurrences_I"], topk)
        axis, _ = axis_of(ordered)
        arrays = {
            "layers": final["layers"],
            "labels": np.array(labels),
            "distance_NL": distance_NL,
            "others_L": others_L,
            "noise_L": noise_L,
            "axis_N": np.array(axis[:-1]),
        }
        shape = distance_NL.shape
        table = grid_table(
            "distance",
            f"share of an id's choices that move until {last}, mean over {len(final['ids_I'])} ids",
            {"checkpoint": labels, "layer": final["layers"].tolist()},
            {
                "distance": distance_NL,
                "between_ids": np.broadcast_to(others_L, shape),
                "noise": np.broadcast_to(noise_L, shape),
            },
        )
        numbers = {
            f"choices of an id that move after {label}": float(distance_NL[n].mean())
            for n, label in enumerate(labels)
        }
        numbers["choices that differ between ids"] = float(others_L.mean())
        numbers["expected of noise alone"] = float(noise_L.mean())
        return Result(
            analysis=self.key,
            numbers=numbers,
            tables=[table],
            arrays=arrays,
            notes=left_out(results, ordered),
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Shares of single ids, checkpoints overlaid; distance in the course of training."""
        ordered = in_order(results)
        found = _bars(ordered)
        combined = self.combine(results)
        if combined is None:
            return found
        arrays = combined.arrays
        _, title = axis_of(ordered)
        panels = {
            f"layer {layer}": Lines(
                series=[
                    Series(
                        name="moves until the end",
                        x=arrays["axis_N"],
                        y=100 * arrays["distance_NL"][:, row],
                    )
                ],
                x=training_axis(title),
                y=Axis(title="choices of an id (%)"),
                references=[
                    Reference(value=100 * float(arrays["others_L"][row]), label="between ids"),
                    Reference(value=100 * float(arrays["noise_L"][row]), label="noise"),
                ],
                markers=True,
            )
            for row, layer in enumerate(arrays["layers"])
        }
        curve = Figure(key="distance", title="How far token ids still move", panels=panels)
        return [curve, *found]

    def reading(self, results: Mapping[str, Result]) -> str:
        """The first checkpoint, beside OpenMoE's finding."""
        combined = self.combine(results)
        if combined is None:
            return (
                none_to_compare(results)
                or "Early routing learning needs several checkpoints and ids that occur often."
            )
        arrays = combined.arrays
        moved, noise_level, others = (
            float(each.mean())
            for each in (arrays["distance_NL"][0], arrays["noise_L"], arrays["others_L"])
        )
        text = (
            f"After {arrays['labels'][0]}, {100 * moved:.0f}% of an id's choices move; different "
            f"ids differ by {100 * others:.0f}%, noise is {100 * noise_level:.0f}%"
        )
        if others < 1.5 * noise_level:
            return f"{text}. Ids have hardly any experts of their own, so there is little to learn."
        settled = (others - moved) / max(others - noise_level, 1e-9)
        if settled > 0.5:
            return f"{text}. As in OpenMoE, the experts of an id are mostly fixed by then."
        return f"{text}. Unlike in OpenMoE, most of it is learned later."


def distance(one_LIE: Array, other_LIE: Array) -> Array:
    """Total variation distance of an id's shares, mean over ids, [L]."""
    return np.asarray(0.5 * np.abs(one_LIE - other_LIE).sum(2).mean(1))


def between_ids(share_LIE: Array) -> Array:
    """The same between each id and the next ones in the list, [L]; 0 for a single id."""
    ids = share_LIE.shape[1]
    steps = range(1, min(ids, 8))
    if not steps:
        return np.zeros(len(share_LIE))
    return np.asarray(
        np.mean([distance(share_LIE, np.roll(share_LIE, s, axis=1)) for s in steps], axis=0)
    )


def noise(share_LIE: Array, occurrences_I: Array, topk: int) -> Array:
    """Distance that is expected between two samples of as many tokens of the same id, [L].

    The number of n tokens that choose an expert is binomial with probability k R, so two shares
    differ by |N(0, 2 k R (1 - k R) / n)| / k on average.
    """
    pi = np.minimum(topk * share_LIE, 1.0)
    deviation = np.sqrt(2 * pi * (1 - pi) / occurrences_I[:, None]) / topk
    return np.asarray(0.5 * np.sqrt(2 / np.pi) * deviation.sum(2).mean(1))


def _bars(ordered: Mapping[str, Result]) -> list[Figure]:
    """Figure 11 of OpenMoE, for the most frequent ids."""
    last = list(ordered.values())[-1].arrays
    found = []
    for place in range(min(DRAWN, len(last["ids_I"]))):
        panels = {}
        for row, layer in enumerate(last["layers"]):
            series = [
                Series(
                    name=label,
                    x=list(range(last["share_LIE"].shape[2])),
                    y=100 * result.arrays["share_LIE"][row, place],
                )
                for label, result in ordered.items()
                if np.array_equal(result.arrays["ids_I"], last["ids_I"])
            ]
            panels[f"layer {layer}"] = Bars(
                series=series, x=Axis(title="expert"), y=Axis(title="choices of the token (%)")
            )
        piece = last["pieces_I"][place]
        found.append(Figure(key=f"token-{place + 1}", title=f"Experts of {piece}", panels=panels))
    return found

"""How early in training the router's choices are those of the last checkpoint.

Shapes: L layers, T tokens, K choices, N checkpoints before the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.grids import grid_table
from megatron_moe.analysis.plot import Axis, Figure, Lines, Reference, Series
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

RULES = {"top-1": "first choice", "top-k": "all k choices"}


@register
class RouterSaturation(Analysis):
    """See the module."""

    key = "saturation"
    title = "Router saturation"
    question = "How early does a token get the experts that it has at the end of training?"
    definition = (
        "|E_t(x) n E_T(x)| / k, averaged over the same tokens x: the share of a token's experts at "
        "checkpoint t that it still has at the last one, T; for all k choices and for the first "
        "alone. Chance: choices with the loads of both checkpoints that do not depend on the "
        "token, sum over e of pi_t(e) pi_T(e) / k, which is k/E for equal loads. One run only, "
        "since another one numbers its experts differently: one directory, or --same-run."
    )
    source = "Muennighoff et al., OLMoE (arXiv 2409.02060), section 5.1, figure 20"
    group = "training"
    uses = ("choices",)
    least_choices = 10
    min_checkpoints = 2

    def compute(self, material: Material) -> Result:
        """The choices themselves; `combine` compares them."""
        ids_LTK = material.collected["choices"].state()["ids_LTK"]
        return Result(
            analysis=self.key,
            numbers={"tokens": float(ids_LTK.shape[1])},
            arrays={**identity(material), "ids_LTK": ids_LTK},
        )

    def combine(self, results: Mapping[str, Result]) -> Result | None:
        """Saturation of each checkpoint against the last, by layer."""
        ordered = in_order(results)
        if len(ordered) < 2:
            return None
        *labels, last = ordered
        final = ordered[last].arrays
        experts, topk = (int(each) for each in final["shape"][:2])
        layers = final["layers"].tolist()
        arrays: dict[str, Array] = {"layers": final["layers"], "labels": np.array(labels)}
        for rule, number in (("top-1", 1), ("top-k", topk)):
            pairs = [
                [
                    agreement(early[:, :number], late[:, :number], experts)
                    for early, late in zip(
                        ordered[label].arrays["ids_LTK"], final["ids_LTK"], strict=True
                    )
                ]
                for label in labels
            ]
            arrays[f"{rule}_NL"], arrays[f"{rule}_null_NL"] = np.moveaxis(np.array(pairs), 2, 0)
        axis, title = axis_of(ordered)
        arrays["axis_N"] = np.array(axis[:-1])
        axes: dict[str, Sequence[Any]] = {"checkpoint": labels, "layer": layers}
        table = grid_table(
            "saturation",
            f"share of a token's experts that it still has at {last}",
            axes,
            {
                f"{rule.replace('-', '_')}{suffix}": arrays[f"{rule}{array}_NL"]
                for rule in RULES
                for suffix, array in (("", ""), ("_chance", "_null"))
            },
        )
        notes = left_out(results, ordered)
        if title == "checkpoint":
            notes.append("Steps are unknown or equal; the last checkpoint given is the reference.")
        numbers = {
            f"{label}, {words}": float(arrays[f"{rule}_NL"][n].mean())
            for n, label in enumerate(labels)
            for rule, words in RULES.items()
        }
        numbers |= {
            f"by chance, {words}": float(arrays[f"{rule}_null_NL"].mean())
            for rule, words in RULES.items()
        }
        return Result(
            analysis=self.key, numbers=numbers, tables=[table], arrays=arrays, notes=notes
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Saturation against training, a line per layer, and against layers, one per checkpoint."""
        combined = self.combine(results)
        if combined is None:
            return []
        arrays = combined.arrays
        _, title = axis_of(in_order(results))
        over_training, over_layers = {}, {}
        y = Axis(title="experts as at the end (%)", range=(0, 100))
        for rule, words in RULES.items():
            chance = 100 * float(arrays[f"{rule}_null_NL"].mean())
            references = [Reference(value=chance, label="chance")]
            over_training[words] = Lines(
                series=[
                    Series(
                        name=f"layer {layer}",
                        x=arrays["axis_N"],
                        y=100 * arrays[f"{rule}_NL"][:, row],
                    )
                    for row, layer in enumerate(arrays["layers"])
                ],
                x=training_axis(title),
                y=y,
                references=references,
                markers=True,
            )
            over_layers[words] = Lines(
                series=[
                    Series(name=str(label), x=arrays["layers"], y=100 * arrays[f"{rule}_NL"][n])
                    for n, label in enumerate(arrays["labels"])
                ],
                x=Axis(title="layer"),
                y=y,
                references=references,
                markers=True,
            )
        return [
            Figure(
                key="saturation",
                title="Router saturation in training",
                panels=over_training,
                selector="choices",
            ),
            Figure(
                key="layers",
                title="Router saturation by layer",
                panels=over_layers,
                selector="choices",
            ),
        ]

    def reading(self, results: Mapping[str, Result]) -> str:
        """The first checkpoint, beside OLMoE and OpenMoE."""
        combined = self.combine(results)
        if combined is None:
            return (
                none_to_compare(results)
                or "One checkpoint alone shows no saturation: give several with --load."
            )
        arrays = combined.arrays
        share = float(arrays["top-k_NL"][0].mean())
        chance = float(arrays["top-k_null_NL"][0].mean())
        text = (
            f"At {arrays['labels'][0]}, a token has {100 * share:.0f}% of its final experts, "
            f"against {100 * chance:.0f}% by chance"
        )
        beyond = (share - chance) / max(1 - chance, 1e-9)
        if beyond < 0.05:
            return f"{text}: nothing is settled yet."
        by_layer = arrays["top-k_NL"][0]
        if len(by_layer) > 2 and by_layer[1:].mean() > by_layer[0] + 0.05:
            text += "; as in OLMoE, the first layer settles last"
        if beyond > 0.5:
            return f"{text}. As in OLMoE and OpenMoE, routing is settled early."
        return f"{text}. Most of the routing is still to be learned."


def agreement(early_TK: Array, late_TK: Array, experts: int) -> tuple[float, float]:
    """Mean overlap of two checkpoints' choices as a share of K, and its chance level.

    Args:
        early_TK: choices of one.
        late_TK: choices of the other for the same tokens.
        experts: E.
    """
    tokens, topk = early_TK.shape
    shared = sum(
        int(np.count_nonzero(early_TK[:, i] == late_TK[:, j]))
        for i in range(topk)
        for j in range(topk)
    )
    loads = [np.bincount(each.ravel(), minlength=experts) / tokens for each in (early_TK, late_TK)]
    return shared / (tokens * topk), float(loads[0] @ loads[1]) / topk

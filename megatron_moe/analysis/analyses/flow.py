"""Which expert of the next layer follows which one, and how far it can be predicted.

Shapes: M pairs of consecutive analysed layers, E experts, R draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.grids import figure_key, figure_title
from megatron_moe.analysis.nulls import p_value
from megatron_moe.analysis.plot import Axis, Figure, Flow, Heatmap
from megatron_moe.analysis.result import Result, Table

Array = npt.NDArray[Any]

LISTED = 50
"""Transitions of a pair of layers in the table, and flows that are drawn."""
COUNTS = {
    "first": "first choice to first choice",
    "all": "every choice to every choice",
    "slots": "as published: choices of equal rank",
}


@register
class CrossLayerFlow(Analysis):
    """See the module."""

    key = "flow"
    title = "Flow between layers"
    question = "Do tokens of one expert go on to certain experts of the next layer?"
    definition = (
        "Tokens by first choice in a layer and in the next analysed one. The strength is the share "
        "of tokens that would have to choose otherwise for the two choices to be independent; "
        "chance: the same for tables drawn from independent choices with these loads. As "
        "published: counts of all k choices pair those of equal rank only, k of the k^2 pairs of a "
        "token."
    )
    source = "Muennighoff et al., OLMoE (arXiv 2409.02060), appendix, figures 33 to 36"
    group = "routing"
    uses = ("flow",)
    least_choices = 10

    def compute(self, material: Material) -> Result:
        """Counts, strength and the most preferred transitions."""
        setting = material.setting
        counts = material.collected["flow"].state()
        rng = np.random.default_rng(setting.seed)
        layers = setting.layers
        arrays: dict[str, Array] = {
            "from_M": np.array(layers[:-1], np.int64),
            "to_M": np.array(layers[1:], np.int64),
        }
        for name in COUNTS:
            table_MEE = counts[f"{name}_MEE"]
            arrays[f"{name}_MEE"] = table_MEE
            arrays[f"{name}_strength_M"] = np.array([strength_of(each) for each in table_MEE])
        null_MR = np.array(
            [
                [strength_of(each) for each in independent(table_EE, material.draws, rng)]
                for table_EE in counts["first_MEE"]
            ]
        ).reshape(len(layers) - 1, material.draws)
        arrays["null_M"] = null_MR.mean(1) if len(null_MR) else np.zeros(0)
        arrays["null_high_M"] = np.quantile(null_MR, 0.95, axis=1) if len(null_MR) else np.zeros(0)
        notes = []
        if len(layers) < 2:
            notes.append("One MoE layer was analysed, so there is no flow between layers.")
        numbers = {
            "strength": _mean(arrays["first_strength_M"]),
            "strength by chance": _mean(arrays["null_M"]),
            "p-value of the strength": _p_value(arrays["first_strength_M"], null_MR),
            "strength over every choice": _mean(arrays["all_strength_M"]),
            "strength as published, equal ranks only": _mean(arrays["slots_strength_M"]),
        }
        return Result(
            analysis=self.key,
            numbers=numbers,
            tables=[_strengths(arrays), _transitions(arrays)],
            arrays=arrays,
            notes=notes,
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Flows and shares of each pair of layers."""
        found = []
        for label, result in results.items():
            if not len(result.arrays["from_M"]):
                continue
            found.append(
                Figure(
                    key=figure_key("flow", label, results),
                    title=figure_title("First choices from layer to layer", label, results),
                    panels=_flows(result),
                    selector="layers",
                    caption=f"The {LISTED} largest flows.",
                )
            )
            for name in COUNTS:
                found.append(
                    Figure(
                        key=figure_key(f"transitions-{name}", label, results),
                        title=figure_title(f"Next experts, {COUNTS[name]}", label, results),
                        panels=_heatmaps(result, name),
                        selector="layers",
                    )
                )
        return found

    def reading(self, results: Mapping[str, Result]) -> str:
        """Strength against chance."""
        return " ".join(_sentence(label, result) for label, result in results.items())


def expected(table_EE: Array) -> Array:
    """The table of independent choices with the same sums."""
    total = max(int(table_EE.sum()), 1)
    return np.outer(table_EE.sum(1), table_EE.sum(0)) / total


def strength_of(table_EE: Array) -> float:
    """Total variation distance between a table and that of independent choices."""
    return float(0.5 * np.abs(table_EE - expected(table_EE)).sum() / max(int(table_EE.sum()), 1))


def independent(table_EE: Array, draws: int, rng: np.random.Generator) -> Array:
    """Tables that are drawn from independent choices, [R, E, E]."""
    mean_EE = expected(table_EE)
    total = int(table_EE.sum())
    probability = mean_EE.ravel() / max(mean_EE.sum(), 1)
    if total == 0:
        return np.zeros((draws, *table_EE.shape), np.int64)
    probability = probability / probability.sum()
    return rng.multinomial(total, probability, size=draws).reshape(draws, *table_EE.shape)


def _p_value(strength_M: Array, null_MR: Array) -> float:
    return p_value(strength_M.mean(), null_MR.mean(0)) if len(strength_M) else float("nan")


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _strengths(arrays: Mapping[str, Array]) -> Table:
    columns = {
        "layer": arrays["from_M"].tolist(),
        "next_layer": arrays["to_M"].tolist(),
        "strength": arrays["first_strength_M"].tolist(),
        "chance": arrays["null_M"].tolist(),
        "chance_95": arrays["null_high_M"].tolist(),
        "strength_all_choices": arrays["all_strength_M"].tolist(),
        "strength_as_published": arrays["slots_strength_M"].tolist(),
    }
    about = "share of tokens whose next choice depends on the one before"
    return Table(name="strength", about=about, columns=columns)


def _transitions(arrays: Mapping[str, Array]) -> Table:
    names = ("layer", "expert", "next_layer", "next_expert", "tokens", "share", "lift")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for row, (one, other) in enumerate(
        zip(arrays["from_M"].tolist(), arrays["to_M"].tolist(), strict=True)
    ):
        table_EE = arrays["first_MEE"][row]
        excess_EE = table_EE - expected(table_EE)
        for flat in np.argsort(-excess_EE, axis=None, kind="stable")[:LISTED].tolist():
            i, j = divmod(flat, table_EE.shape[1])
            if table_EE[i, j] == 0:
                continue
            cells = (one, i, other, j, int(table_EE[i, j]))
            share = table_EE[i, j] / table_EE[i].sum()
            lift = table_EE[i, j] / expected(table_EE)[i, j]
            for name, cell in zip(names, (*cells, float(share), float(lift)), strict=True):
                columns[name].append(cell)
    about = (
        f"the {LISTED} transitions of first choices furthest above independence; share: of the "
        "tokens of `expert`"
    )
    return Table(name="transitions", about=about, columns=columns)


def _name(result: Result, row: int) -> str:
    return f"layers {result.arrays['from_M'][row]} to {result.arrays['to_M'][row]}"


def _flows(result: Result) -> dict[str, Flow]:
    panels = {}
    for row, table_EE in enumerate(result.arrays["first_MEE"]):
        names = [str(e) for e in range(len(table_EE))]
        least = np.sort(table_EE, axis=None)[-min(LISTED, table_EE.size)]
        panels[_name(result, row)] = Flow(
            columns=[names, names],
            titles=[f"layer {result.arrays[end][row]}" for end in ("from_M", "to_M")],
            flows=[np.where(table_EE >= max(least, 1), table_EE, 0)],
        )
    return panels


def _heatmaps(result: Result, name: str) -> dict[str, Heatmap]:
    panels = {}
    for row, table_EE in enumerate(result.arrays[f"{name}_MEE"]):
        names = [str(e) for e in range(len(table_EE))]
        total_E1 = table_EE.sum(1, keepdims=True)
        share = np.divide(
            table_EE, total_E1, out=np.full(table_EE.shape, np.nan), where=total_E1 > 0
        )
        panels[_name(result, row)] = Heatmap(
            values=100 * share,
            rows=names,
            columns=names,
            x=Axis(title=f"expert of layer {result.arrays['to_M'][row]}"),
            y=Axis(title=f"expert of layer {result.arrays['from_M'][row]}"),
            colour="choices of the next layer (%)",
        )
    return panels


def _sentence(label: str, result: Result) -> str:
    if not len(result.arrays["from_M"]):
        return f"{label}: one layer has no flow."
    strength, null = result.numbers["strength"], result.numbers["strength by chance"]
    text = (
        f"{label}: the choice in the next layer depends on the one before for "
        f"{100 * strength:.1f}% of tokens, against {100 * null:.1f}% by chance"
    )
    if result.numbers["p-value of the strength"] >= 0.05:
        return f"{text}: layers route independently of each other."
    return f"{text}. As in OLMoE's diagrams, certain experts hand tokens on to certain others."

"""Figures 9 and 13 of OpenMoE: whether a position in the row prefers certain experts.

Shapes: L layers, P positions (buckets where rows are very long), E experts, D domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.collectors.positions import width_of
from megatron_moe.analysis.grids import (
    figure_key,
    figure_title,
    grid_table,
    layer_lines,
    mean_of,
    series_name,
)
from megatron_moe.analysis.plot import Axis, Figure, Heatmap, Lines, Reference, Series
from megatron_moe.analysis.result import Result
from megatron_moe.analysis.spread import beyond_chance, fixed_experts, spread, spread_by_chance

Array = npt.NDArray[Any]

SHOWN = 64
"""Positions of the heat map: groups of neighbouring ones beyond."""
FEW_ROWS = 100


@register
class PositionSpread(Analysis):
    """See the module."""

    key = "positions"
    title = "Spread over experts by position"
    question = "Does the position in the text decide the expert?"
    definition = (
        "R[p, e]: the share of the choices at position p that go to expert e. The spread of a "
        "position is the standard deviation of R[p, :] over the experts: 0 for uniform routing, "
        "sqrt(1/(k E) - 1/E^2) if the same k experts are always chosen (0.121 for two of 32). "
        "Chance: as many tokens drawn from all positions, with their unequal loads."
    )
    source = "Xue et al., OpenMoE (arXiv 2402.01739), figures 9 and 13"
    group = "routing"
    uses = ("positions",)
    least_choices = 10

    def compute(self, material: Material) -> Result:
        """Spread by layer and position."""
        setting = material.setting
        counts = material.collected["positions"].state()
        topk, experts = setting.sizes.topk, setting.sizes.num_experts
        size_P = counts["tokens_DP"].sum(0)
        tokens = int(size_P.sum())
        found, null, beyond = [], [], []
        for chosen_PE in counts["chosen_LPE"]:
            found.append(spread(chosen_PE))
            null.append(spread_by_chance(chosen_PE.sum(0), tokens, topk, size_P))
            beyond.append(beyond_chance(found[-1], null[-1]))
        width = width_of(setting)
        position_P = np.arange(len(size_P)) * width
        groups = np.array_split(np.arange(len(size_P)), min(SHOWN, len(size_P)))
        shown_LQE = np.stack([counts["chosen_LPE"][:, g].sum(1) for g in groups], 1)
        arrays = {
            "layers": np.array(setting.layers),
            "positions": position_P,
            "spread_LP": np.stack(found),
            "null_LP": np.stack(null),
            "beyond_L": np.array(beyond),
            "fixed_L": np.full(len(found), fixed_experts(topk, experts)),
            "share_LQE": shown_LQE / np.maximum(shown_LQE.sum(2, keepdims=True), 1),
            "shown_Q": position_P[[g[0] for g in groups]],
            **_paper_positions(counts["chosen_LPE"], setting.sample.seq_length, width),
        }
        notes = []
        rows = int(size_P.max()) // width
        if rows < FEW_ROWS:
            notes.append(
                f"Each position was seen {rows} times; below {FEW_ROWS} rows most of the spread "
                "is noise, which the chance level contains."
            )
        if width > 1:
            notes.append(f"Counts are by {width} neighbouring positions, to bound memory.")
        table = grid_table(
            "spread",
            "standard deviation over experts of the shares of choices at a position",
            {"layer": setting.layers, "position": position_P.tolist()},
            {"spread": arrays["spread_LP"], "chance": arrays["null_LP"]},
        )
        numbers = {
            "mean spread": float(np.nanmean(arrays["spread_LP"])),
            "mean spread by chance": float(np.nanmean(arrays["null_LP"])),
            "spread beyond chance": float(np.mean(beyond)),
            "spread of fixed experts": fixed_experts(topk, experts),
            "spread of uniform routing": 0.0,
        }
        return Result(
            analysis=self.key, numbers=numbers, tables=[table], arrays=arrays, notes=notes
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Spread by position, that beyond chance by layer, and shares as heat maps."""
        axis = Axis(title="spread over experts beyond chance")
        beyond = layer_lines(results, {"observed": "beyond_L"}, {"fixed experts": "fixed_L"}, axis)
        found = [
            _curves(results),
            Figure(key="layers", title="Spread of positions by layer", panels={"all": beyond}),
        ]
        for label, result in results.items():
            found.append(_heatmaps(label, result, results))
        return found

    def reading(self, results: Mapping[str, Result]) -> str:
        """Spread beyond chance against that of fixed experts."""
        return " ".join(_sentence(label, result) for label, result in results.items())


def _paper_positions(chosen_LPE: Array, length: int, width: int) -> dict[str, Array]:
    """Shares at the positions of figure 9: every eighth of the row, and the first and its next."""
    step = max(1, length // 8)
    spaced = {step * i for i in range(1, 8)}
    places = sorted(p for p in spaced | set(range(step, step + 4)) if p < length)
    chosen_LWE = chosen_LPE[:, [p // width for p in places]]
    share_LWE = chosen_LWE / np.maximum(chosen_LWE.sum(2, keepdims=True), 1)
    return {"paper_positions_W": np.array(places, np.int64), "paper_share_LWE": share_LWE}


def _curves(results: Mapping[str, Result]) -> Figure:
    first = next(iter(results.values()))
    layers = sorted({int(x) for result in results.values() for x in result.arrays["layers"]})
    panels = {}
    for layer in layers:
        series, references = [], [Reference(value=0.0, label="uniform")]
        for label, result in results.items():
            place = np.flatnonzero(result.arrays["layers"] == layer)
            if not len(place):
                continue
            for name, array in (("observed", "spread_LP"), ("chance", "null_LP")):
                series.append(
                    Series(
                        name=series_name(name, label, results),
                        x=result.arrays["positions"],
                        y=result.arrays[array][place[0]],
                        dashed=name == "chance",
                        group=label,
                    )
                )
            if len(results) == 1:
                mean = float(np.nanmean(result.arrays["spread_LP"][place[0]]))
                references.append(Reference(value=mean, label="mean"))
        panels[f"layer {layer}"] = Lines(
            series=series,
            x=Axis(title="position"),
            y=Axis(title="standard deviation over experts"),
            references=references,
        )
    fixed = first.numbers["spread of fixed experts"]
    return Figure(
        key="spread",
        title="Spread over experts by position",
        panels=panels,
        caption=f"Fixed experts would give {fixed:.3f}.",
    )


def _heatmaps(label: str, result: Result, results: Mapping[str, Result]) -> Figure:
    arrays = result.arrays
    experts = arrays["share_LQE"].shape[2]
    panels = {
        f"layer {layer}": Heatmap(
            values=100 * arrays["share_LQE"][row].T,
            rows=[str(e) for e in range(experts)],
            columns=[str(p) for p in arrays["shown_Q"]],
            x=Axis(title="position"),
            y=Axis(title="expert"),
            colour="choices (%)",
        )
        for row, layer in enumerate(arrays["layers"])
    }
    return Figure(
        key=figure_key("shares", label, results),
        title=figure_title("Experts by position", label, results),
        panels=panels,
    )


def _sentence(label: str, result: Result) -> str:
    beyond, fixed = mean_of(result, "beyond_L"), result.numbers["spread of fixed experts"]
    share = 100 * beyond / fixed if fixed else 0.0
    text = (
        f"{label}: the spread of positions beyond chance is {beyond:.4f}, {share:.0f}% of what "
        "fixed experts would give"
    )
    if share < 10:
        return f"{text}. As in OpenMoE, experts do not specialize in positions."
    return f"{text}. Unlike in OpenMoE, the position matters."

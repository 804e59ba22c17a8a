"""Which tokens lose their experts to full capacity.

Shapes: L layers, D domains, P positions, Q groups of positions, K choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.grids import figure_key, figure_title, grid_table
from megatron_moe.analysis.plot import Axis, Figure, Lines, Reference, Series
from megatron_moe.analysis.result import Result

Array = npt.NDArray[Any]

GROUPS_SHOWN = 32
"""Groups of neighbouring positions in plots and tables."""
KINDS = {"any": "at least one choice", "all": "all choices"}


@register
class Drops(Analysis):
    """See the module."""

    key = "drops"
    title = "Drops by position"
    question = "Are later tokens dropped more often?"
    definition = (
        "The share of tokens at a position that lost at least one of their choices, or all, "
        "because an expert's capacity was full, for each domain. Chance: the same share at every "
        "position. The ratio compares the last quarter of the row with the first."
    )
    source = "Xue et al., OpenMoE (arXiv 2402.01739), section 4.4, figure 12"
    group = "routing"
    uses = ("positions",)
    least_choices = 10

    def compute(self, material: Material) -> Result:
        """Shares by layer, domain and group of positions; ratio of last to first quarter."""
        setting = material.setting
        counts = material.collected["positions"].state()
        tokens_DP = counts["tokens_DP"]
        positions = tokens_DP.shape[1]
        groups = np.array_split(np.arange(positions), min(GROUPS_SHOWN, positions))
        size_DQ = np.stack([tokens_DP[:, g].sum(1) for g in groups], 1)
        width = setting.sample.seq_length / positions
        arrays: dict[str, Array] = {
            "layers": np.array(setting.layers),
            "domains": np.array(setting.sample.names),
            "positions": np.array([g.mean() * width for g in groups]),
        }
        for kind in KINDS:
            count = counts[f"{kind}_LDP"]
            grouped = np.stack([count[:, :, g].sum(2) for g in groups], 2)
            arrays[f"{kind}_LDQ"] = grouped / size_DQ
            arrays[f"{kind}_mean_LD"] = count.sum(2) / tokens_DP.sum(1)
        arrays["by_rank_LDK"] = counts["dropped_LDK"] / tokens_DP.sum(1)[:, None]
        quarter = max(1, positions // 4)
        ends = [slice(0, quarter), slice(positions - quarter, positions)]
        first, last = (counts["any_LDP"][:, :, each].sum((0, 1)).sum() for each in ends)
        of_first, of_last = (tokens_DP[:, each].sum() * len(setting.layers) for each in ends)
        low, high = first / of_first, last / of_last
        error = np.sqrt(low * (1 - low) / of_first + high * (1 - high) / of_last)
        numbers = {
            "tokens that lost a choice": float(arrays["any_mean_LD"].mean()),
            "tokens that lost all choices": float(arrays["all_mean_LD"].mean()),
            "lost a choice in the first quarter of the row": float(low),
            "lost a choice in the last quarter of the row": float(high),
            "last quarter over first": float(high / low) if low else float("nan"),
            "z-score of the difference": float((high - low) / error) if error else 0.0,
        }
        notes = []
        if not counts["any_LDP"].any():
            notes.append("No choice was dropped: the model has no capacity limit or never met it.")
        axes: dict[str, Sequence[Any]] = {
            "layer": setting.layers,
            "domain": setting.sample.names,
        }
        by_position = grid_table(
            "by_position",
            "share of the tokens around a position that lost at least one choice, or all",
            {**axes, "position": arrays["positions"].tolist()},
            {"any_dropped": arrays["any_LDQ"], "all_dropped": arrays["all_LDQ"]},
        )
        by_rank = grid_table(
            "by_rank",
            "share of tokens whose choice of this rank, from 1, was dropped",
            {**axes, "rank": range(1, setting.sizes.topk + 1)},
            {"dropped": arrays["by_rank_LDK"]},
        )
        return Result(
            analysis=self.key,
            numbers=numbers,
            tables=[by_position, by_rank],
            arrays=arrays,
            notes=notes,
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Drop rate against position by domain: a panel per layer, a figure per checkpoint."""
        return [
            Figure(
                key=figure_key(f"dropped-{kind}", label, results),
                title=figure_title(f"Tokens that lost {words}", label, results),
                panels=_panels(result, kind),
            )
            for label, result in results.items()
            for kind, words in KINDS.items()
        ]

    def reading(self, results: Mapping[str, Result]) -> str:
        """First against last quarter, beside OpenMoE's finding."""
        return " ".join(_sentence(label, result) for label, result in results.items())


def _panels(result: Result, kind: str) -> dict[str, Lines]:
    arrays = result.arrays
    return {
        f"layer {layer}": Lines(
            series=[
                Series(
                    name=str(domain),
                    x=arrays["positions"],
                    y=100 * arrays[f"{kind}_LDQ"][row, d],
                    group=str(domain),
                )
                for d, domain in enumerate(arrays["domains"])
            ],
            x=Axis(title="position"),
            y=Axis(title="tokens (%)"),
            references=[
                Reference(
                    value=100 * float(arrays[f"{kind}_mean_LD"][row].mean()),
                    label="the same everywhere",
                )
            ],
        )
        for row, layer in enumerate(arrays["layers"])
    }


def _sentence(label: str, result: Result) -> str:
    rate = 100 * result.numbers["tokens that lost a choice"]
    if not rate:
        return f"{label}: no choice was dropped."
    first, last = (
        100 * result.numbers[f"lost a choice in the {end} quarter of the row"]
        for end in ("first", "last")
    )
    text = (
        f"{label}: {rate:.1f}% of tokens lost a choice, {first:.1f}% in the first and {last:.1f}% "
        "in the last quarter of the row"
    )
    z = result.numbers["z-score of the difference"]
    if z > 3 and last > 1.1 * first:
        return f"{text}: drop towards the end, as in OpenMoE."
    if z < -3 and first > 1.1 * last:
        return f"{text}: unlike in OpenMoE, early tokens are dropped more."
    return f"{text}: unlike in OpenMoE, the position makes little difference."

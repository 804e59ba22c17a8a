"""Figures 10 and 14 of OpenMoE: which experts a token id prefers, and whose tokens are whose.

Shapes: L layers, V ids that occur often enough, E experts, I ids that are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.grids import figure_key, figure_title, layer_lines, mean_of
from megatron_moe.analysis.plot import Axis, Figure, Heatmap, Reference, Scatter, Series
from megatron_moe.analysis.result import Result, Table
from megatron_moe.analysis.spread import beyond_chance, fixed_experts, spread, spread_by_chance

Array = npt.NDArray[Any]

LEAST = 129
"""Occurrences of an id: the paper takes those with more than 128."""
FALLBACKS = (LEAST, 64, 32, 16)
FEW_IDS = 10
TOP = 10
"""Tokens of an expert in the table."""
SHOWN, LISTED = 30, 200
"""Ids of the heat map, and ids of a layer in the table."""


@register
class TokenSpread(Analysis):
    """See the module."""

    key = "tokens"
    title = "Spread over experts by token id"
    question = "Does a token id prefer certain experts, and which ids does an expert get?"
    definition = (
        "R[id, e]: the share of the choices of a token id that go to expert e, for ids that occur "
        "more than 128 times. Its spread is the standard deviation over the experts: 0 for uniform "
        "routing, sqrt(1/(k E) - 1/E^2) if an id always has the same k experts (0.121 for two of "
        "32). Chance: as many tokens drawn from all. Top tokens of an expert: those that make up "
        "most of its choices."
    )
    source = "Xue et al., OpenMoE (arXiv 2402.01739), figures 10 and 14, tables 9 and 10"
    group = "routing"
    uses = ("tokens",)
    least_choices = 10

    def compute(self, material: Material) -> Result:
        """Spread of the frequent ids; top tokens of each expert."""
        setting = material.setting
        counts = material.collected["tokens"].state()
        topk, experts = setting.sizes.topk, setting.sizes.num_experts
        number_V, tokens = counts["input_V"][:-1], int(counts["input_V"].sum())
        least = next((n for n in FALLBACKS if (number_V >= n).sum() >= FEW_IDS), FALLBACKS[-1])
        used = np.flatnonzero(number_V >= least)
        used = used[np.argsort(-number_V[used], kind="stable")]
        shape = (len(setting.layers), len(used))
        found, null = np.full(shape, np.nan), np.full(shape, np.nan)
        share_LIE = np.full((len(setting.layers), min(SHOWN, len(used)), experts), np.nan)
        for row in range(len(setting.layers)):
            table_VE = counts["input_chosen_LVE"][row]
            found[row] = spread(table_VE[used])
            null[row] = spread_by_chance(table_VE.sum(0), tokens, topk, number_V[used])
            shown = table_VE[used[:SHOWN]]
            share_LIE[row] = shown / np.maximum(shown.sum(1, keepdims=True), 1)
        beyond = [beyond_chance(*each) for each in zip(found, null, strict=True)]
        ids_V = counts["ids_V"][used]
        arrays = {
            "layers": np.array(setting.layers),
            "ids_V": ids_V,
            "occurrences_V": number_V[used],
            "spread_LV": found,
            "null_LV": null,
            "beyond_L": np.array(beyond),
            "fixed_L": np.full(len(beyond), fixed_experts(topk, experts)),
            "share_LIE": share_LIE,
            "pieces_I": np.array([material.model.piece(int(t)) for t in ids_V[:SHOWN]], str),
        }
        notes = []
        if len(used) == 0:
            notes.append(
                f"No id occurs {least} times, so there is no spread; more tokens are needed."
            )
        elif least < LEAST:
            notes.append(
                f"Fewer than {FEW_IDS} ids occur more than 128 times, the paper's minimum; ids "
                f"with at least {least} occurrences are used."
            )
        numbers = {
            "ids": float(len(used)),
            "least occurrences": float(least),
            "mean spread": _mean(found),
            "mean spread by chance": _mean(null),
            "spread beyond chance": _mean(np.array(beyond)),
            "spread of fixed experts": fixed_experts(topk, experts),
            "spread of uniform routing": 0.0,
        }
        return Result(
            analysis=self.key,
            numbers=numbers,
            tables=[_spread_table(material, arrays), _top_tokens(material, counts)],
            arrays=arrays,
            notes=notes,
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Spread by id, that beyond chance by layer, shares of frequent ids."""
        axis = Axis(title="spread over experts beyond chance")
        beyond = layer_lines(results, {"observed": "beyond_L"}, {"fixed experts": "fixed_L"}, axis)
        found = [Figure(key="layers", title="Spread of token ids by layer", panels={"all": beyond})]
        for label, result in results.items():
            if len(result.arrays["ids_V"]):
                found += [_points(label, result, results), _heatmaps(label, result, results)]
        return found

    def reading(self, results: Mapping[str, Result]) -> str:
        """Spread beyond chance against that of fixed experts."""
        return " ".join(_sentence(label, result) for label, result in results.items())


def _mean(values: Array) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _spread_table(material: Material, arrays: Mapping[str, Array]) -> Table:
    number = min(LISTED, len(arrays["ids_V"]))
    ids = arrays["ids_V"][:number].tolist()
    layers = arrays["layers"].tolist()
    columns: dict[str, list[Any]] = {
        "layer": [layer for layer in layers for _ in ids],
        "token": ids * len(layers),
        "piece": [material.model.piece(t) for t in ids] * len(layers),
        "occurrences": arrays["occurrences_V"][:number].tolist() * len(layers),
        "spread": arrays["spread_LV"][:, :number].ravel().tolist(),
        "chance": arrays["null_LV"][:, :number].ravel().tolist(),
    }
    about = f"standard deviation over experts of an id's shares of choices; the {LISTED} commonest"
    return Table(name="spread", about=about, columns=columns)


def _top_tokens(material: Material, counts: Mapping[str, Array]) -> Table:
    names = (
        *("layer", "expert", "rank", "token", "piece", "choices"),
        *("share_of_expert", "share_of_token"),
    )
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for row, layer in enumerate(material.setting.layers):
        table_VE = counts["input_chosen_LVE"][row]
        load_E = table_VE.sum(0)
        order_VE = np.argsort(-table_VE[:-1], axis=0, kind="stable")[:TOP]
        for expert in range(table_VE.shape[1]):
            for rank, v in enumerate(order_VE[:, expert].tolist()):
                chosen = int(table_VE[v, expert])
                if not chosen:
                    break
                token = int(counts["ids_V"][v])
                cells = (layer, expert, rank + 1, token, material.model.piece(token), chosen)
                shares = (chosen / int(load_E[expert]), chosen / int(counts["input_V"][v]))
                for name, cell in zip(names, (*cells, *shares), strict=True):
                    columns[name].append(cell)
    about = (
        f"the {TOP} ids with most choices of each expert, as shares of the expert's choices and of "
        "the id's occurrences"
    )
    return Table(name="top_tokens", about=about, columns=columns)


def _points(label: str, result: Result, results: Mapping[str, Result]) -> Figure:
    arrays = result.arrays
    order = np.argsort(arrays["ids_V"])
    fixed = result.numbers["spread of fixed experts"]
    panels = {
        f"layer {layer}": Scatter(
            series=[
                Series(
                    name="token ids", x=arrays["ids_V"][order], y=arrays["spread_LV"][row, order]
                ),
                Series(
                    name="chance",
                    x=arrays["ids_V"][order],
                    y=arrays["null_LV"][row, order],
                    dashed=True,
                ),
            ],
            x=Axis(title="token id"),
            y=Axis(title="standard deviation over experts"),
            references=[
                Reference(value=0.0, label="uniform"),
                Reference(value=float(arrays["spread_LV"][row].mean()), label="mean"),
                Reference(value=fixed, label="fixed experts"),
            ],
        )
        for row, layer in enumerate(arrays["layers"])
    }
    return Figure(
        key=figure_key("spread", label, results),
        title=figure_title("Spread over experts by token id", label, results),
        panels=panels,
    )


def _heatmaps(label: str, result: Result, results: Mapping[str, Result]) -> Figure:
    arrays = result.arrays
    experts = arrays["share_LIE"].shape[2]
    panels = {
        f"layer {layer}": Heatmap(
            values=100 * arrays["share_LIE"][row],
            rows=[str(piece) for piece in arrays["pieces_I"]],
            columns=[str(e) for e in range(experts)],
            x=Axis(title="expert"),
            y=Axis(title="token"),
            colour="choices of the token (%)",
        )
        for row, layer in enumerate(arrays["layers"])
    }
    return Figure(
        key=figure_key("shares", label, results),
        title=figure_title("Experts of the most frequent tokens", label, results),
        panels=panels,
    )


def _sentence(label: str, result: Result) -> str:
    if not len(result.arrays["ids_V"]):
        return f"{label}: no token id occurs often enough."
    beyond, fixed = mean_of(result, "beyond_L"), result.numbers["spread of fixed experts"]
    share = 100 * beyond / fixed if fixed else 0.0
    text = (
        f"{label}: the spread of token ids beyond chance is {beyond:.3f}, {share:.0f}% of what "
        "fixed experts would give"
    )
    if share < 10:
        return f"{text}. Unlike in OpenMoE, token ids hardly matter."
    return f"{text}. As in OpenMoE, token ids have experts of their own."

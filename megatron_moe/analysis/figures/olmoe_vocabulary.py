"""Vocabulary specialization in OLMoE's figures 23 and 30 to 32 and table 8.

Shapes: L layers, X kinds of tokens, C minimum counts, E experts, B bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.paper import Drawn, Given, Missing
from megatron_moe.analysis.plot import Axis, Bars, Figure, Lines, Panel, Reference, Series
from megatron_moe.analysis.result import Result, Table

Array = npt.NDArray[Any]

EXPERTS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 27, 37, 58)
"""Experts of the right panel of figure 23; models with up to as many show all."""
SHARES = (0, 4, 7)
"""Experts of figure 32."""
KINDS = ("Input token ID", "Ground-truth output token ID", "Predicted output token ID")
"""In the order of the stored arrays: input, next, predicted."""


def shown_layers(count: int) -> list[int]:
    """Rows of the first, a middle and the last layer: 0, 7 and 15 of 16."""
    return sorted({0, (count - 1) // 2, count - 1})


def named_figure(
    number: str, label: str, what: str, panels: dict[str, Panel], **more: str
) -> Figure:
    """A figure of the paper.

    Args:
        number: of the paper.
        label: of the checkpoint.
        what: which of the paper's panels it is; empty if it is the only one.
        panels: of it.
        more: further fields of `Figure`.
    """
    parts = [number, what, label] if what else [number, label]
    key = "-".join([number.lower().replace(",", "").replace(" ", "-"), *parts[1:]])
    title = ", ".join(parts)
    return Figure(key=key, title=title, panels=panels, **more)


def shown_experts(count: int) -> list[int]:
    """Experts of the right panel of figure 23, of so many."""
    if count <= len(EXPERTS):
        return list(range(count))
    return [expert for expert in EXPERTS if expert < count]


def vocabulary(number: str, rule: str) -> Callable[[Given], Drawn]:
    """Specialization by layer, and by expert in a middle layer.

    Args:
        number: of the paper.
        rule: `first` choice, or all that are `chosen`.
    """

    def draw(given: Given) -> Drawn:
        made, notes = [], []
        for label, result in given.of("vocabulary").items():
            more = {"selector": "count", "caption": "Dashed: groups of as many tokens from all."}
            made.append(named_figure(number, label, "per layer", _by_layer(result, rule), **more))
            made.append(_by_expert(number, label, result, rule))
            experts = shown_experts(result.arrays[f"{rule}_experts_LXCE"].shape[3])
            if experts == list(range(len(experts))):
                notes.append(
                    f"{label} has the experts 0 to {len(experts) - 1} of the paper's panel: there "
                    "“as published” and “own experts” are equal."
                )
        return Drawn(figures=made, notes=notes)

    return draw


def _by_layer(result: Result, rule: str) -> dict[str, Panel]:
    panels: dict[str, Panel] = {}
    for name, column in (("as published", 0), ("exact: at least 10 occurrences", 1)):
        series = []
        for kind, words in enumerate(KINDS):
            for suffix, dashed in (("", False), ("_null", True)):
                y = 100 * result.arrays[f"{rule}{suffix}_LXC"][:, kind, column]
                title = f"{words}, chance" if dashed else words
                x = result.arrays["layers"].tolist()
                series.append(Series(name=title, x=x, y=y, group=words, dashed=dashed))
        panels[name] = Lines(
            series=series,
            x=Axis(title="Layer ID"),
            y=Axis(title="Vocabulary specialization (%)"),
            markers=True,
        )
    return panels


def _by_expert(number: str, label: str, result: Result, rule: str) -> Figure:
    """Bars of each expert, with the mean of each kind of token."""
    row = shown_layers(len(result.arrays["layers"]))[-2:][0]
    values_XCE = 100 * result.arrays[f"{rule}_experts_LXCE"][row]
    means_XC = 100 * result.arrays[f"{rule}_LXC"][row]
    shown = shown_experts(values_XCE.shape[2])
    first = list(range(len(shown)))
    panels: dict[str, Panel] = {}
    for name, column, of_outputs in (
        ("as published", 0, first),
        ("own experts", 0, shown),
        ("exact: at least 10 occurrences", 1, shown),
    ):
        experts_X = (shown, of_outputs, of_outputs)
        panels[name] = Bars(
            series=[
                Series(name=words, x=[str(e) for e in shown], y=values_XCE[kind, column, experts])
                for kind, (words, experts) in enumerate(zip(KINDS, experts_X, strict=True))
            ],
            x=Axis(title="Expert ID"),
            y=Axis(title="Vocabulary specialization (%)"),
            references=[
                Reference(value=float(means_XC[kind, column]), label=f"mean, {words}")
                for kind, words in enumerate(KINDS)
                if np.isfinite(means_XC[kind, column])
            ],
        )
    what = f"per expert in layer {result.arrays['layers'][row]}"
    return named_figure(number, label, what, panels, selector="values")


def id_shares(given: Given) -> Drawn:
    """Figure 32: ids of the last layer by their share of an expert."""
    made = []
    for label, result in given.of("vocabulary").items():
        shares_EB, layer = result.arrays["shares_LEB"][-1], result.arrays["layers"][-1]
        bins = shares_EB.shape[1]
        uniform = result.numbers["uniform share of occurrences, k/E"]
        panels: dict[str, Panel] = {}
        for expert in (e for e in SHARES if e < len(shares_EB)):
            total = max(1, int(shares_EB[expert].sum()))
            starts = [100 * i / bins for i in range(bins)]
            panels[f"Expert {expert}"] = Bars(
                series=[Series(name="token ids", x=starts, y=100 * shares_EB[expert] / total)],
                x=Axis(title="Routing Probability (%), from"),
                y=Axis(title="Frequency (normalized %)"),
            )
        more = {"selector": "expert", "caption": f"Uniform routing: {100 * uniform:.1f}%."}
        made.append(named_figure("Figure 32", label, f"layer {layer}", panels, **more))
    note = (
        "Input ids that chose the expert at least 8 times. The paper has a panel for each dataset; "
        "this is all of --data together."
    )
    return Drawn(figures=made, notes=[note])


def tokens_of_experts(given: Given) -> Drawn:
    """Table 8: the most faithful input and predicted ids of each expert of a middle layer."""
    tables = []
    for label, result in given.of("vocabulary").items():
        layers = result.arrays["layers"].tolist()
        layer = layers[shown_layers(len(layers))[-2:][0]]
        found = {
            kind: _examples(result.tables, f"{kind}_tokens", layer)
            for kind in ("input", "predicted")
        }
        experts = sorted(set(found["input"]) | set(found["predicted"]))
        columns: dict[str, list[Any]] = {"expert": list(experts)}
        for kind, rows in found.items():
            columns[f"{kind}_token_ids"] = [", ".join(rows.get(e, [])) for e in experts]
        about = f"ids that most faithfully choose each expert of layer {layer}, {label}"
        tables.append(Table(name=f"table-8-{label}", about=about, columns=columns))
    return Drawn(tables=tables)


def _examples(tables: Sequence[Table], name: str, layer: int) -> dict[int, list[str]]:
    """Pieces with shares by expert."""
    table = next((each for each in tables if each.name == name), None)
    if table is None:
        raise Missing(f"needs the table {name} of the analysis vocabulary")
    found: dict[int, list[str]] = {}
    names = ("layer", "expert", "piece", "share")
    for at, expert, piece, share in zip(*(table.columns[n] for n in names), strict=True):
        if at == layer:
            found.setdefault(int(expert), []).append(f"“{piece}” ({100 * share:.0f}%)")
    return found

"""Figures 20 to 23 and 30 to 36 and table 8 of OLMoE.

The paper shows the first, the eighth and the last of 16 layers. Of the three that are analysed with
`--layers 0 7 15` the analysis of flows has the paper's two pairs.

Shapes: L layers, D domains, E experts, M pairs of layers, T tokens, K choices, X kinds of tokens,
C minimum counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.paper import Drawn, Entry, Given, Missing, Paper
from megatron_moe.analysis.plot import (
    Axis,
    Bars,
    Figure,
    Flow,
    Heatmap,
    Lines,
    Panel,
    Reference,
    Series,
)
from megatron_moe.analysis.result import Result, Table

Array = npt.NDArray[Any]

STRONGEST = 16
"""Experts of a heat map of figure 21."""
PER_EXPERT = 32
"""Experts of the right panel of figure 23."""
KINDS = ("Input tokens", "Ground-truth output tokens", "Predicted output tokens")
"""In the order of the stored arrays: input, next, predicted."""
FLOWS = 40
"""Largest flows that are drawn."""


def shown_layers(count: int) -> list[int]:
    """Rows of the first, a middle and the last layer: 0, 7 and 15 of 16."""
    return sorted({0, (count - 1) // 2, count - 1})


def _figure(number: str, label: str, what: str, panels: dict[str, Panel], **more: str) -> Figure:
    key = f"{number.lower().replace(' ', '-')}-{what}-{label}" if what else f"{number}-{label}"
    title = f"{number}, {what}, {label}" if what else f"{number}, {label}"
    return Figure(key=key, title=title, panels=panels, **more)


def _saturation(given: Given) -> Drawn:
    """Figure 20: the share of a token's final experts that are chosen at earlier checkpoints."""
    several = Missing("needs several checkpoints of one run: --load run@1000 run@20000")
    if len(given.models) < 2:  # the analysis did not run at all
        raise several
    analysis, found = given.analyses["saturation"], given.of("saturation")
    combined = analysis.combine(found) if len(found) > 1 else None
    if combined is None:
        raise several
    arrays, topk = combined.arrays, given.models[-1].sizes.topk
    numbers = np.asarray(arrays["axis_N"]).dtype.kind in "fiu"
    panels: dict[str, Panel] = {
        f"Top-k={count}": Lines(
            series=[
                Series(name=str(layer), x=arrays["axis_N"], y=100 * arrays[f"{rule}_NL"][:, row])
                for row, layer in enumerate(arrays["layers"])
            ],
            x=Axis(title="Pretraining stage (%)" if numbers else "checkpoint"),
            y=Axis(title="Router saturation (%)"),
            references=[
                Reference(value=100 * float(arrays[f"{rule}_null_NL"].mean()), label="chance")
            ],
            markers=True,
        )
        for rule, count in (("top-1", 1), ("top-k", topk))
    }
    figure = Figure(
        key="figure-20",
        title="Figure 20, one line per layer",
        panels=panels,
        selector="choices",
        caption="Choices that agree with those of the last checkpoint.",
    )
    return Drawn(figures=[figure], notes=combined.notes)


def _coactivation(given: Given) -> Drawn:
    """Figure 21: the 16 experts of the strongest pairs, counted as published and exactly."""
    made = []
    for label, result in given.of("coactivation").items():
        for what, array in (("as published", "published_LEE"), ("exact", "share_LEE")):
            panels: dict[str, Panel] = {}
            for row in shown_layers(len(result.arrays["layers"])):
                values_EE = 100 * result.arrays[array][row]
                chosen = strongest(values_EE)
                names = [str(e) for e in chosen]
                shown = values_EE[np.ix_(chosen, chosen)]
                highest = float(np.nanmax(shown)) if np.isfinite(shown).any() else 1.0
                panels[f"Layer {result.arrays['layers'][row]}"] = Heatmap(
                    values=shown,
                    rows=names,
                    columns=names,
                    x=Axis(title="Expert ID"),
                    y=Axis(title="Expert ID"),
                    colour="tokens of the expert (%)",
                    range=(0.0, max(60.0, highest)),
                )
            made.append(_figure("Figure 21", label, what, panels))
    return Drawn(figures=made)


def strongest(values_EE: Array) -> list[int]:
    """Experts in the order in which the strongest pairs name them."""
    order = np.argsort(-np.nan_to_num(values_EE, nan=-1.0), axis=None, kind="stable")
    found: dict[int, None] = {}
    for place in order.tolist():
        for expert in divmod(place, len(values_EE)):
            if len(found) < STRONGEST:
                found[expert] = None
        if len(found) == STRONGEST:
            break
    return list(found)


def _domains(number: str, rule: str) -> Callable[[Given], Drawn]:
    """Figure 22: the share of each domain's tokens that choose an expert."""

    def draw(given: Given) -> Drawn:
        made = []
        for label, result in given.of("domains").items():
            arrays = result.arrays
            experts = arrays[f"{rule}_LDE"].shape[2]
            uniform = result.numbers["uniform share of tokens, k/E"]
            level = uniform if rule == "chosen" else 1 / experts
            panels: dict[str, Panel] = {
                f"Layer {arrays['layers'][row]}": Bars(
                    series=[
                        Series(name=str(name), x=range(experts), y=100 * share_E)
                        for name, share_E in zip(
                            arrays["domains"], arrays[f"{rule}_LDE"][row], strict=True
                        )
                    ],
                    x=Axis(title="Expert ID"),
                    y=Axis(title="Tokens routed (%)"),
                    references=[Reference(value=100 * level, label="Random")],
                )
                for row in shown_layers(len(arrays["layers"]))
            }
            made.append(_figure(number, label, "", panels))
        return Drawn(figures=made)

    return draw


def _vocabulary(given: Given) -> Drawn:
    """Figure 23: specialization by layer, and by expert in a middle layer."""
    made = []
    for label, result in given.of("vocabulary").items():
        arrays, layers = result.arrays, result.arrays["layers"].tolist()
        panels: dict[str, Panel] = {}
        for name, rule, column in (
            ("as published", "first", 0),
            ("exact: at least 10 occurrences", "first", 1),
        ):
            series = []
            for kind, words in enumerate(KINDS):
                for suffix, dashed in (("", False), ("_null", True)):
                    y = 100 * arrays[f"{rule}{suffix}_LXC"][:, kind, column]
                    title = f"{words}, chance" if dashed else words
                    each = Series(name=title, x=layers, y=y, group=words, dashed=dashed)
                    series.append(each)
            panels[name] = Lines(
                series=series,
                x=Axis(title="Layer ID"),
                y=Axis(title="Token specialization (%)"),
                markers=True,
            )
        more = {"selector": "count", "caption": "Dashed: groups of as many tokens drawn from all."}
        made.append(_figure("Figure 23", label, "per layer", panels, **more))
        made.append(_per_expert(label, result))
    return Drawn(figures=made)


def _per_expert(label: str, result: Result) -> Figure:
    row = shown_layers(len(result.arrays["layers"]))[-2:][0]
    values_XE = 100 * result.arrays["experts_LXE"][row]
    order = np.argsort(-np.nan_to_num(values_XE[0], nan=-1.0), kind="stable")[:PER_EXPERT]
    panels: dict[str, Panel] = {}
    for name, kinds in (("as published", (0, 2, 1)), ("exact", (0, 1, 2))):
        panels[name] = Lines(
            series=[
                Series(name=words, x=[str(e) for e in order], y=values_XE[kind, order])
                for words, kind in zip(KINDS, kinds, strict=True)
            ],
            x=Axis(title="Expert ID"),
            y=Axis(title="Token specialization (%)"),
            markers=True,
        )
    what = f"per expert in layer {result.arrays['layers'][row]}"
    return _figure("Figure 23", label, what, panels, selector="names")


def _tokens_of_experts(given: Given) -> Drawn:
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


def _flow(given: Given) -> Drawn:
    """Appendix: from the experts of a layer to those of the next shown one."""
    made = []
    counts = {"slots": "as published", "all": "exact", "first": "first choices"}
    for label, result in given.of("flow").items():
        arrays = result.arrays
        if not len(arrays["from_M"]):
            raise Missing("needs two MoE layers")
        for name, what in counts.items():
            panels: dict[str, Panel] = {
                f"layers {arrays['from_M'][row]} and {arrays['to_M'][row]}": Flow(
                    columns=[[str(e) for e in range(len(table_EE))]] * 2,
                    titles=[f"Layer {arrays[end][row]}" for end in ("from_M", "to_M")],
                    flows=[_largest(table_EE)],
                )
                for row, table_EE in enumerate(arrays[f"{name}_MEE"])
            }
            caption = f"The {FLOWS} largest flows."
            more = {"selector": "layers", "caption": caption}
            made.append(_figure("Figures 30 to 36, flow", label, what, panels, **more))
    note = "The paper's pairs are layers 0 and 7, and 7 and 15: analyse with --layers 0 7 15."
    return Drawn(figures=made, notes=[note])


def _largest(table_EE: Array) -> Array:
    least = np.sort(table_EE, axis=None)[-min(FLOWS, table_EE.size)]
    return np.where(table_EE >= max(least, 1), table_EE, 0)


PAPER = Paper(
    key="olmoe",
    title="OLMoE",
    source="Muennighoff et al., OLMoE: Open Mixture-of-Experts Language Models (arXiv 2409.02060)",
    entries=[
        Entry(
            number="Figure 20",
            title="Router saturation",
            needs=("saturation",),
            draw=_saturation,
            finding="In OLMoE, about 60% of the final choices were made at 1% of training and 80% "
            "at 40%; later layers saturated earlier, except the first, which was slowest.",
        ),
        Entry(
            number="Figure 21",
            title="Expert co-activation",
            needs=("coactivation",),
            draw=_coactivation,
            finding="In OLMoE, few experts were chosen together often, so there was little "
            "redundancy.",
            differs="The published code counts only pairs of consecutive ranks, 7 of the 28 pairs "
            "of 8 choices; “exact” counts them all. Both show the 16 experts of the strongest "
            "pairs by their own count.",
        ),
        Entry(
            number="Figure 22",
            title="Domain specialization",
            needs=("domains",),
            draw=_domains("Figure 22", "chosen"),
            finding="In OLMoE, many experts preferred a domain, those of arXiv and GitHub most; "
            "in Mixtral, few did.",
        ),
        Entry(
            number="Figure 23",
            title="Vocabulary specialization",
            needs=("vocabulary",),
            draw=_vocabulary,
            finding="In OLMoE, later layers specialized more in predicted ids, and the first ones "
            "in input ids.",
            differs="The published averages include ids that occur once, each of which scores "
            "100%; “exact” needs 10 occurrences. In the published panel per expert, the curves of "
            "predicted and of true output tokens have each other's names. Here that panel counts "
            "all k choices of ids with at least 10 occurrences.",
        ),
        Entry(
            number="Table 8",
            title="Token ids of experts",
            needs=("vocabulary",),
            draw=_tokens_of_experts,
            finding="In OLMoE, experts of a middle layer had ids of one kind, such as places, "
            "units or parts of names.",
        ),
        Entry(
            number="Figures 30 to 36, domains",
            title="Domain specialization, first choices",
            needs=("domains",),
            draw=_domains("Figures 30 to 36, domains", "first"),
            finding="In OLMoE, the first choices of a domain's tokens differed from uniform ones "
            "more than all choices.",
        ),
        Entry(
            number="Figures 30 to 36, flow",
            title="Flow between layers",
            needs=("flow",),
            draw=_flow,
            finding="In OLMoE, tokens of one expert went to many experts of a later layer, with "
            "some preferred paths.",
            differs="The published code pairs the choice of each rank with that of the same rank, "
            "k of the k² pairs; “exact” counts them all.",
        ),
    ],
)

"""Figures 20 to 23 and 30 to 36 and table 8 of OLMoE.

Which program draws which figure is what the README of the published code says. The paper shows the
first, the eighth and the last of 16 layers. Of the three that are analysed with
`--layers 0 7 15` the analysis of flows has the paper's two pairs.

Shapes: L layers, D domains, E experts, M pairs of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.figures.olmoe_vocabulary import (
    id_shares,
    named_figure,
    shown_layers,
    tokens_of_experts,
    vocabulary,
)
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

Array = npt.NDArray[Any]

STRONGEST = 16
"""Experts of a heat map of figure 21."""
FLOWS = 40
"""Largest flows that are drawn."""


def _saturation(given: Given) -> Drawn:
    """Figure 20: the share of a token's final experts that are chosen at earlier checkpoints."""
    several = Missing(
        "needs several checkpoints of one run: --load run@1000 run@20000 (see also --same-run)"
    )
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
                Series(name=f"layer {layer}", x=arrays["axis_N"], y=100 * share_N)
                for layer, share_N in zip(arrays["layers"], arrays[f"{rule}_NL"].T, strict=True)
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
            made.append(named_figure("Figure 21", label, what, panels))
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
            made.append(named_figure(number, label, "", panels))
        return Drawn(figures=made)

    return draw


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
            made.append(named_figure("Figures 33 to 36, flow", label, what, panels, **more))
    notes = [
        "The paper's pairs are layers 0 and 7, and 7 and 15: analyse with --layers 0 7 15.",
        "The paper draws each dataset apart; this is all of --data together.",
    ]
    return Drawn(figures=made, notes=notes)


def _largest(table_EE: Array) -> Array:
    least = np.sort(table_EE, axis=None)[-min(FLOWS, table_EE.size)]
    return np.where(table_EE >= max(least, 1), table_EE, 0)


_DIFFERS = (
    "The published averages include ids that occur once, each of which scores 100%; “exact” needs "
    "10 occurrences. The published bars of single experts are those of the expert below them for "
    "input tokens alone: for predicted and true output tokens, bar i is that of expert i, whatever "
    "number stands below it. “Own experts” has the same values at their own experts."
)

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
            draw=vocabulary("Figure 23", "first"),
            finding="In OLMoE, later layers specialized more in predicted ids, and the first ones "
            "in input ids.",
            differs=_DIFFERS,
        ),
        Entry(
            number="Table 8",
            title="Token ids of experts",
            needs=("vocabulary",),
            draw=tokens_of_experts,
            finding="In OLMoE, experts of a middle layer had ids of one kind, such as places, "
            "units or parts of names.",
        ),
        Entry(
            number="Figures 30 and 31",
            title="Vocabulary specialization, all choices",
            needs=("vocabulary",),
            draw=vocabulary("Figures 30 and 31", "chosen"),
            finding="Figure 23 with all k choices: 8 of OLMoE, and 2 of Mixtral.",
            differs=_DIFFERS,
        ),
        Entry(
            number="Figure 32",
            title="Share of the occurrences of an id that choose an expert",
            needs=("vocabulary",),
            draw=id_shares,
            finding="In OLMoE, some ids nearly always chose the same expert; in Mixtral, shares "
            "were near that of uniform routing.",
        ),
        Entry(
            number="Figures 33 to 36, domains",
            title="Domain specialization, first choices",
            needs=("domains",),
            draw=_domains("Figures 33 to 36, domains", "first"),
            finding="In OLMoE, the first choices of a domain's tokens differed from uniform ones "
            "more than all choices.",
        ),
        Entry(
            number="Figures 33 to 36, flow",
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

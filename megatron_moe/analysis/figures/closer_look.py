"""The figures of "A Closer Look into Mixture-of-Experts", from the analyses that define them.

The paper has no numbers that fit other models' layers, so entries have the names of its sections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from megatron_moe.analysis.paper import Drawn, Entry, Given, Missing, Paper
from megatron_moe.analysis.plot import Axis, Figure, Heatmap, Panel
from megatron_moe.analysis.result import Result


def _maps(key: str, beginning: str) -> Callable[[Given], Drawn]:
    """The heat maps or points of an analysis for each checkpoint."""

    def draw(given: Given) -> Drawn:
        labels = given.of(key)
        found = given.drawn_by(key, beginning)
        return Drawn(figures=[f for f in found if any(label in f.key for label in labels)])

    return draw


def _norm_ranks(given: Given) -> Drawn:
    """Counts of score rank and norm rank, summed over the layers as published, and by layer."""
    made = []
    for label, result in given.of("norm-rank").items():
        ranks_LEE = result.arrays["ranks_LEE"]
        panels: dict[str, Panel] = {"all layers, as published": _ranks(ranks_LEE.sum(0))}
        for layer, ranks_EE in zip(result.arrays["layers"], ranks_LEE, strict=True):
            panels[f"layer {layer}"] = _ranks(ranks_EE)
        made.append(
            Figure(
                key=f"norm-rank-{label}",
                title=f"Norm rank against score rank, {label}",
                panels=panels,
                caption="Counts on the diagonal: experts with larger scores have larger outputs. "
                "Chance is the same count in every cell of a row.",
            )
        )
    return Drawn(figures=made)


def _ranks(counts_EE: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Heatmap:
    names = [str(i + 1) for i in range(len(counts_EE))]
    return Heatmap(
        values=counts_EE,
        rows=names,
        columns=names,
        x=Axis(title="rank of the output norm"),
        y=Axis(title="rank of the score"),
        colour="tokens",
    )


def _outputs(given: Given) -> Drawn:
    """Similarity of outputs on short and on long text."""
    made = []
    for label, result in given.of("output-similarity").items():
        texts: Mapping[str, np.ndarray] = {
            "short": result.arrays["short_DLEE"].mean(0),
            "long": result.arrays["similarity_LEE"],
        }
        for name, values_LEE in texts.items():
            panels: dict[str, Panel] = {}
            for layer, values_EE in zip(result.arrays["layers"], values_LEE, strict=True):
                panels[f"layer {layer}"] = _similarity(values_EE)
            made.append(
                Figure(
                    key=f"outputs-{name}-{label}",
                    title=f"Similarity of outputs, {name} text, {label}",
                    panels=panels,
                    caption="Angular similarity; unrelated outputs have 0.5.",
                )
            )
    return Drawn(figures=made)


def _similarity(values_EE: np.ndarray) -> Heatmap:
    shown = np.array(values_EE, float)
    np.fill_diagonal(shown, np.nan)
    names = [str(e) for e in range(len(shown))]
    return Heatmap(
        values=shown,
        rows=names,
        columns=names,
        x=Axis(title="expert"),
        y=Axis(title="expert"),
        colour="angular similarity",
        centre=0.5,
    )


def _states(given: Given) -> Drawn:
    """Mean absolute intermediate states, expert x neuron, and the share of active neurons."""
    made = []
    for label, result in given.of("neuron-activity").items():
        for array, words, colour in (
            ("inner_LEF", "Intermediate states", "mean absolute value"),
            ("active_LEF", "Active neurons", "share of tokens"),
        ):
            if array not in result.arrays:
                raise Missing("needs the intermediate states of the analysis neuron-activity")
            panels: dict[str, Panel] = {}
            for layer, values_EF in zip(result.arrays["layers"], result.arrays[array], strict=True):
                panels[f"layer {layer}"] = _neurons(values_EF, colour)
            title = f"{words}, {label}"
            made.append(Figure(key=f"{array[:-4]}-{label}", title=title, panels=panels))
    return Drawn(figures=made)


MOST_COLUMNS = 512
"""Columns of a heat map of neurons; more are averaged in groups of neighbours."""


def _neurons(values_EF: np.ndarray, colour: str) -> Heatmap:
    groups = np.array_split(np.arange(values_EF.shape[1]), min(MOST_COLUMNS, values_EF.shape[1]))
    shown = np.stack([values_EF[:, group].mean(1) for group in groups], 1)
    return Heatmap(
        values=shown,
        rows=[str(e) for e in range(len(shown))],
        columns=[str(group[0]) for group in groups],
        x=Axis(title="neuron"),
        y=Axis(title="expert"),
        colour=colour,
    )


def _chosen(given: Given) -> Drawn:
    """Gate scores along the first tokens of a text."""
    made = []
    for label, result in given.of("chosen-experts").items():
        made += [_along(label, result, place) for place in range(len(result.arrays["domains"]))]
    return Drawn(figures=made)


def _along(label: str, result: Result, place: int) -> Figure:
    pieces = [str(piece) for piece in result.arrays["pieces_DN"][place]]
    name = str(result.arrays["domains"][place])
    panels: dict[str, Panel] = {}
    for layer, weights_NE in zip(
        result.arrays["layers"], result.arrays["weights_DLNE"][place], strict=True
    ):
        panels[f"layer {layer}"] = Heatmap(
            values=weights_NE,
            rows=pieces,
            columns=[str(e) for e in range(weights_NE.shape[1])],
            x=Axis(title="expert"),
            y=Axis(title="token"),
            colour="gate score",
        )
    key = f"chosen-{place}-{label}"
    return Figure(key=key, title=f"Chosen experts, {name}, {label}", panels=panels)


PAPER = Paper(
    key="closer-look",
    title="A closer look into mixture-of-experts",
    source="Lo et al., A Closer Look into Mixture-of-Experts in Large Language Models "
    "(arXiv 2406.18219)",
    entries=[
        Entry(
            number="Matrix level",
            title="Similarity of whole matrices",
            needs=("similarity",),
            draw=_maps("similarity", "similarity-"),
            finding="In the paper, the experts of Mixtral were similar, and those of DeepSeekMoE "
            "and Grok were not.",
        ),
        Entry(
            number="Neuron level, averaged",
            title="Similarity of average neurons",
            needs=("averages",),
            draw=_maps("averages", "averages-"),
            finding="In the paper, averages showed the same groups of experts as whole matrices.",
        ),
        Entry(
            number="Neuron level, reordered",
            title="Similarity after matching neurons",
            needs=("matching",),
            draw=_maps("matching", "matched-"),
            finding="In the paper, matching raised the similarity of Mixtral's experts little: "
            "their neurons were in the same order already, as after upcycling.",
            differs="The paper matches each projection alone, which changes what an expert "
            "computes; the panel of all projections together keeps it.",
        ),
        Entry(
            number="Router",
            title="Router against experts",
            needs=("router-experts",),
            draw=_maps("router-experts", "router-"),
            finding="In the paper, the router agreed most with the gate projections.",
            differs="The paper gives r alone; with 8 experts chance gives r² of 0.04, so the "
            "p-value of Mantel's test stands beside it.",
        ),
        Entry(
            number="Principal components",
            title="Principal components of matrices and neurons",
            needs=("components",),
            draw=_maps("components", ""),
        ),
        Entry(
            number="Expert outputs",
            title="Similarity of outputs on short and long text",
            needs=("output-similarity",),
            draw=_outputs,
            finding="In the paper, outputs were less similar in deeper layers, except the last.",
        ),
        Entry(
            number="Norm rank and score rank",
            title="Output norms against gate scores",
            needs=("norm-rank",),
            draw=_norm_ranks,
            finding="In the paper, routers tended to choose the experts with larger outputs.",
            differs="The published counts add up all layers; here each layer can be chosen too.",
        ),
        Entry(
            number="Intermediate states",
            title="Intermediate states of the experts",
            needs=("neuron-activity",),
            draw=_states,
            finding="The paper concludes that neurons act like fine-grained experts.",
        ),
        Entry(
            number="Chosen experts",
            title="Chosen experts along a text",
            needs=("chosen-experts",),
            draw=_chosen,
        ),
    ],
)

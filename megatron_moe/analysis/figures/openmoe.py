"""Figures 5 to 14 and tables 9, 10 and 15 of OpenMoE.

Shapes: L layers, D domains, E experts, P positions, V token ids, I shown ids, W positions of the
paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.paper import Drawn, Entry, Given, Missing, Paper
from megatron_moe.analysis.plot import (
    Axis,
    Bars,
    Figure,
    Lines,
    Panel,
    Radar,
    Reference,
    Series,
)
from megatron_moe.analysis.result import Result, Table

Array = npt.NDArray[Any]

GROUPS = {
    "programming": "--data programming/python=PREFIX programming/java=PREFIX",
    "language": "--data language/de=PREFIX language/ja=PREFIX",
    "task": "--data task/math=PREFIX task/writing=PREFIX",
}
"""Beginnings of the names of datasets that belong to figures 6, 7 and 8; the others to figure 5."""
TOKENS = ("ed", "an")
"""The token ids of figure 11."""
SHOWN = 8
"""Token ids of figure 10."""
_RADIUS = "ratio of tokens (%)"


def third(layers: Array) -> int:
    """Row of the third MoE layer, which the paper shows; of the last one in smaller models."""
    return min(2, len(layers) - 1)


def _around(values: Sequence[tuple[str, Array]], reference: float) -> Radar:
    """Experts around a circle from E_0 on the right, as in the paper."""
    return Radar(
        categories=[f"E{i}" for i in range(len(values[0][1]))],
        series=[Series(name=name, x=(), y=100 * share_E) for name, share_E in values],
        radius=_RADIUS,
        reference=Reference(value=100 * reference, label="uniform"),
    )


def _layer_name(result: Result) -> str:
    layers = result.arrays["layers"]
    return f"layer {layers[third(layers)]}"


def _domains(number: int, group: str) -> Callable[[Given], Drawn]:
    """Figures 5 to 8: a radar of each checkpoint with a line for each dataset of a group."""

    def draw(given: Given) -> Drawn:
        made = []
        for label, result in given.of("domains").items():
            shares_DE = result.arrays["chosen_LDE"][third(result.arrays["layers"])]
            names = [str(name) for name in result.arrays["domains"]]
            chosen = [
                (name.removeprefix(f"{group}/"), share_E)
                for name, share_E in zip(names, shares_DE, strict=True)
                if (name.partition("/")[0] == group if group else not _grouped(name))
            ]
            if not chosen:
                raise Missing(
                    f"needs datasets that are named like this: {GROUPS[group]}"
                    if group
                    else "needs datasets without such a beginning of the name"
                )
            uniform = result.numbers["uniform share of tokens, k/E"]
            made.append(
                Figure(
                    key=f"figure-{number}-{label}",
                    title=f"Figure {number}, {label}",
                    panels={_layer_name(result): _around(chosen, uniform)},
                    caption="Ratio of the tokens of a dataset that are routed to each expert.",
                )
            )
        return Drawn(figures=made)

    return draw


def _grouped(name: str) -> bool:
    return name.partition("/")[0] in GROUPS


def _positions(given: Given) -> Drawn:
    """Figure 9: uniformly sampled positions, and consecutive ones."""
    made = []
    for label, result in given.of("positions").items():
        known, share_LWE = result.arrays["paper_positions_W"], result.arrays["paper_share_LWE"]
        share_WE = share_LWE[third(result.arrays["layers"])]
        spaced = [i for i, place in enumerate(known) if place % known[0] == 0]
        consecutive = [i for i, place in enumerate(known) if place < known[0] + 4]
        panels: dict[str, Panel] = {
            name: _around(
                [(f"Position {known[i]}", share_WE[i]) for i in places], 1 / len(share_WE[0])
            )
            for name, places in (
                ("(a) uniformly sampled positions", spaced),
                ("(b) consecutive positions", consecutive),
            )
        }
        made.append(_panels(9, label, panels, "positions"))
    return Drawn(
        figures=made,
        notes=["Ratios of choices: those of an expert over all choices at the position."],
    )


def _panels(number: int, label: str, panels: Mapping[str, Panel], selector: str) -> Figure:
    return Figure(
        key=f"figure-{number}-{label}",
        title=f"Figure {number}, {label}",
        panels=panels,
        selector=selector,
    )


def _token_ids(given: Given) -> Drawn:
    """Figure 10: the frequent token ids that are spread least."""
    made = []
    for label, result in given.of("tokens").items():
        arrays = result.arrays
        row, pieces = third(arrays["layers"]), [str(piece) for piece in arrays["pieces_I"]]
        if not pieces:
            raise Missing("needs more tokens: no id is frequent enough")
        best = np.argsort(-arrays["spread_LV"][row, : len(pieces)], kind="stable")[:SHOWN]
        values = [(f"“{pieces[i]}”", arrays["share_LIE"][row, i]) for i in best]
        made.append(
            _panels(10, label, {_layer_name(result): _around(values, _uniform(values))}, "layer")
        )
    note = f"The paper chose its tokens; these are the {SHOWN} of the most frequent ids with the "
    return Drawn(figures=made, notes=[note + "largest standard deviation over the experts."])


def _uniform(values: Sequence[tuple[str, Array]]) -> float:
    return 1 / len(values[0][1])


def _checkpoints(given: Given) -> Drawn:
    """Figure 11: two token ids at all checkpoints."""
    found = given.of("tokens")
    if len(found) < 2:
        raise Missing(
            "needs several checkpoints of one run: --load run@1000 run@20000 (see also --same-run)"
        )
    known = {label: [str(p) for p in r.arrays["pieces_I"]] for label, r in found.items()}
    common = [p for p in next(iter(known.values())) if all(p in each for each in known.values())]
    if not common:
        raise Missing("needs more tokens: no frequent id is common to all checkpoints")
    last = list(found.values())[-1]
    row = third(last.arrays["layers"])
    names = known[list(found)[-1]]
    order = sorted(common, key=lambda p: -last.arrays["spread_LV"][row, names.index(p)])
    wanted = [p for p in common if p.strip("▁ ") in TOKENS]
    panels: dict[str, Panel] = {}
    for piece in (wanted or order)[:2]:
        values = [
            (
                label,
                result.arrays["share_LIE"][
                    third(result.arrays["layers"]), known[label].index(piece)
                ],
            )
            for label, result in found.items()
        ]
        panels[f"“{piece}”"] = _around(values, _uniform(values))
    figure = Figure(
        key="figure-11",
        title="Figure 11",
        panels=panels,
        selector="token",
        caption="One line for each checkpoint: equal lines are early routing learning.",
    )
    return Drawn(figures=[figure])


def _drops(given: Given) -> Drawn:
    """Figure 12: dropped tokens by position, for each dataset and for each checkpoint."""
    found = given.of("drops")
    made = []
    axes = {"x": Axis(title="Position ID"), "y": Axis(title="Token Drop Ratio (%)")}
    kinds = {"any": "at least one choice dropped", "all": "all choices dropped"}
    for label, result in found.items():
        arrays = result.arrays
        row = third(arrays["layers"])
        panels: dict[str, Panel] = {
            words: Lines(
                series=[
                    Series(name=str(name), x=arrays["positions"], y=100 * share_Q)
                    for name, share_Q in zip(
                        arrays["domains"], arrays[f"{kind}_LDQ"][row], strict=True
                    )
                ],
                x=axes["x"],
                y=axes["y"],
            )
            for kind, words in kinds.items()
        }
        made.append(
            Figure(
                key=f"figure-12a-{label}",
                title=f"Figure 12 (a), different datasets, {label}",
                panels=panels,
                selector="tokens",
            )
        )
    panels = {
        words: Lines(
            series=[
                Series(
                    name=label,
                    x=result.arrays["positions"],
                    y=100 * result.arrays[f"{kind}_LDQ"][third(result.arrays["layers"])].mean(0),
                )
                for label, result in found.items()
            ],
            x=axes["x"],
            y=axes["y"],
        )
        for kind, words in kinds.items()
    }
    title = "Figure 12 (b), different checkpoints"
    made.append(Figure(key="figure-12b", title=title, panels=panels, selector="tokens"))
    return Drawn(figures=made, notes=["Neighbouring positions are averaged."])


def _deviation(number: int, key: str, x: str) -> Callable[[Given], Drawn]:
    """Figures 13 and 14: the standard deviation of each id, its mean, and 0 for uniform routing."""

    def draw(given: Given) -> Drawn:
        made = []
        for label, result in given.of(key).items():
            arrays = result.arrays
            row = third(arrays["layers"])
            letter = "P" if key == "positions" else "V"
            values, null = (arrays[f"{n}_L{letter}"][row] for n in ("spread", "null"))
            if not len(values):
                raise Missing("needs more tokens: no id is frequent enough")
            if key == "positions":
                places = arrays["positions"]
            else:
                order = np.argsort(arrays["ids_V"])
                values, null, places = values[order], null[order], np.arange(len(values))
            panel = Lines(
                series=[
                    Series(name="Routing Decision Std", x=places, y=values),
                    Series(name="chance", x=places, y=null, dashed=True),
                ],
                x=Axis(title=x),
                y=Axis(title="Std Value", range=(-0.01, max(0.19, 1.05 * float(values.max())))),
                references=[
                    Reference(value=0.0, label="Uniform Distribution Std"),
                    Reference(
                        value=float(np.nanmean(values)), label="Average Routing Decision Std"
                    ),
                ],
            )
            made.append(_panels(number, label, {_layer_name(result): panel}, "layer"))
        return Drawn(figures=made)

    return draw


def _top_tokens(given: Given) -> Drawn:
    """Tables 9 and 15: the tokens that an expert gets most, in the third MoE layer."""
    tables = []
    for label, result in given.of("tokens").items():
        found = next((table for table in result.tables if table.name == "top_tokens"), None)
        if found is None:
            raise Missing("needs the table top_tokens of the analysis tokens")
        layers = result.arrays["layers"]
        rows: dict[int, list[str]] = {}
        columns = found.columns
        for layer, expert, piece in zip(
            columns["layer"], columns["expert"], columns["piece"], strict=True
        ):
            if layer == layers[third(layers)]:
                rows.setdefault(int(expert), []).append(f"“{piece}”")
        table = Table(
            name=f"table-15-{label}",
            about=f"the tokens that each expert of {_layer_name(result)} gets most, {label}",
            columns={
                "expert": list(rows),
                "top_tokens": [", ".join(each) for each in rows.values()],
            },
        )
        tables.append(table)
    return Drawn(tables=tables)


def _tokenizer(given: Given) -> Drawn:
    """Table 10: tokens of each dataset and how many ids they use."""
    if given.sample is None or not given.sample.domains:
        raise Missing("needs --data")
    sample = given.sample
    used: dict[int, Array] = {}
    tokens: dict[int, int] = {}
    for batch in sample.batches():
        ids = np.unique(batch.tokens_BS)
        used[batch.domain] = np.union1d(used.get(batch.domain, np.zeros(0, np.int64)), ids)
        tokens[batch.domain] = tokens.get(batch.domain, 0) + batch.size
    columns: dict[str, list[Any]] = {
        "dataset": list(sample.names),
        "tokens": [tokens[i] for i in range(len(sample.names))],
        "vocab_used": [len(used[i]) for i in range(len(sample.names))],
    }
    names = [str(name) for name in columns["dataset"]]
    panel = Bars(
        series=[Series(name="vocabulary used", x=names, y=columns["vocab_used"])],
        x=Axis(title="dataset"),
        y=Axis(title="token ids that occur"),
    )
    figure = Figure(key="table-10", title="Table 10 as a plot", panels={"all": panel})
    note = (
        "The paper compares two tokenizers on the same texts. For a second one, preprocess the "
        "texts with it and analyse that model with them."
    )
    about = "analysed tokens of each dataset, and the number of different ids among them"
    return Drawn(
        figures=[figure],
        tables=[Table(name="table-10", about=about, columns=columns)],
        notes=[note],
    )


PAPER = Paper(
    key="openmoe",
    title="OpenMoE",
    source="Xue et al., OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models "
    "(arXiv 2402.01739)",
    entries=[
        Entry(
            number="Figure 5",
            title="Routing of domains",
            needs=("domains",),
            draw=_domains(5, ""),
            finding="In OpenMoE, most experts did not specialize in domains.",
        ),
        Entry(
            number="Figure 6",
            title="Routing of programming languages",
            needs=("domains",),
            draw=_domains(6, "programming"),
            finding="In OpenMoE, experts did not specialize in programming languages.",
        ),
        Entry(
            number="Figure 7",
            title="Routing of natural languages",
            needs=("domains",),
            draw=_domains(7, "language"),
            finding="In OpenMoE, some experts preferred certain languages, and related languages "
            "shared them.",
        ),
        Entry(
            number="Figure 8",
            title="Routing of tasks",
            needs=("domains",),
            draw=_domains(8, "task"),
            finding="In OpenMoE, some experts preferred tasks, above all mathematics.",
        ),
        Entry(
            number="Figure 9",
            title="Routing of positions",
            needs=("positions",),
            draw=_positions,
            finding="In OpenMoE, positions differed somewhat, and consecutive ones were alike.",
        ),
        Entry(
            number="Figure 10",
            title="Routing of token ids",
            needs=("tokens",),
            draw=_token_ids,
            finding="In OpenMoE, a token id had a few fixed experts whatever its context.",
        ),
        Entry(
            number="Table 9 and table 15",
            title="Top tokens of each expert",
            needs=("tokens",),
            draw=_top_tokens,
            finding="In OpenMoE, experts had groups of tokens of similar use. Table 9 has five of "
            "the experts of table 15.",
        ),
        Entry(
            number="Figure 11",
            title="Routing of two token ids during training",
            needs=("tokens",),
            draw=_checkpoints,
            finding="In OpenMoE, routing was decided early in training and hardly changed later.",
        ),
        Entry(
            number="Figure 12",
            title="Dropped tokens by position",
            needs=("drops",),
            draw=_drops,
            finding="In OpenMoE, later tokens were dropped more often, most in data that differed "
            "from the pretraining data.",
        ),
        Entry(
            number="Table 10",
            title="Tokens and ids of each dataset",
            needs=(),
            draw=_tokenizer,
            finding="OpenMoE's tokenizer needs fewer tokens than LLaMA's for other languages than "
            "English.",
        ),
        Entry(
            number="Figure 13",
            title="Standard deviation of routing by position",
            needs=("positions",),
            draw=_deviation(13, "positions", "Position ID"),
            finding="In OpenMoE, the deviation was near 0 at every position.",
        ),
        Entry(
            number="Figure 14",
            title="Standard deviation of routing by token id",
            needs=("tokens",),
            draw=_deviation(14, "tokens", "Token ID"),
            finding="In OpenMoE, it was about 0.08 for token ids; always the same two of 32 "
            "experts would be 0.121.",
        ),
    ],
)

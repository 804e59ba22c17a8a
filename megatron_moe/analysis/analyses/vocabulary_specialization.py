"""Whether a token id always goes to the same expert, and which tokens an expert is for.

Shapes: L layers, V ids, E experts, K choices, C minimum counts, X kinds of tokens, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.collectors.tokens import KINDS, RULES
from megatron_moe.analysis.grids import figure_key, figure_title, grid_table, series_name
from megatron_moe.analysis.nulls import by_size
from megatron_moe.analysis.plot import Axis, Bars, Figure, Lines, Reference, Series
from megatron_moe.analysis.result import Result, Table

Array = npt.NDArray[Any]

LEAST = (1, 10, 50)
"""Occurrences that an id needs to be counted."""
OF_EXPERTS = 10
"""The same for the values of single experts and the examples."""
FOR_EXPERTS = (1, OF_EXPERTS)
"""The same in the arrays of the values of single experts; 1 as published."""
BINS = 20
"""Equal parts of 0 to 1 in which ids are counted by their share of an expert."""
OF_SHARES = 8
"""Choices of an expert by an id that is counted there; as published."""
EXAMPLES = 5
"""Ids of an expert in the table."""
MARGIN = 0.02
"""Shares beyond chance that differ by less are called equal."""
NAMES = {"input": "input token", "next": "next token", "predicted": "predicted token"}
WORDS = {"chosen": "any of the k choices", "first": "first choice"}


@register
class VocabularySpecialization(Analysis):
    """See the module."""

    key = "vocabulary"
    title = "Vocabulary specialization"
    question = "Does a token id always go to the same expert?"
    definition = (
        "N(x, e) / N(x): the share of the occurrences of id x that choose expert e; of each id, "
        "that of its most chosen expert, averaged over ids with at least 1, 10 or 50 occurrences. "
        "x is the token that is read, the one that follows, or the one that is predicted. Chance: "
        "groups of as many tokens drawn from all, since an id that occurs once scores 100%. As "
        "published: first choices and a minimum of 1."
    )
    source = (
        "Muennighoff et al., OLMoE (arXiv 2409.02060), section 5.4, figures 23 and 30 to 32 and "
        "table 8"
    )
    group = "routing"
    uses = ("tokens", "choices")
    least_choices = 10

    def compute(self, material: Material) -> Result:
        """Specialization by layer, kind and minimum count; by expert; examples."""
        setting = material.setting
        counts = material.collected["tokens"].state()
        pool_LTK = material.collected["choices"].state()["ids_LTK"]
        experts, layers = setting.sizes.num_experts, setting.layers
        rng = np.random.default_rng(setting.seed)
        number_XV = [counts[f"{kind}_V"][:-1] for kind in KINDS]
        largest = int(max(number_V.max(initial=1) for number_V in number_XV))
        shape = (len(layers), len(KINDS), len(LEAST))
        arrays: dict[str, Array] = {"layers": np.array(layers)}
        for rule in RULES:
            found, null = np.full(shape, np.nan), np.full(shape, np.nan)
            for row in range(len(layers)):
                pool_TK = pool_LTK[row] if rule == "chosen" else pool_LTK[row, :, :1]
                chance = by_size(
                    pool_TK, experts, largest, _favourite, draws=material.draws, rng=rng
                )
                for place, kind in enumerate(KINDS):
                    number_V = number_XV[place]
                    best_V = counts[f"{kind}_{rule}_LVE"][row, :-1].max(1)
                    for column, least in enumerate(LEAST):
                        used = number_V >= least
                        if used.any():
                            found[row, place, column] = (best_V[used] / number_V[used]).mean()
                            null[row, place, column] = chance(number_V[used]).mean()
            arrays[f"{rule}_LXC"], arrays[f"{rule}_null_LXC"] = found, null
        arrays["ids_XC"] = np.array([[(n >= c).sum() for c in LEAST] for n in number_XV])
        for rule in RULES:
            values = [_by_expert(counts, len(layers), rule, least)[0] for least in FOR_EXPERTS]
            arrays[f"{rule}_experts_LXCE"] = np.stack(values, 2)
        arrays["experts_LXE"], arrays["experts_ids_LXE"] = _by_expert(
            counts, len(layers), "chosen", OF_EXPERTS
        )
        arrays["shares_LEB"] = np.stack([_shares(counts, row) for row in range(len(layers))])
        return Result(
            analysis=self.key,
            numbers=_numbers(arrays, setting.sizes.topk / experts),
            tables=[
                _table(arrays),
                _expert_table(arrays),
                *(_examples(material, counts, kind) for kind in ("input", "predicted")),
            ],
            arrays=arrays,
            notes=_notes(arrays, counts),
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """By layer, for each minimum count; by expert."""
        panels = {
            f"{WORDS[rule]}, at least {least}": _lines(results, rule, column)
            for rule in RULES
            for column, least in enumerate(LEAST)
        }
        found = [
            Figure(
                key="layers",
                title="How much of an id goes to its favourite expert",
                panels=panels,
                selector="count",
                caption=(
                    "Dashed: chance. 'First choice, at least 1' is the published figure; its curve "
                    "is high largely because ids that occur once score 100%."
                ),
            )
        ]
        for label, result in results.items():
            found.append(
                Figure(
                    key=figure_key("experts", label, results),
                    title=figure_title("Specialization by expert", label, results),
                    panels=_bars(result),
                )
            )
        return found

    def reading(self, results: Mapping[str, Result]) -> str:
        """Input against predicted token, first against last layer, beside OLMoE."""
        return " ".join(_sentence(label, result) for label, result in results.items())


def _favourite(shares: Array) -> Array:
    return np.asarray(shares.max(-1))


def _by_expert(
    counts: Mapping[str, Array], layers: int, rule: str, least: int
) -> tuple[Array, Array]:
    """Mean share of the ids whose favourite an expert is, and their number, [L, X, E] each.

    Of equally frequent experts the favourite is the one with the lowest number.

    Args:
        counts: sums of the collector of tokens.
        layers: L.
        rule: `chosen`, all K choices, or `first`.
        least: occurrences that an id needs.
    """
    experts = counts["input_chosen_LVE"].shape[2]
    mean = np.full((layers, len(KINDS), experts), np.nan)
    ids = np.zeros((layers, len(KINDS), experts), np.int64)
    for place, kind in enumerate(KINDS):
        used = counts[f"{kind}_V"][:-1] >= least
        number_V = counts[f"{kind}_V"][:-1][used]
        for row in range(layers):
            table_VE = counts[f"{kind}_{rule}_LVE"][row, :-1][used]
            if not len(table_VE):
                continue
            best_V = table_VE.argmax(1)
            total_E = np.bincount(best_V, table_VE.max(1) / number_V, minlength=experts)
            ids[row, place] = np.bincount(best_V, minlength=experts)
            np.divide(total_E, ids[row, place], out=mean[row, place], where=ids[row, place] > 0)
    return mean, ids


def _shares(counts: Mapping[str, Array], row: int) -> Array:
    """Input ids by the share of their occurrences that choose an expert, [E, B].

    Counted for an expert are ids that chose it `OF_SHARES` times or more.
    """
    table_VE = counts["input_chosen_LVE"][row, :-1]
    number_V1 = np.maximum(counts["input_V"][:-1, None], 1)
    # In integers, so that a share at the edge of two bins is in the upper one.
    bin_VE = np.minimum(table_VE.astype(np.int64) * BINS // number_V1, BINS - 1)
    found_EB = np.zeros((table_VE.shape[1], BINS), np.int64)
    ids_N, experts_N = np.nonzero(table_VE >= OF_SHARES)
    np.add.at(found_EB, (experts_N, bin_VE[ids_N, experts_N]), 1)
    return found_EB


def _numbers(arrays: Mapping[str, Array], uniform: float) -> dict[str, float]:
    numbers = {"uniform share of occurrences, k/E": uniform}
    for place, kind in enumerate(KINDS):
        found = arrays["chosen_LXC"][:, place, 1]
        null = arrays["chosen_null_LXC"][:, place, 1]
        numbers[f"{NAMES[kind]}, at least 10 occurrences"] = float(found.mean())
        numbers[f"{NAMES[kind]}, at least 10 occurrences, by chance"] = float(null.mean())
    numbers["input token, as published (first choice, at least 1)"] = float(
        arrays["first_LXC"][:, 0, 0].mean()
    )
    numbers["input token, as published, by chance"] = float(
        arrays["first_null_LXC"][:, 0, 0].mean()
    )
    return numbers


def _table(arrays: Mapping[str, Array]) -> Table:
    found = np.stack([arrays[f"{rule}_LXC"] for rule in RULES], 1)
    null = np.stack([arrays[f"{rule}_null_LXC"] for rule in RULES], 1)
    axes: dict[str, Sequence[Any]] = {
        "layer": arrays["layers"].tolist(),
        "choices": RULES,
        "token": KINDS,
        "least_count": LEAST,
    }
    ids = np.broadcast_to(arrays["ids_XC"], found.shape)
    values = {"ids": ids, "specialization": found, "chance": null}
    return grid_table("specialization", "mean share of an id's favourite expert", axes, values)


def _expert_table(arrays: Mapping[str, Array]) -> Table:
    values = {"ids": arrays["experts_ids_LXE"], "specialization": arrays["experts_LXE"]}
    axes: dict[str, Sequence[Any]] = {
        "layer": arrays["layers"].tolist(),
        "token": KINDS,
        "expert": range(arrays["experts_LXE"].shape[2]),
    }
    about = f"mean share of the ids, with at least {OF_EXPERTS} occurrences, that prefer the expert"
    return grid_table("experts", about, axes, values)


def _examples(material: Material, counts: Mapping[str, Array], kind: str) -> Table:
    """The most faithful ids of each expert."""
    names = ("layer", "expert", "token", "piece", "occurrences", "share")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    used = counts[f"{kind}_V"][:-1] >= OF_EXPERTS
    number_V, ids_V = counts[f"{kind}_V"][:-1][used], counts["ids_V"][used]
    for row, layer in enumerate(material.setting.layers):
        share_VE = counts[f"{kind}_chosen_LVE"][row, :-1][used] / number_V[:, None]
        order_VE = np.argsort(-share_VE, axis=0, kind="stable")[:EXAMPLES]
        for expert in range(share_VE.shape[1]):
            for v in order_VE[:, expert].tolist():
                if share_VE[v, expert] > 0:
                    token = int(ids_V[v])
                    cells = (layer, expert, token, material.model.piece(token))
                    cells_ = (*cells, int(number_V[v]), float(share_VE[v, expert]))
                    for name, cell in zip(names, cells_, strict=True):
                        columns[name].append(cell)
    about = f"the {kind} ids, with at least {OF_EXPERTS} occurrences, most faithful to each expert"
    return Table(name=f"{kind}_tokens", about=about, columns=columns)


def _notes(arrays: Mapping[str, Array], counts: Mapping[str, Array]) -> list[str]:
    notes = []
    others = int(counts["input_V"][-1])
    if others:
        share = 100 * others / int(counts["input_V"].sum())
        notes.append(f"Rare ids, {share:.1f}% of tokens, are left out to bound memory.")
    ids = arrays["ids_XC"][0]
    if ids[2] == 0:
        notes.append(
            f"No id occurs 50 times ({ids[1]} occur 10 times): more tokens fill the empty curves."
        )
    return notes


def _lines(results: Mapping[str, Result], rule: str, column: int) -> Lines:
    series = []
    for label, result in results.items():
        for dashed, suffix in ((False, ""), (True, "_null")):
            for place, kind in enumerate(KINDS):
                name = NAMES[kind] + (", chance" if dashed else "")
                series.append(
                    Series(
                        name=series_name(name, label, results),
                        x=result.arrays["layers"],
                        y=100 * result.arrays[f"{rule}{suffix}_LXC"][:, place, column],
                        dashed=dashed,
                        group=label if len(results) > 1 else kind,
                    )
                )
    y = Axis(title="at the favourite (%)")
    return Lines(series=series, x=Axis(title="layer"), y=y, markers=True)


def _bars(result: Result) -> dict[str, Bars]:
    arrays, uniform = result.arrays, result.numbers["uniform share of occurrences, k/E"]
    return {
        f"layer {layer}": Bars(
            series=[
                Series(
                    name=NAMES[kind],
                    x=list(range(arrays["experts_LXE"].shape[2])),
                    y=100 * arrays["experts_LXE"][row, place],
                )
                for place, kind in enumerate(KINDS)
            ],
            x=Axis(title="expert"),
            y=Axis(title="mean share of its ids (%)"),
            references=[Reference(value=100 * uniform, label="uniform")],
        )
        for row, layer in enumerate(arrays["layers"])
    }


def _sentence(label: str, result: Result) -> str:
    found, null = (result.arrays[name][:, :, 1] for name in ("chosen_LXC", "chosen_null_LXC"))
    if np.isnan(found[:, 0]).all():
        return f"{label}: no id occurs {LEAST[1]} times, so specialization cannot be told."
    over = found - null
    text = (
        f"{label}: an id's favourite expert gets {100 * found[:, 0].mean():.0f}% of its "
        f"occurrences, against {100 * null[:, 0].mean():.0f}% by chance"
    )
    if np.nanmean(over) < MARGIN:
        return f"{text}: experts do not specialize in vocabulary, unlike in OLMoE."
    last = over[-1]
    if np.isnan(last[[0, 2]]).any():
        return (
            f"{text}. No predicted id occurs {LEAST[1]} times, so which token the last layer "
            "follows cannot be told."
        )
    if abs(last[2] - last[0]) < MARGIN:
        return f"{text}. The last layer follows the input and the predicted token about equally."
    if last[2] > last[0]:
        return f"{text}. As in OLMoE, the last layer follows the predicted token more."
    return f"{text}. Even the last layer follows the input token, as OpenMoE reports."

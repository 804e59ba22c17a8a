"""How much of the routing the token id alone decides.

Shapes: L layers, V ids, E experts, X kinds of id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.collectors.tokens import KINDS, RULES
from megatron_moe.analysis.grids import grid_table, series_name
from megatron_moe.analysis.nulls import by_size, entropy
from megatron_moe.analysis.plot import Axis, Figure, Lines, Series
from megatron_moe.analysis.result import Result

Array = npt.NDArray[Any]

WORDS = {"chosen": "all k choices", "first": "first choice"}

SUFFIXES = {"": "", "_null": ", by chance", "_beyond": ", beyond chance"}


@register
class ContextIndependence(Analysis):
    """See the module."""

    key = "context"
    title = "Context independence"
    question = "How much of the routing does the token id alone decide?"
    definition = (
        "(H(e) - H(e | id)) / (H(e) - log k), with entropies of the share of choices of each "
        "expert: 1 if the id decides the experts, 0 if it says nothing. Chance, which is above 0 "
        "because rare ids are seen few times: groups of as many tokens drawn from all. Beyond "
        "chance: (observed - chance) / (1 - chance)."
    )
    source = (
        "the question of Xue et al., OpenMoE (arXiv 2402.01739), section 4.2, "
        "context-independent specialization; as a share of entropy here"
    )
    group = "routing"
    uses = ("tokens", "choices")
    least_choices = 10

    def compute(self, material: Material) -> Result:
        """Shares explained by the id that is read, follows or is predicted."""
        setting = material.setting
        counts = material.collected["tokens"].state()
        pool_LTK = material.collected["choices"].state()["ids_LTK"]
        experts, layers = setting.sizes.num_experts, setting.layers
        rng = np.random.default_rng(setting.seed)
        largest = max(int(counts[f"{kind}_V"].max()) for kind in KINDS)
        arrays: dict[str, Array] = {"layers": np.array(layers)}
        for rule in RULES:
            found, null = (np.full((len(layers), len(KINDS)), np.nan) for _ in range(2))
            topk = setting.sizes.topk if rule == "chosen" else 1
            for row in range(len(layers)):
                chance = by_size(
                    pool_LTK[row, :, :topk],
                    experts,
                    largest,
                    entropy,
                    draws=material.draws,
                    rng=rng,
                )
                for place, kind in enumerate(KINDS):
                    table_VE = counts[f"{kind}_{rule}_LVE"][row, :-1]
                    number_V = counts[f"{kind}_V"][:-1]
                    table_VE, number_V = table_VE[number_V > 0], number_V[number_V > 0]
                    found[row, place] = explained(table_VE, number_V, entropy(table_VE), topk)
                    null[row, place] = explained(table_VE, number_V, chance(number_V), topk)
            arrays[f"{rule}_LX"], arrays[f"{rule}_null_LX"] = found, null
            arrays[f"{rule}_beyond_LX"] = (found - null) / (1 - null)
        numbers = {}
        for rule in RULES:
            for suffix, words in (
                ("", ""),
                ("_null", ", by chance"),
                ("_beyond", ", beyond chance"),
            ):
                name = f"explained by the input token, {WORDS[rule]}{words}"
                numbers[name] = _mean(arrays[f"{rule}{suffix}_LX"][:, 0])
        notes = []
        if pool_LTK.shape[1] < 1000:
            notes.append(
                f"The chance level is drawn from {pool_LTK.shape[1]} tokens; it needs about 1000."
            )
        columns = {
            f"{rule}{suffix or '_explained'}": arrays[f"{rule}{suffix}_LX"]
            for rule in RULES
            for suffix in SUFFIXES
        }
        about = "share of the entropy of the choices that the id explains"
        axes: dict[str, Sequence[Any]] = {"layer": layers, "token": KINDS}
        return Result(
            analysis=self.key,
            numbers=numbers,
            tables=[grid_table("explained", about, axes, columns)],
            arrays=arrays,
            notes=notes,
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Explained share by layer and kind, with chance."""
        panels = {WORDS[rule]: _lines(results, rule) for rule in RULES}
        title = "How much of the routing a token id decides"
        return [Figure(key="explained", title=title, panels=panels, selector="choices")]

    def reading(self, results: Mapping[str, Result]) -> str:
        """The share beyond chance, beside OpenMoE's finding."""
        return " ".join(_sentence(label, result) for label, result in results.items())


def explained(table_VE: Array, number_V: Array, entropy_V: Array, topk: int) -> float:
    """(H(e) - H(e | id)) / (H(e) - log k); NaN where H(e) is log k.

    Args:
        table_VE: choices by id.
        number_V: occurrences.
        entropy_V: entropy of the choices of each id, or its value by chance.
        topk: k.
    """
    whole = float(entropy(table_VE.sum(0)))
    room = whole - float(np.log(topk))
    if room < 1e-9 or not len(number_V):
        return float("nan")
    return (whole - float(np.average(entropy_V, weights=number_V))) / room


def _mean(values: Array) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _lines(results: Mapping[str, Result], rule: str) -> Lines:
    series = []
    for label, result in results.items():
        for dashed, suffix in ((False, ""), (True, "_null")):
            for place, kind in enumerate(KINDS):
                name = f"{kind} token" + (", chance" if dashed else "")
                series.append(
                    Series(
                        name=series_name(name, label, results),
                        x=result.arrays["layers"],
                        y=100 * result.arrays[f"{rule}{suffix}_LX"][:, place],
                        dashed=dashed,
                        group=label if len(results) > 1 else kind,
                    )
                )
    y = Axis(title="entropy of the choices explained (%)")
    return Lines(series=series, x=Axis(title="layer"), y=y, markers=True)


def _sentence(label: str, result: Result) -> str:
    beyond = _mean(result.arrays["chosen_beyond_LX"][:, 0])
    if np.isnan(beyond):
        return f"{label}: the same experts are always chosen, so there is nothing to explain."
    text = f"{label}: beyond chance, the token id decides {100 * beyond:.0f}% of the routing"
    if beyond < 0.02:
        return f"{text}: experts do not follow token ids, unlike in OpenMoE."
    if beyond < 0.5:
        return f"{text}; the rest depends on context, more than OpenMoE's account suggests."
    return f"{text}: as in OpenMoE, experts specialize in token ids, whatever the context."

"""Which experts are chosen together.

Shapes: L layers, E experts, T tokens, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.grids import (
    figure_key,
    figure_title,
    grid_table,
    layer_lines,
    mean_of,
)
from megatron_moe.analysis.nulls import independent_pairs, p_value
from megatron_moe.analysis.plot import Axis, Figure, Heatmap
from megatron_moe.analysis.result import Result, Table

Array = npt.NDArray[Any]

LEAST_EXPECTED = 5.0
"""Pairs that loads alone would give fewer tokens have no lift: noise would decide it."""
MOST_SHOWN, SHOWN = 64, 32
"""Above so many experts, a heat map shows the members of the strongest pairs."""
LISTED = 50
"""Pairs of a layer in the table."""
_AT_ONCE = 20
"""Drawn tables in memory."""


@register
class Coactivation(Analysis):
    """See the module."""

    key = "coactivation"
    title = "Expert co-activation"
    question = "Are some experts chosen together?"
    definition = (
        "N_ij / N_i: the share of the tokens that choose expert i which choose j as well, over all "
        "k (k-1) / 2 pairs of a token's choices. Chance: (k-1)/(E-1) for equal loads. The lift of "
        "a pair is N_ij over what the loads of the experts alone give (the pair table of largest "
        "entropy with these loads). The strength of a layer is the share of pairs that differ from "
        "that table; its chance level draws the pairs from it. As published: only pairs of "
        "consecutive ranks are counted, k-1 of the k (k-1) / 2, which lowers values by k/2."
    )
    source = "Muennighoff et al., OLMoE (arXiv 2409.02060), section 5.2, figure 21"
    group = "routing"
    uses = ("coactivation",)
    least_choices = 10

    def compute(self, material: Material) -> Result:
        """Shares, lifts and strength by layer."""
        setting = material.setting
        topk, experts = setting.sizes.topk, setting.sizes.num_experts
        counts = material.collected["coactivation"].state()
        loads_LE = np.diagonal(counts["pairs_LEE"], axis1=1, axis2=2)
        pairs_LEE = counts["pairs_LEE"] * (1 - np.eye(experts, dtype=np.int64))
        adjacent_LEE = counts["adjacent_LEE"] + counts["adjacent_LEE"].swapaxes(1, 2)
        known = loads_decide(experts, topk)
        expected_LEE = pairs_LEE if known else independent_pairs(loads_LE, topk)
        strength_L = strength_of(pairs_LEE, expected_LEE)
        null_RL = np.full((material.draws, len(strength_L)), np.nan)
        p = math.nan
        if known:
            strength_L = np.full(len(strength_L), np.nan)
        else:
            rng = np.random.default_rng(setting.seed)
            null_RL = drawn_strength(expected_LEE, material.draws, rng) * set_factor(experts, topk)
            p = p_value(strength_L.mean(), null_RL.mean(1))
        arrays = {
            "layers": np.array(setting.layers),
            "tokens_LEE": pairs_LEE,
            "share_LEE": _masked(_divided(pairs_LEE, loads_LE[:, :, None])),
            "published_LEE": _masked(_divided(adjacent_LEE, loads_LE[:, :, None])),
            "lift_LEE": _masked(
                np.where(expected_LEE >= LEAST_EXPECTED, _divided(pairs_LEE, expected_LEE), np.nan)
            ),
            "strength_L": strength_L,
            "null_L": null_RL.mean(0),
            "null_high_L": np.quantile(null_RL, 0.95, axis=0),
        }
        share_LEE, lift_LEE = arrays["share_LEE"], arrays["lift_LEE"]
        numbers = {
            "chance for equal loads, (k-1)/(E-1)": (topk - 1) / max(experts - 1, 1),
            "largest share of a pair": _largest(share_LEE),
            "largest share of a pair, as published": _largest(arrays["published_LEE"]),
            "largest lift of a pair": _largest(lift_LEE),
            "strength": float(arrays["strength_L"].mean()),
            "strength by chance": float(arrays["null_L"].mean()),
            "p-value of the strength": p,
        }
        notes = []
        if topk == 1:
            notes.append("The router chooses one expert per token, so there are no pairs.")
        elif known:
            notes.append(
                f"A token misses at most one of the {experts} experts, so the loads alone decide "
                "how often each pair is chosen: there is no strength."
            )
        elif np.isnan(lift_LEE).sum() > lift_LEE.shape[0] * experts:
            notes.append(
                f"Pairs that loads alone would give fewer than {LEAST_EXPECTED:.0f} tokens "
                "have no lift; more tokens give them one."
            )
        return Result(
            analysis=self.key,
            numbers=numbers,
            tables=[_strength_table(arrays), _pair_table(arrays)],
            arrays=arrays,
            notes=notes,
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Strength by layer; for each checkpoint the shares, exact and as published, and lifts."""
        axis = Axis(title="pairs that loads do not explain (%)")
        lines = layer_lines(
            results, {"observed": "strength_L"}, {"chance": "null_L"}, axis, factor=100
        )
        found = [
            Figure(key="strength", title="How much experts go together", panels={"all": lines})
        ]
        for label, result in results.items():
            for array, title, centre in (
                ("share", "Experts chosen together", None),
                ("published", "Experts chosen together, counted as published", None),
                ("lift", "Experts chosen together, over what their loads give", 1.0),
            ):
                found.append(
                    Figure(
                        key=figure_key(array, label, results),
                        title=figure_title(title, label, results),
                        panels=_heatmaps(result, array, centre),
                    )
                )
        return found

    def reading(self, results: Mapping[str, Result]) -> str:
        """Strength against chance, and the strongest pair."""
        return " ".join(_sentence(label, result) for label, result in results.items())


def _divided(a: Array, b: Array) -> Array:
    """A / b, NaN where b is 0."""
    b = np.broadcast_to(b, a.shape)
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


def _masked(values_LEE: Array) -> Array:
    """The values with NaN on the diagonals."""
    return np.where(np.eye(values_LEE.shape[1], dtype=bool), np.nan, values_LEE)


def _largest(values: Array) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")


def strength_of(pairs: Array, expected: Array) -> Array:
    """Total variation distance of pair tables, [...]."""
    total = np.maximum(pairs.sum((-2, -1)), 1)
    return np.asarray(0.5 * np.abs(pairs - expected).sum((-2, -1)) / total)


def loads_decide(experts: int, topk: int) -> bool:
    """Whether loads decide the pairs: N_ij = N_i + N_j - T if one is missing."""
    return topk >= 2 and topk >= experts - 1


def set_factor(experts: int, topk: int) -> float:
    """How much less the pairs of sets of K scatter than as many single pairs.

    The K (K-1) / 2 pairs of one token differ, so they spread over the table more evenly. For equal
    loads the variance beyond that of the loads is C(E-4, K-2) / C(E, K) per token and pair (an
    eigenvalue of the Johnson scheme), that of single pairs C(K, 2) / C(E, 2). For K = 2 they agree.
    """
    if experts < 4 or topk < 2:
        return 1.0
    of_sets = math.comb(experts - 4, topk - 2) / math.comb(experts, topk)
    return math.sqrt(of_sets * math.comb(experts, 2) / math.comb(topk, 2))


def drawn_strength(expected_LEE: Array, draws: int, rng: np.random.Generator) -> Array:
    """Strength of tables of as many pairs that are drawn from the expected ones, [R, L].

    Each is compared with what its own loads give, as the observed table is, and that is found with
    as many rounds: what the iteration is short of is then the same in both.
    """
    experts = expected_LEE.shape[1]
    rows, columns = np.triu_indices(experts, 1)
    found = np.zeros((draws, len(expected_LEE)))
    for layer, expected_EE in enumerate(expected_LEE):
        mean_P = expected_EE[rows, columns]
        if mean_P.sum() == 0:
            continue
        for start in range(0, draws, _AT_ONCE):
            size = min(_AT_ONCE, draws - start)
            table = np.zeros((size, experts, experts))
            table[:, rows, columns] = rng.multinomial(
                round(mean_P.sum()), mean_P / mean_P.sum(), size=size
            )
            table += table.swapaxes(1, 2)
            own = independent_pairs(table.sum(2), 2)
            found[start : start + size, layer] = strength_of(table, own)
    return found


def _strength_table(arrays: Mapping[str, Array]) -> Table:
    return grid_table(
        "strength",
        "share of pairs of choices that the loads of the experts do not explain",
        {"layer": arrays["layers"].tolist()},
        {
            "strength": arrays["strength_L"],
            "chance": arrays["null_L"],
            "chance_95": arrays["null_high_L"],
        },
    )


def _pair_table(arrays: Mapping[str, Array]) -> Table:
    """The pairs of largest lift; a pair has one row, its first expert being the less loaded."""
    columns: dict[str, list[Any]] = {
        name: []
        for name in ("layer", "expert", "other", "tokens", "share", "published_share", "lift")
    }
    share_LEE, lift_LEE = arrays["share_LEE"], arrays["lift_LEE"]
    for row, layer in enumerate(arrays["layers"].tolist()):
        one, other = np.triu_indices(share_LEE.shape[1], 1)
        lift_P = lift_LEE[row, one, other]
        order = np.argsort(-np.nan_to_num(lift_P, nan=-1.0), kind="stable")[:LISTED]
        for i, j in zip(one[order].tolist(), other[order].tolist(), strict=True):
            if np.nan_to_num(share_LEE[row, j, i]) > np.nan_to_num(share_LEE[row, i, j]):
                i, j = j, i
            columns["layer"].append(layer)
            columns["expert"].append(i)
            columns["other"].append(j)
            columns["tokens"].append(int(arrays["tokens_LEE"][row, i, j]))
            columns["share"].append(float(share_LEE[row, i, j]))
            columns["published_share"].append(float(arrays["published_LEE"][row, i, j]))
            columns["lift"].append(float(lift_LEE[row, i, j]))
    about = (
        f"the {LISTED} pairs of largest lift in each layer; share: of the tokens of `expert`, "
        "those that choose `other` too"
    )
    return Table(name="pairs", about=about, columns=columns)


def _shown(values_EE: Array) -> list[int]:
    """Experts of a heat map: all, or the members of the strongest pairs."""
    experts = len(values_EE)
    if experts <= MOST_SHOWN:
        return list(range(experts))
    order = np.argsort(-np.nan_to_num(values_EE, nan=-1.0), axis=None, kind="stable")
    members = np.stack(np.unravel_index(order, values_EE.shape), -1).reshape(-1)
    return list(dict.fromkeys(members.tolist()))[:SHOWN]


def _heatmaps(result: Result, array: str, centre: float | None) -> dict[str, Heatmap]:
    lift = array == "lift"
    found = {}
    for row, layer in enumerate(result.arrays["layers"]):
        values_EE = result.arrays[f"{array}_LEE"][row]
        shown = _shown(values_EE)
        names = [str(e) for e in shown]
        found[f"layer {layer}"] = Heatmap(
            values=(1 if lift else 100) * values_EE[np.ix_(shown, shown)],
            rows=names,
            columns=names,
            x=Axis(title="is chosen as well"),
            y=Axis(title="expert"),
            colour="times expected" if lift else "tokens of the expert (%)",
            centre=centre,
        )
    return found


def _sentence(label: str, result: Result) -> str:
    strength, null = mean_of(result, "strength_L"), mean_of(result, "null_L")
    if not result.arrays["tokens_LEE"].any():
        return f"{label}: the router chooses one expert per token."
    if math.isnan(strength):
        return f"{label}: each token misses at most one expert, so loads decide which go together."
    text = (
        f"{label}: loads alone leave {100 * strength:.1f}% of pairs unexplained, against "
        f"{100 * null:.1f}% by chance"
    )
    if result.numbers["p-value of the strength"] >= 0.05:
        return f"{text}: experts are chosen independently of each other."
    best = result.numbers["largest share of a pair"]
    text += (
        f"; the strongest pair shares {100 * best:.0f}% of the tokens of one of its experts "
        f"(chance for equal loads: "
        f"{100 * result.numbers['chance for equal loads, (k-1)/(E-1)']:.0f}%)"
    )
    if strength < 0.15:
        return (
            f"{text}. As in OLMoE, few experts go together, which speaks against redundant experts."
        )
    return f"{text}. Experts go together more than OLMoE reports; pairs may be redundant."

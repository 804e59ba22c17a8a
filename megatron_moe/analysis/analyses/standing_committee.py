"""Whether a few experts serve most tokens of every domain, beside experts of single domains.

Shapes: L layers, D domains, E experts, T stored tokens, K choices, R draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.grids import figure_key, figure_title, grid_table, layer_lines, mean_of
from megatron_moe.analysis.nulls import gini, uniform_loads
from megatron_moe.analysis.plot import Axis, Figure, Heatmap
from megatron_moe.analysis.result import Result, Table

Array = npt.NDArray[Any]

HALF = 0.5
"""Share of a domain's choices that its main experts take."""
TOKENS_COVERED = 0.9
BUSY = 2.0
"""Times the mean load that members of a standing committee have."""


@register
class StandingCommittee(Analysis):
    """See the module."""

    key = "committee"
    title = "Standing committee and domain experts"
    question = "Do the same few experts serve every domain?"
    definition = (
        "The main experts of a domain are the smallest set that takes half of its choices. The "
        "standing committee are those that are main in every domain; domain experts are main in "
        "one. Overlap: mean Jaccard index of two domains' main experts; chance: random sets of "
        "these sizes. Gini of the loads: 0 if equal; chance: random routing. Coverage: the "
        "smallest set, built greedily, such that 90% of tokens choose at least one of it."
    )
    source = (
        "The illusion of specialization: the domain-invariant standing committee "
        "(arXiv 2601.03425); sets by half of the choices here"
    )
    group = "routing"
    uses = ("domains", "choices", "load")
    least_choices = 10

    def compute(self, material: Material) -> Result:
        """Main experts of each domain, the committee, overlap, Gini, coverage."""
        setting = material.setting
        topk, experts = setting.sizes.topk, setting.sizes.num_experts
        count_LDE = material.collected["domains"].state()["chosen_LDGE"].sum(2)
        loads_LE = count_LDE.sum(1)
        pool_LTK = material.collected["choices"].state()["ids_LTK"]
        tokens = int(material.collected["load"].state()["tokens_1"][0])
        rng = np.random.default_rng(setting.seed)
        main_LDE = main_experts(count_LDE)
        size_LD = main_LDE.sum(2)
        committee_LE = main_LDE.all(1)
        drawn = [overlap_by_chance(sizes, experts, material.draws, rng) for sizes in size_LD]
        random_RE = uniform_loads(tokens, topk, experts, material.draws, rng)
        covered = [smallest_cover(pool_TK, experts, TOKENS_COVERED) for pool_TK in pool_LTK]
        arrays = {
            "layers": np.array(setting.layers),
            "domains": np.array(setting.sample.names),
            "load_LDE": count_LDE / np.maximum(count_LDE.sum(2, keepdims=True), 1),
            "main_LDE": main_LDE,
            "main_L": size_LD.mean(1),
            "committee_L": committee_LE.sum(1),
            "committee_null_L": experts * np.prod(size_LD / experts, axis=1),
            "committee_share_L": (loads_LE * committee_LE).sum(1) / loads_LE.sum(1),
            "single_L": (main_LDE.sum(1) == 1).sum(1)
            if main_LDE.shape[1] > 1
            else 0 * size_LD[:, 0],
            "overlap_L": np.array([overlap(each) for each in main_LDE]),
            "overlap_null_L": np.array(drawn),
            "gini_L": gini(loads_LE),
            "gini_null_L": np.full(len(loads_LE), gini(random_RE).mean()),
            "cover_L": np.array(covered),
        }
        notes = []
        if len(setting.sample.names) < 2:
            notes.append("There is one domain: its main experts are the committee.")
        numbers = {
            "experts of the committee (mean over layers)": float(arrays["committee_L"].mean()),
            "experts of the committee by chance": float(arrays["committee_null_L"].mean()),
            "choices that the committee takes": float(arrays["committee_share_L"].mean()),
            "main experts of a domain": float(size_LD.mean()),
            "experts that are main in one domain": float(arrays["single_L"].mean()),
            "overlap of domains": float(np.nanmean(arrays["overlap_L"])) if not notes else np.nan,
            "overlap of domains by chance": float(np.nanmean(drawn)) if not notes else np.nan,
            "Gini of the loads": float(arrays["gini_L"].mean()),
            "Gini of the loads by chance": float(arrays["gini_null_L"].mean()),
            "experts that cover 90% of tokens": float(arrays["cover_L"].mean()),
        }
        return Result(
            analysis=self.key,
            numbers=numbers,
            tables=[_table(arrays), _members(arrays)],
            arrays=arrays,
            notes=notes,
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Measures by layer; loads of the experts by domain, sorted by their least one."""
        found = [
            Figure(
                key=array,
                title=title,
                panels={
                    "all": layer_lines(
                        results,
                        {"observed": f"{array}_L"},
                        {"chance": f"{array}_null_L"},
                        Axis(title=axis),
                    )
                },
            )
            for array, title, axis in (
                ("committee", "Experts of the committee", "experts"),
                ("overlap", "Overlap of the main experts of domains", "Jaccard index"),
                ("gini", "Inequality of the loads", "Gini coefficient"),
                ("main", "Main experts of a domain", "experts"),
                ("single", "Experts that are main in one domain", "experts"),
                ("cover", "Experts that cover 90% of tokens", "experts"),
            )
        ]
        return found + [_heatmaps(label, result, results) for label, result in results.items()]

    def reading(self, results: Mapping[str, Result]) -> str:
        """The committee and its share, beside chance."""
        return " ".join(_sentence(label, result) for label, result in results.items())


def main_experts(count_LDE: Array) -> Array:
    """Members of the smallest set of experts that takes half of the choices, [L, D, E]."""
    order = np.argsort(-count_LDE, axis=2, kind="stable")
    ranked = np.take_along_axis(count_LDE, order, 2)
    before = np.cumsum(ranked, 2) - ranked
    needed = before < HALF * count_LDE.sum(2, keepdims=True)
    members = np.zeros(count_LDE.shape, bool)
    np.put_along_axis(members, order, needed, 2)
    return members


def overlap(main_DE: Array) -> float:
    """Mean Jaccard index over pairs of domains; NaN for a single domain."""
    one, other = np.triu_indices(len(main_DE), 1)
    if not len(one):
        return float("nan")
    both = (main_DE[one] & main_DE[other]).sum(1)
    either = (main_DE[one] | main_DE[other]).sum(1)
    return float((both / np.maximum(either, 1)).mean())


def overlap_by_chance(sizes_D: Array, experts: int, draws: int, rng: np.random.Generator) -> float:
    """The overlap of random sets of these sizes, mean over draws."""
    if len(sizes_D) < 2:
        return float("nan")
    ranks = np.argsort(rng.random((draws, len(sizes_D), experts)), axis=2)
    return float(np.mean([overlap(each) for each in ranks < sizes_D[None, :, None]]))


def smallest_cover(pool_TK: Array, experts: int, share: float) -> int:
    """Experts of a greedily built set such that ``share`` of tokens choose at least one of it."""
    left = pool_TK
    found = 0
    while len(left) > (1 - share) * len(pool_TK) + 1e-9:
        best = np.bincount(left.ravel(), minlength=experts).argmax()
        left = left[(left != best).all(1)]
        found += 1
    return found


def _table(arrays: Mapping[str, Array]) -> Table:
    names = (
        *("committee", "committee_null", "committee_share", "main", "single"),
        *("overlap", "overlap_null", "gini", "gini_null", "cover"),
    )
    about = (
        "committee: experts that are main in every domain; single: in one; null: chance; share: "
        "of the choices; cover: experts such that 90% of tokens choose one of them"
    )
    columns = {name: arrays[f"{name}_L"] for name in names}
    return grid_table("committee", about, {"layer": arrays["layers"].tolist()}, columns)


def _members(arrays: Mapping[str, Array]) -> Table:
    axes: dict[str, Sequence[Any]] = {
        "layer": arrays["layers"].tolist(),
        "domain": arrays["domains"].tolist(),
        "expert": range(arrays["main_LDE"].shape[2]),
    }
    values = {"load": arrays["load_LDE"], "is_main": arrays["main_LDE"].astype(int)}
    return grid_table("members", "share of the domain's choices", axes, values)


def _heatmaps(label: str, result: Result, results: Mapping[str, Result]) -> Figure:
    arrays = result.arrays
    panels = {}
    for row, layer in enumerate(arrays["layers"]):
        load_DE = arrays["load_LDE"][row]
        order = np.argsort(-load_DE.min(0), kind="stable")
        panels[f"layer {layer}"] = Heatmap(
            values=100 * load_DE[:, order],
            rows=[str(domain) for domain in arrays["domains"]],
            columns=[str(e) for e in order],
            x=Axis(title="expert"),
            y=Axis(title="domain"),
            colour="choices of the domain (%)",
        )
    return Figure(
        key=figure_key("loads", label, results),
        title=figure_title("Loads by domain, common experts first", label, results),
        panels=panels,
    )


def _sentence(label: str, result: Result) -> str:
    if len(result.arrays["domains"]) < 2:
        return f"{label}: one domain shows no committee."
    numbers = result.numbers
    experts = result.arrays["load_LDE"].shape[2]
    text = (
        f"{label}: {mean_of(result, 'committee_L'):.1f} of {experts} experts are main in every "
        f"domain (chance {mean_of(result, 'committee_null_L'):.1f}) and take "
        f"{100 * numbers['choices that the committee takes']:.0f}% of choices; "
        f"{mean_of(result, 'single_L'):.1f} are main in one"
    )
    if numbers["Gini of the loads"] < 2 * numbers["Gini of the loads by chance"]:
        return f"{text}. Loads are as even as at random, so main experts are a matter of noise."
    overlap_, chance = numbers["overlap of domains"], numbers["overlap of domains by chance"]
    if overlap_ - chance <= 0.5 * (1 - chance):
        return f"{text}. Domains use experts of their own more than a common committee."
    members = mean_of(result, "committee_L") / experts
    if numbers["choices that the committee takes"] < BUSY * members:
        return (
            f"{text}. The same experts are the busiest in all domains, but loads are too even to "
            "call them a standing committee."
        )
    return f"{text}. A standing committee serves all domains."

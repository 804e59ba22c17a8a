"""How much an expert prefers the tokens of one domain.

Shapes: L layers, D domains, E experts, G blocks of neighbouring rows, R draws, X blocks of all
domains.
"""

from __future__ import annotations

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
from megatron_moe.analysis.nulls import p_value
from megatron_moe.analysis.plot import Axis, Bars, Figure, Radar, Reference, Series
from megatron_moe.analysis.result import Result

Array = npt.NDArray[Any]

FEW_BLOCKS = 10
"""Blocks per domain below which the permutation test is called weak."""


@register
class DomainSpecialization(Analysis):
    """See the module."""

    key = "domains"
    title = "Domain specialization"
    question = "Do experts specialize in domains?"
    definition = (
        "The share of a domain's tokens that choose expert e among their k experts, "
        "N_e(domain) / N(domain); uniform routing gives k/E. Intervals: 95%, from resampled blocks "
        "of neighbouring rows. The strength of a layer is the share of choices that would have to "
        "go to other experts for a domain to be routed like all domains together (total variation "
        "distance, mean over the domains). Its chance level exchanges blocks between the domains; "
        "both are of blocks of as many rows each, so up to one block of a domain is left out."
    )
    source = (
        "Muennighoff et al., OLMoE (arXiv 2409.02060), section 5.3; "
        "Xue et al., OpenMoE (arXiv 2402.01739), figures 5 to 8"
    )
    group = "routing"
    uses = ("domains",)
    least_choices = 10

    def compute(self, material: Material) -> Result:
        """Shares, intervals and strength."""
        counts, setting = material.collected["domains"].state(), material.setting
        rng = np.random.default_rng(setting.seed)
        tokens_DG = counts["tokens_DG"]
        tokens_D1 = tokens_DG.sum(1)[:, None]
        topk, experts = setting.sizes.topk, setting.sizes.num_experts
        arrays: dict[str, Array] = {"kept_LDE": counts["kept_LDE"] / tokens_D1}
        p_values = {}
        for name in ("chosen", "first"):
            count_LDGE = counts[f"{name}_LDGE"]
            arrays[f"{name}_LDE"] = count_LDGE.sum(2) / tokens_D1
            low, high = intervals(count_LDGE, tokens_DG, material.draws, rng)
            arrays[f"{name}_low_LDE"], arrays[f"{name}_high_LDE"] = low, high
            strength_L, null_RL = permuted(count_LDGE, tokens_DG, material.draws, rng)
            arrays[f"{name}_strength_L"] = strength_L
            arrays[f"{name}_null_L"] = null_RL.mean(0)
            arrays[f"{name}_null_high_L"] = np.quantile(null_RL, 0.95, axis=0)
            columns = zip(strength_L, null_RL.T, strict=True)
            arrays[f"{name}_p_L"] = np.array([_p_value(one, drawn) for one, drawn in columns])
            p_values[name] = _p_value(strength_L.mean(), null_RL.mean(1))
        share_LDE = arrays["chosen_LDE"]
        overall_LE = counts["chosen_LDGE"].sum((1, 2)) / tokens_DG.sum()
        ratio = np.divide(
            share_LDE,
            overall_LE[:, None],
            out=np.ones_like(share_LDE),
            where=overall_LE[:, None] > 0,
        )
        names, layers = setting.sample.names, setting.layers
        numbers = {
            "uniform share of tokens, k/E": topk / experts,
            "largest share over uniform": share_LDE.max() * experts / topk,
            "largest share over the expert's share of all domains": ratio.max(),
        }
        for name, words in (("chosen", "all choices"), ("first", "first choices")):
            for array, what in (("strength", "strength"), ("null", "strength by chance")):
                numbers[f"{what}, {words}"] = float(arrays[f"{name}_{array}_L"].mean())
            numbers[f"p-value of the strength, {words}"] = p_values[name]
        return Result(
            analysis=self.key,
            numbers=numbers,
            tables=_tables(arrays, layers, names, range(experts)),
            arrays={
                **arrays,
                "overall_LE": overall_LE,
                "layers": np.array(layers),
                "domains": np.array(names),
            },
            notes=_notes(tokens_DG, names, setting.sample.seq_length),
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Strength by layer; for each checkpoint bars by expert, and the same as radar."""
        percent = Axis(title="choices that depend on the domain (%)")
        strength = {
            words: layer_lines(
                results,
                {"observed": f"{n}_strength_L"},
                {"chance": f"{n}_null_L"},
                percent,
                factor=100,
            )
            for n, words in (("chosen", "all choices"), ("first", "first choice"))
        }
        found = [
            Figure(
                key="strength",
                title="How much routing depends on the domain",
                panels=strength,
                selector="choices",
                caption="Dashed: blocks of rows exchanged between the domains.",
            )
        ]
        for label, result in results.items():
            for name, words in (("chosen", "all k choices"), ("first", "first choice")):
                found.append(_bars(name, words, label, results))
            found.append(_radar(label, result, results))
        return found

    def reading(self, results: Mapping[str, Result]) -> str:
        """Strength against chance, beside the papers' findings."""
        return " ".join(_sentence(label, result) for label, result in results.items())


def intervals(
    count_LDGE: Array, tokens_DG: Array, draws: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Ends of the 95% bootstrap interval of the shares, [L, D, E] each.

    Blocks of a domain are drawn with replacement. With one block there is no interval: NaN.
    """
    layers, domains, _, experts = count_LDGE.shape
    low, high = (np.full((layers, domains, experts), np.nan) for _ in range(2))
    for d in range(domains):
        used = np.flatnonzero(tokens_DG[d])
        if len(used) < 2:
            continue
        weight_RG = rng.multinomial(len(used), np.full(len(used), 1 / len(used)), size=draws)
        tokens_R = weight_RG @ tokens_DG[d, used]
        for row in range(layers):
            share_RE = (weight_RG @ count_LDGE[row, d, used]) / tokens_R[:, None]
            low[row, d], high[row, d] = np.quantile(share_RE, [0.025, 0.975], axis=0)
    return low, high


def full_blocks(tokens_DG: Array) -> Array:
    """Which blocks have all their rows, [D, G]: the last one of a domain may have fewer."""
    return np.asarray((tokens_DG > 0) & (tokens_DG == tokens_DG.max()))


def strength_of(count_LDE: Array) -> Array:
    """Mean over domains of the total variation distance to all domains together, [L]."""
    share_LDE = count_LDE / np.maximum(count_LDE.sum(2, keepdims=True), 1)
    all_L1E = count_LDE.sum(1, keepdims=True)
    all_L1E = all_L1E / np.maximum(all_L1E.sum(2, keepdims=True), 1)
    return 0.5 * np.abs(share_LDE - all_L1E).sum(2).mean(1)


def permuted(
    count_LDGE: Array, tokens_DG: Array, draws: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """The strength by layer, [L], and that after exchanging blocks between domains, [R, L].

    Both are of the full blocks alone: were a domain's blocks smaller than another's, exchanging
    them would even out the noise that a small domain has, and chance would come out too low.
    Domains without a full block do not count; with several domains but fewer than two that count,
    there is no strength: NaN.
    """
    full_DG = full_blocks(tokens_DG)
    counted_D = full_DG.any(1)
    if counted_D.sum() < min(2, len(tokens_DG)):
        nothing_L = np.full(len(count_LDGE), np.nan)
        return nothing_L, np.tile(nothing_L, (draws, 1))
    count_LDGE = count_LDGE[:, counted_D] * full_DG[counted_D][:, :, None]
    domain_X, block_X = np.nonzero(full_DG[counted_D])
    count_LXE = count_LDGE[:, domain_X, block_X]
    null_RL = np.empty((draws, len(count_LXE)))
    for draw in range(draws):
        member_DX = (rng.permutation(domain_X) == np.arange(counted_D.sum())[:, None]).astype(float)
        null_RL[draw] = strength_of(np.einsum("dx,lxe->lde", member_DX, count_LXE, optimize=True))
    return strength_of(count_LDGE.sum(2)), null_RL


def _tables(
    arrays: Mapping[str, Array], layers: Sequence[int], names: Sequence[str], experts: range
) -> list[Any]:
    columns = {
        "share": "chosen_LDE",
        "share_low": "chosen_low_LDE",
        "share_high": "chosen_high_LDE",
        "first_share": "first_LDE",
        "first_share_low": "first_low_LDE",
        "first_share_high": "first_high_LDE",
        "kept_share": "kept_LDE",
    }
    strength = {
        f"{rule}_{column}": arrays[f"{rule}_{array}_L"]
        for rule in ("chosen", "first")
        for column, array in (
            *(("strength", "strength"), ("chance", "null")),
            *(("chance_95", "null_high"), ("p", "p")),
        )
    }
    about = "choices that depend on the domain, as a share of all, and its chance level"
    return [
        grid_table("strength", about, {"layer": layers}, strength),
        grid_table(
            "shares",
            "share of the domain's tokens that choose the expert among their k, as their first, "
            "and among those that found a slot",
            {"layer": layers, "domain": names, "expert": experts},
            {column: arrays[array] for column, array in columns.items()},
        ),
    ]


def _p_value(observed: float, drawn_R: Array) -> float:
    return float("nan") if np.isnan(observed) else p_value(observed, drawn_R)


def _notes(tokens_DG: Array, names: Sequence[str], seq_length: int) -> list[str]:
    notes = []
    if len(names) < 2:
        notes.append("There is one domain, so nothing to compare: give several with --data.")
    blocks = full_blocks(tokens_DG).sum(1)
    rows = int(tokens_DG.max()) // seq_length
    if len(names) > 1 and blocks.min() < FEW_BLOCKS:
        name = names[int(blocks.argmin())]
        notes.append(
            f"{name} has {blocks.min()} full blocks of {rows} rows; intervals and the permutation "
            f"test need about {FEW_BLOCKS} in each domain, that is {FEW_BLOCKS * rows} rows, or "
            "domains of more similar size. A domain without any does not count in the strength."
        )
    return notes


def _bars(name: str, words: str, label: str, results: Mapping[str, Result]) -> Figure:
    result = results[label]
    arrays = result.arrays
    experts = list(range(arrays["chosen_LDE"].shape[2]))
    uniform = result.numbers["uniform share of tokens, k/E"]
    if name == "first":
        uniform = 1 / len(experts)
    panels = {
        f"layer {layer}": Bars(
            series=[
                Series(
                    name=str(domain),
                    x=experts,
                    y=100 * arrays[f"{name}_LDE"][row, d],
                    low=100 * arrays[f"{name}_low_LDE"][row, d],
                    high=100 * arrays[f"{name}_high_LDE"][row, d],
                )
                for d, domain in enumerate(arrays["domains"])
            ],
            x=Axis(title="expert"),
            y=Axis(title="tokens of the domain (%)"),
            references=[Reference(value=100 * uniform, label="uniform")],
        )
        for row, layer in enumerate(arrays["layers"])
    }
    return Figure(
        key=figure_key(f"shares-{name}", label, results),
        title=figure_title(f"Experts by domain, {words}", label, results),
        panels=panels,
    )


def _radar(label: str, result: Result, results: Mapping[str, Result]) -> Figure:
    arrays = result.arrays
    uniform = 100 * result.numbers["uniform share of tokens, k/E"]
    panels = {
        f"layer {layer}": Radar(
            categories=[str(e) for e in range(arrays["chosen_LDE"].shape[2])],
            series=[
                Series(name=str(domain), x=[], y=100 * arrays["chosen_LDE"][row, d])
                for d, domain in enumerate(arrays["domains"])
            ],
            radius="tokens of the domain (%)",
            reference=Reference(value=uniform, label="uniform"),
        )
        for row, layer in enumerate(arrays["layers"])
    }
    return Figure(
        key=figure_key("radar", label, results),
        title=figure_title("Experts by domain, around the circle", label, results),
        panels=panels,
    )


def _sentence(label: str, result: Result) -> str:
    if len(result.arrays["domains"]) < 2:
        return f"{label}: one domain alone shows no specialization."
    strength, null = (mean_of(result, f"chosen_{name}_L") for name in ("strength", "null"))
    if np.isnan(strength):
        return (
            f"{label}: the domains are too small beside the largest one to compare their routing."
        )
    text = (
        f"{label}: {100 * strength:.1f}% of choices depend on the domain, against "
        f"{100 * null:.1f}% by chance"
    )
    if result.numbers["p-value of the strength, all choices"] >= 0.05:
        return f"{text}. Like OpenMoE, this model shows no specialization in domains."
    if strength - null < 0.05:
        return (
            f"{text}. The preference is real but small, close to OpenMoE's finding that experts "
            "hardly specialize in domains."
        )
    return f"{text}. Experts prefer domains, as in OLMoE and unlike in OpenMoE."

"""Whether the router uses all of its experts: load, dead experts, confidence.

Shapes: L layers, E experts, R draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.grids import figure_key, figure_title, grid_table, layer_lines, mean_of
from megatron_moe.analysis.nulls import entropy, uniform_loads
from megatron_moe.analysis.plot import Axis, Bars, Figure, Lines, Reference, Series
from megatron_moe.analysis.result import Result

Array = npt.NDArray[Any]

RANDOM = "Dashed: a router that chooses at random."


@register
class Collapse(Analysis):
    """See the module."""

    key = "collapse"
    title = "Load and collapse"
    question = "Does the router use all of its experts, and how sure is it?"
    definition = (
        "Load: an expert's share of the choices, 1/E if uniform. MaxVio: largest load over the "
        "mean load, minus 1. Effective experts: exp of the entropy of the loads, E if uniform and "
        "k if the same k are always chosen. Dead: chosen by no token. Confidence: score of the "
        "first choice, mean over tokens; router entropy: of a token's scores over all experts, as "
        "a share of log E. Sigmoid scores are divided by their sum over all experts. Chance: a "
        "router that chooses at random for as many tokens."
    )
    source = (
        "MaxVio: Wang et al., auxiliary-loss-free load balancing (arXiv 2408.15664), section 4.1; "
        "uniform and random routing as references"
    )
    group = "routing"
    uses = ("load",)
    least_choices = 10

    def compute(self, material: Material) -> Result:
        """Indicators of every layer, beside those of random routing."""
        setting = material.setting
        sums = material.collected["load"].state()
        topk, experts = setting.sizes.topk, setting.sizes.num_experts
        tokens = int(sums["tokens_1"][0])
        rng = np.random.default_rng(setting.seed)
        random_RE = uniform_loads(tokens, topk, experts, material.draws, rng)
        layers = len(setting.layers)
        arrays: dict[str, Array] = {
            "layers": np.array(setting.layers),
            "load_LE": sums["chosen_LE"] / (tokens * topk),
            "first_LE": sums["first_LE"] / tokens,
            "kept_LE": sums["kept_LE"] / (tokens * topk),
            "score_LE": sums["score_LE"] / tokens,
            "max_violation_L": max_violation(sums["chosen_LE"]),
            "max_violation_null_L": np.full(layers, max_violation(random_RE).mean()),
            "effective_L": np.exp(entropy(sums["chosen_LE"])),
            "effective_null_L": np.full(layers, np.exp(entropy(random_RE)).mean()),
            "dead_L": (sums["chosen_LE"] == 0).sum(1),
            "confidence_L": sums["confidence_L"] / tokens,
            "mass_L": sums["mass_L"] / tokens,
            "entropy_L": sums["entropy_L"] / tokens / np.log(max(experts, 2)),
        }
        # P(an expert is never chosen) = (1 - k/E)^T.
        arrays["dead_null_L"] = np.full(layers, experts * (1 - topk / experts) ** tokens)
        numbers = {
            "dead experts": float(arrays["dead_L"].sum()),
            "dead experts by chance": float(arrays["dead_null_L"].sum()),
            "MaxVio (mean over layers)": float(arrays["max_violation_L"].mean()),
            "MaxVio by chance": float(arrays["max_violation_null_L"].mean()),
            "effective experts (mean over layers)": float(arrays["effective_L"].mean()),
            "effective experts by chance": float(arrays["effective_null_L"].mean()),
            "fewest effective experts of a layer": float(arrays["effective_L"].min()),
            "confidence": float(arrays["confidence_L"].mean()),
            "score of all k choices": float(arrays["mass_L"].mean()),
            "router entropy over log E": float(arrays["entropy_L"].mean()),
        }
        columns = {
            name: arrays[f"{name}_L"]
            for name in (
                *("max_violation", "max_violation_null", "effective", "effective_null"),
                *("dead", "dead_null", "confidence", "mass", "entropy"),
            )
        }
        indicators = grid_table(
            "indicators",
            "effective: experts; mass: score of all k choices; entropy: share of log E; null: at "
            "random",
            {"layer": setting.layers},
            columns,
        )
        loads = grid_table(
            "loads",
            "share of all choices, of first choices, of choices that found a slot; mean score",
            {"layer": setting.layers, "expert": range(experts)},
            {name: arrays[f"{name}_LE"] for name in ("load", "first", "kept", "score")},
        )
        return Result(
            analysis=self.key,
            numbers=numbers,
            tables=[indicators, loads],
            arrays=arrays,
            notes=_notes(tokens, topk, experts),
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Indicators by layer; loads by expert."""
        found = [
            Figure(
                key=array.replace("_", "-"),
                title=f"{title} by layer",
                panels={"all": _indicator(results, array, axis, factor)},
                caption=caption,
            )
            for array, title, axis, factor, caption in (
                ("max_violation", "MaxVio", "MaxVio", 1.0, RANDOM),
                ("effective", "Effective experts", "experts", 1.0, RANDOM),
                ("dead", "Dead experts", "experts", 1.0, RANDOM),
                ("confidence", "Confidence", "score of the first choice (%)", 100.0, ""),
                ("entropy", "Router entropy", "share of log E (%)", 100.0, ""),
            )
        ]
        return found + [_loads(label, result, results) for label, result in results.items()]

    def reading(self, results: Mapping[str, Result]) -> str:
        """Effective and dead experts."""
        return " ".join(_sentence(label, result) for label, result in results.items())


def max_violation(loads: Array) -> Array:
    """Largest over mean load, minus 1, over the last axis."""
    return np.asarray(loads.max(-1) / loads.mean(-1) - 1)


def _notes(tokens: int, topk: int, experts: int) -> list[str]:
    if tokens * topk < 100 * experts:
        needed = 100 * experts // topk
        return [
            f"{tokens} tokens give an expert {tokens * topk / experts:.0f} choices; about "
            f"{needed} are needed to tell loads from noise."
        ]
    return []


def _indicator(results: Mapping[str, Result], array: str, title: str, factor: float) -> Lines:
    solid, dashed = {"observed": f"{array}_L"}, {"chance": f"{array}_null_L"}
    return layer_lines(results, solid, dashed, Axis(title=title), factor=factor)


def _loads(label: str, result: Result, results: Mapping[str, Result]) -> Figure:
    arrays = result.arrays
    experts = list(range(arrays["load_LE"].shape[1]))
    panels = {
        f"layer {layer}": Bars(
            series=[
                Series(name=name, x=experts, y=100 * arrays[array][row])
                for name, array in (
                    ("all choices", "load_LE"),
                    ("first choices", "first_LE"),
                    ("mean score", "score_LE"),
                )
            ],
            x=Axis(title="expert"),
            y=Axis(title="share (%)"),
            references=[Reference(value=100 / len(experts), label="uniform")],
        )
        for row, layer in enumerate(arrays["layers"])
    }
    return Figure(
        key=figure_key("loads", label, results),
        title=figure_title("Load of the experts", label, results),
        panels=panels,
    )


def _sentence(label: str, result: Result) -> str:
    numbers = result.numbers
    experts = result.arrays["load_LE"].shape[1]
    effective = numbers["effective experts (mean over layers)"]
    text = (
        f"{label}: loads are those of {effective:.1f} equal experts of {experts}, the busiest has "
        f"{1 + mean_of(result, 'max_violation_L'):.1f} times the mean load, and a token's first "
        f"choice scores {numbers['confidence']:.2f}"
    )
    if numbers["dead experts"] > numbers["dead experts by chance"] + 0.5:
        return f"{text}; {numbers['dead experts']:.0f} experts are dead."
    if numbers["fewest effective experts of a layer"] < 0.5 * experts:
        return f"{text}; at least one layer leaves half of its experts nearly unused."
    return f"{text}; there is no sign of collapse."

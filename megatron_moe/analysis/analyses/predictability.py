"""How far the first choice of a layer gives away that of the next one.

A system that loads experts on demand can fetch those of the next layer early if it can.

Shapes: M pairs of consecutive analysed layers, E experts, R draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.analyses.flow import independent
from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.grids import layer_lines
from megatron_moe.analysis.nulls import entropy
from megatron_moe.analysis.plot import Axis, Figure, Lines
from megatron_moe.analysis.result import Result, Table

Array = npt.NDArray[Any]


@register
class LoadPredictability(Analysis):
    """See the module."""

    key = "predictability"
    title = "Predictability one layer ahead"
    question = "Does the expert of a token tell its expert in the next layer?"
    definition = (
        "Accuracy of the best guess of the next layer's first choice that knows this layer's, "
        "sum over i of max_j N_ij / N, beside the best guess that knows nothing, max_j N_j / N; "
        "and mutual information as a share of the entropy of the next choice. Chance: the same "
        "for tables drawn from independent choices, since the guesses are fitted to these tokens."
    )
    source = "no paper's figure; the question of prefetching experts"
    group = "routing"
    uses = ("flow",)
    least_choices = 10

    def compute(self, material: Material) -> Result:
        """Accuracy and information of each pair of layers."""
        setting = material.setting
        table_MEE = material.collected["flow"].state()["first_MEE"]
        rng = np.random.default_rng(setting.seed)
        arrays: dict[str, Array] = {"layers": np.array(setting.layers[1:], np.int64)}
        arrays["accuracy_L"] = np.array([accuracy(each) for each in table_MEE])
        arrays["information_L"] = np.array([information(each) for each in table_MEE])
        arrays["baseline_L"] = np.array([each.sum(0).max() / each.sum() for each in table_MEE])
        null_accuracy, null_information = [], []
        for each in table_MEE:
            drawn = independent(each, material.draws, rng)
            null_accuracy.append(np.mean([accuracy(one) for one in drawn]))
            null_information.append(np.mean([information(one) for one in drawn]))
        arrays["accuracy_null_L"] = np.array(null_accuracy)
        arrays["information_null_L"] = np.array(null_information)
        about = "the next layer's first choice, guessed from this layer's"
        columns = {"layer": list(setting.layers[:-1]), "next_layer": list(setting.layers[1:])}
        names = ("accuracy", "baseline", "accuracy_null", "information", "information_null")
        table = Table(
            name="predictability",
            about=about,
            columns={**columns, **{name: arrays[f"{name}_L"].tolist() for name in names}},
        )
        single = len(setting.layers) < 2
        return Result(
            analysis=self.key,
            numbers={
                f"{words} (mean over layers)": float("nan") if single else arrays[name].mean()
                for name, words in (
                    ("accuracy_L", "accuracy"),
                    ("accuracy_null_L", "accuracy by chance"),
                    ("baseline_L", "accuracy without knowledge"),
                    ("information_L", "share of entropy explained"),
                    ("information_null_L", "share of entropy explained by chance"),
                )
            },
            tables=[table],
            arrays=arrays,
            notes=["One MoE layer was analysed, so there is no next one."] if single else [],
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Accuracy and information by layer."""
        panels = {
            "accuracy": _lines(
                results,
                "tokens guessed right (%)",
                {"knows the layer before": "accuracy_L"},
                {"chance": "accuracy_null_L", "knows nothing": "baseline_L"},
            ),
            "information": _lines(
                results,
                "entropy of the choice explained (%)",
                {"observed": "information_L"},
                {"chance": "information_null_L"},
            ),
        }
        title = "Guessing the next layer's first choice"
        return [Figure(key="predictability", title=title, panels=panels, selector="measure")]

    def reading(self, results: Mapping[str, Result]) -> str:
        """Accuracy beside the guess without knowledge."""
        return " ".join(_sentence(label, result) for label, result in results.items())


def accuracy(table_EE: Array) -> float:
    """Share of tokens whose next choice is the most frequent one after theirs."""
    return float(table_EE.max(1).sum() / max(int(table_EE.sum()), 1))


def information(table_EE: Array) -> float:
    """Mutual information over the entropy of the next choice; 0 if that is constant."""
    after = float(entropy(table_EE.sum(0)))
    if after == 0:
        return 0.0
    joint = float(entropy(table_EE.ravel()))
    return float((entropy(table_EE.sum(1)) + after - joint) / after)


def _lines(
    results: Mapping[str, Result], title: str, solid: dict[str, str], dashed: dict[str, str]
) -> Lines:
    lines = layer_lines(results, solid, dashed, Axis(title=title), factor=100)
    return replace(lines, x=Axis(title="next layer"))


def _sentence(label: str, result: Result) -> str:
    if not len(result.arrays["layers"]):
        return f"{label}: one layer has no next one."
    right, chance, baseline = (
        100 * float(result.arrays[name].mean())
        for name in ("accuracy_L", "accuracy_null_L", "baseline_L")
    )
    text = (
        f"{label}: knowing a layer's expert, the next one is guessed right for {right:.0f}% of "
        f"tokens, without it for {baseline:.0f}%, by chance for {chance:.0f}%"
    )
    if right - chance < 2:
        return f"{text}: the layer before does not help."
    return f"{text}, so part of the load is known one layer ahead."

"""Experts with huge activations, and what the model is without them.

Shapes: L layers, E experts, S super experts or candidates, R random draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.ablation import ALL, change_of, evaluate, evaluate_without, part_of
from megatron_moe.analysis.analyses.expert_ablation import LENGTH, check_can_leave_out
from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.collector import Setting
from megatron_moe.analysis.collectors.expert_passes import ExpertPasses, check_rows
from megatron_moe.analysis.grids import figure_key, figure_title, grid_table
from megatron_moe.analysis.plot import Axis, Bars, Figure, Heatmap, Reference, Series
from megatron_moe.analysis.result import Result, Table
from megatron_moe.analysis.weights.reading import sentence_for_each

Array = npt.NDArray[Any]
HUGE = 10.0
"""A super expert's largest output is this many times the median of its layer."""
TENTH = 0.1
"""And at least this part of the largest output of any layer (Su et al., section 3)."""
MOST = 8
"""Experts that are left out, at most."""
MARGIN = 2.0
"""The model depends on super experts if the loss rises by this many times that of the worst random
set, at least, and the interval of the change is above 0."""
DRAWS = 3
"""Random sets of experts that are left out for comparison."""
TOKENS = 4096
"""Tokens of each evaluation, about."""


@register
class SuperExperts(Analysis):
    """See the module."""

    key = "super-experts"
    title = "Super experts"
    question = "Do a few experts produce huge activations, and does the model depend on them?"
    definition = (
        "The largest absolute output of an expert, before the combine weight, over the tokens that "
        "chose it, and the same of the input of its down projection. A super expert's largest "
        "output is at least 10 times the median of its layer and a tenth of the largest of all "
        "layers. The super experts with the largest ratio, at most eight, are left out together; "
        "without any, the expert with the largest ratio is. Chance: as many random other experts "
        "of the same layers are left out."
    )
    source = (
        "Su et al., Unveiling Super Experts (arXiv 2507.23279); "
        "Sun et al., Massive Activations (arXiv 2402.17762)"
    )
    group = "experts"
    uses = ("expert_passes",)

    def check(self, setting: Setting) -> None:
        """See `Analysis.check`."""
        check_rows(setting)
        check_can_leave_out(setting)

    def compute(self, material: Material) -> Result:
        """Largest activations, and losses without the experts that have them."""
        passes = cast(ExpertPasses, material.collected["expert_passes"])
        setting = material.setting
        seen_LE = passes.seen_LE > 0
        output_LE = np.where(seen_LE, passes.output_max_LE, np.nan)
        ratio_LE = ratios(output_LE)
        found = super_experts(output_LE)
        ranked = _by_ratio(ratio_LE)
        # Each token still needs K experts of a layer.
        left_out = _allowed(found or ranked[:1], setting)
        losses = _losses(material, left_out)
        dimension, agreeing = _dimension(passes.output_at_LE3, left_out)
        inner_LE = np.where(seen_LE, passes.inner_max_LE, np.nan)
        return Result(
            analysis=self.key,
            numbers={
                "super experts": float(len(found)),
                "largest ratio to the median of a layer": _largest(ratio_LE),
                "largest output": _largest(output_LE),
                "largest input of a down projection over its layer's median": _largest(
                    ratios(inner_LE)
                ),
                "hidden dimension of the largest outputs": float(dimension),
                "experts left out whose largest output is there": float(agreeing),
                "experts left out": float(len(left_out)),
                **losses,
                "experts seen": float(seen_LE.mean()),
            },
            tables=[
                grid_table(
                    "activations",
                    "largest absolute output and input of the down projection over the tokens "
                    "that chose the expert, ratio of the output to the median of the layer, and "
                    "the hidden dimension, token id and position of the largest output",
                    {"layer": setting.layers, "expert": range(output_LE.shape[1])},
                    {
                        "largest_output": output_LE,
                        "largest_inner": inner_LE,
                        "ratio": ratio_LE,
                        "dimension": passes.output_at_LE3[:, :, 0],
                        "token": passes.output_at_LE3[:, :, 1],
                        "position": passes.output_at_LE3[:, :, 2],
                    },
                ),
                _left_out_table(material, left_out, found, ratio_LE, passes.output_at_LE3),
            ],
            arrays={
                "layers": np.array(setting.layers),
                "output_LE": output_LE,
                "ratio_LE": ratio_LE,
            },
            notes=_notes(seen_LE, found),
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Ratios as heat maps, and changes of the loss."""
        maps = [
            Figure(
                key=figure_key("super-experts", label, results),
                title=figure_title("Largest output over the median of the layer", label, results),
                panels={"all": _map(result)},
                caption=f"Super experts are at {HUGE:g} or more. Blank: chosen by no token that "
                "went through all experts.",
            )
            for label, result in results.items()
        ]
        labels = list(results)
        names = {"experts with huge outputs": _CHANGE, "random experts": _RANDOM}
        bars = Bars(
            series=[
                Series(name=name, x=labels, y=[results[la].numbers[number] for la in labels])
                for name, number in names.items()
            ],
            x=Axis(title="checkpoint"),
            y=Axis(title="change of the loss (nats per token)"),
            references=[Reference(value=0.0, label="no change")],
        )
        changes = Figure(
            key="super-experts-loss",
            title="Change of the loss without the experts",
            panels={"all": bars},
            caption="Random experts: as many of the same layers, mean of several draws.",
        )
        return [*maps, changes]

    def reading(self, results: Mapping[str, Result]) -> str:
        """Whether there are any, and what they do."""
        return sentence_for_each({label: _reading(result) for label, result in results.items()})


_CHANGE = "change of the loss without them"
_LOW, _HIGH = f"{_CHANGE}, low", f"{_CHANGE}, high"
_RANDOM = "change of the loss without random experts"


def ratios(largest_LE: Array) -> Array:
    """Largest values over the median of the layer; NaN for experts that were not seen."""
    median_L = np.array(
        [
            np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan
            for row in largest_LE
        ]
    )
    median_L[median_L == 0] = np.nan
    return np.asarray(largest_LE / median_L[:, None])


def super_experts(output_LE: Array) -> list[tuple[int, int]]:
    """Row of the layer and expert of each super expert, largest ratio first, at most `MOST`."""
    ratio_LE = ratios(output_LE)
    floor = TENTH * _largest(output_LE)
    return [
        (row, expert)
        for row, expert in _by_ratio(ratio_LE)
        if ratio_LE[row, expert] >= HUGE and output_LE[row, expert] >= floor
    ][:MOST]


def _by_ratio(ratio_LE: Array) -> list[tuple[int, int]]:
    experts = ratio_LE.shape[1]
    order = np.argsort(-np.nan_to_num(ratio_LE, nan=-1.0), axis=None, kind="stable")
    return [(int(i) // experts, int(i) % experts) for i in order]


def _largest(values: Array) -> float:
    return float(np.nanmax(values)) if np.isfinite(values).any() else math.nan


def _allowed(ranked: Sequence[tuple[int, int]], setting: Setting) -> list[tuple[int, int]]:
    """Of a layer, no more than the E - K that can be left out."""
    most = setting.sizes.num_experts - setting.sizes.topk
    kept: list[tuple[int, int]] = []
    for row, expert in ranked:
        if sum(other == row for other, _ in kept) < most:
            kept.append((row, expert))
    return kept


def _grouped(left_out: Sequence[tuple[int, int]], layers: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for row, expert in left_out:
        found.setdefault(layers[row], []).append(expert)
    return found


def _losses(material: Material, left_out: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Losses of the whole model, without these experts, and without as many random ones."""
    runner, setting = material.runner, material.setting
    assert runner is not None
    sample = part_of(setting.sample, TOKENS, LENGTH)
    experts = _grouped(left_out, setting.layers)
    whole = evaluate(runner, sample)[ALL]
    without = evaluate_without(runner, sample, experts)[ALL]
    change, low, high = change_of(whole.rows_R, without.rows_R, material.draws, setting.seed)
    random = [
        evaluate_without(runner, sample, drawn)[ALL].loss - whole.loss
        for drawn in _random_sets(experts, setting)
    ]
    return {
        "loss of the whole model": whole.loss,
        _CHANGE: change,
        _LOW: low,
        _HIGH: high,
        _RANDOM: float(np.mean(random)),
        f"{_RANDOM}, largest": float(np.max(random)),
        "perplexity of the whole model": whole.perplexity,
        "perplexity without them": without.perplexity,
    }


def _random_sets(
    experts: Mapping[int, Sequence[int]], setting: Setting
) -> list[dict[int, list[int]]]:
    """As many others of each layer, in several draws that differ where there are enough."""
    rng, drawn = np.random.default_rng(setting.seed), [dict[int, list[int]]() for _ in range(DRAWS)]
    for layer, ids in experts.items():
        others = rng.permutation(np.setdiff1d(np.arange(setting.sizes.num_experts), ids))
        count = min(len(ids), len(others))
        for draw, chosen in enumerate(drawn):
            places = (draw * count + np.arange(count)) % len(others)
            chosen[layer] = others[places].tolist()
    return drawn


def _dimension(at_LE3: Array, left_out: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The most frequent hidden dimension of the largest outputs, and how many have it."""
    found = [int(at_LE3[row, expert, 0]) for row, expert in left_out]
    best = max(found, key=lambda dimension: (found.count(dimension), -dimension))
    return best, found.count(best)


def _left_out_table(
    material: Material,
    left_out: Sequence[tuple[int, int]],
    found: Sequence[tuple[int, int]],
    ratio_LE: Array,
    at_LE3: Array,
) -> Table:
    layers = material.setting.layers
    tokens = [int(at_LE3[row, expert, 1]) for row, expert in left_out]
    return Table(
        name="left_out",
        about="experts that are left out: ratio of the largest output to the median of the layer, "
        "and where it occurs",
        columns={
            "layer": [layers[row] for row, _ in left_out],
            "expert": [expert for _, expert in left_out],
            "super": [pair in found for pair in left_out],
            "ratio": [float(ratio_LE[pair]) for pair in left_out],
            "dimension": [int(at_LE3[row, expert, 0]) for row, expert in left_out],
            "token": [material.model.piece(i) if i >= 0 else "" for i in tokens],
            "position": [int(at_LE3[row, expert, 2]) for row, expert in left_out],
        },
    )


def _notes(seen_LE: Array, found: Sequence[tuple[int, int]]) -> list[str]:
    notes = []
    if not seen_LE.all():
        notes.append(
            f"{100 * (1 - seen_LE.mean()):.0f}% of the experts were chosen by none of the tokens "
            "that went through all experts, so that their largest outputs are not known."
        )
    if not found:
        notes.append("No expert is a super expert: the one with the largest ratio was left out.")
    return notes


def _map(result: Result) -> Heatmap:
    ratio_LE = result.arrays["ratio_LE"]
    return Heatmap(
        values=ratio_LE,
        rows=[str(layer) for layer in result.arrays["layers"]],
        columns=[str(e) for e in range(ratio_LE.shape[1])],
        x=Axis(title="expert"),
        y=Axis(title="layer"),
        colour="ratio to the median",
    )


def _reading(result: Result) -> str:
    n = result.numbers
    count, change, random = int(n["super experts"]), n[_CHANGE], n[_RANDOM]
    ratio = n["largest ratio to the median of a layer"]
    if not count:
        return (
            f"There are no super experts: the largest output of an expert is {ratio:.1f} times the "
            f"median of its layer. Without that expert the loss changes by {change:+.3f} nats, "
            f"without a random one by {random:+.3f}."
        )
    named = "super expert has an output" if count == 1 else "super experts have outputs"
    said = (
        f"{count} {named} up to {ratio:.0f} times the median of the layer, "
        f"{int(n['experts left out whose largest output is there'])} of "
        f"{int(n['experts left out'])} in hidden dimension "
        f"{int(n['hidden dimension of the largest outputs'])}. Without them the loss changes by "
        f"{change:+.3f} nats (95% interval {n[_LOW]:+.3f} to {n[_HIGH]:+.3f}), without random "
        f"experts by {random:+.3f}"
    )
    return said + _conclusion(change, n[_LOW], n[_HIGH], n[f"{_RANDOM}, largest"])


def _conclusion(change: float, low: float, high: float, random: float) -> str:
    """What a change of the loss, its interval and the worst random set say."""
    if not (low > 0 or high < 0):
        return ": too few rows to tell whether the model depends on them."
    if low > 0 and change > MARGIN * max(random, 0.0):
        return ": the model depends on them, as in the paper."
    return ": they matter little more than others or not at all, unlike in the paper."

"""What the loss is without each of some experts.

Shapes: A experts that are left out one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.ablation import ALL, change_of, evaluate, evaluate_without, part_of
from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.collector import Setting
from megatron_moe.analysis.grids import series_name
from megatron_moe.analysis.plot import Axis, Figure, Reference, Scatter, Series
from megatron_moe.analysis.result import Result, Table
from megatron_moe.analysis.weights.reading import sentence_for_each
from megatron_moe.analysis.weights.statistics import rank_correlation
from megatron_moe.errors import UsageError

Array = npt.NDArray[Any]
TOKENS = 2048
"""Tokens that are evaluated for each expert, about."""
LENGTH = 256
"""Tokens of a row, at most: more and shorter rows make intervals narrower."""
EXPERTS = 24
"""Experts that are left out, at most: each costs a pass over these tokens."""
LAYERS = 3
"""Layers that they are of, at most: the first, the last, and those between."""
_LEAST_ROWS = 2


@register
class ExpertAblation(Analysis):
    """See the module."""

    key = "expert-ablation"
    title = "Loss without an expert"
    question = "How much does each expert matter for the loss?"
    definition = (
        "The change of the mean cross entropy when one expert cannot be chosen: its logit is "
        "-inf, so that tokens that would choose it take their next best, weighted by the "
        "routing rule. At most 24 experts of three layers, spread over their numbers, on about "
        "2048 tokens, with an interval by a bootstrap over rows. An expert whose interval contains "
        "0 is not known to matter. Load alone would rank experts by the share of tokens that "
        "choose them."
    )
    source = "Expert pruning, e.g. Lu et al. (arXiv 2402.14800); the measure is defined here"
    group = "experts"

    def check(self, setting: Setting) -> None:
        """See `Analysis.check`."""
        check_can_leave_out(setting)
        rows = sum(len(domain.starts) for domain in setting.sample.domains)
        if rows < _LEAST_ROWS:
            raise UsageError("rows of --data", rows, f">= {_LEAST_ROWS}, for an interval")

    def compute(self, material: Material) -> Result:
        """Change of the loss for each expert that is left out."""
        runner, setting = material.runner, material.setting
        assert runner is not None
        sample = part_of(setting.sample, TOKENS, LENGTH)
        whole = evaluate(runner, sample)[ALL]
        load_LE = _loads(material, sample)
        places = _chosen(setting)
        changes = []
        for layer, expert in places:
            without = evaluate_without(runner, sample, {layer: [expert]})[ALL]
            changes.append(change_of(whole.rows_R, without.rows_R, material.draws, setting.seed))
        change_A, low_A, high_A = (np.array(column) for column in zip(*changes, strict=True))
        load_A = np.array([load_LE[setting.layers.index(la), e] for la, e in places])
        harm = float((low_A > 0).mean())
        return Result(
            analysis=self.key,
            numbers={
                "loss of the whole model": whole.loss,
                "mean change of the loss": float(change_A.mean()),
                "largest change of the loss": float(change_A.max()),
                "experts without which the loss is higher": harm,
                "experts without which the loss is lower": float((high_A < 0).mean()),
                "rank correlation with load": _correlation(load_A, change_A),
                "experts": float(len(places)),
                "tokens": float(whole.tokens),
            },
            tables=[
                Table(
                    name="ablation",
                    about="change of the loss in nats per token without one expert, and its 95% "
                    "interval; load: share of tokens that choose it",
                    columns={
                        "layer": [layer for layer, _ in places],
                        "expert": [expert for _, expert in places],
                        "load": load_A.tolist(),
                        "loss_change": change_A.tolist(),
                        "low": low_A.tolist(),
                        "high": high_A.tolist(),
                    },
                )
            ],
            arrays={
                "layers_A": np.array([layer for layer, _ in places]),
                "experts_A": np.array([expert for _, expert in places]),
                "load_A": load_A,
                "change_A": change_A,
                "low_A": low_A,
                "high_A": high_A,
            },
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Change of the loss against load."""
        series = [
            Series(
                name=series_name(f"layer {layer}", label, results),
                x=100 * result.arrays["load_A"][at],
                y=result.arrays["change_A"][at],
                low=result.arrays["low_A"][at],
                high=result.arrays["high_A"][at],
                text=[f"expert {e}" for e in result.arrays["experts_A"][at]],
            )
            for label, result in results.items()
            for layer in np.unique(result.arrays["layers_A"])
            for at in [result.arrays["layers_A"] == layer]
        ]
        return [
            Figure(
                key="expert-ablation",
                title="Change of the loss without an expert",
                panels={
                    "all": Scatter(
                        series=series,
                        x=Axis(title="tokens that choose the expert (%)"),
                        y=Axis(title="change of the loss (nats per token)"),
                        references=[Reference(value=0.0, label="no change")],
                    )
                },
                caption="Intervals: 95%, bootstrap over rows.",
            )
        ]

    def reading(self, results: Mapping[str, Result]) -> str:
        """How many experts matter, and whether load predicts which."""
        return sentence_for_each({label: _reading(result) for label, result in results.items()})


def check_can_leave_out(setting: Setting) -> None:
    """Check that the model works without one expert of a layer.

    Raises:
        UsageError: each token uses all experts.
    """
    sizes = setting.sizes
    if sizes.topk >= sizes.num_experts:
        expected = f"> {sizes.topk}, the number that each token uses, to leave one out"
        raise UsageError("number of experts", sizes.num_experts, expected)


def spread_layers(layers: Sequence[int], count: int) -> list[int]:
    """The first, the last, and layers evenly between them, at most ``count``."""
    places = np.unique(np.linspace(0, len(layers) - 1, min(count, len(layers))).round())
    return [layers[int(place)] for place in places]


def _chosen(setting: Setting) -> list[tuple[int, int]]:
    layers = spread_layers(setting.layers, LAYERS)
    experts = setting.sizes.num_experts
    each = min(experts, EXPERTS // len(layers))
    return [(layer, int(e)) for layer in layers for e in np.arange(each) * experts // each]


def _loads(material: Material, sample: Any) -> Array:
    """Share of tokens that choose each expert, before drops, [L, E]."""
    runner, setting = material.runner, material.setting
    assert runner is not None
    counts = np.zeros((len(setting.layers), setting.sizes.num_experts), np.int64)
    for batch in sample.batches():
        seen = runner.run(batch)
        for index, place in enumerate(setting.places()):
            counts[index] += seen.layers[place].counts_E.cpu().numpy()
    return np.asarray(counts / sample.tokens)


def _correlation(load_A: Array, change_A: Array) -> float:
    if len(load_A) < 3 or np.ptp(load_A) == 0 or np.ptp(change_A) == 0:
        return math.nan
    return float(rank_correlation(load_A, change_A))


def _reading(result: Result) -> str:
    n = result.numbers
    count, harm = int(n["experts"]), n["experts without which the loss is higher"]
    said = (
        f"Leaving out one expert raises the loss beyond its interval for {100 * harm:.0f}% of "
        f"{count} experts; the largest change is {n['largest change of the loss']:+.3f} nats on a "
        f"loss of {n['loss of the whole model']:.2f}"
    )
    correlation = n["rank correlation with load"]
    if math.isnan(correlation):
        return said + "."
    chance = 2 / math.sqrt(max(1, count - 1))
    if correlation > chance:
        return said + f". Experts that more tokens choose matter more ({correlation:.2f})."
    if correlation < -chance:
        return said + f". Experts that fewer tokens choose matter more ({correlation:.2f})."
    return said + f". Load does not tell which experts matter ({correlation:.2f}, within chance)."

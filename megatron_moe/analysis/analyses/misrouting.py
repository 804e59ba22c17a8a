"""How often another expert would have been better for a token.

Shapes: B windows of C tokens, of which the last is looked at; K choices, E experts, J alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_moe.analysis.analyses.expert_ablation import check_can_leave_out, spread_layers
from megatron_moe.analysis.base import Analysis, Material, register
from megatron_moe.analysis.collector import Setting
from megatron_moe.analysis.grids import layer_lines, series_name
from megatron_moe.analysis.model import MoERunner
from megatron_moe.analysis.observation import LayerRouting, TokenBatch
from megatron_moe.analysis.plot import Axis, Figure, Lines, Reference, Series
from megatron_moe.analysis.result import Result, Table
from megatron_moe.analysis.sample import Sample, spread
from megatron_moe.analysis.weights.reading import sentence_for_each
from megatron_moe.errors import UsageError

Array = npt.NDArray[Any]
WINDOWS = 32
"""Tokens that are looked at, at most: each is the last of a window."""
CONTEXT = 64
"""Tokens of a window."""
ALTERNATIVES = 4
"""Experts that are tried for a token, at most; each costs a pass over the windows."""
LAYERS = 3
"""Layers, at most: the first, the last, and one between."""
NO_CHANGE = 1e-5
"""Nats: a loss that changes by at most this is unchanged, since fp32 rounds a loss by as much."""
LEAST = 8
"""Tokens from which shares are reported."""


@register
class Misrouting(Analysis):
    """See the module."""

    key = "misrouting"
    title = "Counterfactual routing"
    question = "How often would a token's loss be lower with another expert?"
    definition = (
        "An expert of the router's ranks k+1 to 2k takes the place and the weight of a token's "
        "last kept choice in one layer; everything before the token stays as it is. Ranks are by "
        "what the router maximises, bias included; experts of groups that it does not keep come "
        "last. Reported are "
        "the share of these exchanges that lower the loss of the token, and the share of tokens "
        "for which one of the tried experts does. Chance: the same with experts drawn from those "
        "behind rank 2k. An exchange that does not change the loss counts as one half; if the "
        "exchanged experts were equivalent, half of the exchanges would lower the loss, and one "
        "of j would for 1 - 1/2^j of the tokens."
    )
    source = "Defined here; related: Lo et al. (arXiv 2406.18219), section 4.3"
    group = "experts"

    def check(self, setting: Setting) -> None:
        """See `Analysis.check`."""
        check_can_leave_out(setting)
        rows = sum(len(domain.starts) for domain in setting.sample.domains)
        if rows < LEAST:
            raise UsageError(
                "rows of --data", rows, f">= {LEAST}, one for each token", "shorter --seq-length"
            )

    def compute(self, material: Material) -> Result:
        """Exchanges in up to three layers."""
        runner, setting = material.runner, material.setting
        assert runner is not None
        batch = windows_of(setting.sample)
        layers = spread_layers(setting.layers, LAYERS)
        tried = [_exchanges(runner, batch, layer, setting) for layer in layers]
        columns = {
            "better": [_mean(lowered(each.gain_JB), each.gain_JB) for each in tried],
            "better_random": [_mean(lowered(each.random_JB), each.random_JB) for each in tried],
            "any_better": [_any(each.gain_JB) for each in tried],
            "any_better_random": [_any(each.random_JB) for each in tried],
            "mean_loss_change": [-_mean(each.gain_JB, each.gain_JB) for each in tried],
            "mean_loss_change_random": [-_mean(each.random_JB, each.random_JB) for each in tried],
        }
        share = [_interval(each.gain_JB, material.draws, setting.seed) for each in tried]
        low_L, high_L = (np.array(column) for column in zip(*share, strict=True))
        numbers = {
            "exchanges that lower the loss": _nanmean(columns["better"]),
            "exchanges that do not change the loss": _nanmean(
                [_mean(np.abs(each.gain_JB) <= NO_CHANGE, each.gain_JB) for each in tried]
            ),
            "exchanges with experts behind rank 2k that do": _nanmean(columns["better_random"]),
            "tokens that one exchange improves": _nanmean(columns["any_better"]),
            "tokens that one exchange behind rank 2k improves": _nanmean(
                columns["any_better_random"]
            ),
            "tokens that one exchange improves, equivalent experts": 1
            - 0.5 ** len(tried[0].gain_JB),
            "mean change of the loss": _nanmean(columns["mean_loss_change"]),
            "mean change of the loss behind rank 2k": _nanmean(columns["mean_loss_change_random"]),
            "standard error of the share": 0.5 / math.sqrt(len(layers) * len(batch.tokens_BS)),
            "tokens": float(len(batch.tokens_BS)),
            "experts tried for a token": float(tried[0].gain_JB.shape[0]),
        }
        few = "There are no experts behind rank 2k, so that only one half is left as chance level."
        has_behind = setting.sizes.num_experts > 2 * setting.sizes.topk
        return Result(
            analysis=self.key,
            numbers=numbers,
            notes=[] if has_behind else [few],
            tables=[
                Table(
                    name="misrouting",
                    about="share of exchanges, and of tokens with an exchange, that lower the "
                    "loss; mean change of the loss in nats; `random`: experts behind rank 2k",
                    columns={"layer": layers, "low": low_L.tolist(), "high": high_L.tolist()}
                    | columns,
                )
            ],
            arrays={"layers": np.array(layers), "low_L": low_L, "high_L": high_L}
            | {f"{name}_L": np.array(values) for name, values in columns.items()},
        )

    def figures(self, results: Mapping[str, Result]) -> Sequence[Figure]:
        """Shares by layer."""
        improved = layer_lines(
            results,
            {"ranks k+1 to 2k": "any_better_L"},
            {"behind rank 2k": "any_better_random_L"},
            Axis(title="tokens that one exchange improves (%)"),
            factor=100,
        )
        return [
            Figure(
                key="misrouting-exchanges",
                title="Exchanges of an expert that lower the loss",
                panels={"all": _exchange_lines(results)},
                caption="Intervals: 95%, bootstrap over tokens.",
            ),
            Figure(
                key="misrouting-tokens",
                title="Tokens for which an exchanged expert is better",
                panels={"all": improved},
            ),
        ]

    def reading(self, results: Mapping[str, Result]) -> str:
        """Beside equivalent experts and experts of low ranks."""
        return sentence_for_each({label: _reading(result) for label, result in results.items()})


def _exchange_lines(results: Mapping[str, Result]) -> Lines:
    series = []
    for label, result in results.items():
        values = {name: 100 * array for name, array in result.arrays.items() if name != "layers"}
        layers = result.arrays["layers"]
        near = Series(
            name=series_name("ranks k+1 to 2k", label, results),
            x=layers,
            y=values["better_L"],
            low=values["low_L"],
            high=values["high_L"],
            group=label,
        )
        behind = Series(
            name=series_name("behind rank 2k", label, results),
            x=layers,
            y=values["better_random_L"],
            dashed=True,
            group=label,
        )
        series += [near, behind]
    return Lines(
        series=series,
        x=Axis(title="layer"),
        y=Axis(title="exchanges that lower the loss (%)"),
        references=[Reference(value=50.0, label="equivalent experts")],
        markers=True,
    )


@dataclass(frozen=True)
class _Exchanges:
    """Loss before minus loss after an exchange, [J, B]; NaN where there was none."""

    gain_JB: Array
    random_JB: Array


def windows_of(sample: Sample) -> TokenBatch:
    """The beginnings of rows that are spread over all domains, as one batch.

    Whole rows and groups of them, where they compete for the slots of experts: then at most as
    many as a batch has, but not fewer than are needed.
    """
    rows = sum(len(domain.starts) for domain in sample.domains)
    count, length, group = min(WINDOWS, rows), min(CONTEXT, sample.seq_length), sample.group_rows
    if group is not None:
        least = -(-LEAST // group) * group
        count, length = min(rows, max(least, sample.batch_size)), sample.seq_length
    wanted, place = set(spread(rows, count).tolist()), 0
    tokens, labels = [], []
    for batch in sample.batches():
        picked = [r for r in range(len(batch.tokens_BS)) if place + r in wanted]
        tokens.append(batch.tokens_BS[picked, :length])
        labels.append(batch.next_BS[picked, :length])
        place += len(batch.tokens_BS)
    tokens_BS = np.concatenate(tokens)
    return TokenBatch(
        tokens_BS=tokens_BS,
        next_BS=np.concatenate(labels),
        documents_BS=np.zeros_like(tokens_BS),
        domain=0,
        number=0,
    )


def _exchanges(runner: MoERunner, batch: TokenBatch, layer: int, setting: Setting) -> _Exchanges:
    """All exchanges in one layer."""
    rows, length = batch.tokens_BS.shape
    plain = runner.run(batch, predictions=True)
    record = plain.layers[setting.sizes.moe_layers.index(layer)]
    assert plain.loss_T is not None
    last_B = torch.arange(length - 1, rows * length, length, device=record.ids_TK.device)
    loss_B = plain.loss_T[last_B].double()
    experts, topk = setting.sizes.num_experts, setting.sizes.topk
    order_BE = ranked_others(runner, record, last_B)
    near = order_BE[:, : min(topk, experts - topk)]
    behind = order_BE[:, near.shape[1] :]
    tried = near[:, _places(near.shape[1], ALTERNATIVES)]
    rng = np.random.default_rng(setting.seed)
    drawn = torch.from_numpy(rng.permuted(behind.cpu().numpy(), axis=1)[:, : tried.shape[1]])
    gains = []
    for candidates_BJ in (tried, drawn.to(tried.device)):
        columns = [
            _gain(runner, batch, record, last_B, loss_B, candidates_BJ[:, j])
            for j in range(candidates_BJ.shape[1])
        ]
        gains.append(np.stack(columns) if columns else np.full((1, rows), np.nan))
    return _Exchanges(gains[0], gains[1])


def ranked_others(runner: MoERunner, record: LayerRouting, tokens_B: Tensor) -> Tensor:
    """Experts that a token did not choose, as the router ranks them, best first, [B, E - K].

    Those outside the groups that the router keeps come last, by their scores.
    """
    ids_BK, scores_BE = record.ids_TK[tokens_B], record.router_probs_TE[tokens_B]
    ranking_BE = runner.ranking(record.layer, scores_BE).scatter(1, ids_BK, -torch.inf)
    scores_BE = scores_BE.scatter(1, ids_BK, -torch.inf)
    by_score_BE = scores_BE.argsort(dim=1, descending=True, stable=True)
    # The stable sort leaves experts that cannot be chosen by score, and the chosen ones at the end.
    again_BE = ranking_BE.gather(1, by_score_BE).argsort(dim=1, descending=True, stable=True)
    return by_score_BE.gather(1, again_BE)[:, : scores_BE.shape[1] - ids_BK.shape[1]]


def _places(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, spread evenly from the first on."""
    most = min(count, most)
    return [place * count // most for place in range(most)]


def _gain(
    runner: MoERunner,
    batch: TokenBatch,
    record: LayerRouting,
    last_B: Tensor,
    loss_B: Tensor,
    experts_B: Tensor,
) -> Array:
    """How much lower the loss of each last token is with this expert for its last kept choice."""
    kept_BK = record.kept_TK[last_B]
    topk = kept_BK.shape[1]
    slot_B = topk - 1 - kept_BK.flip(1).int().argmax(1)
    ids_TK = record.ids_TK.clone()
    ids_TK[last_B, slot_B] = experts_B.to(ids_TK)
    with runner.forced(record.layer, ids_TK, record.weights_TK, record.kept_TK):
        changed = runner.run(batch, predictions=True)
    assert changed.loss_T is not None
    gain_B = loss_B - changed.loss_T[last_B].double()
    return gain_B.masked_fill(~kept_BK.any(1), math.nan).cpu().numpy()


def _mean(values_JB: Array, present_JB: Array) -> float:
    found = values_JB[np.isfinite(present_JB)]
    return float(found.mean()) if found.size else math.nan


def lowered(gain_JB: Array) -> Array:
    """1 where the loss is lower, 0 where it is higher, and 1/2 where it does not change."""
    return np.where(np.abs(gain_JB) <= NO_CHANGE, 0.5, gain_JB > 0)


def _any(gain_JB: Array) -> float:
    """Share of tokens that an exchange improves, of those that had one.

    Of n exchanges that do not change the loss, one counts as better with 1 - 1/2^n.
    """
    present_B = np.isfinite(gain_JB).all(0)
    if not present_B.any():
        return math.nan
    return float((1 - (1 - lowered(gain_JB[:, present_B])).prod(0)).mean())


def _interval(gain_JB: Array, draws: int, seed: int) -> tuple[float, float]:
    """95% interval of the share of exchanges that lower the loss: a bootstrap over tokens."""
    better_B = lowered(gain_JB).mean(0)[np.isfinite(gain_JB).all(0)]
    if len(better_B) < 2 or draws < 1:
        return math.nan, math.nan
    drawn = np.random.default_rng(seed).integers(len(better_B), size=(draws, len(better_B)))
    low, high = np.quantile(better_B[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def _nanmean(values: Sequence[float]) -> float:
    found = [value for value in values if math.isfinite(value)]
    return float(np.mean(found)) if found else math.nan


def _reading(result: Result) -> str:
    n = result.numbers
    found, random = (
        n["exchanges that lower the loss"],
        n["exchanges with experts behind rank 2k that do"],
    )
    if math.isnan(found):
        return "None of the tokens had a choice that found a slot."
    same = n["exchanges that do not change the loss"]
    if same > 0.5:
        return (
            f"{100 * same:.0f}% of the exchanges with an expert of ranks k+1 to 2k do not change "
            f"the loss (by at most {NO_CHANGE:g} nats): the experts are as good as each other, or "
            "the last choice has next to no weight."
        )
    noise = 2 * n["standard error of the share"]
    if abs(found - 0.5) <= noise:
        said = (
            f"{100 * found:.0f}% of the exchanges with an expert of ranks k+1 to 2k lower the "
            "loss, as if the experts were equivalent"
        )
    elif found < 0.5:
        said = (
            f"Only {100 * found:.0f}% of the exchanges with an expert of ranks k+1 to 2k lower "
            "the loss: the router's choice is better than the next ones"
        )
    else:
        said = (
            f"{100 * found:.0f}% of the exchanges with an expert of ranks k+1 to 2k lower the "
            "loss: the router's last choice is worse than the next ones"
        )
    beside = "" if math.isnan(random) else f" (experts behind rank 2k: {100 * random:.0f}%)"
    improved = 100 * n["tokens that one exchange improves"]
    equivalent = 100 * n["tokens that one exchange improves, equivalent experts"]
    return (
        f"{said}{beside}; for {improved:.0f}% of the tokens one of those tried is better "
        f"({equivalent:.0f}% if experts were equivalent)."
    )

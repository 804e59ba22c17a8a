"""Some tokens through every expert of a layer: outputs, norms, activity, largest activations.

Tokens are bounded, since E experts process each instead of K: up to `TOKENS` for all domains, or
`LEAST` of each, from rows spread evenly over the domain. Of a chosen row, the first token goes
through the experts too, for the largest activations alone: they often occur there, and it would be
over-represented in means. The first tokens of the first row of a domain are the short text.

Inputs of the chosen tokens are recorded in all layers at once: at most L H values for each of
`TOKENS + ROWS (1 + SHORT)` tokens, 1.0 GB for 58 layers of width 7168 in bf16, where those of all
tokens of 8 rows of 2048 would be 13.6 GB.

Shapes: L analysed layers, D domains, E experts, F width, H hidden, N tokens of a row that go
through the experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_moe.analysis.collector import Collector, Inputs, Setting, collector
from megatron_moe.analysis.model import MoERunner
from megatron_moe.analysis.observation import LayerRouting, Observation, TokenBatch
from megatron_moe.analysis.sample import Sample
from megatron_moe.errors import UsageError

TOKENS = 1024
"""Tokens of all domains together."""
LEAST = 64
"""Tokens of a domain, also with many domains."""
ROWS = 16
"""Rows of a domain, at most."""
SHORT = 8
"""Tokens of the short text, from the second of a row on."""
LEAST_LENGTH = 3
"""Tokens of a row, at least: the first, and two to exchange."""
ACTIVE = 1e-3
"""A neuron is active if its activation is larger than this (Lo et al., section 4.1)."""


@dataclass(frozen=True)
class ChosenTokens:
    """Positions in a row, ascending, and which of them belong to what."""

    positions_N: npt.NDArray[np.int64]
    sampled_N: npt.NDArray[np.bool_]
    short_N: npt.NDArray[np.bool_]


def chosen_tokens(sample: Sample, seed: int) -> dict[tuple[int, int], ChosenTokens]:
    """Positions by domain and row of the domain: a function of sample and seed, not of batches."""
    found = {}
    budget = max(LEAST, TOKENS // max(1, len(sample.domains)))
    places = np.arange(1, sample.seq_length)
    for index, domain in enumerate(sample.domains):
        count = min(ROWS, len(domain.starts))
        each = min(-(-budget // count), len(places))
        for row in (np.arange(count) * len(domain.starts) // count).tolist():
            rng = np.random.default_rng([seed, index, row])
            drawn = rng.choice(places, each, replace=False)
            short = places[:SHORT] if row == 0 else places[:0]
            positions = np.unique(np.concatenate([[0], drawn, short]))
            found[index, row] = ChosenTokens(
                positions, np.isin(positions, drawn), np.isin(positions, short)
            )
    return found


class ChosenRows:
    """The chosen tokens of a sample, batch by batch.

    Args:
        sample: the tokens.
        seed: of the draws.
    """

    def __init__(self, sample: Sample, seed: int) -> None:
        self._chosen = chosen_tokens(sample, seed)
        self._batch_size, self._first_batch_of = sample.batch_size, [0]
        for domain in sample.domains:
            count = -(-len(domain.starts) // sample.batch_size)
            self._first_batch_of.append(self._first_batch_of[-1] + count)

    def of(self, batch: TokenBatch) -> list[tuple[int, ChosenTokens]]:
        """Index of each chosen row of a batch, and its tokens."""
        first = (batch.number - self._first_batch_of[batch.domain]) * self._batch_size
        rows = range(len(batch.tokens_BS))
        found = ((row, self._chosen.get((batch.domain, first + row))) for row in rows)
        return [(row, chosen) for row, chosen in found if chosen is not None]


def check_rows(setting: Setting) -> None:
    """Check that rows have tokens after the first.

    Raises:
        UsageError: rows are too short.
    """
    if setting.sample.seq_length < LEAST_LENGTH:
        expected = f">= {LEAST_LENGTH}, to compare tokens of a row"
        raise UsageError("--seq-length", setting.sample.seq_length, expected)


@collector("expert_passes")
class ExpertPasses(Collector):
    """See the module.

    Attributes:
        tokens: sampled tokens, [1].
        short_D: tokens of the short texts.
        angles_LEE: sums of 1 - arccos(cos(output i, output j)) / pi over the sampled tokens.
        other_angles_LEE: the same between output i and output j of the next sampled token.
        short_angles_DLEE: as the first over the short text of each domain.
        ranks_LEE: tokens whose expert of score rank i has norm rank j; ranks are from 0, the
            largest.
        shuffled_LEE: the same with the scores of the next sampled token of the row.
        equal_L: tokens whose K experts with the largest scores are those with the largest norms.
        shuffled_equal_L: the same with the scores of the next sampled token.
        score_LE: sums of scores.
        norm_LE: sums of output norms.
        chosen_LE: sampled tokens that chose the expert, and for which it was kept.
        chosen_norm_LE: sums of output norms over these.
        active_LEF: tokens for which a neuron is active.
        inner_LEF: sums of the absolute input of the down projection.
        seen_LE: tokens that chose the expert, the first ones of rows included.
        output_max_LE: largest absolute output over these.
        output_at_LE3: hidden dimension, token id and position of it; -1 if there is none.
        inner_max_LE: largest absolute input of the down projection over these.
    """

    def __init__(self, setting: Setting) -> None:
        sizes, sample = setting.sizes, setting.sample
        self._setting = setting
        self._rows = ChosenRows(sample, setting.seed)
        layers, experts, domains = len(setting.layers), sizes.num_experts, len(sample.domains)
        by_expert, square = (layers, experts), (layers, experts, experts)
        self.tokens = np.zeros(1, np.int64)
        self.short_D = np.zeros(domains, np.int64)
        self.angles_LEE = np.zeros(square)
        self.other_angles_LEE = np.zeros(square)
        self.short_angles_DLEE = np.zeros((domains, *square))
        self.ranks_LEE = np.zeros(square, np.int64)
        self.shuffled_LEE = np.zeros(square, np.int64)
        self.equal_L = np.zeros(layers, np.int64)
        self.shuffled_equal_L = np.zeros(layers, np.int64)
        self.score_LE = np.zeros(by_expert)
        self.norm_LE = np.zeros(by_expert)
        self.chosen_LE = np.zeros(by_expert, np.int64)
        self.chosen_norm_LE = np.zeros(by_expert)
        self.active_LEF = np.zeros((*by_expert, sizes.expert_width), np.int64)
        self.inner_LEF = np.zeros((*by_expert, sizes.expert_width))
        self.seen_LE = np.zeros(by_expert, np.int64)
        self.output_max_LE = np.zeros(by_expert)
        self.output_at_LE3 = np.full((*by_expert, 3), -1, np.int64)
        self.inner_max_LE = np.zeros(by_expert)

    def inputs_for(self, batch: TokenBatch) -> Inputs | None:
        """See `Collector.inputs_for`: the chosen tokens alone."""
        rows = self._rows.of(batch)
        if not rows:
            return None
        length = batch.tokens_BS.shape[1]
        places = [row * length + chosen.positions_N for row, chosen in rows]
        return Inputs(self._setting.layers, np.concatenate(places))

    def add(self, seen: Observation, runner: MoERunner) -> None:
        """See `Collector.add`."""
        batch, first = seen.batch, 0
        for row, chosen in self._rows.of(batch):
            inputs = slice(first, first + len(chosen.positions_N))
            first = inputs.stop
            self.tokens += int(chosen.sampled_N.sum())
            self.short_D[batch.domain] += int(chosen.short_N.sum())
            ids_N = batch.tokens_BS[row, chosen.positions_N]
            places_N = torch.from_numpy(row * batch.tokens_BS.shape[1] + chosen.positions_N)
            for index, place in enumerate(self._setting.places()):
                passes = _row_passes(seen.layers[place], inputs, places_N, chosen, runner)
                self._add_similarity(index, batch.domain, passes)
                self._add_norms(index, passes)
                self._add_largest(index, passes, ids_N, chosen.positions_N)
                self.active_LEF[index] += passes.active_EF.cpu().numpy()
                self.inner_LEF[index] += passes.inner_EF.cpu().numpy()

    def _add_similarity(self, index: int, domain: int, passes: _Passes) -> None:
        unit_ENH = torch.nn.functional.normalize(passes.output_ENH.double(), dim=-1)
        unit_NEH = unit_ENH.transpose(0, 1)
        sampled_NEH, short_NEH = unit_NEH[passes.sampled_N], unit_NEH[passes.short_N]
        self.angles_LEE[index] += _angles(sampled_NEH, sampled_NEH)
        self.other_angles_LEE[index] += _angles(sampled_NEH, sampled_NEH.roll(-1, 0))
        self.short_angles_DLEE[domain, index] += _angles(short_NEH, short_NEH)

    def _add_norms(self, index: int, passes: _Passes) -> None:
        sampled = passes.sampled_N
        norm_NE = passes.output_ENH.norm(dim=-1).T[sampled]
        score_NE, chosen_NE = passes.score_NE[sampled], passes.chosen_NE[sampled]
        topk = self._setting.sizes.topk
        ranks = _ranks(norm_NE)
        for scores, counts, equal in (
            (score_NE, self.ranks_LEE, self.equal_L),
            (score_NE.roll(-1, 0), self.shuffled_LEE, self.shuffled_equal_L),
        ):
            own, experts = _ranks(scores), ranks.shape[1]
            pairs = (own * experts + ranks).flatten().bincount(minlength=experts * experts)
            counts[index] += pairs.view(experts, experts).cpu().numpy()
            equal[index] += int(((own < topk) == (ranks < topk)).all(1).sum())
        self.score_LE[index] += score_NE.double().sum(0).cpu().numpy()
        self.norm_LE[index] += norm_NE.double().sum(0).cpu().numpy()
        self.chosen_LE[index] += chosen_NE.sum(0).cpu().numpy()
        self.chosen_norm_LE[index] += (norm_NE.double() * chosen_NE).sum(0).cpu().numpy()

    def _add_largest(
        self,
        index: int,
        passes: _Passes,
        ids_N: npt.NDArray[np.int64],
        positions_N: npt.NDArray[np.int64],
    ) -> None:
        chosen_EN = passes.chosen_NE.T
        self.seen_LE[index] += chosen_EN.sum(1).cpu().numpy()
        inner_E = passes.inner_max_EN.masked_fill(~chosen_EN, 0).amax(1).cpu().numpy()
        np.maximum(self.inner_max_LE[index], inner_E, out=self.inner_max_LE[index])
        size_ENH = passes.output_ENH.abs().masked_fill(~chosen_EN[:, :, None], -1)
        largest_E, place_E = (part.cpu().numpy() for part in size_ENH.flatten(1).max(1))
        hidden = size_ENH.shape[-1]
        token_E = place_E // hidden
        at_E3 = np.stack([place_E % hidden, ids_N[token_E], positions_N[token_E]], 1)
        larger_E = (largest_E >= 0) & (
            (largest_E > self.output_max_LE[index]) | (self.output_at_LE3[index, :, 0] < 0)
        )
        self.output_max_LE[index][larger_E] = largest_E[larger_E]
        self.output_at_LE3[index][larger_E] = at_E3[larger_E]


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """All experts of a layer on N tokens of a row."""

    sampled_N: Tensor
    short_N: Tensor
    score_NE: Tensor
    chosen_NE: Tensor
    output_ENH: Tensor
    inner_max_EN: Tensor
    active_EF: Tensor
    inner_EF: Tensor


def _row_passes(
    layer: LayerRouting, inputs: slice, places_N: Tensor, chosen: ChosenTokens, runner: MoERunner
) -> _Passes:
    """All experts on the chosen tokens of a row.

    Args:
        layer: its routing.
        inputs: the part of its recorded inputs that these tokens have.
        places_N: the tokens in the batch.
        chosen: positions in the row, and what they belong to.
        runner: the model.
    """
    assert layer.inputs_NH is not None
    device = layer.inputs_NH.device
    places_N = places_N.to(device)
    x_NH = layer.inputs_NH[inputs]
    score_NE = layer.router_probs_TE[places_N]
    ids_NK, kept_NK = layer.ids_TK[places_N], layer.kept_TK[places_N]
    chosen_NE = torch.zeros_like(score_NE, dtype=torch.bool).scatter(1, ids_NK, kept_NK)
    sampled_N = torch.from_numpy(chosen.sampled_N).to(device)
    parts: dict[str, list[Any]] = {"output": [], "inner_max": [], "active": [], "inner": []}
    for expert in range(score_NE.shape[1]):
        one = runner.expert(layer.layer, x_NH, expert)
        inner_NF = one.inner_TF.abs()
        parts["output"].append(one.output_TH)
        parts["inner_max"].append(inner_NF.amax(1))
        parts["active"].append((one.activation_TF[sampled_N].abs() > ACTIVE).sum(0))
        parts["inner"].append(inner_NF[sampled_N].double().sum(0))
    return _Passes(
        sampled_N=sampled_N,
        short_N=torch.from_numpy(chosen.short_N).to(device),
        score_NE=score_NE,
        chosen_NE=chosen_NE,
        output_ENH=torch.stack(parts["output"]),
        inner_max_EN=torch.stack(parts["inner_max"]),
        active_EF=torch.stack(parts["active"]),
        inner_EF=torch.stack(parts["inner"]),
    )


def _angles(first_NEH: Tensor, second_NEH: Tensor) -> npt.NDArray[np.float64]:
    """Angular similarities of unit vectors, summed over N: [E, E]."""
    cosine_NEE = (first_NEH @ second_NEH.mT).clamp(-1, 1)
    found: npt.NDArray[np.float64] = (1 - cosine_NEE.arccos() / torch.pi).sum(0).cpu().numpy()
    return found


def _ranks(values_NE: Tensor) -> Tensor:
    """Rank of each expert, 0 for the largest; equal ones in the order of the experts."""
    return values_NE.argsort(dim=1, descending=True, stable=True).argsort(dim=1)

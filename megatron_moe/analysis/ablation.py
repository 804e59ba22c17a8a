"""Losses of a model without some of its experts.

    losses = evaluate_without(runner, sample, {3: [5, 7]})

Shapes: R rows, S tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.model import MoERunner, Sizes, check_experts
from megatron_moe.analysis.observation import Observation, TokenBatch
from megatron_moe.analysis.result import Table
from megatron_moe.analysis.sample import Sample, spread
from megatron_moe.errors import UsageError

Array = npt.NDArray[Any]
ALL = "all"
"""Name of all domains together."""


@dataclass(frozen=True, kw_only=True)
class DomainLoss:
    """Loss of a domain.

    Args:
        tokens: number of predicted tokens.
        rows_R: mean cross entropy of each row in nats, fp64.
    """

    tokens: int
    rows_R: Array

    @property
    def loss(self) -> float:
        """Mean cross entropy in nats per token."""
        return float(self.rows_R.mean())

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is not a number of fp64."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


def evaluate(
    runner: MoERunner,
    sample: Sample,
    *,
    within: Callable[[TokenBatch], AbstractContextManager[None]] = lambda _: nullcontext(),
    seen_by: Callable[[Observation], object] = lambda _: None,
) -> dict[str, DomainLoss]:
    """Losses by domain, and of `ALL` tokens together, which is the last entry.

    Args:
        runner: the loaded model.
        sample: the tokens.
        within: the context in which a batch is run, e.g. with forced choices.
        seen_by: called with each forward pass.
    """
    rows: dict[str, list[Array]] = {name: [] for name in sample.names}
    for batch in sample.batches():
        with within(batch):
            seen = runner.run(batch, predictions=True)
        assert seen.loss_T is not None
        seen_by(seen)
        loss_BS = seen.loss_T.double().reshape(batch.tokens_BS.shape)
        rows[sample.names[batch.domain]].append(loss_BS.mean(1).cpu().numpy())
    found = {name: np.concatenate(parts) for name, parts in rows.items()}
    found[ALL] = np.concatenate(list(found.values()))
    return {
        name: DomainLoss(tokens=len(rows_R) * sample.seq_length, rows_R=rows_R)
        for name, rows_R in found.items()
    }


def evaluate_without(
    runner: MoERunner, sample: Sample, experts: Mapping[int, Sequence[int]]
) -> dict[str, DomainLoss]:
    """Losses by domain without some experts, see `MoERunner.without`.

    Args:
        runner: the loaded model.
        sample: the tokens.
        experts: ids to leave out, by layer; none gives the losses of the whole model.

    Raises:
        UsageError: a layer or an expert that is not there, or too few experts are left.
    """
    with runner.without(experts):
        return evaluate(runner, sample)


def loss_table(
    runner: MoERunner, sample: Sample, experts: Mapping[int, Sequence[int]], draws: int, seed: int
) -> Table:
    """Losses and perplexities by domain with and without experts, and the change of the loss.

    The change has its 95% interval; its exponential is the ratio of the perplexities.

    Args:
        runner: the loaded model.
        sample: the tokens.
        experts: ids to leave out, by layer.
        draws: of the bootstrap over rows.
        seed: of the draws.
    """
    whole, without = evaluate(runner, sample), evaluate_without(runner, sample, experts)
    changes = [change_of(whole[n].rows_R, without[n].rows_R, draws, seed) for n in whole]
    return Table(
        name="ablation",
        about="loss in nats per token, and perplexity, exp(loss); the interval of the change of "
        "the loss is a bootstrap over rows",
        columns={
            "domain": list(whole),
            "tokens": [loss.tokens for loss in whole.values()],
            "loss": [loss.loss for loss in whole.values()],
            "loss_without": [without[name].loss for name in whole],
            "change": [change for change, _, _ in changes],
            "low": [low for _, low, _ in changes],
            "high": [high for _, _, high in changes],
            "perplexity": [loss.perplexity for loss in whole.values()],
            "perplexity_without": [without[name].perplexity for name in whole],
        },
    )


def change_of(
    whole_R: Array, without_R: Array, draws: int, seed: int
) -> tuple[float, float, float]:
    """Mean change of the loss, and its 95% interval by a bootstrap over rows.

    Args:
        whole_R: losses of rows by the whole model.
        without_R: those of the same rows without the experts.
        draws: of the bootstrap.
        seed: of the draws.

    Returns:
        Change, and the ends of the interval; these are NaN for fewer than two rows.
    """
    change_R = without_R - whole_R
    if len(change_R) < 2 or draws < 1:
        return float(change_R.mean()), math.nan, math.nan
    drawn = np.random.default_rng(seed).integers(len(change_R), size=(draws, len(change_R)))
    low, high = np.quantile(change_R[drawn].mean(1), [0.025, 0.975])
    return float(change_R.mean()), float(low), float(high)


def part_of(sample: Sample, tokens: int, length: int | None = None) -> Sample:
    """A part of a sample: beginnings of rows that are spread evenly over each domain.

    Args:
        sample: the whole.
        tokens: most tokens, about; each domain has at least one row.
        length: most tokens of a row; `None` for whole rows. Rows that compete for the slots of
            experts stay whole, and so do their groups.
    """
    group = sample.group_rows or 1
    length = min(sample.seq_length, length or sample.seq_length)
    length = length if sample.group_rows is None else sample.seq_length
    each = max(1, tokens // (max(1, len(sample.domains)) * length * group)) * group
    domains = tuple(
        replace(domain, starts=domain.starts[spread(len(domain.starts), each)])
        for domain in sample.domains
    )
    # As many tokens of a batch as before, so that short rows are no slower.
    batch_size = max(1, sample.batch_size * sample.seq_length // length)
    return replace(sample, domains=domains, seq_length=length, batch_size=batch_size)


def parse_experts(words: Sequence[str], sizes: Sizes) -> dict[int, list[int]]:
    """Experts of a command line, `LAYER:EXPERT` or `LAYER:EXPERT,EXPERT`, by layer.

    Raises:
        UsageError: a word of another form, a layer or an expert that is not there, or too few
            experts are left.
    """
    found: dict[int, list[int]] = {}
    for word in words:
        layer, separator, ids = word.partition(":")
        numbers = [layer, *ids.split(",")]
        if not separator or not all(n.isascii() and n.isdigit() and len(n) < 10 for n in numbers):
            raise UsageError("--ablate", word, "LAYER:EXPERT or LAYER:EXPERT,EXPERT")
        found.setdefault(int(layer), []).extend(int(n) for n in numbers[1:])
    check_experts(found, sizes)
    return {layer: sorted(set(ids)) for layer, ids in found.items()}

"""The held-out loss: the same samples at every evaluation, and no effect on training.

Capacity follows `--moe-eval-capacity-factor`, because the chunks are in evaluation mode. Random
states, modes and routing statistics are restored, so that a run with evaluations takes and reports
bit for bit the same steps as one without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch

from megatron_moe.data.batch import Batch
from megatron_moe.data.pipeline import Data
from megatron_moe.moe.statistics import counters
from megatron_moe.parallel.schedule import forward_backward
from megatron_moe.platform import rng_states, set_rng_states
from megatron_moe.training.metrics import Evaluation
from megatron_moe.training.run import TrainingRun
from megatron_moe.training.step import fetch_batches, forward_function, total_sums

NextBatches = Callable[[], Sequence[Batch | None]]
"""Returns this rank's micro-batches of the next global batch."""


def evaluate_split(
    run: TrainingRun,
    data: Data,
    split: Literal["valid", "test"],
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The loss of the blend, then of each of its domains, in the order of their prefixes.

    The batches of a domain hold nothing else, so its loss is that of a run on this domain alone,
    whatever the layout and the other domains are. All evaluations use the full global batch, also
    during a batch-size ramp-up.

    Args:
        run: the model.
        data: of this rank.
        split: which held-out data.
        after_batch: called after each global batch, on every rank.
    """
    size = run.plan.batch_sizes.full

    def loss_of(batches: Iterator[Batch] | None, iterations: int) -> Evaluation:
        return evaluate(run, partial(fetch_batches, run, batches, size), iterations, after_batch)

    blend = data.test() if split == "test" else data.valid()
    found = loss_of(blend, run.config.train.eval_iters)
    parts: dict[str, Evaluation] = {}
    for name, iterations in data.domains[split].items():
        parts[name] = loss_of(data.domain(split, name), iterations)
    return replace(found, domains=parts)


def evaluate(
    run: TrainingRun,
    next_batches: NextBatches,
    iterations: int,
    after_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Mean cross entropy over ``iterations`` global batches; the same value on every rank."""
    sums = torch.zeros(3, dtype=torch.float64, device=run.ctx.platform.device)
    with undisturbed(run), torch.no_grad():
        for _ in range(iterations):
            batches = next_batches()
            forward = forward_function(run, None, len(batches))
            reported = forward_backward(run.ctx, forward, batches, run.wrapped, forward_only=True)
            sums += total_sums(reported, run)
            after_batch()
    # Sums, not means, are reduced: ranks hold different numbers of targets.
    torch.distributed.all_reduce(sums)
    cross_entropy, _, targets = sums.tolist()
    return Evaluation(lm_loss=cross_entropy / max(targets, 1.0), targets=int(targets))


@contextlib.contextmanager
def undisturbed(run: TrainingRun) -> Iterator[None]:
    """Evaluation mode; everything that training and its reports depend on is restored at the end:
    random states, modes and statistics of routing.
    """
    states = rng_states()
    routed = {counter: counter.sums.clone() for counter in counters(run.chunks).values()}
    for chunk in run.wrapped:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in run.wrapped:
            chunk.train()
        set_rng_states(states)
        for counter, sums in routed.items():
            counter.sums.copy_(sums)

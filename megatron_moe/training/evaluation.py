"""The held-out loss: the same samples every time, exactly weighted, without a trace in training.

Capacity follows `--moe-eval-capacity-factor` because the chunks are in evaluation mode. Random
states, modes and routing statistics are put back afterwards, so that a run with evaluations takes,
and reports, the same steps as one without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_moe.data.batch import Batch
from megatron_moe.moe.statistics import counters
from megatron_moe.parallel.schedule import forward_backward
from megatron_moe.platform import rng_states, set_rng_states
from megatron_moe.training.losses import forward_function, total_sums
from megatron_moe.training.metrics import Evaluation
from megatron_moe.training.run import TrainingRun

NextBatches = Callable[[], Sequence[Batch | None]]
"""Gives this rank's micro-batches of the next global batch."""


def evaluate(run: TrainingRun, next_batches: NextBatches, iterations: int) -> Evaluation:
    """Mean cross entropy over ``iterations`` global batches; the same value on every rank."""
    sums = torch.zeros(3, dtype=torch.float64, device=run.ctx.platform.device)
    with _undisturbed(run), torch.no_grad():
        for _ in range(iterations):
            batches = next_batches()
            forward = forward_function(run, None, len(batches))
            reported = forward_backward(run.ctx, forward, batches, run.wrapped, forward_only=True)
            sums += total_sums(reported, run)
    torch.distributed.all_reduce(sums)
    cross_entropy, _, targets = sums.tolist()
    return Evaluation(lm_loss=cross_entropy / max(targets, 1.0), targets=int(targets))


@contextlib.contextmanager
def _undisturbed(run: TrainingRun) -> Iterator[None]:
    """Evaluation mode, with everything that training depends on put back at the end."""
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

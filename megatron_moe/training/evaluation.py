"""The held-out loss: the same samples every time, exactly weighted, without a trace in training.

Capacity follows `--moe-eval-capacity-factor` because the chunks are in evaluation mode. Random
states, modes and routing statistics are put back afterwards, so that a run with evaluations takes,
and reports, the same steps as one without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from megatron_moe.data.batch import Batch
from megatron_moe.data.pipeline import Data
from megatron_moe.moe.statistics import counters
from megatron_moe.parallel.schedule import forward_backward
from megatron_moe.platform import rng_states, set_rng_states
from megatron_moe.training.losses import forward_function, total_sums
from megatron_moe.training.metrics import Evaluation
from megatron_moe.training.run import TrainingRun

NextBatches = Callable[[], Sequence[Batch | None]]
"""Gives this rank's micro-batches of the next global batch."""


Fetch = Callable[[Iterator[Batch] | None], Sequence[Batch | None]]
"""Likewise, from an iterator over micro-batches, `None` on ranks that do not read."""


def evaluate_split(run: TrainingRun, data: Data, split: str, fetch: Fetch) -> Evaluation:
    """The loss of the blend, then of each of its domains, in the order of their prefixes.

    A domain's batches hold nothing else, so its loss is what a run on it alone would find, whatever
    the layout and the other domains are.

    Args:
        run: the run.
        data: of this rank.
        split: `valid` or `test`.
        fetch: gives this rank's micro-batches of the next global batch.
    """
    blend = data.test() if split == "test" else data.valid()
    found = evaluate(run, lambda: fetch(blend), run.config.train.eval_iters)
    parts: dict[str, Evaluation] = {}
    for name, iterations in data.domains[split].items():
        batches = data.domain(split, name)
        parts[name] = evaluate(run, partial(fetch, batches), iterations)
    return replace(found, domains=parts)


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

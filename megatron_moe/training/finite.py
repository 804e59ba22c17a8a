"""Stop, on all ranks alike and before any parameter changes, when a gradient is not finite.

Gradients are judged after they are reduced, by their norm: the same number on every rank, so that
all ranks stop at the same step. By then a NaN has spread over the replicas; to name where it came
from, every rank also looks at its own gradients just before they are reduced: one pass over them,
and no host read unless the norm is bad. With `--overlap-grad-reduce` part of them is reduced by
then, and more ranks may be named than were at fault.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from megatron_moe.training.run import TrainingRun


class NonFiniteError(RuntimeError):
    """A step whose gradient is infinite or not a number; its parameters were left unchanged."""


class LocalFlags:
    """Whether this rank's own gradients are finite.

    Args:
        run: the run whose gradient buffers are looked at.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._sum: Tensor | None = None

    def look(self) -> None:
        """Note the state of the gradient buffers, to be called before they are reduced."""
        if self._run.ctx.world_size > 1:
            self._sum = self._total()

    def finite(self) -> bool:
        """The answer; a host read. A single rank looks only now: nothing was mixed with its own."""
        total = self._total() if self._sum is None else self._sum
        return total is None or bool(torch.isfinite(total))

    def _total(self) -> Tensor | None:
        """One number that is finite if all gradients are."""
        # A sum over finite fp32 gradients overflows only if they are useless as well.
        parts = [
            buffer.grad_data.sum()
            for chunk in self._run.wrapped
            for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
        ]
        return torch.stack(parts).sum() if parts else None


def stop_run(run: TrainingRun, flags: LocalFlags, iteration: int, norm: float) -> NoReturn:
    """Gather who is at fault and raise the same error on every rank.

    Raises:
        NonFiniteError: always.
    """
    mine = torch.tensor([not flags.finite()], dtype=torch.int32, device=run.ctx.platform.device)
    everyone = [torch.empty_like(mine) for _ in range(run.ctx.world_size)]
    torch.distributed.all_gather(everyone, mine)
    faulty = [rank for rank, flag in enumerate(everyone) if flag.item()]
    where = (
        ", ".join(map(str, faulty)) if faulty else "no single one: the sum over ranks overflowed"
    )
    raise NonFiniteError(
        f"gradient norm is {norm} at iteration {iteration}, expected a finite number; ranks with"
        f" such gradients of their own: {where}; parameters are those of iteration {iteration - 1}"
    )

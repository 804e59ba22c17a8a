"""`--loss-spike-policy`: what happens at a step whose loss or gradient norm is far too large.

A step is a spike if its loss, or its gradient norm, is above mean + sigma * standard deviation of
the last `--loss-spike-window` steps that were none. The decision is made before the update, from
the loss and the norm of the whole model. These are the same numbers on every rank, so all ranks
decide alike without asking each other. They and the decisions so far are saved with checkpoints: a
run that resumes decides as the uninterrupted one.

Example with a window of 4 and sigma 3: losses 4, 5, 4, 5 have mean 4.5 and deviation 0.5, so 6.1 is
a spike, and 5.9 is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config import TrainConfig
from megatron_moe.errors import UsageError
from megatron_moe.training.metrics import StepRecord

SPIKES = "loss_spikes"
"""Key of the watch's state in a checkpoint's `TrainState.extra`."""


class LossSpikeError(RuntimeError):
    """A loss spike ends the run; parameters and optimizer state are those before its step."""


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A step that was far too large."""

    iteration: int
    action: str
    """The policy."""
    lm_loss: float
    grad_norm: float
    restored: int | None = None
    """With `rollback`, the iteration whose weights came back."""


class SpikeWatch:
    """Decides about each step before its update, the same on every rank.

    Args:
        train: policy, sigma, window and limit.
        saved: from `to_json`, of the checkpoint that the run resumes from.

    Raises:
        UsageError: ``saved`` is something else.
    """

    def __init__(self, train: TrainConfig, saved: Any = None) -> None:
        self._train = train
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.spikes: list[Spike] = []
        if saved is None:
            return
        try:
            self.losses, self.norms = list(saved["losses"]), list(saved["norms"])
            self.spikes = [Spike(**entry) for entry in saved["spikes"]]
        except (TypeError, KeyError) as error:
            expected = "an object with losses, norms and spikes"
            raise UsageError(f"'{SPIKES}' of the checkpoint", repr(error), expected) from None

    def to_json(self) -> dict[str, Any]:
        """State for a checkpoint; its floats are exact."""
        spikes = [asdict(spike) for spike in self.spikes]
        return {"losses": self.losses, "norms": self.norms, "spikes": spikes}

    def takes_update(self, iteration: int, sums: Tensor, grad_norm: float) -> bool:
        """Whether the update of a step is applied; one all-reduce of three numbers.

        Args:
            iteration: of the step, from 1.
            sums: this rank's `total_sums` of it.
            grad_norm: of the whole model.

        Raises:
            LossSpikeError: on every rank: the policy is `stop`, or there were too many spikes.
        """
        total = sums.clone()
        torch.distributed.all_reduce(total)
        cross_entropy, _, targets = total.tolist()
        return self.judge(iteration, cross_entropy / max(targets, 1.0), grad_norm)

    def judge(self, iteration: int, lm_loss: float, grad_norm: float) -> bool:
        """As `takes_update`, for the loss of the whole step."""
        train, policy = self._train, self._train.loss_spike_policy
        assert policy is not None
        if not self._is_spike(lm_loss, grad_norm):
            window = train.loss_spike_window
            self.losses = [*self.losses, lm_loss][-window:]
            self.norms = [*self.norms, grad_norm][-window:]
            return True
        spike = Spike(iteration=iteration, action=policy, lm_loss=lm_loss, grad_norm=grad_norm)
        self.spikes.append(spike)
        if policy == "stop":
            raise LossSpikeError(f"{self.describe(spike)}; --loss-spike-policy stop")
        recent = [s for s in self.spikes if s.iteration > iteration - train.loss_spike_window]
        if policy != "continue" and len(recent) > train.loss_spike_limit:
            limit = f"more than --loss-spike-limit {train.loss_spike_limit} in as many steps as"
            raise LossSpikeError(f"{self.describe(spike)}; {limit} --loss-spike-window")
        return policy == "continue"

    def at(self, iteration: int) -> Spike | None:
        """The spike of the last step, if it was one."""
        last = self.spikes[-1] if self.spikes else None
        return last if last is not None and last.iteration == iteration else None

    def restored(self, iteration: int) -> None:
        """Record whose weights came back after the last spike."""
        self.spikes[-1] = replace(self.spikes[-1], restored=iteration)

    def describe(self, spike: Spike) -> str:
        """One line: the values and their limits."""
        loss, norm = self._limit(self.losses), self._limit(self.norms)
        return (
            f"loss spike at iteration {spike.iteration}: lm loss {spike.lm_loss:.6g} (limit"
            f" {loss:.6g}), grad norm {spike.grad_norm:.6g} (limit {norm:.6g})"
        )

    def mark(self, records: Sequence[StepRecord]) -> list[StepRecord]:
        """The records of steps, with the policy that was applied to those that were spikes."""
        actions = {spike.iteration: spike.action for spike in self.spikes}
        return [replace(record, spike=actions.get(record.iteration)) for record in records]

    def _is_spike(self, lm_loss: float, grad_norm: float) -> bool:
        # With half a window the deviation means something; training begins with large norms.
        if len(self.losses) < max(2, self._train.loss_spike_window // 2):
            return False
        return lm_loss > self._limit(self.losses) or grad_norm > self._limit(self.norms)

    def _limit(self, values: Sequence[float]) -> float:
        if not values:
            return math.inf
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
        return mean + self._train.loss_spike_sigma * math.sqrt(variance)

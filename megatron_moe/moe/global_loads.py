"""Loads of the global batch, for a balance loss over it (`global_aux_loss`).

Every pass adds its loads to those of the same pass of all data-parallel ranks, and to those of the
passes before it in the step: the loss of micro-batch n sees the loads of micro-batches 1 to n of
every rank. Later ones do not exist yet when its backward pass needs its loss. Sources: Qiu et al.,
arXiv 2501.11873, section 3; Megatron-Core's `_apply_global_aux_loss`.

Shapes: E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.moe.exchange import Group, size_of


class GlobalLoads:
    """The loads of one layer in the current step.

    Args:
        dp_group: ranks with other rows of the same micro-batches; `None` for one.
    """

    def __init__(self, dp_group: Group = None) -> None:
        self.dp_group = dp_group
        self._sum_E: Tensor | None = None
        self._passes = 0

    def begin_step(self) -> None:
        """Forget the loads of the step before."""
        self._sum_E, self._passes = None, 0

    def add(self, load_E: Tensor) -> tuple[Tensor, int]:
        """Add a pass; a collective call over the data-parallel ranks.

        Args:
            load_E: int64 choices of this rank's rows, over all ranks that share them.

        Returns:
            The loads so far, and of how many micro-batches, over data-parallel ranks.
        """
        load_E = load_E.clone()
        if size_of(self.dp_group) > 1:
            dist.all_reduce(load_E, group=self.dp_group)
        # Not in place: the backward pass of an earlier micro-batch still needs its own sum.
        self._sum_E = load_E if self._sum_E is None else self._sum_E + load_E
        self._passes += 1
        return self._sum_E, self._passes * size_of(self.dp_group)

    def counts(self, training: bool) -> bool:
        """Whether a pass counts: not in evaluation, and once under recomputation, whose first pass
        has no gradients.
        """
        return training and torch.is_grad_enabled()

"""Who keeps a slot when an expert is full: what a drop policy decides on, and the built-in ones.

Other policies are the files of `moe/drop_policies/`.

Shapes: G groups, K choices of a token, E experts, A = K * (tokens of a group) choices of a group in
position order: all first choices in token order, then all second choices, ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fused_kernels.operations import RankInExpert
from megatron_moe.moe.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What a policy may depend on besides the choices; the same on all ranks of a layout.

    Nothing tells groups or micro-batches apart, so that what drops in a row does not depend on the
    rows beside it.

    Args:
        layer: 0-based number of the transformer layer.
        seed: of the run; 0 outside of training.
        step: number of the training step, from 1; 0 outside of training. Recomputation and a
            resumed run have that of the first pass.
    """

    layer: int = 0
    seed: int = 0
    step: int = 0


OUTSIDE_TRAINING = Draw()
"""Of the layer 0; the default of functions that most callers need for other policies alone."""


@dataclass(frozen=True, kw_only=True)
class Competition:
    """The choices of a micro-batch, which compete for the slots of their experts in each group.

    Args:
        experts_GA: int64 chosen experts, in position order.
        weights_GA: returns the probabilities of the choices, [G, A]; costs a copy that not every
            policy needs.
        topk: K.
        num_experts: E.
        slots: C, choices that one expert keeps of one group.
        draw: layer, seed and step.
        rank_in_expert: the kernel.
    """

    experts_GA: Tensor
    weights_GA: Callable[[], Tensor]
    topk: int
    num_experts: int
    slots: int
    draw: Draw
    rank_in_expert: RankInExpert


DropPolicy = Callable[[Competition], Tensor | None]
"""From a competition to the order in which its choices get slots: order_GA, the indices 0 to A - 1
of each group, the choice that is dropped last first; `None` leaves position order. It must depend
on the competition only, so that all ranks agree."""


def by_position(competition: Competition) -> None:
    """All first choices in token order, then all second choices, ... (OpenMoE)."""


def by_prob(competition: Competition) -> Tensor:
    """The most probable first; equal ones in position order."""
    return competition.weights_GA().argsort(dim=1, descending=True, stable=True)


DROP_POLICIES: Registry[DropPolicy] = Registry("drop_policies", position=by_position, probs=by_prob)
"""By the value of `--moe-token-drop-policy`."""

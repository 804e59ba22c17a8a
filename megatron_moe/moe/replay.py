"""Force the choices of a forward pass, e.g. those of a trace: debugging, kernels, RL.

The router computes its logits and probabilities as usual. The given experts replace its choices,
weighted by the router's own probabilities of them, or by given ones; the drop policy then decides
again which of them are kept. With the choices that the router would have made, nothing changes.

Shapes: T tokens of this rank in (sequence, batch) order, K choices, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.observing import moe_layers
from megatron_moe.moe.scoring import Scores


@dataclass(frozen=True)
class Forced:
    """Choices of one layer for one micro-batch.

    Args:
        experts_TK: int64 distinct experts, best first.
        probabilities_TK: to weight them with, as by a softmax over all experts; they have no
            gradient. `None`: the router's own.
    """

    experts_TK: Tensor
    probabilities_TK: Tensor | None = None


Choices = Callable[[int, int], Forced | None]
"""Of the 0-based layer number and the number of the micro-batch on this rank; `None` leaves the
router its choice."""


@contextmanager
def replayed(chunks: Iterable[nn.Module], choices: Choices) -> Iterator[None]:
    """Force the choices of all passes of the MoE layers in model chunks.

    The n-th pass of a layer is of micro-batch n. Under recomputation a layer runs twice: passes
    without and with gradients are counted separately, so both get the same choices.
    """
    passes: Counter[tuple[int, bool]] = Counter()

    def force(layer: MoELayer, scores: Scores) -> Scores:
        which = layer.layer_number, torch.is_grad_enabled()
        passes[which] += 1
        forced = choices(layer.layer_number, passes[which] - 1)
        return scores if forced is None else with_choices(layer, scores, forced)

    layers = moe_layers(chunks).values()
    before = [layer.replace_scores for layer in layers]
    for layer in layers:
        layer.replace_scores = partial(force, layer)
    try:
        yield
    finally:
        for layer, function in zip(layers, before, strict=True):
            layer.replace_scores = function


def with_choices(layer: MoELayer, scores: Scores, forced: Forced) -> Scores:
    """The scores with other choices and their weights.

    Raises:
        ValueError: the choices are of another number of tokens or experts per token.
    """
    experts_TK = forced.experts_TK
    if experts_TK.shape != scores.choices_TK.shape:
        raise ValueError(
            f"layer {layer.layer_number}: choices must have the shape"
            f" {tuple(scores.choices_TK.shape)} (got {tuple(experts_TK.shape)})"
        )
    scores_TE = scores.raw_TE
    if forced.probabilities_TK is not None:
        given_TK = forced.probabilities_TK.to(scores_TE.dtype)
        scores_TE = torch.zeros_like(scores_TE).scatter(1, experts_TK, given_TK)
    weights_TK = layer.router.weights_of(scores_TE, experts_TK)
    return replace(scores, choices_TK=experts_TK, weights_TK=weights_TK, balance_TK=None)

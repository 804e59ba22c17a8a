"""The MoE layers of a model: watch their decisions, and tell them which step begins.

Shapes: S positions of a row on this rank, B rows, K choices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from megatron_moe.moe.dropping import Draw
from megatron_moe.moe.layer import MoELayer, RoutingDecision

Observer = Callable[[int, int, RoutingDecision], None]
"""Of the 0-based layer number, the number of the micro-batch on this rank, and its decisions."""


def moe_layers(chunks: Iterable[nn.Module]) -> dict[int, MoELayer]:
    """The MoE layers in model chunks, by 0-based layer number."""
    found = (m for chunk in chunks for m in chunk.modules() if isinstance(m, MoELayer))
    return {layer.layer_number: layer for layer in found}


def begin_step(chunks: Iterable[nn.Module], seed: int, step: int) -> None:
    """Set what drop policies may depend on in passes in training mode from here on, and let the
    loads of a balance loss over the global batch begin anew.

    Args:
        chunks: model chunks.
        seed: of the run.
        step: number of the training step, from 1.
    """
    for number, layer in moe_layers(chunks).items():
        layer.draw = Draw(layer=number, seed=seed, step=step)
        layer.losses.global_loads.begin_step()


@contextmanager
def observed(chunks: Iterable[nn.Module], observer: Observer) -> Iterator[None]:
    """Call ``observer`` for each pass that counts, instead of what was called before.

    Every schedule passes the micro-batches through a layer in order, forward and backward, so the
    n-th pass of a layer is of micro-batch n; under recomputation it is the one that is repeated in
    the backward pass.
    """
    passes: Counter[int] = Counter()

    def call(number: int, decision: RoutingDecision) -> None:
        passes[number] += 1
        observer(number, passes[number] - 1, decision)

    layers = moe_layers(chunks)
    before = {number: layer.on_routing for number, layer in layers.items()}
    for number, layer in layers.items():
        layer.on_routing = partial(call, number)
    try:
        yield
    finally:
        for number, layer in layers.items():
            layer.on_routing = before[number]

"""Force the choices of the reference model, e.g. those of a trace.

As `moe/replay.py` does for the parallel model: the router weights the given experts with its own
probabilities, and capacity decides again which of them are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from megatron_moe.model.reference.ffn import MoE
from megatron_moe.model.reference.model import ReferenceOpenMoE


@contextmanager
def replayed(model: ReferenceOpenMoE, choices: Mapping[int, Tensor]) -> Iterator[None]:
    """Force the choices of every forward pass, each of the same micro-batch.

    Args:
        model: the reference model.
        choices: by 0-based layer number, int64 experts [T, K] of the tokens row by row, best first;
            layers that are not named choose for themselves.
    """
    layers = [m for m in model.modules() if isinstance(m, MoE) and m.layer in choices]
    for layer in layers:
        layer.forced_TK = choices[layer.layer]
    try:
        yield
    finally:
        for layer in layers:
            layer.forced_TK = None

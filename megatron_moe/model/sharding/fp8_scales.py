"""Scales of delayed FP8 scaling as blocks of logical tensors, so that any layout loads any other.

For each operand of each GEMM: `layers.0.ffn.input.weight` has a scale [1] and a history [steps, 1];
`layers.1.moe.experts.down.input` has [E] and [steps, E], of which a rank holds its experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from megatron_moe.config import RunConfig
from megatron_moe.model.fp8 import NamedScale, ScaleTensors, delayed_scales
from megatron_moe.model.sharding.blocks import Block, Part
from megatron_moe.model.sharding.parts import Replicas
from megatron_moe.model.sharding.shards import unwrap
from megatron_moe.model.te_scales import te_scales

FP8_SCALE, FP8_HISTORY = "fp8_scale", "fp8_amax_history"
"""Kinds of tensors in a checkpoint."""


def scale_parts(chunks: Sequence[Any], config: RunConfig) -> Iterator[Part]:
    """Every scale and history in this rank's memory.

    Args:
        chunks: the model chunks of this rank, in Megatron-Core's wrappers or bare.
        config: of the run, for the numbers of experts.
    """
    bare = [unwrap(chunk) for chunk in chunks]
    scales: Iterator[NamedScale[ScaleTensors]] = chain(delayed_scales(bare), te_scales(bare))
    for scale in scales:
        own = scale.state.scale.numel()
        total, first = 1, 0
        if scale.first is not None:
            layer = int(scale.name.split(".")[1])
            moe = config.moe.of_layer(layer, config.model.num_layers)
            total, first = moe.num_experts, scale.first
        for kind, values in (
            (FP8_SCALE, scale.state.scale.view(own)),
            (FP8_HISTORY, scale.state.amax_history.view(-1, own)),
        ):
            leading = tuple(values.shape[:-1])
            shape = (*leading, total)
            block = Block(shape, (*(0,) * len(leading), first), (*leading, own))
            yield Part(kind, scale.name, shape, block, values)


def writes_scale(part: Part, chunk: Any, replicas: Replicas) -> bool:
    """Whether this rank saves a part: of all that hold it, the first one."""
    pgs = unwrap(chunk).pg_collection
    if ".experts." in part.name:
        return bool(pgs.expt_tp.rank() == 0) and replicas.expert[0] == 0
    return bool(pgs.tp.rank() == 0) and replicas.dense[0] == 0

"""Finished gradients: reduced over everybody that holds the same parameter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from megatron_moe.parallel.context import ParallelContext


def finalize_gradients(ctx: ParallelContext, chunks: Sequence[nn.Module]) -> None:
    """Reduce the gradients of all chunks of this rank, after the last micro-batch.

    Over data-parallel replicas (all-reduce, or reduce-scatter with the distributed optimizer); over
    tensor-parallel ranks for parameters that see a part of the sequence each, i.e. those with
    `sequence_parallel = True`; and between the first and the last stage for a tied embedding.

    Args:
        ctx: the layout.
        chunks: Megatron-Core's `DistributedDataParallel` around each model chunk.
    """
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(list(chunks), num_tokens=None, pg_collection=ctx.pgs)

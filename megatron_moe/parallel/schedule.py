"""Run the micro-batches of a step through the pipeline, forward and backward, and reduce gradients.

One function for all layouts: no pipeline, 1F1B, or interleaved 1F1B. What Megatron-Core's schedules
require of their callers is ensured here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from megatron_moe.errors import UsageError
from megatron_moe.parallel.context import ParallelContext

LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Any]]]
ForwardStep = Callable[[Iterator[Any], nn.Module], tuple[Tensor, LossFunction]]


def forward_backward(
    ctx: ParallelContext,
    forward_step: ForwardStep,
    batches: Sequence[Any],
    chunks: Sequence[nn.Module],
    *,
    forward_only: bool = False,
    before_reduction: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Run the micro-batches of one step.

    Args:
        ctx: the layout.
        forward_step: called with an iterator over `batches` and a chunk; returns the chunk's output
            and a function from the last stage's output to (loss, values to report). The loss is
            divided by the number of micro-batches.
        batches: one entry per micro-batch, the same number on every rank. Every chunk runs all of
            them.
        chunks: the model chunks of this rank; for a backward pass, each in Megatron-Core's
            `DistributedDataParallel`.
        forward_only: no backward pass, no gradients.
        before_reduction: called once after the last backward pass, before gradients are reduced
            (with `--overlap-grad-reduce`, before waiting for the reduction).

    Returns:
        On the last stage the values that the loss function reported, in order; else an empty list.

    Raises:
        UsageError: the number of micro-batches of an interleaved schedule is not a multiple of the
            number of pipeline stages.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    layout = ctx.layout
    if len(chunks) != layout.num_chunks:
        raise ValueError(f"{len(chunks)} model chunks, the layout has {layout.num_chunks}")
    if layout.vp is not None and len(batches) % layout.pp:
        expected = f"a multiple of --pipeline-model-parallel-size ({layout.pp})"
        raise UsageError("number of micro-batches", len(batches), expected)
    config = megatron_config(chunks[0])
    _set_p2p_overlap(config, interleaved=layout.vp is not None)
    config.no_sync_func = _no_sync(chunks)

    def finalize(*args: Any, **kwargs: Any) -> None:
        if before_reduction is not None:
            before_reduction()
        finalize_gradients(ctx, chunks)

    config.finalize_model_grads_func = finalize
    run = get_forward_backward_func(pp_size=layout.pp, vp_size=layout.vp)
    try:
        return run(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=layout.seq_length,
            micro_batch_size=layout.micro_batch_size,
            forward_only=forward_only,
            p2p_communicator=P2PCommunicator(ctx.pgs.pp, config) if layout.pp > 1 else None,
            pg_collection=ctx.pgs,
        )
    finally:
        # Nothing that outlives the run may reach it through the configuration: gradient hooks of
        # the wrapper, which Python's collector does not see, keep its modules and this alive.
        config.no_sync_func = config.finalize_model_grads_func = None


def finalize_gradients(ctx: ParallelContext, chunks: Sequence[nn.Module]) -> None:
    """Reduce the gradients of all chunks of this rank, after the last micro-batch.

    Over the data-parallel ranks (all-reduce, or reduce-scatter with the distributed optimizer);
    over the tensor-parallel ranks for parameters with `sequence_parallel = True`, whose gradients
    come from a part of the sequence each; and between the first and the last stage for a tied
    embedding.

    Args:
        ctx: the layout.
        chunks: Megatron-Core's `DistributedDataParallel` around each model chunk.
    """
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(list(chunks), num_tokens=None, pg_collection=ctx.pgs)


def megatron_config(chunk: nn.Module) -> Any:
    """Megatron-Core's configuration of a chunk, wrapped or not."""
    from megatron.core.utils import get_model_config

    return get_model_config(chunk)


def _set_p2p_overlap(config: Any, *, interleaved: bool) -> None:
    """Choose how activations and their gradients are sent between stages.

    The interleaved schedule needs overlapped transfers. Otherwise Megatron-Core posts the transfers
    of a stage in one batch, in the order send to previous, receive from previous, send to next,
    receive from next. With two stages, previous and next are the same peer, and transfers with one
    peer are matched in order: what rank 0 sends to its previous stage arrives as what rank 1
    receives from *its* previous stage, where it should be received from the next. Gradients are
    wrong, without any error.

    The plain schedule, in contrast, does not support overlap.

    After each batch Megatron-Core would make the host wait for the device, against a defect of old
    versions of PyTorch (`ModelParallelConfig.batch_p2p_sync`): received tensors could be read too
    early. Today the transfers of a batch are one NCCL group with one request, which Megatron-Core
    waits for, and with it the stream that reads them. The host need not wait, and launches ahead.
    """
    config.overlap_p2p_comm = interleaved
    config.batch_p2p_comm = not interleaved
    config.batch_p2p_sync = False


def _no_sync(chunks: Sequence[nn.Module]) -> Any:
    """The contexts in which chunks keep gradients local, until the last micro-batch."""
    functions = [chunk.no_sync for chunk in chunks if hasattr(chunk, "no_sync")]
    if not functions:
        return None
    return functions if len(functions) > 1 else functions[0]

"""All micro-batches of a step through the pipeline, forward and backward.

One entry for all layouts: no pipeline, 1F1B, or interleaved 1F1B. The laws that the engine leaves
to its callers are held here, where the schedule is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from megatron_moe.errors import UsageError
from megatron_moe.parallel.context import ParallelContext
from megatron_moe.parallel.gradients import finalize_gradients

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
            and a function from the last stage's output to (loss, what to report). The loss is
            divided by the number of micro-batches.
        batches: one entry per micro-batch, the same number on every rank. Every chunk goes through
            all of them.
        chunks: the model chunks of this rank, for a backward pass each in Megatron-Core's
            `DistributedDataParallel`.
        forward_only: no backward pass, no gradients.
        before_reduction: called once after the last backward pass, before gradients are reduced
            (with `--overlap-grad-reduce`, before the reduction is waited for).

    Returns:
        On the last stage what the loss function reported, in order; else an empty list.

    Raises:
        UsageError: the interleaved schedule got micro-batches that are no multiple of the stages.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    layout = ctx.layout
    if len(chunks) != layout.num_chunks:
        raise ValueError(f"{len(chunks)} model chunks, the layout has {layout.num_chunks}")
    if layout.vp is not None and len(batches) % layout.pp:
        raise UsageError(
            "micro-batches", len(batches), f"a multiple of the pipeline size ({layout.pp})"
        )
    config = engine_config(chunks[0])
    _obey_transfer_laws(config, interleaved=layout.vp is not None)
    config.no_sync_func = _no_sync(chunks)

    def finalize(*args: Any, **kwargs: Any) -> None:
        if before_reduction is not None:
            before_reduction()
        finalize_gradients(ctx, chunks)

    config.finalize_model_grads_func = finalize
    run = get_forward_backward_func(pp_size=layout.pp, vp_size=layout.vp)
    pipelined = layout.pp > 1
    return run(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=layout.seq_length,
        micro_batch_size=layout.micro_batch_size,
        forward_only=forward_only,
        p2p_communicator=P2PCommunicator(ctx.pgs.pp, config) if pipelined else None,
        pg_collection=ctx.pgs,
    )


def engine_config(chunk: nn.Module) -> Any:
    """The engine's configuration of a chunk, wrapped or not."""
    from megatron.core.utils import get_model_config

    return get_model_config(chunk)


def _obey_transfer_laws(config: Any, *, interleaved: bool) -> None:
    """Choose how activations travel between stages.

    The interleaved schedule between two stages sends in both directions to the same peer at once.
    Unless the transfers are overlapped, they are posted in one batch in an order that pairs the
    wrong tensors, and gradients are wrong without any error. The plain schedule refuses overlap.
    """
    config.overlap_p2p_comm = interleaved
    config.batch_p2p_comm = not interleaved


def _no_sync(chunks: Sequence[nn.Module]) -> Any:
    """Keep gradients local until the last micro-batch, if chunks reduce them as they come."""
    functions = [chunk.no_sync for chunk in chunks if hasattr(chunk, "no_sync")]
    if not functions:
        return None
    return functions if len(functions) > 1 else functions[0]

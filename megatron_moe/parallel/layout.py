"""How a run is laid out over its ranks: every degree is checked before any process group exists.

World size = TP x PP x DP for the dense part and ETP x EP x PP x EDP for the experts, on the same
ranks ("parallel folding", arXiv 2504.14960): the ranks of a pipeline stage are divided twice. With
8 ranks, TP 2, EP 4 and ETP 1, for example, attention runs as 4 data-parallel replicas of 2 ranks
each, and the experts as 2 replicas of 4 ranks each.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.moe import capacity_group_tokens
from megatron_moe.config.rampup import BatchSizes
from megatron_moe.config.run import RunConfig
from megatron_moe.model.logical import check_sizes
from megatron_moe.parallel.layout_rules import (
    check_experts,
    check_interleaving,
    check_layers_in_bf16,
    check_overlap,
    check_recomputation,
    check_widths,
    check_world,
    degree,
    expert_tensor_size,
    global_batch_sequences,
)
from megatron_moe.parallel.stages import split_layers


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A valid layout. Sizes are numbers of ranks unless stated otherwise."""

    world_size: int
    tp: int
    """Tensor-parallel size of attention and dense feed-forward layers."""
    pp: int
    """Pipeline stages."""
    vp: int | None
    """Model chunks per rank of the interleaved schedule; `None` for one chunk."""
    ep: int
    """Expert-parallel size."""
    etp: int
    """Tensor-parallel size of one expert."""
    dp: int
    """Data-parallel size of everything but experts."""
    edp: int
    """Data-parallel size of experts."""
    sequence_parallel: bool
    num_microbatches: int
    """Micro-batches of one data-parallel rank in a step."""
    micro_batch_size: int
    """Sequences."""
    global_batch_size: int
    """Sequences."""
    seq_length: int
    """Tokens of one sequence."""
    chunk_layers: tuple[int, ...]
    """Layers of every model chunk, in the order of the model; chunk c is on stage c % PP."""

    @property
    def num_chunks(self) -> int:
        """Model chunks on each rank."""
        return self.vp or 1

    def layers_of_chunk(self, stage: int, number: int) -> range:
        """Layers (from 0) of a rank's model chunk.

        Args:
            stage: pipeline stage of the rank.
            number: of its chunk, from 0.
        """
        chunk = number * self.pp + stage
        first = sum(self.chunk_layers[:chunk])
        return range(first, first + self.chunk_layers[chunk])


def resolve_layout(
    config: RunConfig, world_size: int, padded_vocab_size: int | None = None
) -> Layout:
    """Resolve the layout of a run and check its constraints.

    Args:
        config: the run's configuration, validated.
        world_size: ranks.
        padded_vocab_size: V after padding, if known already.

    Raises:
        UsageError: the first constraint that does not hold: flag, value and valid values.
    """
    parallel, model, moe = config.parallel, config.model, config.moe
    has_moe = bool(config.moe_layers)
    tp = degree("--tensor-model-parallel-size", parallel.tensor_model_parallel_size)
    pp = degree("--pipeline-model-parallel-size", parallel.pipeline_model_parallel_size)
    ep = degree("--expert-model-parallel-size", parallel.expert_model_parallel_size)
    etp = expert_tensor_size(parallel, tp, has_moe)
    check_world(world_size, tp, pp, ep, etp)
    _check_model(config, has_moe)
    check_widths(config, tp, padded_vocab_size)
    check_experts(config, tp, ep, etp, has_moe)
    split = split_layers(parallel, model.num_layers, pp)
    check_layers_in_bf16(config.precision, model.num_layers // pp)
    check_overlap(parallel)
    has_shared = moe.moe_shared_expert_intermediate_size is not None
    check_recomputation(parallel, split.chunk_layers, has_moe, has_shared)
    dp = world_size // (tp * pp)
    micro = degree("--micro-batch-size", config.train.micro_batch_size)
    global_batch = global_batch_sequences(config.train.global_batch_size, micro, dp)
    num_microbatches = global_batch // (micro * dp)
    check_interleaving(split.vp, pp, num_microbatches, micro * dp)
    _check_rampup(config, global_batch, micro * dp, pp if split.vp else 1)
    return Layout(
        world_size=world_size,
        tp=tp,
        pp=pp,
        vp=split.vp,
        ep=ep,
        etp=etp,
        dp=dp,
        edp=world_size // (etp * ep * pp),
        # Over one rank, splitting the sequence changes nothing.
        sequence_parallel=parallel.sequence_parallel and tp > 1,
        num_microbatches=num_microbatches,
        micro_batch_size=micro,
        global_batch_size=global_batch,
        seq_length=config.data.seq_length,
        chunk_layers=split.chunk_layers,
    )


def _check_rampup(config: RunConfig, global_batch: int, step: int, stages: int) -> None:
    meaning = "micro-batch x data-parallel" + (" x pipeline" if stages > 1 else "") + " size"
    BatchSizes.of(config.train, global_batch).check_divides(step * stages, meaning)


def _check_model(config: RunConfig, has_moe: bool) -> None:
    """What no layout can make possible: sizes of the model, groups of tokens that share slots."""
    check_sizes(config.model, config.moe, config.data.vocab_size or 1)
    if has_moe:
        rows, row = config.train.micro_batch_size, config.data.seq_length
        capacity_group_tokens(config.moe, rows=rows, row_tokens=row)

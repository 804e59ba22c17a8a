"""How a run is laid out over its ranks: every degree checked before any process group exists.

World = TP x PP x DP for the dense part and ETP x EP x PP x EDP for the experts of the same ranks
("parallel folding", arXiv 2504.14960): a pipeline stage's ranks are divided twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.moe import moe_layer_pattern
from megatron_moe.config.rampup import BatchSizes
from megatron_moe.config.ranges import check_ranges
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import UsageError
from megatron_moe.model.logical import check_sizes
from megatron_moe.parallel.layout_rules import (
    check_experts,
    check_interleaving,
    check_overlap,
    check_recomputation,
    check_widths,
    check_world,
    degree,
    expert_tensor_size,
    global_batch_sequences,
    virtual_stages,
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A valid layout. Sizes are numbers of ranks unless said otherwise."""

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
    layers_per_chunk: int

    @property
    def num_chunks(self) -> int:
        """Model chunks on each rank."""
        return self.vp or 1

    def layers_of(self, pp_rank: int, chunk: int) -> range:
        """The layers (0-based) of one chunk; chunk c of stage r follows chunk c of stage r - 1."""
        first = (chunk * self.pp + pp_rank) * self.layers_per_chunk
        return range(first, first + self.layers_per_chunk)


def resolve_layout(
    config: RunConfig, world_size: int, padded_vocab_size: int | None = None
) -> Layout:
    """Work out the layout of a run and check all of it.

    Args:
        config: the run's configuration.
        world_size: ranks.
        padded_vocab_size: V after padding, if known already.

    Raises:
        UsageError: the first rule that does not hold: flag, value and valid values.
    """
    check_ranges(config)
    parallel, model, moe = config.parallel, config.model, config.moe
    has_moe = any(moe_layer_pattern(moe.moe_layer_freq, model.num_layers))
    tp = degree("--tensor-model-parallel-size", parallel.tensor_model_parallel_size)
    pp = degree("--pipeline-model-parallel-size", parallel.pipeline_model_parallel_size)
    ep = degree("--expert-model-parallel-size", parallel.expert_model_parallel_size)
    etp = expert_tensor_size(parallel, tp, has_moe)
    check_world(world_size, tp, pp, ep, etp)
    _check_model(config, has_moe)
    check_widths(config, tp, padded_vocab_size)
    check_experts(config, tp, ep, etp, has_moe)
    vp = virtual_stages(parallel, model.num_layers, pp)
    layers_per_chunk = model.num_layers // (pp * (vp or 1))
    check_overlap(parallel)
    check_recomputation(parallel, layers_per_chunk, has_moe)
    dp = world_size // (tp * pp)
    micro = degree("--micro-batch-size", config.train.micro_batch_size)
    global_batch = global_batch_sequences(config.train.global_batch_size, micro, dp)
    num_microbatches = global_batch // (micro * dp)
    check_interleaving(vp, pp, num_microbatches, micro * dp)
    _check_rampup(config, global_batch, micro * dp, pp if vp else 1)
    return Layout(
        world_size=world_size,
        tp=tp,
        pp=pp,
        vp=vp,
        ep=ep,
        etp=etp,
        dp=dp,
        edp=world_size // (etp * ep * pp),
        # Over one rank it is the identity.
        sequence_parallel=parallel.sequence_parallel and tp > 1,
        num_microbatches=num_microbatches,
        micro_batch_size=micro,
        global_batch_size=global_batch,
        seq_length=config.data.seq_length,
        layers_per_chunk=layers_per_chunk,
    )


def _check_rampup(config: RunConfig, global_batch: int, step: int, stages: int) -> None:
    meaning = "micro-batch x data-parallel" + (" x pipeline" if stages > 1 else "") + " size"
    BatchSizes.of(config.train, global_batch).check_divides(step * stages, meaning)


def _check_model(config: RunConfig, has_moe: bool) -> None:
    """What a model cannot be on any layout."""
    length, longest = config.data.seq_length, config.model.max_position_embeddings
    if length > longest:
        raise UsageError("--seq-length", length, f"at most --max-position-embeddings ({longest})")
    check_sizes(config.model, config.moe, config.data.vocab_size or 1)
    if has_moe and config.moe.moe_capacity_group_size is not None:
        # Imported here: its package needs torch, which --describe and --help do not.
        from megatron_moe.moe.plan import group_size

        group_size(config.moe, rows=config.train.micro_batch_size, row_tokens=length)

"""What a training rank works with: one value that the loop's parts take as argument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_moe.config import RunConfig
from megatron_moe.model.openmoe import OpenMoEModel
from megatron_moe.model.sharding.shards import model_shards
from megatron_moe.parallel.context import ParallelContext
from megatron_moe.training.optim.freezing import Freezing
from megatron_moe.training.optim.optimizer import build_optimizer, wrap_chunks
from megatron_moe.training.plan import TrainingPlan


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """The model on this rank and everything that changes it."""

    config: RunConfig
    """The run, as given."""
    plan: TrainingPlan
    """Its length."""
    ctx: ParallelContext
    """Layout, platform and process groups."""
    chunks: Sequence[OpenMoEModel]
    """The model chunks of this rank, without wrappers."""
    wrapped: Sequence[DistributedDataParallel]
    """The same chunks with their gradient buffers."""
    optimizer: MegatronOptimizer
    """Moments, fp32 master weights under bf16, and the update."""
    freezing: Freezing
    """What the update must leave as it is."""
    vocab_size: int
    """V, padded."""

    @property
    def has_loss(self) -> bool:
        """Whether this rank's pipeline stage computes the loss."""
        return self.ctx.is_last_stage

    @property
    def reports_loss(self) -> bool:
        """Whether this rank's loss is counted: tensor-parallel ranks all hold the same one."""
        return self.ctx.is_last_stage and self.ctx.tp_rank == 0


def prepare_run(
    config: RunConfig,
    plan: TrainingPlan,
    ctx: ParallelContext,
    chunks: Sequence[OpenMoEModel],
    vocab_size: int,
) -> TrainingRun:
    """Add gradient buffers and an optimizer to the model chunks."""
    wrapped = wrap_chunks(config, chunks, ctx.pgs)
    optimizer = build_optimizer(config, wrapped, ctx.pgs)
    return TrainingRun(
        config=config,
        plan=plan,
        ctx=ctx,
        chunks=chunks,
        wrapped=wrapped,
        optimizer=optimizer,
        freezing=Freezing(
            config.optimizer, model_shards(chunks, config.model, config.moe), optimizer
        ),
        vocab_size=vocab_size,
    )

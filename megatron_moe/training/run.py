"""What a rank trains: model chunks with gradient buffers, optimizer, and the settings in force.

`TrainingRun` is the one value that the parts of training take as argument. It is built once, and
replaced by `in_phase` where a phase of the curriculum changes the settings; the model and the
optimizer stay the same objects.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.optimizer import MegatronOptimizer

from megatron_moe.config import ModelConfig, RunConfig
from megatron_moe.model.attention import RotaryCoreAttention
from megatron_moe.model.layer import OpenMoELayer
from megatron_moe.model.openmoe import OpenMoEModel
from megatron_moe.model.sharding.shards import model_shards
from megatron_moe.moe.registry import check_norm_width, kernels_for
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.parallel.context import ParallelContext
from megatron_moe.platform.precision import check_precision
from megatron_moe.platform.transformer_engine import check_implementation
from megatron_moe.training.captured import CapturedPasses, check_device, count_at_once
from megatron_moe.training.optim.build import build_optimizer, wrap_chunks
from megatron_moe.training.optim.freezing import Freezing
from megatron_moe.training.phases import Phase
from megatron_moe.training.plan import TrainingPlan
from megatron_moe.training.timing import StepTimers


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """The model and the optimizer of this rank, and the settings they are trained with."""

    config: RunConfig
    """Settings of the current phase."""
    plan: TrainingPlan
    """Length and batch sizes of the current phase."""
    ctx: ParallelContext
    """Layout, platform and process groups."""
    chunks: Sequence[OpenMoEModel]
    """The model chunks of this rank, without wrappers."""
    wrapped: Sequence[DistributedDataParallel]
    """The same chunks with their gradient buffers."""
    optimizer: MegatronOptimizer
    """Moments, fp32 master weights under bf16, and the update."""
    freezing: Freezing
    """Weights that the update leaves unchanged."""
    vocab_size: int
    """V, padded."""
    timers: StepTimers = field(default_factory=lambda: StepTimers(0))
    """Measures the parts of a step."""
    captured: CapturedPasses | None = None
    """Repeats the passes of a step; `None` where each step launches its kernels anew."""

    @property
    def has_loss(self) -> bool:
        """Whether this rank's pipeline stage computes the loss."""
        return self.ctx.is_last_stage

    @property
    def reports_loss(self) -> bool:
        """Whether this rank's loss is counted: tensor-parallel ranks all hold the same one."""
        return self.ctx.is_last_stage and self.ctx.tp_rank == 0

    def in_phase(self, phase: Phase) -> TrainingRun:
        """The same model and optimizer with the settings of a phase.

        Parameters, optimizer state and random states are not touched, so a run that switches
        phases at step n and one that resumes at step n in the new phase take the same steps.
        """
        set_dropout(self.chunks, phase.config.model)
        ctx = replace(self.ctx, layout=phase.layout)
        return replace(self, config=phase.config, plan=phase.plan, ctx=ctx)


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
    timers = StepTimers(config.logging.timing_log_level)
    timers.attach(wrapped, optimizer)
    captured = None if config.parallel.cuda_graph == "none" else CapturedPasses()
    if captured is not None:
        count_at_once(chunks)
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
        timers=timers,
        captured=captured,
    )


def set_dropout(chunks: Sequence[OpenMoEModel], model: ModelConfig) -> None:
    """Set the dropout probabilities of a built model, as `build_model` would have set them.

    Args:
        chunks: the model chunks of this rank, without wrappers.
        model: `hidden_dropout` (embedding and residual branches) and `attention_dropout`.
    """
    for chunk in chunks:
        chunk.config.hidden_dropout = model.hidden_dropout
        chunk.config.attention_dropout = model.attention_dropout
        # Modules copy the probability when they are built, so the configuration is not enough.
        for module in chunk.modules():
            if isinstance(module, OpenMoELayer):
                module.hidden_dropout = model.hidden_dropout
            elif isinstance(module, RotaryCoreAttention):
                module.dropout = model.attention_dropout
            elif isinstance(module, LanguageModelEmbedding):
                module.embedding_dropout.p = model.hidden_dropout


def compare_kernels(config: RunConfig, device_type: str, ranks: RankGroup) -> list[str]:
    """Select the MoE kernels on every rank, compile them if needed, and report differences.

    The log names the kernels of rank 0. Each rank selects for itself, and one whose node has no
    compiler uses slower kernels than the others: every step then waits for it. Called before
    process groups exist, so that a compilation cannot run into their timeout.

    Returns:
        Lines for the log: on rank 0 one for each selection, if there are several.

    Raises:
        UsageError: what `--kernel-impl`, `--transformer-impl`, `--gradient-accumulation-fusion`,
            `--fp8-format` or `--cuda-graph` ask for is not available here, or not at this width.
    """
    check_implementation(config, device_type)
    check_precision(config, device_type)
    check_device(config, device_type)
    kernels = kernels_for(config.moe, device_type)
    check_norm_width(config.model.hidden_size, kernels)
    selected = kernels.selected
    used = sorted({f"{each.implementation} ({each.reason})" for each in selected if not each.sole})
    gathered = ranks.gather([", ".join(used), socket.gethostname()])
    hosts_by_selection: dict[str, list[str]] = defaultdict(list)
    for selection, host in gathered or []:
        hosts_by_selection[selection].append(host)
    if len(hosts_by_selection) == 1:
        return []
    return [
        f" WARNING: MoE kernels of {len(hosts)} of {ranks.size} ranks: {selection};"
        f" on {_abbreviated(hosts)}"
        for selection, hosts in hosts_by_selection.items()
    ]


def _abbreviated(hosts: list[str], most: int = 4) -> str:
    """Each host once; of more than ``most``, the first ones and a count."""
    names = list(dict.fromkeys(hosts))
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])

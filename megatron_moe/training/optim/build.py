"""Gradient buffers and optimizer around the model chunks, over Megatron-Core's.

The gradient norm, clipping and the learning rate of a step are in `training/step.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_moe.config import RunConfig
from megatron_moe.model.logical import logical_parameters
from megatron_moe.model.openmoe import OpenMoEModel
from megatron_moe.model.sharding.shards import model_shards
from megatron_moe.training.optim.adafactor import install_adafactor
from megatron_moe.training.optim.muon import install_muon


def wrap_chunks(
    config: RunConfig, chunks: Sequence[OpenMoEModel], pgs: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """Give every chunk its gradient buffers, reduced in fp32 over its data-parallel replicas.

    Gradients are averaged over the data-parallel size, also those of experts, although each expert
    has fewer replicas than that: it already receives the tokens of the other ranks through the
    all-to-all.
    """
    _mark_split_weights(config, chunks)
    parallel = config.parallel
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    return [
        # As in Megatron-LM, chunks after the first are not on the critical path: one bucket each.
        DistributedDataParallel(
            chunk.config, ddp, chunk, disable_bucketing=index > 0, pg_collection=pgs
        )
        for index, chunk in enumerate(chunks)
    ]


def _mark_split_weights(config: RunConfig, chunks: Sequence[OpenMoEModel]) -> None:
    """Mark the weights that differ between tensor-parallel ranks.

    Megatron-Core's layers set this mark only when they initialize their own weights, and ours are
    initialized by logical name instead. Of an unmarked weight only tensor-parallel rank 0 counts
    in the gradient norm: a [2F, H] gate split over two ranks would count half. Experts are marked
    in any case: their norm is summed over groups in which no two ranks hold the same ones.
    """
    for shard in model_shards(chunks, config.model, config.moe):
        if shard.expert or any(prod(p.sizes) < prod(p.logical_shape) for p in shard.pieces):
            shard.param.tensor_model_parallel = True  # type: ignore[attr-defined]


def build_optimizer(
    config: RunConfig, wrapped: Sequence[DistributedDataParallel], pgs: ProcessGroupCollection
) -> MegatronOptimizer:
    """Megatron-Core's optimizer with the settings of the run; one-dimensional weights do not decay.

    Megatron-Core has no Adafactor, and Muon for matrices alone that are one local parameter: its
    wrapper (master weights, copies, norms) is built around plain SGD, which ours then replaces.
    """
    settings, parallel = config.optimizer, config.parallel
    ours = settings.optimizer in ("adafactor", "muon")
    core = CoreOptimizerConfig(
        optimizer="sgd" if ours else settings.optimizer,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.used_weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        sgd_momentum=settings.sgd_momentum,
        clip_grad=settings.used_clip_grad,
        bf16=config.train.bf16,
        params_dtype=torch.bfloat16 if config.train.bf16 else torch.float32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(
        core, list(wrapped), use_gloo_process_groups=False, pg_collection=pgs
    )
    shards = model_shards(wrapped, config.model, config.moe) if ours else []
    if settings.optimizer == "adafactor":
        install_adafactor(optimizer, shards, settings, pgs)
    if settings.optimizer == "muon":
        table = logical_parameters(config.model, config.moe, 1)  # kinds do not depend on V
        kinds = {name: parameter.kind for name, parameter in table.items()}
        install_muon(optimizer, shards, kinds, settings, pgs)
    _fuse(optimizer)
    return optimizer


def _fuse(optimizer: MegatronOptimizer) -> None:
    """Let torch's AdamW, used without Apex and Transformer Engine, update in one fused kernel.

    On one CPU core, 13.6 million parameters: 18 ms; 59 ms with `foreach`; 161 ms parameter by
    parameter, which is Megatron-Core's choice.
    """
    for part in chained_optimizers(optimizer):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = True


def chained_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of dense and of expert parameters; on every rank, also if one is empty."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))

"""What `--transformer-impl` selects: classes of linear layers, experts, and how to recompute.

Both implementations have the same parameters but for experts, the same norms, router and core
attention, and compute the same numbers up to rounding. Transformer Engine is imported when its
layers are built, never before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.config.parallel import TransformerImpl
from megatron_moe.model.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_moe.moe.experts import MakeExperts

Recompute = Callable[..., Tensor]
"""(module, tensor-parallel group, *tensors) -> the module's output, computed again in the backward
pass."""


@dataclass(frozen=True)
class Implementation:
    """The parts of a layer that `--transformer-impl` selects.

    Args:
        column: linear layer whose outputs tensor parallelism divides.
        row: linear layer whose inputs it divides.
        make_experts: (model, moe, Megatron-Core's configuration, groups) -> what builds the experts
            of a layer, or `None` for stacked ones.
    """

    column: type[Module]
    row: type[Module]
    make_experts: Callable[
        [ModelConfig, MoEConfig, TransformerConfig, ProcessGroupCollection], MakeExperts | None
    ]


def implementation(name: TransformerImpl) -> Implementation:
    """The classes of an implementation; imports Transformer Engine if it is that one."""
    if name == "local":
        return Implementation(Fp8ColumnParallelLinear, Fp8RowParallelLinear, lambda *_: None)
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TERowParallelLinear,
    )

    return Implementation(TEColumnParallelLinear, TERowParallelLinear, _grouped_experts)


def _grouped_experts(
    model: ModelConfig, moe: MoEConfig, config: TransformerConfig, pgs: ProcessGroupCollection
) -> MakeExperts:
    from megatron_moe.moe.te_experts import GroupedExperts

    return lambda groups: GroupedExperts(model, moe, groups, config, pgs)


def recompute_with(config: TransformerConfig) -> Recompute:
    """The checkpoint function for a configuration.

    In FP8 it must be Transformer Engine's: the second forward pass has to use the scales of the
    first. Megatron-Core does the same where it recomputes whole layers.
    """
    return _te_checkpoint if config.fp8 else _checkpoint


def _checkpoint(module: Module, tp_group: ProcessGroup, *tensors: Tensor) -> Tensor:
    output: Tensor = tensor_parallel.checkpoint(module, False, *tensors)
    return output


def _te_checkpoint(module: Module, tp_group: ProcessGroup, *tensors: Any) -> Tensor:
    from megatron.core.extensions.transformer_engine import te_checkpoint

    tracker = tensor_parallel.random.get_cuda_rng_tracker
    output: Tensor = te_checkpoint(module, False, tracker, tp_group, *tensors)
    return output

"""Process groups and ranks of a layout, as one value that is passed around."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.errors import UsageError
from megatron_moe.parallel.launch import meet_at_start
from megatron_moe.parallel.layout import Layout
from megatron_moe.platform import Platform

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

STAGE_SEED = 100
"""Pipeline stages draw from seeds this far apart, as in Megatron-LM."""


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """Where this rank stands in the layout."""

    layout: Layout
    platform: Platform
    pgs: ProcessGroupCollection
    """Megatron-Core's process groups of this rank."""
    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    """Within the ranks that hold the same dense parameters."""
    ep_rank: int
    etp_rank: int
    edp_rank: int
    """Within the ranks that hold the same experts."""
    is_first_stage: bool
    """Holds the embedding (of its first chunk, when interleaved)."""
    is_last_stage: bool
    """Holds the logits and the loss (of its last chunk, when interleaved)."""

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks."""
        return self.layout.tp

    @property
    def pp_size(self) -> int:
        """Pipeline stages."""
        return self.layout.pp

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks of the dense part."""
        return self.layout.dp

    @property
    def ep_size(self) -> int:
        """Expert-parallel ranks."""
        return self.layout.ep

    @property
    def etp_size(self) -> int:
        """Tensor-parallel ranks of one expert."""
        return self.layout.etp

    @property
    def edp_size(self) -> int:
        """Data-parallel ranks of the experts."""
        return self.layout.edp

    @property
    def needs_data(self) -> bool:
        """The first stage needs tokens, the last one labels."""
        return self.is_first_stage or self.is_last_stage

    @property
    def reads_data(self) -> bool:
        """Reads data itself; the other tensor-parallel ranks get it from this one."""
        return self.needs_data and self.tp_rank == 0


def initialize_parallel(
    layout: Layout,
    parallel: ParallelConfig,
    platform: Platform,
    seed: int,
    *,
    store: dist.Store | None = None,
    rank: int = 0,
) -> ParallelContext:
    """Create the process groups of a layout and seed the engine's random streams.

    The default process group is made if there is none: from `store` and `rank` if given, else as
    `megatron_moe.parallel.launch` finds it in the environment, after all ranks have met; if any of
    them found a mistake of the user's, the process ends there with code 2.

    Raises:
        UsageError: the default group is of another size than the layout.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    if not dist.is_initialized():
        _initialize_default_group(layout, platform, timeout, store, rank)
    if dist.get_world_size() != layout.world_size:
        raise UsageError("world size", dist.get_world_size(), f"{layout.world_size}, as laid out")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,  # type: ignore[arg-type]
        create_gloo_process_groups=False,
    )
    pgs = ProcessGroupCollection.use_mpu_process_groups()
    stage_seed = seed + STAGE_SEED * pgs.pp.rank()
    # Nothing of ours draws from Python's or NumPy's global streams; what a user adds may.
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)
    return _context(layout, platform, pgs)


def _initialize_default_group(
    layout: Layout,
    platform: Platform,
    timeout: timedelta,
    store: dist.Store | None,
    rank: int,
) -> None:
    options: dict[str, Any] = {"backend": platform.backend, "timeout": timeout}
    if platform.kind == "cuda" and platform.backend == "nccl":
        options["device_id"] = platform.device
    if store is None:
        store, rank = meet_at_start(layout.world_size, timeout)
    dist.init_process_group(store=store, rank=rank, world_size=layout.world_size, **options)


def _context(layout: Layout, platform: Platform, pgs: ProcessGroupCollection) -> ParallelContext:
    return ParallelContext(
        layout=layout,
        platform=platform,
        pgs=pgs,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=pgs.tp.rank(),
        pp_rank=pgs.pp.rank(),
        dp_rank=pgs.dp.rank(),
        ep_rank=pgs.ep.rank(),
        etp_rank=pgs.expt_tp.rank(),
        edp_rank=pgs.expt_dp.rank(),
        is_first_stage=pgs.pp.rank() == 0,
        is_last_stage=pgs.pp.rank() == layout.pp - 1,
    )


def destroy_parallel(*, default_group: bool = False) -> None:
    """Forget a layout entirely, so that this process can take another one.

    Args:
        default_group: take the default process group down as well.
    """
    if "megatron.core.parallel_state" in sys.modules:
        _forget_groups()
        _forget_engine_state()
    if default_group and dist.is_initialized():
        dist.destroy_process_group()


def _forget_groups() -> None:
    from megatron.core import parallel_state

    groups = getattr(parallel_state, "_global_process_group_list", None) or ()
    parallel_state.destroy_model_parallel()
    for group in groups:
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)
    # The engine leaves lists of ranks behind, e.g. that of the embedding group, which would be
    # taken for the next layout's on ranks that get no new one.
    for name, value in vars(parallel_state).items():
        if name.startswith("_") and name[1:].replace("_", "").isupper() and value is not None:
            setattr(parallel_state, name, {} if isinstance(value, dict) else None)


def _forget_engine_state() -> None:
    """Random streams, micro-batch counts, loss scales, trackers: what outlives a layout."""
    import megatron.core.tensor_parallel.random as random
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.core.transformer.moe import moe_utils

    random._CUDA_RNG_STATE_TRACKER = None
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    random.IS_CHECKPOINTING = False
    unset_num_microbatches_calculator()
    destroy_rerun_state_machine()
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
    moe_utils.get_moe_layer_wise_logging_tracker().clear()

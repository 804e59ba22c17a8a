"""The process groups of a layout and this rank's coordinates, as one value that is passed on.

The only module that creates Megatron-Core's global groups, and that destroys them.
"""

from __future__ import annotations

import os
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
from megatron_moe.parallel.launch import startup_barrier
from megatron_moe.parallel.layout import Layout
from megatron_moe.platform import Platform
from megatron_moe.platform.queues import check_queues
from megatron_moe.platform.release import check_norm_recomputation

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

STAGE_SEED = 100
"""The seeds of consecutive pipeline stages differ by this, as in Megatron-LM."""


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """This rank's place in the layout."""

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
    is_first_stage: bool
    """Holds the embedding (of its first chunk, when interleaved)."""
    is_last_stage: bool
    """Holds the logits and the loss (of its last chunk, when interleaved)."""

    @property
    def needs_data(self) -> bool:
        """The first stage needs tokens, the last one labels."""
        return self.is_first_stage or self.is_last_stage

    @property
    def reads_data(self) -> bool:
        """Reads data itself; the other tensor-parallel ranks receive it from this one."""
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
    """Create the process groups of a layout and seed Megatron-Core's random streams.

    The default process group is created if there is none: from `store` and `rank` if given, else
    from the launcher's, after a `startup_barrier`, in which the process exits with code 2 if any
    rank has a usage error.

    Raises:
        UsageError: the default group is of another size than the layout; or tensor parallelism
            needs `CUDA_DEVICE_MAX_CONNECTIONS=1` on this GPU; or recomputed norms need ninja.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if platform.kind == "cuda" and layout.tp > 1:
        major, _ = torch.cuda.get_device_capability(platform.device)
        check_queues(layout.tp, major, os.environ)
    if platform.kind == "cuda" and parallel.recompute_granularity == "selective":
        check_norm_recomputation(parallel.recompute_modules)
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    if not dist.is_initialized():
        _initialize_default_group(layout, platform, timeout, store, rank)
    if dist.get_world_size() != layout.world_size:
        raise UsageError(
            "world size", dist.get_world_size(), f"{layout.world_size}, that of the layout"
        )
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
    # Our own code does not draw from Python's and NumPy's global generators; a user's may.
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
        store, rank = startup_barrier(layout.world_size, timeout)
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
        is_first_stage=pgs.pp.rank() == 0,
        is_last_stage=pgs.pp.rank() == layout.pp - 1,
    )


def destroy_parallel(*, default_group: bool = False) -> None:
    """Destroy a layout with all its state, so that this process can create another one.

    Args:
        default_group: destroy the default process group as well.
    """
    if "megatron.core.parallel_state" in sys.modules:
        _destroy_groups()
        _reset_megatron_state()
    if default_group and dist.is_initialized():
        dist.destroy_process_group()


def _destroy_groups() -> None:
    from megatron.core import parallel_state

    groups = getattr(parallel_state, "_global_process_group_list", None) or ()
    parallel_state.destroy_model_parallel()
    for group in groups:
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)
    # `destroy_model_parallel` leaves lists of ranks behind, e.g. those of the embedding group. On a
    # rank that is in no such group of the next layout, the old list would be taken for the new one.
    for name, value in vars(parallel_state).items():
        if name.startswith("_") and name[1:].replace("_", "").isupper() and value is not None:
            setattr(parallel_state, name, {} if isinstance(value, dict) else None)


def _reset_megatron_state() -> None:
    """Reset what outlives a layout: random streams, micro-batch counts, loss scales, trackers."""
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

"""Which data a rank reads, known before there are process groups.

Data is opened first, so that a missing or broken file ends all ranks with one line, and so that
nobody waits in a collective while another builds an index.
"""

from __future__ import annotations

from megatron_moe.config import RunConfig
from megatron_moe.data.batch import extra_planes
from megatron_moe.data.pipeline import Data, build_data
from megatron_moe.parallel.context import ParallelContext
from megatron_moe.parallel.layout import Layout


def open_data(config: RunConfig, layout: Layout, rank: int, consumed_samples: int) -> Data:
    """This rank's data, from the sample after ``consumed_samples`` on.

    Ranks are numbered as Megatron-LM does: tensor-parallel ranks are neighbours, then come
    data-parallel ones, then pipeline stages.
    """
    tp_rank, dp_rank, pp_rank = coordinates(layout, rank)
    return build_data(
        config,
        dp_rank=dp_rank,
        dp_size=layout.dp,
        num_microbatches=layout.num_microbatches,
        consumed_train_samples=consumed_samples,
        # Middle stages need where documents begin, and reading that is cheaper than sending it.
        reads_data=tp_rank == 0
        and (pp_rank in (0, layout.pp - 1) or bool(extra_planes(config.objective))),
    )


def coordinates(layout: Layout, rank: int) -> tuple[int, int, int]:
    """(tensor-parallel, data-parallel, pipeline) rank of a global rank."""
    return rank % layout.tp, rank // layout.tp % layout.dp, rank // (layout.tp * layout.dp)


def check_coordinates(layout: Layout, ctx: ParallelContext) -> None:
    """Make sure that the engine numbered the ranks in the same way.

    Raises:
        RuntimeError: it did not; data would go to the wrong ranks.
    """
    ours = coordinates(layout, ctx.rank)
    engine = (ctx.tp_rank, ctx.dp_rank, ctx.pp_rank)
    if ours != engine:
        raise RuntimeError(f"rank {ctx.rank} is {ours} here and {engine} in the engine")

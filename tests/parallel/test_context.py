"""Ranks and groups of many layouts, one after another in the same processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_moe.errors import UsageError
from megatron_moe.parallel.context import destroy_parallel
from megatron_moe.parallel.layout import resolve_layout
from tests.support import toy
from tests.support.pool import Pool

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
VPP = "num_layers_per_virtual_pipeline_stage"
SP = {"sequence_parallel": True}

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (4, {}),
    (4, {TP: 2, **SP}),
    (4, {PP: 2, VPP: 1}),
    (4, {PP: 4}),
    (4, {EP: 2, ETP: 2}),
    (4, {TP: 2, ETP: 1, EP: 2, **SP}),
    (4, {TP: 2, EP: 2, PP: 2, ETP: 1, **SP}),
    (4, {TP: 4, ETP: 2, EP: 2, **SP}),
    (2, {PP: 2}),
]


def coordinates(rank: int, world_size: int, *, layouts: list[dict[str, Any]]) -> list[Any]:
    """For each layout in turn: this rank's coordinates, and the ranks of its groups."""
    found = []
    for parallel in layouts:
        ctx = toy.context(world_size, **parallel)
        ranks = {
            name: dist.get_process_group_ranks(getattr(ctx.pgs, name))
            for name in ("tp", "pp", "dp", "ep", "expt_tp", "expt_dp")
        }
        own = (ctx.tp_rank, ctx.pp_rank, ctx.dp_rank, ctx.ep_rank, ctx.etp_rank)
        places = (*own, ctx.pgs.expt_dp.rank())
        layout = ctx.layout
        sizes = (layout.tp, layout.pp, layout.dp, layout.ep, layout.etp, layout.edp)
        ends = (ctx.is_first_stage, ctx.is_last_stage, ctx.needs_data, ctx.reads_data)
        found.append((ctx.rank, places, sizes, ends, ranks))
        destroy_parallel()
    return found


def expected(rank: int, world: int, parallel: dict[str, Any]) -> Any:
    """The same from first principles: tensor ranks vary fastest, stages slowest."""
    layout = resolve_layout(toy.run_config(**parallel), world)
    tp, pp, ep, etp = layout.tp, layout.pp, layout.ep, layout.etp
    dp, edp = world // (tp * pp), world // (etp * ep * pp)
    dense = [(r % tp, r // (tp * dp), (r // tp) % dp) for r in range(world)]
    expert = [((r // etp) % ep, r % etp, (r // (etp * ep)) % edp) for r in range(world)]
    t, p, d = dense[rank]
    e, x, y = expert[rank]
    ranks = {
        "tp": [r for r in range(world) if dense[r][1:] == (p, d)],
        "pp": [r for r in range(world) if (dense[r][0], dense[r][2]) == (t, d)],
        "dp": [r for r in range(world) if dense[r][:2] == (t, p)],
        "ep": [r for r in range(world) if (dense[r][1], expert[r][1:]) == (p, (x, y))],
        "expt_tp": [
            r for r in range(world) if (dense[r][1], expert[r][0], expert[r][2]) == (p, e, y)
        ],
        "expt_dp": [r for r in range(world) if (dense[r][1], expert[r][:2]) == (p, (e, x))],
    }
    data = p in (0, pp - 1)
    ends = (p == 0, p == pp - 1, data, data and t == 0)
    return rank, (t, p, d, e, x, y), (tp, pp, dp, ep, etp, edp), ends, ranks


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_many_layouts_in_the_same_processes(pool: Pool, world_size: int) -> None:
    layouts = [parallel for world, parallel in LAYOUTS if world == world_size]
    for rank, found in enumerate(pool.run(coordinates, world_size, layouts=layouts)):
        assert found == [expected(rank, world_size, parallel) for parallel in layouts]


def left_behind(rank: int, world_size: int) -> tuple[dict[str, str], int, list[Any]]:
    """State of Megatron-Core that a layout, created and destroyed, leaves changed."""
    import megatron.core.tensor_parallel.random as random
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import (
        get_num_microbatches,
        init_num_microbatches_calculator,
    )
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    def state() -> dict[str, str]:
        return {k: repr(v) for k, v in vars(parallel_state).items() if k.startswith("_")}

    before = state()
    ctx = toy.context(world_size, **{PP: 2, VPP: 1})
    groups_made = len(dist.distributed_c10d._world.pg_map)
    random._set_checkpointing()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    init_num_microbatches_calculator(ctx.rank, None, 16, 2, 1)
    destroy_parallel()
    after = state()
    changed = {k: v for k, v in after.items() if before.get(k) != v and k != "__builtins__"}
    try:
        counted: Any = get_num_microbatches()
    except AttributeError:
        counted = None
    others = [
        counted,
        MoEAuxLossAutoScaler.main_loss_backward_scale,
        random._CUDA_RNG_STATE_TRACKER,
        random.is_checkpointing(),
    ]
    assert groups_made > 1
    return changed, len(dist.distributed_c10d._world.pg_map), others


def test_nothing_of_a_layout_is_left_behind(pool: Pool) -> None:
    for changed, groups, others in pool.run(left_behind, 4):
        assert changed == {}
        assert groups == 1, "the default group stays, and nothing else"
        assert others == [None, None, None, False]


def in_embedding_group_after(rank: int, world_size: int) -> list[bool]:
    """Whether Megatron-Core has this rank in the embedding group, in two layouts in turn."""
    from megatron.core import parallel_state

    toy.context(world_size)
    first = parallel_state.is_rank_in_embedding_group()
    destroy_parallel()
    toy.context(world_size, **{PP: 4})
    return [first, parallel_state.is_rank_in_embedding_group()]


def test_the_next_layout_does_not_inherit_the_embedding_ranks(pool: Pool) -> None:
    assert pool.run(in_embedding_group_after, 4) == [
        [True, True],
        [True, False],
        [True, False],
        [True, True],
    ]


def another_world(rank: int, world_size: int) -> str:
    config = toy.run_config()
    from megatron_moe.parallel.context import initialize_parallel
    from megatron_moe.platform import activate

    try:
        initialize_parallel(resolve_layout(config, 4), config.parallel, activate(), seed=1)
    except UsageError as error:
        return str(error)
    return "accepted"


def test_a_layout_for_another_world_is_rejected(pool: Pool) -> None:
    assert pool.run(another_world, 2) == ["world size must be 4, that of the layout (got 2)"] * 2


def draws(rank: int, world_size: int, *, parallel: dict[str, Any]) -> dict[str, float]:
    """A number from each of Megatron-Core's random streams, and from the default one."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    toy.context(world_size, **parallel)
    tracker = get_cuda_rng_tracker()
    found = {"default": float(torch.rand(()))}
    for name in ("model-parallel-rng", "expert-parallel-rng"):
        with tracker.fork(name):
            found[name] = float(torch.rand(()))
    return found


def test_random_streams_agree_among_replicas_and_differ_among_shards(pool: Pool) -> None:
    a, b, c, d = pool.run(draws, 4, parallel={TP: 2, ETP: 1, EP: 2, **SP})
    assert a["default"] == b["default"] == c["default"] == d["default"]
    assert (a, b) == (c, d), "data-parallel replicas"
    assert a["model-parallel-rng"] != b["model-parallel-rng"], "tensor-parallel shards"
    assert a["expert-parallel-rng"] != b["expert-parallel-rng"], "expert-parallel shards"


def test_stages_draw_different_numbers(pool: Pool) -> None:
    first, second = pool.run(draws, 2, parallel={PP: 2})
    assert all(first[name] != second[name] for name in first)

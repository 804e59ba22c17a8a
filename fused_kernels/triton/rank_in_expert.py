"""For each choice in priority order, how many earlier ones of its group chose the same expert.

As `fused_kernels.reference.rank_in_expert`, by counting: choices are ranked within tiles of `TILE`,
the tiles' counts are summed up tile after tile, and the sums before a tile are added to its ranks.
No step depends on the order in which programs run. An id that is no expert is not counted, and its
rank is that within its tile.

Shapes: G groups, A choices of a group in priority order, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_kernels.plain_tensors import runs_on
from fused_kernels.reference import rank_in_expert as reference
from fused_kernels.triton.launch import block_of, cdiv, checked, launch

TILE = 64
"""Choices of a tile: each is compared with each, in registers."""
TILES = 64
"""Tiles whose counts a program of the running sum holds at once, of so many experts: `EXPERTS`."""
EXPERTS = 32


@triton.jit
def rank_tiles_kernel(
    experts: tl.tensor,
    ranks: tl.tensor,
    counts: tl.tensor,
    choices: tl.tensor,
    num_experts: tl.tensor,
    tiles: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """A program for each tile: ranks within it, and its choices of each expert."""
    program = tl.program_id(0).to(tl.int64)
    group, tile = program // tiles, program % tiles
    place = tl.arange(0, TILE)
    choice = tile * TILE + place
    inside = choice < choices
    expert = tl.load(experts + group * choices + choice, mask=inside, other=-1).to(tl.int32)
    same = expert[:, None] == expert[None, :]
    earlier = same & (place[:, None] > place[None, :])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    tl.store(ranks + group * choices + choice, rank.to(tl.int64), mask=inside)
    # Every choice of an expert writes the same number; those of experts without any stay zero.
    count = tl.sum(same.to(tl.int32), axis=1)
    known = inside & (expert >= 0) & (expert < num_experts)
    tl.store(counts + program * num_experts + expert, count, mask=known)


@triton.jit
def sum_tiles_kernel(
    counts: tl.tensor,
    sums: tl.tensor,
    loads: tl.tensor,
    tiles: tl.tensor,
    num_experts: tl.tensor,
    TILES: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    """A program for some experts of a group: sums of the counts of the tiles before.

    Not in place of the counts: where a program holds fewer numbers than it has threads, several
    load the same one, and none may find it overwritten.
    """
    blocks = tl.cdiv(num_experts, EXPERTS)
    program = tl.program_id(0).to(tl.int64)
    group, block = program // blocks, program % blocks
    expert = block * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        at = (group * tiles + tile[:, None]) * num_experts + expert[None, :]
        inside = (tile[:, None] < tiles) & (expert[None, :] < num_experts)
        count = tl.load(counts + at, mask=inside, other=0)
        before = tl.cumsum(count, axis=0) - count + total[None, :]
        tl.store(sums + at, before, mask=inside)
        total += tl.sum(count, axis=0)
    at_group = loads + group * num_experts + expert
    tl.store(at_group, total.to(tl.int64), mask=expert < num_experts)


@triton.jit
def add_tiles_kernel(
    experts: tl.tensor,
    ranks: tl.tensor,
    sums: tl.tensor,
    choices: tl.tensor,
    num_experts: tl.tensor,
    tiles: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """A program for each tile: add what came before it."""
    program = tl.program_id(0).to(tl.int64)
    group, tile = program // tiles, program % tiles
    choice = tile * TILE + tl.arange(0, TILE)
    at = group * choices + choice
    inside = choice < choices
    expert = tl.load(experts + at, mask=inside, other=-1)
    known = inside & (expert >= 0) & (expert < num_experts)
    before = tl.load(sums + program * num_experts + expert, mask=known, other=0)
    rank = tl.load(ranks + at, mask=inside, other=0)
    tl.store(ranks + at, rank + before, mask=inside)


def forward(experts_GA: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Ranks within the expert, rank_GA from 0, and the load of each expert, load_GE; int64."""
    if not runs_on(experts_GA):
        return reference.forward(experts_GA, num_experts)
    groups, choices = experts_GA.shape
    tiles = cdiv(choices, TILE)
    ranks_GA = experts_GA.new_empty(groups, choices)
    loads_GE = experts_GA.new_empty(groups, num_experts)
    counts = experts_GA.new_zeros(groups * tiles, num_experts, dtype=torch.int32)
    sums = torch.empty_like(counts)
    by_tile: dict[str, Tensor | int] = {
        "experts": checked("rank_in_expert", experts_GA, (groups, choices), torch.int64),
        "ranks": ranks_GA,
        "choices": choices,
        "num_experts": num_experts,
        "tiles": tiles,
    }
    counted = {**by_tile, "counts": counts}
    launch(rank_tiles_kernel, groups * tiles, counted, {"TILE": TILE}, 4)
    by_expert: dict[str, Tensor | int] = {
        "counts": counts,
        "sums": sums,
        "loads": loads_GE,
        "tiles": tiles,
        "num_experts": num_experts,
    }
    wide = {"TILES": block_of(tiles, TILES), "EXPERTS": block_of(num_experts, EXPERTS)}
    launch(sum_tiles_kernel, groups * cdiv(num_experts, wide["EXPERTS"]), by_expert, wide, 4)
    launch(add_tiles_kernel, groups * tiles, {**by_tile, "sums": sums}, {"TILE": TILE}, 2)
    return ranks_GA, loads_GE

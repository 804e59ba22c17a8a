"""Flat ranges of parameters as blocks, and the division of a save among replicas."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from megatron_moe.model.sharding import parts as module
from megatron_moe.model.sharding.blocks import Block, refine
from megatron_moe.model.sharding.parts import Replicas, load_plan, piece_blocks, save_plan
from megatron_moe.model.sharding.shards import Piece, model_shards
from tests.checkpoint import toy
from tests.checkpoint.layouts import Case, build


def rows_of(name: str, first: int, rows: int, width: int = 4) -> Piece:
    """A logical [rows, width] tensor in the rows of a local parameter that begin at ``first``."""
    return Piece(
        name=name,
        logical_shape=(rows, width),
        view_shape=(rows, width),
        offsets=(0, 0),
        sizes=(rows, width),
        select=lambda t: t[first : first + rows],
    )


def test_a_range_over_two_pieces():
    """The example at `piece_blocks`: elements 10..17 of a fused parameter [2 * 3, 4]."""
    parameter = torch.arange(24.0).view(6, 4)
    flat = parameter.view(-1)[10:18].clone()
    gate, up = rows_of("gate", 0, 3), rows_of("up", 3, 3)
    ((block, values),) = piece_blocks(gate, (6, 4), flat, 10)
    assert block == Block((3, 4), (2, 2), (1, 2)) and values.tolist() == [[10.0, 11.0]]
    (first, row), (second, rest) = piece_blocks(up, (6, 4), flat, 10)
    assert first == Block((3, 4), (0, 0), (1, 4)) and row.tolist() == [[12.0, 13.0, 14.0, 15.0]]
    assert second == Block((3, 4), (1, 0), (1, 2)) and rest.tolist() == [[16.0, 17.0]]


def test_rows_across_two_halves():
    """The example at `refine`: rows 1..4 of [6, 5] in the view [2, 3, 5]."""
    tensor = torch.arange(30.0).view(6, 5)
    found = list(refine(Block((6, 5), (1, 0), (4, 5)), tensor[1:5], (2, 3, 5)))
    assert [block for block, _ in found] == [
        Block((2, 3, 5), (0, 1, 0), (1, 2, 5)),
        Block((2, 3, 5), (1, 0, 0), (1, 2, 5)),
    ]
    assert torch.equal(found[0][1], tensor[1:3].view(1, 2, 5))
    assert torch.equal(found[1][1], tensor[3:5].view(1, 2, 5))


@pytest.mark.parametrize(
    ("sizes", "steps"),
    [((2, 4), (12, 1)), ((3,), (2,)), ((2, 3, 2), (20, 6, 1)), ((2, 2), (9, 3)), ((), ())],
)
def test_elements_below_an_address(sizes, steps):
    addresses = [
        sum(i * step for i, step in zip(index, steps, strict=True))
        for index in product(*map(range, sizes))
    ]
    for limit in range(-2, max(addresses) + 4):
        expected = sum(address < limit for address in addresses)
        assert module._elements_before(limit, sizes, steps) == expected, limit


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_replicas_divide_a_save_and_each_loads_everything(replicas):
    shards = toy.shards(toy.logical())
    states = toy.adam_state(shards)
    loaded = [(p.kind, p.name) for p in load_plan(shards, states)]
    assert len(loaded) == len(set(loaded)) == 6
    saved = [
        (p.kind, p.name)
        for rank in range(replicas)
        for p in save_plan(shards, states, Replicas((rank, replicas)))
    ]
    assert sorted(saved) == sorted(loaded)


def _tables(rank: int, world_size: int) -> bool:
    run = build(Case(1, {}))
    wrapped = model_shards(run.wrapped, run.config.model, run.config.moe)
    return [s.local_name for s in wrapped] == [s.local_name for s in run.shards] and all(
        a.param is b.param for a, b in zip(wrapped, run.shards, strict=True)
    )


def test_the_table_is_the_same_through_wrappers(pool):
    assert pool.run(_tables, 1) == [True]

"""Blocks of tensors, against element-by-element bookkeeping."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch

from megatron_moe.model.sharding.blocks import (
    Block,
    common_view,
    copy_overlap,
    split_range,
)
from megatron_moe.model.sharding.parts import piece_blocks
from megatron_moe.model.sharding.shards import Piece


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (2, 3, 5), (1, 4, 1, 3)])
def test_every_range_is_cut_into_boxes_in_order(sizes):
    numbers = torch.arange(prod(sizes)).view(sizes)
    for start in range(prod(sizes) + 1):
        for stop in range(start, prod(sizes) + 1):
            boxes = split_range(start, stop, sizes)
            parts = [numbers[tuple(slice(o, o + n) for o, n in box)].flatten() for box in boxes]
            found = torch.cat(parts).tolist() if parts else []
            assert found == list(range(start, stop))
            assert len(boxes) <= 2 * len(sizes) - 1


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((6, 5), (2, 3, 5), (2, 3, 5)),
        ((2, 15), (6, 5), (2, 3, 5)),
        ((4, 1, 3), (12,), (4, 3)),
        ((12, 2), (2, 6, 2), (2, 6, 2)),
        ((5,), (1, 5), (5,)),
    ],
)
def test_views_meet_in_the_coarsest_that_refines_both(first, second, expected):
    assert common_view(first, second) == expected


@pytest.mark.parametrize(("first", "second"), [((4, 6), (6, 4)), ((4,), (5,)), ((4, 2), (4,))])
def test_views_that_cannot_meet_are_rejected(first, second):
    with pytest.raises(ValueError, match="shapes"):
        common_view(first, second)


def test_a_block_is_copied_between_different_views():
    """Rows 1..9 of [10, 6] into halves 0 and 1 of [2, 5, 6], columns 2..4, and back."""
    logical = torch.arange(60.0).view(10, 6)
    source = Block((10, 6), (1, 0), (8, 6))
    target = Block((2, 5, 6), (0, 0, 2), (2, 5, 2))
    out = torch.full((2, 5, 2), -1.0)
    copied = copy_overlap(source, logical[1:9], target, out)
    expected = logical.view(2, 5, 6)[:, :, 2:4].clone()
    expected[0, 0] = -1.0  # row 0 and row 9 are not in the source
    expected[1, 4] = -1.0
    assert torch.equal(out, expected)
    assert copied == int((expected >= 0).sum())
    back = torch.full((8, 6), -1.0)
    assert copy_overlap(target, out, source, back) == copied
    assert torch.equal(back[:, 2:4], logical[1:9, 2:4])
    assert (back[:, :2] == -1).all() and (back[:, 4:] == -1).all()


def _fused(experts, hidden, width, blocks, part, parts):
    """A local [E, H, M * F/P] parameter that holds gate blocks and up, and its two pieces."""
    gates, width_l = blocks - 1, width // parts
    gate = Piece(
        name="gate",
        logical_shape=(experts, hidden, gates * width),
        view_shape=(experts, hidden, gates, width),
        offsets=(0, 0, 0, part * width_l),
        sizes=(experts, hidden, gates, width_l),
        select=lambda t: t.view(experts, hidden, blocks, width_l)[:, :, :gates],
    )
    up = Piece(
        name="up",
        logical_shape=(experts, hidden, width),
        view_shape=(experts, hidden, width),
        offsets=(0, 0, part * width_l),
        sizes=(experts, hidden, width_l),
        select=lambda t: t.view(experts, hidden, blocks, width_l)[:, :, gates],
    )
    return gate, up, (experts, hidden, blocks * width_l)


@pytest.mark.parametrize("cuts", [[0, 120], [0, 1, 37, 38, 80, 120], [0, 60, 60, 119, 120]])
def test_flat_ranges_of_a_fused_parameter_are_blocks_of_its_logical_tensors(cuts):
    """Like shards of the distributed optimizer: cut anywhere, put together again."""
    logical = {"gate": torch.randn(2, 5, 16), "up": torch.randn(2, 5, 8)}
    rebuilt = {name: torch.zeros_like(t) for name, t in logical.items()}
    seen = {name: torch.zeros_like(t) for name, t in logical.items()}
    for part in range(2):
        gate, up, shape = _fused(2, 5, 8, 3, part, 2)
        local = torch.empty(shape)
        for piece in (gate, up):
            piece.select(local).copy_(piece.block_of(logical[piece.name]))
        for start, stop in pairwise(cuts):
            flat = local.view(-1)[start:stop].clone()  # another memory, as in an optimizer
            for piece in (gate, up):
                for block, values in piece_blocks(piece, shape, flat, start):
                    index = tuple(
                        slice(o, o + s) for o, s in zip(block.offsets, block.sizes, strict=True)
                    )
                    rebuilt[piece.name].view(block.view)[index] = values
                    seen[piece.name].view(block.view)[index] += 1
    for name, tensor in logical.items():
        assert torch.equal(rebuilt[name], tensor)
        assert (seen[name] == 1).all()


def test_blocks_are_views_so_that_a_load_can_write_through_them():
    gate, _, shape = _fused(2, 5, 8, 3, 0, 1)
    local = torch.zeros(shape)
    for _, values in piece_blocks(gate, shape, local.view(-1)):
        values.fill_(1.0)
    assert (gate.select(local) == 1).all()
    assert local.sum() == gate.select(local).numel()


def test_a_part_with_interleaved_dimensions_is_rejected():
    piece = Piece(
        name="twisted",
        logical_shape=(2, 3),
        view_shape=(2, 3),
        offsets=(0, 0),
        sizes=(2, 3),
        select=lambda t: t.as_strided((2, 3), (1, 1)),
    )
    with pytest.raises(ValueError, match="twisted"):
        list(piece_blocks(piece, (6,), torch.zeros(6)))

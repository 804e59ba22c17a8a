"""The index: what ranks wrote, joined, proved complete, and parsed without trust."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_moe.checkpoint import index
from megatron_moe.checkpoint.index import LogicalTensor, block_key
from megatron_moe.checkpoint.reading import TensorReader
from megatron_moe.checkpoint.tensor_files import TensorSource, write_tensors
from megatron_moe.errors import CheckpointError, Corrupt
from megatron_moe.model.sharding.blocks import Block


def tensor(*blocks: tuple[tuple[int, int], tuple[int, int]], file: str = "f") -> LogicalTensor:
    view = (4, 6)
    placed = tuple((file, Block(view, offsets, sizes)) for offsets, sizes in blocks)
    return LogicalTensor("model", "w", view, "F32", view, placed)


TOP, BOTTOM = ((0, 0), (2, 6)), ((2, 0), (2, 6))


def test_an_index_comes_back_from_json():
    whole = tensor(TOP, BOTTOM)
    content = json.loads(json.dumps(index.to_json([whole])))
    assert list(index.from_json(content, "index.json")) == [whole]


def test_shares_of_ranks_join():
    joined = index.merge([tensor(TOP, file="a"), tensor(BOTTOM, file="b")])
    assert [file for file, _ in joined["model", "w"].blocks] == ["a", "b"]


@pytest.mark.parametrize(
    ("blocks", "fault"),
    [
        ([TOP], "12 elements, expected 24"),
        ([TOP, BOTTOM, TOP], "36 elements"),
        ([TOP, ((1, 0), (2, 6))], "overlap"),  # as many elements as the tensor, but not its own
    ],
)
def test_a_hole_or_an_overlap_is_found(blocks, fault):
    with pytest.raises(CheckpointError, match=fault):
        index.merge([tensor(block) for block in blocks])


def test_ranks_that_disagree_are_found():
    other = LogicalTensor("model", "w", (4, 6), "BF16", (4, 6), tensor(BOTTOM).blocks)
    with pytest.raises(CheckpointError, match="on every rank"):
        index.merge([tensor(TOP), other])


GOOD = index.to_json([tensor(TOP, BOTTOM)])["model"]["w"]


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [4, 7]},
        {"shape": [-4, -6]},
        {"shape": "46"},
        {"view": [24]},
        {"view": [4, 6.0]},
        {"view": [10**30, 6]},
        {"dtype": "F31"},
        {"dtype": ["F32"]},
        {"blocks": None},
        {"blocks": [["f", [0, 0], [4]]]},
        {"blocks": [["f", [0, 0]]]},
        {"blocks": [["f", [0, -1], [4, 6]]]},
        {"blocks": [["f", [0, 1], [4, 6]]]},
        {"blocks": [[7, [0, 0], [4, 6]]]},
        {"blocks": [["f", [True, 0], [4, 6]]]},
    ],
)
def test_what_is_no_index_is_rejected(change):
    with pytest.raises(Corrupt, match=r"index\.json"):
        list(index.from_json({"model": {"w": {**GOOD, **change}}}, "index.json"))


@pytest.mark.parametrize("content", [{"model": []}, {"model": {"w": 3}}, {"model": {"w": {}}}])
def test_another_structure_is_rejected(content):
    with pytest.raises(Corrupt, match=r"index\.json"):
        list(index.from_json(content, "index.json"))


def test_a_block_that_no_file_holds_is_rejected_rather_than_left_as_it_was(tmp_path):
    values = torch.randn(2, 6)
    key = block_key("model", "w", (0, 0))
    write_tensors(tmp_path / "f", [TensorSource.of(key, values)], {})
    reader = TensorReader(tmp_path, {("model", "w"): tensor(TOP)})  # the lower half is nowhere
    out = torch.zeros(4, 6)
    with pytest.raises(Corrupt, match="12 elements"):
        reader.fill("model", "w", Block.whole((4, 6)), out)
    reader.fill("model", "w", Block((4, 6), (1, 2), (1, 3)), out[:1, :3])
    assert torch.equal(out[:1, :3], values[1:2, 2:5])

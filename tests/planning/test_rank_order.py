"""Groups of ranks against those of Megatron-Core, and their picture on the nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_moe.config.cli import parse_args
from megatron_moe.parallel.layout import Layout, resolve_layout
from megatron_moe.planning.rank_order import broken_groups, groups_of, picture
from megatron_moe.platform import activate


def layout_of(world_size: int, *, tp: int, pp: int, ep: int, etp: int) -> Layout:
    words = ["--preset", "openmoe-34b-32e", "--sequence-parallel"] if tp > 1 else []
    words = words or ["--preset", "openmoe-34b-32e"]
    for name, degree in (("tensor", tp), ("pipeline", pp), ("expert", ep)):
        words += [f"--{name}-model-parallel-size", str(degree)]
    words += ["--expert-tensor-parallel-size", str(etp), "--vocab-size", "256000"]
    return resolve_layout(parse_args(words).config, world_size)


LAYOUTS = [
    layout_of(32, tp=2, pp=4, ep=8, etp=1),
    layout_of(64, tp=4, pp=2, ep=4, etp=2),
    layout_of(16, tp=1, pp=1, ep=8, etp=1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_are_those_of_megatron_core(layout: Layout) -> None:
    activate()
    from megatron.core.parallel_state import RankGenerator

    order, sizes = "tp-cp-ep-dp-pp", {"cp": 1, "pp": layout.pp}
    dense = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, order=order, **sizes)
    experts = RankGenerator(tp=layout.etp, ep=layout.ep, dp=layout.edp, order=order, **sizes)
    for name in ("tp", "dp", "pp"):
        assert sorted(groups_of(layout, name)) == sorted(dense.get_ranks(name))  # type: ignore[arg-type]
    for ours, theirs in (("etp", "tp"), ("ep", "ep"), ("edp", "dp")):
        assert sorted(groups_of(layout, ours)) == sorted(experts.get_ranks(theirs))  # type: ignore[arg-type]


def test_the_picture() -> None:
    """TP 2, PP 4, EP 8 of 32 ranks: as in the documentation."""
    lines = list(picture(LAYOUTS[0], 8, most=2))
    page = Path(__file__).parents[2] / "docs" / "scaling.md"
    assert "\n".join(f"    {line}" for line in lines) in page.read_text()
    assert lines == [
        "32 ranks, 8 a node; ranks in brackets form a group",
        "node 0: ranks 0-7, pipeline stage 0",
        "  tensor        [0 1] [2 3] [4 5] [6 7]",
        "  expert        [0 1 2 3 4 5 6 7]",
        "node 1: ranks 8-15, pipeline stage 1",
        "  tensor        [8 9] [10 11] [12 13] [14 15]",
        "  expert        [8 9 10 11 12 13 14 15]",
        "... and 2 more nodes",
        "groups",
        "  tensor        2 ranks, inside a node",
        "  data          4 ranks with a stride of 2, inside a node",
        "  expert        8 ranks, inside a node",
        "  pipeline      4 ranks with a stride of 8, over 4 nodes",
    ]


def test_groups_on_more_nodes_than_they_need() -> None:
    layout = LAYOUTS[0]
    block = [str(rank // 8) for rank in range(32)]
    assert all(broken_groups(layout, block, group) == [] for group in ("tp", "ep"))
    cyclic = [str(rank % 4) for rank in range(32)]
    assert broken_groups(layout, cyclic, "tp")[0] == ([0, 1], 2)
    assert broken_groups(layout, cyclic, "ep")[0] == (list(range(8)), 4)
    wide = layout_of(16, tp=1, pp=1, ep=16, etp=1)
    assert broken_groups(wide, block[:16], "ep") == [], "it cannot be on fewer than two"
    four = [str(rank // 4) for rank in range(32)]
    assert broken_groups(layout, four, "ep") == [], "the nodes are smaller than the group"
    small = [str(rank) for rank in range(32)]
    assert broken_groups(layout, small, "tp")[0] == ([0, 1], 2), "never across nodes"
    text = "\n".join(picture(layout, 1))
    assert "the tensor group of ranks 0-1 is on 2 nodes" in text

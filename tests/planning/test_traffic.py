"""Bytes of collectives: against those of a real step, and over links by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_moe.planning.cluster import load_cluster
from megatron_moe.planning.layout_plan import step_transfers
from megatron_moe.planning.placement import GroupPlace, LinkBytes, place_of, seconds_of, sent_bytes
from megatron_moe.planning.traffic import Transfer
from tests.planning.ranks import SMALLEST, VOCAB, measured_traffic, planned_config
from tests.support.pool import Pool

TP = "--tensor-model-parallel-size 2 --sequence-parallel"
PP = "--pipeline-model-parallel-size 2"
EP = "--expert-model-parallel-size 2"
SHARDED = "--use-distributed-optimizer"


def _check(pool: Pool, ranks: int, flags: str) -> None:
    config = planned_config(flags.split())
    for stage, layout, groups, measured in pool.run(measured_traffic, ranks, flags=flags.split()):
        planned: Counter[tuple[str, tuple[int, ...]]] = Counter()
        for transfer, count in step_transfers(config, layout, VOCAB, stage):
            if transfer.bytes >= SMALLEST:
                planned[transfer.operation, groups[transfer.group]] += count * transfer.bytes
        assert dict(planned) == measured, (stage, flags)


QUICK = [
    (2, f"{EP} {SHARDED} --bf16"),
    (2, f"{TP} --expert-tensor-parallel-size 1"),
    (2, f"{PP} --micro-batch-size 1"),
]
MORE = [
    (2, f"{EP} --moe-a2a-overlap-chunks 3"),
    (
        2,
        f"{EP} --moe-expert-impl grouped --moe-expert-capacity-factor None"
        " --moe-dropless-buffer-factor 1.25",
    ),
    (2, f"{TP} --expert-tensor-parallel-size 1 --moe-router-type contextual --num-experts 64"),
    (2, "--bf16 --moe-router-load-balancing-type global_aux_loss --num-experts 512"),
    (2, "--bf16"),
    (2, f"{EP} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    (2, f"{TP} --recompute-granularity selective --recompute-modules moe mlp"),
    (4, f"{TP} {EP} --expert-tensor-parallel-size 2"),
    (4, f"{PP} {EP} --num-virtual-stages-per-pipeline-rank 2 --micro-batch-size 1"),
]


@pytest.mark.parametrize(("ranks", "flags"), QUICK)
def test_bytes_of_collectives_are_those_of_a_real_step(pool: Pool, ranks: int, flags: str) -> None:
    _check(pool, ranks, flags)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "flags"), MORE)
def test_bytes_of_collectives_of_more_layouts(pool: Pool, ranks: int, flags: str) -> None:
    _check(pool, ranks, flags)


def test_links_by_hand() -> None:
    """Sixteen ranks, eight a node, 1600 bytes."""
    place = GroupPlace(size=16, stride=1, per_node=8)
    # To 7 ranks of the node and 8 others, 100 bytes each.
    assert sent_bytes(Transfer("all-to-all", "ep", 1600), place) == LinkBytes(700.0, 800.0)
    # A ring sends 1500 bytes on; one of the eight members of a node sends to the next node.
    assert sent_bytes(Transfer("all-gather", "dp", 1600), place) == LinkBytes(1312.5, 187.5)
    assert sent_bytes(Transfer("all-reduce", "dp", 1600), place) == LinkBytes(2625.0, 375.0)
    alone = GroupPlace(size=4, stride=16, per_node=1)
    assert sent_bytes(Transfer("send", "pp", 10), alone) == LinkBytes(0.0, 10.0)


def test_seconds_by_hand() -> None:
    """On H100s: 370 GB/s and 15 us in a node, 47 GB/s and 23 us for each doubling between nodes."""
    cluster, gather = load_cluster("h100"), Transfer("all-gather", "dp", 1_600_000_000)
    two = GroupPlace(size=16, stride=1, per_node=8)
    # All 1.5 GB pass through each GPU, an eighth of them through each card.
    assert seconds_of(gather, two, cluster) == pytest.approx(1.5 / 370 + 38e-6)
    four = GroupPlace(size=32, stride=1, per_node=8)
    assert seconds_of(gather, four, cluster) == pytest.approx(1.55 / 370 + (15 + 2 * 23) * 1e-6)
    apart = GroupPlace(size=4, stride=8, per_node=1)
    assert seconds_of(gather, apart, cluster) == pytest.approx(1.2 / 47 + 2 * 23e-6)
    # To the next stage it is one step, however many stages there are.
    send = Transfer("send", "pp", 47_000_000)
    assert seconds_of(send, apart, cluster) == pytest.approx(1e-3 + 23e-6)
    exchange = Transfer("all-to-all", "ep", 1_600_000_000)
    assert seconds_of(exchange, two, cluster) == pytest.approx(0.8 / 47 + 38e-6)


def test_groups_on_nodes() -> None:
    """TP 2, EP 4, ETP 1, PP 2 on 32 GPUs: the layout of the docstring of `placement.py`."""
    flags = f"{TP} {PP} --expert-model-parallel-size 4 --expert-tensor-parallel-size 1"
    config = planned_config(flags.split())
    from megatron_moe.parallel.layout import resolve_layout

    layout, cluster = resolve_layout(config, 16, VOCAB), load_cluster("h100")
    assert place_of(layout, cluster, "tp") == GroupPlace(2, 1, 2)
    assert place_of(layout, cluster, "ep") == GroupPlace(4, 1, 4)
    assert place_of(layout, cluster, "dp") == GroupPlace(4, 2, 4)
    assert place_of(layout, cluster, "edp") == GroupPlace(2, 4, 2)
    assert place_of(layout, cluster, "pp") == GroupPlace(2, 8, 1)

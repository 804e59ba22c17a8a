"""Statistics of routing of every layout equal those of one process, padding apart."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from megatron_moe.moe.statistics import collect_statistics
from megatron_moe.parallel.schedule import forward_backward
from megatron_moe.training.step import count_targets, forward_function
from tests.parity.cases import GLOBAL_ROWS, LAYOUTS, SEQ, document_planes, global_batch
from tests.parity.harness import own_batches, prepare
from tests.parity.test_layouts import RECOMPUTE
from tests.support.pool import Pool

PADDING = ("padding",)
LAYOUT = {layout.name: layout for layout in LAYOUTS}
CASES = [
    *(
        (name, {}, True)
        for name in ("TP2", "PP2-interleaved", "DP2", "EP2", "TP2xEP2", "PP2xEP2", "EP2xETP2")
    ),
    *(("PP2", flags, True) for flags in RECOMPUTE.values()),
    ("TP2", {}, False),
]


def statistics_of(
    rank: int, world_size: int, *, variant: str, flags: dict[str, Any], zeroed: bool
) -> dict[int, dict[str, Any]]:
    """One step; what each rank then reads."""
    run = prepare(variant, flags, world_size)
    for chunk in run.chunks:
        chunk.zeroes_padding = zeroed
    batches = own_batches(run.ctx, extra=PADDING)
    targets = count_targets([b for b in batches if b], run) if run.has_loss else None
    forward_backward(run.ctx, forward_function(run, targets, len(batches)), batches, run.wrapped)
    found = collect_statistics(run.chunks, run.ctx.pgs)
    return {number: asdict(layer) for number, layer in found.items()}


def run(
    pool: Pool, name: str, flags: dict[str, Any], zeroed: bool = True
) -> list[dict[int, dict[str, Any]]]:
    layout = LAYOUT[name]
    settings = {**layout.flags, **flags}
    return pool.run(
        statistics_of, layout.world_size, variant="released", flags=settings, zeroed=zeroed
    )


_WHOLE: dict[bool, dict[int, dict[str, Any]]] = {}


def whole(pool: Pool, zeroed: bool) -> dict[int, dict[str, Any]]:
    if zeroed not in _WHOLE:
        _WHOLE[zeroed] = run(pool, "1", {}, zeroed)[0]
    return _WHOLE[zeroed]


@pytest.mark.parametrize(("name", "flags", "zeroed"), CASES)
def test_layouts_agree(pool: Pool, name: str, flags: dict[str, Any], zeroed: bool) -> None:
    expect = whole(pool, zeroed)
    for found in run(pool, name, flags, zeroed):
        assert found.keys() == expect.keys()
        for number, layer in found.items():
            for field, value in layer.items():
                same = value == expect[number][field]
                assert same or value == pytest.approx(expect[number][field], rel=1e-5), field


def test_padding_is_that_of_the_batch(pool: Pool) -> None:
    tokens, _, _ = global_batch(3)
    pads = document_planes(tokens, PADDING)["padding_BS"]
    count = int((pads != 0).sum())
    assert 0 < count < GLOBAL_ROWS * SEQ
    for layer in whole(pool, True).values():
        assert sum(layer["tokens_at"][1]) == count
        assert sum(layer["tokens_at"][0]) == GLOBAL_ROWS * SEQ - count
    assert whole(pool, False) != whole(pool, True), "not zeroed, it is routed by its activations"

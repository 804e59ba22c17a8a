"""Loss and every gradient of every layout equal those of the single-device reference model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parity.cases import (
    DROPS,
    GROUPED,
    IGNORING,
    LAYOUTS,
    NUMBERS,
    OF_THE_STEP,
    ROUTERS,
    SLOW_LAYOUTS,
    STATEFUL,
    VARIANTS,
    Layout,
)
from tests.parity.compare import assemble, assert_same, relative_error
from tests.parity.expected import expected
from tests.parity.harness import Outcome, one_step
from tests.support.pool import Pool

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
FIRST = ("released", "paper-port")
"""Variants that every layout runs; the others run where their rules could differ."""
ALONE = ("dense-head-norm", "bounded", "overlapped")
"""Variants with tests of their own."""
ELSEWHERE = (*FIRST, *ROUTERS, *OF_THE_STEP, *STATEFUL, *DROPS, *IGNORING, *NUMBERS, *ALONE)


def check(outcomes: list[Outcome], variant: str, extra: tuple[str, ...] = ()) -> None:
    """Hold what the ranks found against the reference."""
    want = expected(variant, extra)
    for outcome in outcomes:
        assert relative_error(outcome.sums, want.sums) < LOSS_TOLERANCE
        assert outcome.kept == want.kept
        for layer, losses in want.aux.items():
            assert outcome.aux[layer] == pytest.approx(losses, rel=LOSS_TOLERANCE)
    gradients = assemble(block for outcome in outcomes for block in outcome.gradients)
    assert_same(gradients, want.gradients, GRADIENT_TOLERANCE)


def run(pool: Pool, layout: Layout, variant: str, **flags: Any) -> list[Outcome]:
    return pool.run(one_step, layout.world_size, variant=variant, flags={**layout.flags, **flags})


@pytest.mark.parametrize("variant", FIRST)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_equals_reference(pool: Pool, layout: Layout, variant: str) -> None:
    check(run(pool, layout, variant), variant)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ELSEWHERE])
@pytest.mark.parametrize("name", ["1", "TP2", "PP2", "TP2xEP2", "EP2xETP2"])
def test_other_rules_equal_reference(pool: Pool, name: str, variant: str) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    check(run(pool, layout, variant), variant)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1", "EP2", "PP2xEP2", "TP2xEP2", "EP2xETP2"])
def test_a_bounded_buffer_equals_reference(pool: Pool, name: str) -> None:
    """`tests/moe/test_bounded_buffer.py` has a layer of it in the quick tests."""
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    check(run(pool, layout, "bounded"), "bounded")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "full", "selective", "norms"])
@pytest.mark.parametrize("name", ["EP2", "PP2xEP2", "TP2xEP2", "DP2xEP2"])
def test_overlapped_exchanges_equal_reference(pool: Pool, name: str, kind: str | None) -> None:
    """`tests/moe/test_overlap.py` has a layer of it in the quick tests."""
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    check(run(pool, layout, "overlapped", **(RECOMPUTE[kind] if kind else {})), "overlapped")


@pytest.mark.parametrize("variant", GROUPED)
@pytest.mark.parametrize("name", ["DP2", "EP2", "TP2xETP2"])
def test_grouped_attention_equals_reference(pool: Pool, name: str, variant: str) -> None:
    """In the layouts that `test_other_rules_equal_reference` leaves out."""
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    check(run(pool, layout, variant), variant)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dense_grouped_attention_equals_reference(pool: Pool, sequence_parallel: bool) -> None:
    """Gradients of norms over heads are summed over tensor-parallel ranks, each way once."""
    flags = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    check(run(pool, Layout("TP2", 2, flags), "dense-head-norm"), "dense-head-norm")


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*FIRST, *GROUPED])
@pytest.mark.parametrize("layout", SLOW_LAYOUTS, ids=lambda layout: layout.name)
def test_eight_ranks_equal_reference(pool: Pool, layout: Layout, variant: str) -> None:
    check(run(pool, layout, variant), variant)


@pytest.mark.parametrize("variant", FIRST)
@pytest.mark.parametrize("name", ["1", "TP2xEP2", "PP2-interleaved", "EP2xETP2"])
def test_bf16_follows_the_reference(pool: Pool, name: str, variant: str) -> None:
    """To the precision of bf16: 8 bits, over a few layers, where the same choices are made.

    Rounding moves some tokens to another expert, so tensors are compared as a whole.
    """
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    outcomes = pool.run(one_step, layout.world_size, variant=variant, flags=layout.flags, bf16=True)
    want = expected(variant)
    gradients = assemble(block for outcome in outcomes for block in outcome.gradients)
    assert gradients.keys() == want.gradients.keys()
    assert relative_error(outcomes[0].sums, want.sums) < 0.03
    for name, grad in want.gradients.items():
        found = gradients[name].double()
        assert gradients[name].dtype == torch.float32, "gradients are accumulated in fp32"
        cosine = (found * grad).sum() / (found.norm() * grad.norm())
        assert cosine > 0.9, (name, float(cosine))
        assert 0.8 < float(found.norm() / grad.norm()) < 1.25, name


RECOMPUTE: dict[str, dict[str, Any]] = {
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective": {
        "recompute_granularity": "selective",
        "recompute_modules": ("core_attn", "mlp", "moe"),
    },
    "norms": {
        "recompute_granularity": "selective",
        "recompute_modules": ("layernorm", "moe_act"),
    },
    "everything": {
        "recompute_granularity": "selective",
        "recompute_modules": ("core_attn", "layernorm", "mlp", "moe"),
    },
}


@pytest.mark.parametrize("kind", RECOMPUTE)
@pytest.mark.parametrize("name", ["1", "TP2xEP2", "PP2"])
def test_recomputation_changes_nothing(pool: Pool, name: str, kind: str) -> None:
    """Neither gradients nor the losses that are reported, which must count once."""
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    check(run(pool, layout, "released", **RECOMPUTE[kind]), "released")


@pytest.mark.parametrize("name", ["1", "TP2xEP2"])
def test_recomputed_norms_beside_a_parallel_shared_expert(pool: Pool, name: str) -> None:
    """Which shares its norm with the routed experts."""
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    check(run(pool, layout, "paper-port", **RECOMPUTE["norms"]), "paper-port")


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("variant", GROUPED)
def test_recomputation_of_grouped_attention(pool: Pool, variant: str, kind: str) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == "TP2xEP2")
    check(run(pool, layout, variant, **RECOMPUTE[kind]), variant)


def test_tokens_are_dropped() -> None:
    """The tests above would say little if capacity were never short."""
    for variant in FIRST:
        assert expected(variant).dropped > 10
    assert expected("dropless").dropped == 0


BROKEN = [
    ("TP2", "layers.0.ffn.gate.weight", "released"),
    ("TP2", "layers.1.attention.value.weight", "released"),
    ("TP2", "layers.1.attention.key.weight", "grouped-head-norm"),
    ("EP2", "layers.1.moe.experts.up", "released"),
    ("EP2xETP2", "layers.3.moe.experts.down", "released"),
]


@pytest.mark.parametrize(("name", "tensor", "variant"), BROKEN)
def test_a_wrong_shard_is_noticed(pool: Pool, name: str, tensor: str, variant: str) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    outcomes = pool.run(
        one_step, layout.world_size, variant=variant, flags=layout.flags, swap=tensor
    )
    with pytest.raises(AssertionError):
        check(outcomes, variant)

"""Padding that is not routed: every layout equals the reference, and that a model without it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_moe.model.reference import ReferenceOpenMoE
from tests.parity.cases import (
    IGNORING,
    LAYOUTS,
    ROWS,
    SEQ,
    document_planes,
    global_batch,
)
from tests.parity.expected import expected, reference_model
from tests.parity.harness import one_step
from tests.parity.test_layouts import RECOMPUTE, check
from tests.support.pool import Pool

LAYOUT = {layout.name: layout for layout in LAYOUTS}
PADDING = ("padding",)
SLOW = ["TP2", "PP2-interleaved", "DP2", "EP2", "TP2xEP2", "EP2xETP2"]


@pytest.mark.parametrize("variant", IGNORING)
@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("1", None),
        ("TP2xEP2", "everything"),
        *(pytest.param(name, None, marks=pytest.mark.slow) for name in SLOW),
        *(pytest.param("PP2", kind, marks=pytest.mark.slow) for kind in RECOMPUTE),
    ],
)
def test_equals_reference(pool: Pool, name: str, recompute: str | None, variant: str) -> None:
    flags = LAYOUT[name].flags | RECOMPUTE.get(str(recompute), {})
    settings = {"variant": variant, "flags": flags, "extra": PADDING}
    outcomes = pool.run(one_step, LAYOUT[name].world_size, **settings)
    check(outcomes, variant, PADDING)


@pytest.mark.parametrize("variant", IGNORING)
def test_padding_counts_otherwise(variant: str) -> None:
    """The tests above would say little if it changed nothing."""
    ignored, routed = expected(variant, PADDING), expected(variant)
    for layer, losses in ignored.aux.items():
        assert all(abs(a - b) > 1e-4 for a, b in zip(losses, routed.aux[layer], strict=True))
    assert ignored.kept != routed.kept


def rows_and_lengths() -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    tokens = global_batch()[0][:ROWS]
    padding = document_planes(tokens, PADDING)["padding_BS"]
    return tokens, padding, (padding == 0).sum(1).tolist()


def without_capacity_rounding(model: ReferenceOpenMoE, slots: int) -> None:
    """Groups of a row, with the slots of the padded row whatever its length is."""
    for block in model.layers:
        if block.moe is not None:
            block.moe.moe = replace(
                block.moe.moe, moe_min_capacity=slots, moe_expert_capacity_factor=1e-6
            )


def test_a_row_is_routed_as_if_its_padding_were_not_there() -> None:
    """Text alone, of its own length: the same logits, losses and drops."""
    model = reference_model("ignored-pads-of-rows")
    without_capacity_rounding(model, 3)
    tokens, padding, lengths = rows_and_lengths()
    assert any(length < SEQ for length in lengths)
    with torch.no_grad():
        both = model(tokens, training_capacity=True, padding_BS=padding)
        alone = [
            model(tokens[row : row + 1, :length], training_capacity=True)
            for row, length in enumerate(lengths)
        ]
    for row, length in enumerate(lengths):
        torch.testing.assert_close(both.logits[row, :length], alone[row].logits[0])
    for number, routing in enumerate(both.routing):
        each = [one.routing[number] for one in alone]
        kept = routing.kept_TK.view(ROWS, SEQ, -1)
        for row, length in enumerate(lengths):
            assert torch.equal(kept[row, :length], each[row].kept_TK)
            assert not kept[row, length:].any()
        assert torch.equal(routing.counts_E, sum(one.counts_E for one in each))
        balance = torch.stack([one.balance_loss for one in each]).mean()
        torch.testing.assert_close(routing.balance_loss, balance)
        z = sum(one.z_loss * n for one, n in zip(each, lengths, strict=True)) / sum(lengths)
        torch.testing.assert_close(routing.z_loss, z)


def test_a_row_of_padding_is_no_row() -> None:
    """Losses are those of the other row, and finite where all rows are padding."""
    model = reference_model("ignored-pads-of-rows")
    tokens, padding, _ = rows_and_lengths()
    padding[0] = 1
    with torch.no_grad():
        both = model(tokens, training_capacity=True, padding_BS=padding)
        alone = model(tokens[1:], training_capacity=True, padding_BS=padding[1:])
        nothing = model(tokens, training_capacity=True, padding_BS=torch.ones_like(padding))
    for routing, one, none in zip(both.routing, alone.routing, nothing.routing, strict=True):
        torch.testing.assert_close(routing.balance_loss, one.balance_loss)
        torch.testing.assert_close(routing.z_loss, one.z_loss)
        assert not routing.kept_TK.view(ROWS, SEQ, -1)[0].any()
        assert (none.balance_loss, none.z_loss, int(none.kept_TK.sum())) == (0, 0, 0)

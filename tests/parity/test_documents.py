"""Rows of several documents: every layout equals the reference, which takes them one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parity.cases import LAYOUTS, PLANES, VOCAB, Layout, global_batch
from tests.parity.compare import relative_error
from tests.parity.expected import expected, reference_model
from tests.parity.harness import build, one_step
from tests.parity.test_layouts import RECOMPUTE, check
from tests.support.pool import Pool

# Of two pipeline stages each has an embedding or a loss; of four, two have neither.
LAYOUT = {layout.name: layout for layout in LAYOUTS} | {
    "PP4": Layout("PP4", 4, {"pipeline_model_parallel_size": 4})
}
NAMES = ["1", "TP2", "PP2", "PP2-interleaved", "EP2", "TP2xEP2", "PP2xEP2", "PP4"]


def run(
    pool: Pool, name: str, extra: tuple[str, ...], variant: str = "released", **flags: Any
) -> list[Any]:
    layout = LAYOUT[name]
    flags = {**layout.flags, **flags}
    return pool.run(one_step, layout.world_size, variant=variant, flags=flags, extra=extra)


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_equals_the_reference(pool: Pool, name: str) -> None:
    check(run(pool, name, PLANES), "released", PLANES)


def test_documents_of_grouped_attention(pool: Pool) -> None:
    variant = "grouped-projection-norm"
    check(run(pool, "TP2", PLANES, variant), variant, PLANES)


@pytest.mark.parametrize("extra", [PLANES[:1], PLANES[1:]], ids=["positions", "mask"])
@pytest.mark.parametrize("name", ["1", "TP2", "PP4"])
def test_each_flag_by_itself(pool: Pool, name: str, extra: tuple[str, ...]) -> None:
    check(run(pool, name, extra), "released", extra)


@pytest.mark.parametrize("kind", RECOMPUTE)
@pytest.mark.parametrize("name", ["1", "TP2xEP2", "PP2"])
def test_recomputation_takes_the_same_documents(pool: Pool, name: str, kind: str) -> None:
    """Of its own micro-batch, when several are in progress."""
    check(run(pool, name, PLANES, **RECOMPUTE[kind]), "released", PLANES)


def test_each_flag_changes_the_loss() -> None:
    """The tests above would say little otherwise."""
    none, positions, mask, both = (
        expected("released", extra).sums[0] for extra in ((), PLANES[:1], PLANES[1:], PLANES)
    )
    for one, other in ((none, positions), (none, mask), (positions, mask)):
        assert relative_error(one, other) > 1e-4
    # Rotation sees differences of positions alone, which within a document stay as they are.
    assert relative_error(mask, both) < 1e-12


def losses_of(rank: int, world_size: int, **batch: torch.Tensor) -> torch.Tensor:
    """Cross entropy [B, S] of the model without capacity limits, fp64."""
    (chunk,), _, _ = build("dropless", {}, world_size)
    return chunk.double()(**batch)[0].detach()


def test_two_documents_in_a_row_are_two_rows(pool: Pool) -> None:
    """By hand: 7 and 9 tokens in one row, against each in a padded row of its own."""
    tokens, labels, _ = (part[:1] for part in global_batch())
    cut, length = 7, tokens.shape[1]
    positions = torch.tensor([[*range(cut), *range(length - cut)]])
    documents = torch.tensor([[0] * cut + [1] * (length - cut)])
    (packed,) = pool.run(
        losses_of,
        1,
        tokens_BS=tokens,
        labels_BS=labels,
        positions_BS=positions,
        documents_BS=documents,
    )
    alone = torch.full((2, length), VOCAB - 1), torch.zeros((2, length), dtype=torch.int64)
    for rows, source in zip(alone, (tokens, labels), strict=True):
        rows[0, :cut], rows[1, : length - cut] = source[0, :cut], source[0, cut:]
    (apart,) = pool.run(losses_of, 1, tokens_BS=alone[0], labels_BS=alone[1])
    expect = torch.cat((apart[0, :cut], apart[1, : length - cut]))
    torch.testing.assert_close(packed[0], expect, rtol=1e-12, atol=1e-12)
    (whole,) = pool.run(losses_of, 1, tokens_BS=tokens, labels_BS=labels)
    torch.testing.assert_close(whole[0, :cut], expect[:cut], rtol=1e-12, atol=1e-12)
    assert (whole[0, cut:] - expect[cut:]).abs().min() > 1e-6


def test_the_reference_says_the_same_of_two_documents() -> None:
    model = reference_model("dropless")
    tokens, labels, _ = (part[:1] for part in global_batch())
    cut, length = 5, tokens.shape[1]
    out = model(
        tokens,
        labels,
        training_capacity=True,
        positions_BS=torch.tensor([[*range(cut), *range(length - cut)]]),
        documents_BS=torch.tensor([[0] * cut + [1] * (length - cut)]),
    )
    for part in (slice(0, cut), slice(cut, length)):
        alone = model(tokens[:, part], labels[:, part], training_capacity=True)
        torch.testing.assert_close(out.cross_entropy_BS[:, part], alone.cross_entropy_BS)

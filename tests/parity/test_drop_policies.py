"""Drop policies that draw: every layout, in any step, drops what the reference model drops."""

from __future__ import annotations

import pytest

from tests.parity.cases import DROPS, LAYOUTS
from tests.parity.expected import expected
from tests.parity.harness import one_step
from tests.parity.test_layouts import RECOMPUTE, check
from tests.support.pool import Pool

LAYOUT = {layout.name: layout for layout in LAYOUTS}
SLOW = ["1", "TP2", "PP2", "DP2", "EP2", "EP2xETP2"]


@pytest.mark.parametrize("variant", DROPS)
@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("TP2xEP2", "everything"),
        *(pytest.param(name, None, marks=pytest.mark.slow) for name in SLOW),
        *(pytest.param("PP2", kind, marks=pytest.mark.slow) for kind in RECOMPUTE),
    ],
)
def test_equals_reference(pool: Pool, name: str, recompute: str | None, variant: str) -> None:
    """Under recomputation, too: the second pass of a layer has the draw of the first."""
    flags = LAYOUT[name].flags | RECOMPUTE.get(str(recompute), {})
    outcomes = pool.run(one_step, LAYOUT[name].world_size, variant=variant, flags=flags)
    check(outcomes, variant)


def test_each_drops_otherwise() -> None:
    found = [expected(variant) for variant in ("released", *DROPS)]
    first = min(found[0].kept)
    assert all(each.kept[first] == found[0].kept[first] for each in found), "as many"
    assert len({float(each.sums[0]) for each in found}) == 3, "but not the same"

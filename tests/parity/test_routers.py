"""Every router, score and balance in every layout: loss and gradients equal the reference model."""

from __future__ import annotations

import pytest

from tests.parity.cases import LAYOUTS, ROUTERS
from tests.parity.expected import expected
from tests.parity.test_layouts import RECOMPUTE, check, run
from tests.support.pool import Pool

BY_NAME = {layout.name: layout for layout in LAYOUTS}


@pytest.mark.parametrize("variant", ROUTERS)
def test_equals_reference(pool: Pool, variant: str) -> None:
    check(run(pool, BY_NAME["TP2xEP2"], variant, **RECOMPUTE["full"]), variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ROUTERS)
@pytest.mark.parametrize("name", ["1", "TP2", "PP2", "DP2", "EP2", "PP2-interleaved", "TP2xETP2"])
def test_other_layouts_equal_reference(pool: Pool, name: str, variant: str) -> None:
    check(run(pool, BY_NAME[name], variant), variant)


def test_tokens_are_dropped() -> None:
    for variant in ROUTERS:
        assert expected(variant).dropped > 5

"""Every implementation in turn, as far as the machine has it."""

from __future__ import annotations

import pytest

from tests.support.kernels import IMPLEMENTATIONS, need


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    """Its name."""
    need(request.param)
    return request.param


@pytest.fixture
def compiled() -> None:
    """For tests of the native implementation alone."""
    need("native")

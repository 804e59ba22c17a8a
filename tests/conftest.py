"""Fixtures for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Persistent ranks on gloo; see `tests.support.pool`."""
    ranks = Pool()
    yield ranks
    ranks.close()

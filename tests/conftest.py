"""Fixtures for every test, which all run on the CPU, several ranks at once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.pool import Pool

# Before torch looks; the ranks of the pool inherit it. With a GPU in sight they would all take it.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Persistent ranks on gloo; see `tests.support.pool`."""
    ranks = Pool()
    yield ranks
    ranks.close()

"""Fixtures for every test. All run on the CPU, several ranks at once, but those marked `gpu`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.pool import Pool

ON_GPU = os.environ.get("MEGATRON_MOE_TEST_GPU") == "1"
"""Whether this is `make test-gpu`, which runs the tests marked `gpu` alone."""
if not ON_GPU:
    # Before torch looks; the ranks of the pool inherit it. With a GPU in sight all would take it.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Before Triton looks: its kernels then run, slowly, on tensors of the CPU.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Elsewhere a test of a GPU is skipped, never run on something else."""
    if item.get_closest_marker("gpu") is not None and not ON_GPU:
        pytest.skip("needs a CUDA device: make test-gpu")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Persistent ranks on gloo; see `tests.support.pool`."""
    ranks = Pool()
    yield ranks
    ranks.close()

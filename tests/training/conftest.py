"""The corpus that training tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.tiny import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a small indexed data set."""
    directory: Path = tmp_path_factory.mktemp("corpus")
    return write_corpus(directory / "counting")

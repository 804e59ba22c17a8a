"""Every parser reads its valid file, and hostile or damaged ones with a typed error or a value."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.fuzz.mutation import damaged, replace_anywhere
from tests.fuzz.target import attempt
from tests.fuzz.targets import TARGETS

TIMES = 12
"""Damaged contents of each parser: a check of the parser, not a search, which `make fuzz` is."""


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(tmp_path: Path, name: str) -> None:
    opened = TARGETS[name].make(tmp_path)
    good, source = opened.file.read_bytes(), random.Random(name)
    assert attempt(opened, good)
    contents = [*TARGETS[name].seeds, *damaged(good, source, TIMES)]
    try:
        value = json.loads(good)
    except ValueError:
        pass
    else:
        contents += [json.dumps(replace_anywhere(value, source)).encode() for _ in range(TIMES)]
    for content in contents:
        attempt(opened, content)
    assert attempt(opened, good)

"""Every layout loads what every other saved, as it is and through other programs' formats.

The layouts are those that parity tests run. Optimizer state is distributed in every other one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_moe.convert.formats import ConversionTarget, read, write
from tests.checkpoint.layouts import DIST, move, start
from tests.checkpoint.test_layouts import assembled, same
from tests.convert.layout_pairs import OneWidth, load_all
from tests.parity.cases import LAYOUTS, SLOW_LAYOUTS

CASES = {
    layout.name: OneWidth(layout.world_size, {**layout.flags, **(DIST if number % 2 else {})})
    for number, layout in enumerate(LAYOUTS + SLOW_LAYOUTS)
}
FAST = [layout.name for layout in LAYOUTS]
SLOW = [layout.name for layout in SLOW_LAYOUTS]


def through(source: Path, format_name: str, scratch: Path) -> Path:
    """A native checkpoint after another format, which holds weights alone."""
    model = read("native", source)
    there = ConversionTarget(format=format_name, path=scratch / "there", layout="unstacked")
    write(model, there, lambda _: None)
    found = read(format_name, there.path, config=model.config)
    write(found, ConversionTarget(format="native", path=scratch / "back"), lambda _: None)
    return scratch / "back"


class Saved:
    """A checkpoint from every layout, all of the same state."""

    def __init__(self, pool: Any, root: Path) -> None:
        self.pool, self.root = pool, root
        origin = root / "origin"
        state = pool.run(start, 1, case=CASES["1"], directory=origin)
        self.tensors = assembled(state, 0)
        self.paths = {name: self.save(name, origin) for name in FAST}

    def save(self, name: str, origin: Path) -> Path:
        target = self.root / name
        case = CASES[name]
        self.pool.run(move, case.world_size, case=case, source=origin, target=target)
        return target

    def check(self, name: str, whole: list[Path], weights: list[Path]) -> None:
        """That a layout holds the state after loading each of them."""
        case = CASES[name]
        results = self.pool.run(load_all, case.world_size, case=case, whole=whole, weights=weights)
        same(self.tensors, assembled(results, 0))
        assert [odd for _, odd in results] == [[]] * case.world_size


@pytest.fixture(scope="module")
def saved(pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(pool, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def converted(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of every layout, in turn by way of Hugging Face and of t5x."""
    root = tmp_path_factory.mktemp("converted")
    ways = ("hf", "t5x")
    return [
        through(path, ways[number % 2], root / name)
        for number, (name, path) in enumerate(saved.paths.items())
    ]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if CASES[name].world_size > 2 else [])
        for name in FAST
    ],
)
def test_every_layout_loads_every_other(saved: Saved, converted: list[Path], name: str) -> None:
    assert len(saved.paths) == len(converted) == len(FAST)
    saved.check(name, list(saved.paths.values()), converted)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_eight_ranks_and_every_other(
    saved: Saved, converted: list[Path], tmp_path: Path, name: str
) -> None:
    saved.check(name, list(saved.paths.values()), converted)
    eight = saved.save(name, saved.root / "origin")
    back = through(eight, "hf", tmp_path)
    for other in FAST:
        saved.check(other, [eight], [back])

"""Any layout loads what any other saved: bit-identical weights, moments and masters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoint.layouts import DIST, Case, cut_parameters, move, start
from tests.parity.cases import GROUPED, LAYOUTS, SLOW_LAYOUTS

_OVERLAP = {**DIST, "overlap_grad_reduce": True, "overlap_param_gather": True}
_FLAGS = {layout.name: (layout.world_size, layout.flags) for layout in LAYOUTS + SLOW_LAYOUTS}
CASES: dict[str, Case] = {layout.name: Case(layout.world_size, layout.flags) for layout in LAYOUTS}
for _name in ("1", "DP2", "TP2", "EP2", "PP2-interleaved", "TP2xEP2", "DP2xEP2", "EP2xETP2"):
    CASES[f"{_name} distributed"] = Case(_FLAGS[_name][0], {**_FLAGS[_name][1], **DIST})
CASES["DP4 distributed"] = Case(4, DIST)
CASES["DP2 overlapped"] = Case(2, _OVERLAP)
NAMES = list(CASES)
SLOW = {layout.name: Case(layout.world_size, {**layout.flags, **DIST}) for layout in SLOW_LAYOUTS}


def assembled(results: list[Any], index: int) -> dict[tuple[str, str], Tensor]:
    """Logical tensors from the blocks of all ranks; replicas must agree to the bit."""
    whole: dict[tuple[str, str], Tensor] = {}
    for result in results:
        for kind, name, view, offsets, block in result[index]:
            target = whole.setdefault(
                (kind, name), torch.full(view, float("nan"), dtype=block.dtype)
            )
            where = tuple(slice(o, o + s) for o, s in zip(offsets, block.shape, strict=True))
            known = target[where]
            assert known.isnan().all() or torch.equal(known, block), f"replicas of {name} differ"
            target[where] = block
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def same(first: dict[Any, Tensor], second: dict[Any, Tensor]) -> None:
    """Equal names, dtypes and bits."""
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        other = second[key].view(tensor.shape)
        assert tensor.dtype == other.dtype, key
        assert torch.equal(tensor, other), f"{key}: {(tensor != other).sum()} elements differ"


def close(first: dict[Any, Tensor], second: dict[Any, Tensor]) -> None:
    """The step after: the same to rounding, which a wrong step count or rate is not."""
    for key, tensor in first.items():
        torch.testing.assert_close(second[key].view(tensor.shape), tensor, rtol=1e-5, atol=1e-8)


class Origin:
    """A checkpoint of one rank, and what it must give in any layout."""

    def __init__(self, pool: Any, directory: Any, case: Case) -> None:
        self.directory = directory
        results = pool.run(start, case.world_size, case=case, directory=directory)
        self.saved = assembled(results, 0)
        self.next = assembled(results, 1)

    def check(self, results: list[Any]) -> None:
        same(self.saved, assembled(results, 0))
        close(self.next, assembled(results, 1))


@pytest.fixture(scope="module")
def origin(pool, tmp_path_factory):
    return Origin(pool, tmp_path_factory.mktemp("origin"), CASES["1"])


def test_the_state_under_test_is_not_trivial(origin):
    kinds = {kind for kind, _ in origin.saved}
    assert kinds == {"model", "exp_avg", "exp_avg_sq"}
    for key, tensor in origin.saved.items():
        assert tensor.unique().numel() > 8, key
        assert not torch.equal(tensor, origin.next[key])


@pytest.mark.parametrize("name", ["DP4 distributed", "DP2xEP2 distributed"])
def test_the_distributed_optimizer_does_cut_parameters(pool, name):
    """Otherwise the tests of these layouts would show less than intended."""
    assert sum(pool.run(cut_parameters, 4, case=CASES[name])) > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_loads_and_saves_the_same_tensors(pool, tmp_path, origin, name):
    """From one rank to this layout, and from it to another one, far from it in the list."""
    case, other = CASES[name], CASES[NAMES[(NAMES.index(name) + 8) % len(NAMES)]]
    there = pool.run(move, case.world_size, case=case, source=origin.directory, target=tmp_path)
    origin.check(there)
    origin.check(pool.run(move, other.world_size, case=other, source=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_layouts_of_eight_ranks(pool, tmp_path, origin, name):
    case = SLOW[name]
    there = pool.run(move, 8, case=case, source=origin.directory, target=tmp_path)
    origin.check(there)
    origin.check(pool.run(move, 1, case=CASES["1"], source=tmp_path))


TIED = ["PP2", "PP2-interleaved", "TP2xEP2"]


def test_tied_embeddings_are_written_once_and_read_on_both_stages(pool, tmp_path):
    def case(name: str, **flags: Any) -> Case:
        return Case(_FLAGS[name][0], {**_FLAGS[name][1], **flags}, variant="paper-port")

    origin = Origin(pool, tmp_path / "1", case("1"))
    assert ("model", "output.weight") not in origin.saved
    source = tmp_path / "1"
    for number, name in enumerate(TIED):
        flags = DIST if number % 2 else {}
        target = tmp_path / name
        chosen = case(name, **flags)
        origin.check(pool.run(move, chosen.world_size, case=chosen, source=source, target=target))
        source = target
    origin.check(pool.run(move, 1, case=case("1"), source=source))


@pytest.mark.slow
@pytest.mark.parametrize("variant", GROUPED)
def test_grouped_heads_and_their_norms_move(pool, tmp_path, variant):
    def case(name: str, **flags: Any) -> Case:
        return Case(_FLAGS[name][0], {**_FLAGS[name][1], **flags}, variant=variant)

    origin = Origin(pool, tmp_path / "1", case("1"))
    assert ("exp_avg", "layers.1.attention.key_norm.weight") in origin.saved
    source = tmp_path / "1"
    for name, flags in (("TP2", DIST), ("PP2", {}), ("TP2xEP2", {}), ("DP2xEP2", DIST)):
        target = tmp_path / name
        chosen = case(name, **flags)
        origin.check(pool.run(move, chosen.world_size, case=chosen, source=source, target=target))
        source = target
    origin.check(pool.run(move, 1, case=case("1", **DIST), source=source))


def test_half_precision_moves_with_its_masters(pool, tmp_path):
    def case(name: str, **flags: Any) -> Case:
        return Case(_FLAGS[name][0], {**_FLAGS[name][1], **flags}, bf16=True)

    origin = Origin(pool, tmp_path / "1", case("1"))
    assert ("master", "embedding.weight") in origin.saved
    assert origin.saved["model", "embedding.weight"].dtype == torch.bfloat16
    source = tmp_path / "1"
    for name, flags in (("TP2xEP2", DIST), ("PP2", {}), ("DP2xEP2", DIST), ("EP2", {})):
        target = tmp_path / name
        chosen = case(name, **flags)
        origin.check(pool.run(move, chosen.world_size, case=chosen, source=source, target=target))
        source = target
    origin.check(pool.run(move, 1, case=case("1", **DIST), source=source))


def test_momentum_of_sgd_moves_too(pool, tmp_path):
    def case(name: str) -> Case:
        return Case(*_FLAGS[name], optimizer="sgd")

    origin = Origin(pool, tmp_path / "1", case("1"))
    assert {kind for kind, _ in origin.saved} == {"model", "momentum_buffer"}
    origin.check(
        pool.run(move, 2, case=case("TP2"), source=tmp_path / "1", target=tmp_path / "TP2")
    )
    origin.check(pool.run(move, 2, case=case("EP2"), source=tmp_path / "TP2"))

"""Layers with different numbers of experts, and split experts, equal the reference in each layout.

Several shared experts are one wide one, which all other cases have.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.model.reference.ffn import Experts, FeedForward
from tests.parity.cases import LAYOUTS, NUMBERS
from tests.parity.expected import expected
from tests.parity.test_layouts import check, run
from tests.parity.test_routing_statistics import statistics_of
from tests.support.pool import Pool

LAYOUT = {layout.name: layout for layout in LAYOUTS}
SLOW = ("TP2", "PP2", "DP2", "EP2", "PP2xEP2", "EP2xETP2")


@pytest.mark.parametrize("variant", NUMBERS)
@pytest.mark.parametrize(
    "name", ["1", "TP2xEP2", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_equals_reference(pool: Pool, name: str, variant: str) -> None:
    assert expected(variant).dropped > 10
    check(run(pool, LAYOUT[name], variant), variant)


@pytest.mark.parametrize("name", ["PP2", pytest.param("EP2", marks=pytest.mark.slow)])
def test_statistics_are_those_of_one_process(pool: Pool, name: str) -> None:
    """With as many loads for each layer as it has experts."""
    layout = LAYOUT[name]
    case: dict[str, Any] = {"variant": "experts-by-layer", "zeroed": True}
    (whole,) = pool.run(statistics_of, 1, flags={}, **case)
    assert [len(layer["load"]) for layer in whole.values()] == [4, 8]
    assert [len(layer["kept"]) for layer in whole.values()] == [4, 8]
    for found in pool.run(statistics_of, layout.world_size, flags=layout.flags, **case):
        assert found.keys() == whole.keys()
        for number, layer in found.items():
            for field, value in layer.items():
                same = value == whole[number][field]
                assert same or value == pytest.approx(whole[number][field], rel=1e-5), field


def _filled(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("gates", [1, 2])
def test_several_shared_experts_are_one_as_wide_as_all(gates: int) -> None:
    """Three of width 5, with the rows and columns of one of width 15."""
    model = ModelConfig(hidden_size=8, ffn_variant="swiglu" if gates == 1 else "gated-swiglu")
    wide = FeedForward(model, 15).double()
    _filled(wide, 1)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2)).double()
    total = torch.zeros_like(x)
    for number in range(3):
        part, own = FeedForward(model, 5).double(), slice(5 * number, 5 * number + 5)
        with torch.no_grad():
            gate = wide.gate.weight.view(gates, 15, 8)[:, own]
            part.gate.weight.copy_(gate.reshape(gates * 5, 8))
            part.up.weight.copy_(wide.up.weight[own])
            part.down.weight.copy_(wide.down.weight[:, own])
        total += part(x)
    torch.testing.assert_close(total, wide(x))


def test_parts_of_split_experts_are_the_whole_experts() -> None:
    """A token that chooses all parts of an expert, with its weight, has the expert's output."""
    model = ModelConfig(hidden_size=8, ffn_hidden_size=12)
    whole = Experts(model, MoEConfig(num_experts=3)).double()
    parts = Experts(model, MoEConfig(num_experts=6, moe_ffn_hidden_size=6)).double()
    _filled(whole, 3)
    with torch.no_grad():
        gate = whole.gate.view(3, 8, 2, 2, 6).permute(0, 3, 1, 2, 4)
        parts.gate.copy_(gate.reshape(6, 8, 12))
        parts.up.copy_(whole.up.view(3, 8, 2, 6).permute(0, 2, 1, 3).reshape(6, 8, 6))
        parts.down.copy_(whole.down.view(6, 6, 8))
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 8, generator=generator).double()
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [2, 1]])
    probs = torch.rand(5, 2, generator=generator).double()
    fine = (2 * ids.unsqueeze(2) + torch.arange(2)).flatten(1)
    found = parts(x, fine, probs.repeat_interleave(2, 1), torch.ones(5, 4, dtype=torch.bool))
    torch.testing.assert_close(found, whole(x, ids, probs, torch.ones(5, 2, dtype=torch.bool)))

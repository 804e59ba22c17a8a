"""Sums of squares against fp64, at sizes at which sums in fp32 are wrong; norms in every layout."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_moe.model.reference import ReferenceOpenMoE
from megatron_moe.training.optim.squares import squares, sum_of_squares
from tests.training.ranks import LARGE, LARGE_VOCAB, norms_of_known_gradients, tiny_config
from tests.training.test_step import LAYOUTS

SIZE = 4_000_037
"""Elements: not a multiple of a block. A norm in fp32 is wrong by 4e-5 here."""


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.01 + 0.003


def test_a_large_tensor_has_the_sum_of_fp64():
    large, small = noise(SIZE), noise(7)
    exact = (large.double().square().sum() + small.double().square().sum()).item()
    assert sum_of_squares([large, small]).item() == pytest.approx(exact, rel=1e-8)
    assert abs(torch.linalg.vector_norm(large).item() ** 2 / exact - 1) > 1e-5, "it needs no care"


@pytest.mark.parametrize("shape", [(4096, 1000), (1000, 4096), (3, 1365, 1024), (4093, 1001)])
@pytest.mark.parametrize("transposed", [False, True])
def test_sums_over_dimensions_are_those_of_fp64(shape, transposed):
    block = noise(*shape)
    block = block.transpose(0, 1) if transposed else block
    for dims in [(0,), (1,), (0, 1)]:
        exact = block.double().square().sum(dims, keepdim=True)
        found = squares(block, dims)
        assert found.shape == exact.shape
        assert torch.allclose(found, exact, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", ["1", "DP2 sharded", "EP2", "TP2xEP2", "PP2 tied"])
def test_norms_and_clipping_are_those_of_fp64_in_every_layout(name, pool):
    world, flags = LAYOUTS[name]
    tied = "tied" in name
    for values in pool.run(norms_of_known_gradients, world, flags=flags):
        exact = expected(tied)
        assert values["params_norm"] == pytest.approx(exact, rel=1e-6)
        assert values["grad_norm"] == pytest.approx(exact, rel=1e-6)
        assert values["clipped"] == pytest.approx(1.0, rel=1e-6)


def expected(tied: bool) -> float:
    """Norm of all parameters of the reference model, in fp64."""
    config = tiny_config([*LARGE, *(["--no-untie-embeddings-and-output-weights"] if tied else [])])
    model = ReferenceOpenMoE(config.model, config.moe, LARGE_VOCAB, seed=config.train.seed)
    return math.sqrt(sum(p.detach().double().square().sum().item() for p in model.parameters()))

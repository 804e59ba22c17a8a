"""Several optimizer steps of every kind of layout equal PyTorch's AdamW on the reference model.

This holds what gradients alone do not: clipping by the global norm, the sharding of optimizer
state, overlapped reduction and gathering, and replicas that stay the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.cases import LAYOUTS
from tests.parity.compare import Block, assemble, assert_same
from tests.parity.expected import reference_model, step_loss
from tests.support.pool import Pool

STEPS = 3
# A large epsilon, so that the update is a smooth function of the gradient: with a small one the
# first step of Adam is the sign of each element, and rounding decides that of tiny ones.
OPTIMIZER: dict[str, Any] = {
    "lr": 1e-2,
    "adam_eps": 1e-2,
    "weight_decay": 0.1,
    "clip_grad": 0.5,
    "lr_decay_style": "constant",
}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAPPED = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}
CASES = [
    ("1", {}),
    ("DP2", DISTRIBUTED),
    ("DP2", OVERLAPPED),
    ("TP2", DISTRIBUTED),
    ("EP2", OVERLAPPED),
    ("PP2-interleaved", OVERLAPPED),
    ("PP2xEP2", DISTRIBUTED),
    ("DP2xEP2", {}),
    ("DP2xEP2", OVERLAPPED),
    ("EP2xETP2", DISTRIBUTED),
    ("TP2xEP4", OVERLAPPED),
]


def several_steps(
    rank: int, world_size: int, variant: str, flags: dict[str, Any]
) -> tuple[list[float], list[Block]]:
    """Gradient norms, and the weights after the last step."""
    from megatron_moe.training.parameters import gathered_parameters
    from megatron_moe.training.step import train_step
    from tests.parity.harness import own_batches, prepare, weight_blocks

    run = prepare(variant, flags, world_size, **OPTIMIZER)
    norms = [
        train_step(run, own_batches(run.ctx, seed), OPTIMIZER["lr"], seed + 1).grad_norm
        for seed in range(STEPS)
    ]
    with gathered_parameters(run.wrapped):
        return norms, weight_blocks(list(run.chunks), run.config)


def reference_steps(variant: str) -> tuple[list[float], dict[str, Tensor]]:
    """The same in fp64 on one device."""
    model = reference_model(variant)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms_ = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": norms_, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(
        groups,
        lr=OPTIMIZER["lr"],
        eps=OPTIMIZER["adam_eps"],
        weight_decay=OPTIMIZER["weight_decay"],
    )
    norms = []
    for seed in range(STEPS):
        adam.zero_grad()
        step_loss(model, seed)[0].backward()
        norms.append(
            float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_grad"]))
        )
        adam.step()
    return norms, {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """Of each variant, computed once."""
    return {variant: reference_steps(variant) for variant in ("released", "paper-port")}


@pytest.mark.parametrize("variant", ["released", "paper-port"])
@pytest.mark.parametrize(("name", "flags"), CASES)
def test_equals_adamw(
    pool: Pool,
    expected: dict[str, tuple[list[float], dict[str, Tensor]]],
    name: str,
    flags: dict[str, Any],
    variant: str,
) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    ranks = pool.run(
        several_steps, layout.world_size, variant=variant, flags={**layout.flags, **flags}
    )
    norms, weights = expected[variant]
    for found, _ in ranks:
        assert found == pytest.approx(norms, rel=1e-4)
        assert min(norms) > OPTIMIZER["clip_grad"], "clipping is not tested"
    # `assemble` holds that replicas are bit-identical.
    found_weights = assemble(block for _, blocks in ranks for block in blocks)
    assert_same(found_weights, weights, 1e-4)

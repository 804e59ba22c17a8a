"""Several optimizer steps of every kind of layout equal PyTorch's on the reference model.

This holds what gradients alone do not: clipping by the global norm, the sharding of optimizer
state, overlapped reduction and gathering, and replicas that stay the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.cases import GROUPED, LAYOUTS
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
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "clip_grad": 0.5,
    "lr_decay_style": "constant",
}
SGD = {**OPTIMIZER, "optimizer": "sgd", "sgd_momentum": 0.7}
SETTINGS = {"adam": OPTIMIZER, "sgd": SGD}
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
    rank: int, world_size: int, variant: str, flags: dict[str, Any], kind: str = "adam"
) -> tuple[list[float], list[Block]]:
    """Gradient norms, and the weights after the last step."""
    from megatron_moe.training.step import train_step
    from tests.parity.harness import own_batches, prepare, weight_blocks

    run = prepare(variant, flags, world_size, **SETTINGS[kind])
    norms = [
        train_step(run, own_batches(run.ctx, seed), OPTIMIZER["lr"], seed + 1).grad_norm
        for seed in range(STEPS)
    ]
    if run.config.parallel.overlap_param_gather:
        for chunk in run.wrapped:
            chunk.start_param_sync(force_sync=True)
    return norms, weight_blocks(list(run.chunks), run.config)


def torch_optimizer(model: torch.nn.Module, kind: str) -> torch.optim.Optimizer:
    """PyTorch's own, with weight decay on matrices alone."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    lr, decay = OPTIMIZER["lr"], OPTIMIZER["weight_decay"]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=SGD["sgd_momentum"], weight_decay=decay)
    betas = (OPTIMIZER["adam_beta1"], OPTIMIZER["adam_beta2"])
    return torch.optim.AdamW(
        groups, lr=lr, eps=OPTIMIZER["adam_eps"], betas=betas, weight_decay=decay
    )


@cache
def reference_steps(variant: str, kind: str) -> tuple[list[float], dict[str, Tensor]]:
    """The same in fp64 on one device."""
    model = reference_model(variant)
    optimizer = torch_optimizer(model, kind)
    norms = []
    for seed in range(STEPS):
        optimizer.zero_grad()
        step_loss(model, seed)[0].backward()
        norms.append(
            float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_grad"]))
        )
        optimizer.step()
    return norms, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "variant", ["released", pytest.param("paper-port", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("name", "flags"), CASES)
def test_equals_adamw(pool: Pool, name: str, flags: dict[str, Any], variant: str) -> None:
    _check(pool, name, flags, variant, "adam")


@pytest.mark.parametrize("variant", GROUPED)
@pytest.mark.parametrize(("name", "flags"), [("TP2", OVERLAPPED), ("TP2xEP2", {})])
def test_grouped_attention_equals_adamw(
    pool: Pool, name: str, flags: dict[str, Any], variant: str
) -> None:
    """Norms of queries and keys have left one, so that a wrong block of a split one shows."""
    _check(pool, name, flags, variant, "adam")


@pytest.mark.parametrize(("name", "flags"), [("1", {}), ("TP2", {}), ("DP2xEP2", {})])
def test_equals_sgd(pool: Pool, name: str, flags: dict[str, Any]) -> None:
    _check(pool, name, flags, "released", "sgd")


def test_each_step_draws_anew(pool: Pool) -> None:
    """A drop policy is told the number of the step and the seed of the run."""
    _check(pool, "1", {}, "random", "sgd")


def _check(pool: Pool, name: str, flags: dict[str, Any], variant: str, kind: str) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    all_flags = {**layout.flags, **flags}
    ranks = pool.run(several_steps, layout.world_size, variant=variant, flags=all_flags, kind=kind)
    norms, weights = reference_steps(variant, kind)
    for found, _ in ranks:
        assert found == pytest.approx(norms, rel=1e-4)
        assert min(norms) > OPTIMIZER["clip_grad"], "clipping is not tested"
    # `assemble` holds that replicas are bit-identical.
    found_weights = assemble(block for _, blocks in ranks for block in blocks)
    assert_same(found_weights, weights, 1e-4)

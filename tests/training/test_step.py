"""A step against the reference model: exact normalisation of the loss, norm of the gradient.

The reference sees the whole global batch at once, in one process, with PyTorch's own autograd.
Every layout and every cut into micro-batches must give its loss, its gradient norm, and its
held-out loss, although targets are spread over rows (and so ranks and micro-batches) very unevenly.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from megatron_moe.data.batch import Batch
from megatron_moe.model.reference import ReferenceOpenMoE
from megatron_moe.training.step import micro_batch_loss
from tests.training.ranks import (
    PADDED_VOCAB,
    global_batch,
    poisoned_step,
    step_and_evaluation,
    tiny_config,
)

_TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
_EP2 = ["--expert-model-parallel-size", "2"]
_PP2 = ["--pipeline-model-parallel-size", "2"]
_ETP1 = ["--expert-tensor-parallel-size", "1"]
_SHARDED = ["--use-distributed-optimizer"]
_TIED = ["--no-untie-embeddings-and-output-weights"]
LAYOUTS = {
    "1": (1, []),
    "one micro-batch": (1, ["--micro-batch-size", "8"]),
    "DP2": (2, []),
    "DP2, micro-batches of one row": (2, ["--micro-batch-size", "1"]),
    "DP2 sharded": (2, _SHARDED),
    "DP2 overlapped": (2, [*_SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"]),
    "EP2": (2, _EP2),
    "EP2 sharded": (2, [*_EP2, *_SHARDED]),
    "TP2": (2, _TP2),
    "TP2 sharded, experts replicated": (2, [*_TP2, *_ETP1, *_SHARDED]),
    "TP2, experts replicated": (2, [*_TP2, *_ETP1]),
    "TP2xEP2": (2, [*_TP2, *_EP2, *_ETP1]),
    "PP2": (2, _PP2),
    "PP2 tied": (2, [*_PP2, *_TIED]),
    "PP2 interleaved": (2, [*_PP2, "--num-virtual-stages-per-pipeline-rank", "2"]),
    "EP2xETP2": (4, [*_TP2, *_EP2]),
    "EP2xDP2 sharded": (4, [*_EP2, *_SHARDED]),
    "PP2xTP2xEP2": (4, [*_PP2, *_TP2, *_EP2, *_ETP1]),
}


@cache
def expected(tied: bool) -> dict[str, float]:
    """Losses and gradient norm of the reference model on the global batch."""
    torch.set_num_threads(1)
    config = tiny_config(_TIED if tied else [])
    model = ReferenceOpenMoE(config.model, config.moe, PADDED_VOCAB, seed=config.train.seed)
    batch = global_batch(config)
    arguments = (batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS)
    with torch.no_grad():
        held_out = model(*arguments, training_capacity=False)
    out = model(*arguments, training_capacity=True)
    targets = batch.loss_mask_BS.sum()
    lm_loss = (out.cross_entropy_BS * batch.loss_mask_BS).sum() / targets
    logit_z = (out.logit_z_BS * batch.loss_mask_BS).sum() / targets
    loss = lm_loss + config.model.logit_z_loss_coeff * logit_z
    loss = loss + config.moe.moe_aux_loss_coeff * out.aux_loss
    loss = loss + config.moe.moe_z_loss_coeff * out.router_z_loss
    loss.backward()
    squares = [p.grad.double().square().sum() for p in model.parameters()]
    return {
        "lm_loss": lm_loss.item(),
        "logit_z": logit_z.item(),
        "targets": targets.item(),
        "grad_norm": math.sqrt(sum(squares).item()),
        "num_zeros": sum((p.grad == 0).sum().item() for p in model.parameters()),
        "params_norm": math.sqrt(sum(p.double().square().sum().item() for p in model.parameters())),
        "held_out": ((held_out.cross_entropy_BS * batch.loss_mask_BS).sum() / targets).item(),
        "held_out_targets": 2 * targets.item(),
    }


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_loss_and_gradient_norm_are_the_reference_models(name, pool):
    world, flags = LAYOUTS[name]
    found = pool.run(step_and_evaluation, world, flags=flags)
    for values in found:
        assert values == pytest.approx(expected(_TIED[0] in flags), rel=1e-5)
    assert len({values["grad_norm"] for values in found}) == 1
    assert len({values["held_out"] for values in found}) == 1


def test_the_reference_is_sensitive_to_normalisation_and_capacity():
    """A mean of per-row means, the obvious wrong normalization, is far away."""
    assert abs(expected(False)["held_out"] / expected(False)["lm_loss"] - 1) > 1e-4
    config = tiny_config([])
    model = ReferenceOpenMoE(config.model, config.moe, PADDED_VOCAB, seed=config.train.seed)
    batch = global_batch(config)
    out = model(batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS, training_capacity=True)
    mask = batch.loss_mask_BS
    per_row = (out.cross_entropy_BS * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    assert abs(per_row.mean().item() / expected(False)["lm_loss"] - 1) > 1e-2


@pytest.mark.parametrize(
    ("name", "poisoned", "named"),
    [("1", 0, "0"), ("DP2", 1, "1"), ("DP2 sharded", 0, "0"), ("PP2", 1, "0, 1")],
)
def test_a_nan_stops_every_rank_before_anything_changes(name, poisoned, named, pool):
    world, flags = LAYOUTS[name]
    found = pool.run(poisoned_step, world, flags=flags, poisoned=poisoned, healthy_steps=2)
    for values in found:
        assert values["message"] is not None
        assert "nan at iteration 3" in values["message"]
        assert f"non-finite local gradients: {named};" in values["message"]
        assert values["unchanged"]


def test_an_infinite_loss_that_does_not_count_is_left_out():
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    batch = Batch(tokens, tokens, torch.tensor([[1.0, 0.0, 1.0]]))
    losses = torch.tensor([[[2.0, math.inf, 3.0]], [[4.0, math.nan, 1.0]]], requires_grad=True)
    total, reported = micro_batch_loss(batch, torch.tensor(0.5), 0.1)(losses)
    total.backward()
    assert reported["sums"].tolist() == [5.0, 5.0, 2.0]
    assert total.item() == pytest.approx(0.5 * (5.0 + 0.1 * 5.0))
    expected = torch.tensor([[[0.5, 0.0, 0.5]], [[0.05, 0.0, 0.05]]])
    torch.testing.assert_close(losses.grad, expected)

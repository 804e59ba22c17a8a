"""A step of the single-device reference model; runs in the process of the test."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_moe.model.logical import initial_tensors, logical_parameters
from megatron_moe.model.reference import ReferenceOpenMoE
from tests.parity.cases import (
    GLOBAL_ROWS,
    ROWS,
    TRAIN_SEED,
    VOCAB,
    document_planes,
    global_batch,
    run_config,
)


@dataclass(frozen=True)
class Expected:
    """One step of the reference model over the global batch, in fp64."""

    sums: Tensor
    """Cross entropy, squared log Z and targets, summed."""
    aux: dict[int, list[float]]
    """By layer: the z-loss, then the balance losses."""
    kept: dict[int, list[int]]
    dropped: int
    gradients: dict[str, Tensor]


def reference_model(variant: str) -> ReferenceOpenMoE:
    """The reference with the initial weights of the run, fp64."""
    config = run_config(variant, {})
    model = ReferenceOpenMoE(config.model, config.moe, VOCAB)
    table = logical_parameters(config.model, config.moe, VOCAB)
    model.load_logical(initial_tensors(table, config.train.seed))
    return model.double().train()


def step_loss(
    model: ReferenceOpenMoE, seed: int = 3, extra: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor, list[list]]:
    """Loss of the global batch, its sums, and the routing of each micro-batch.

    The cross entropy is the mean over all real targets of the global batch; the losses of MoE
    layers are means over micro-batches. Data of seed n are those of step n + 1.
    """
    tokens, labels, mask = global_batch(seed)
    for block in model.layers:
        if block.moe is not None:
            block.moe.seed, block.moe.step = TRAIN_SEED, seed + 1
            block.moe.earlier.clear()
    coefficients = model.model, model.moe
    total, sums, routing = torch.zeros((), dtype=torch.float64), torch.zeros(3), []
    sums = sums.double()
    count = GLOBAL_ROWS // ROWS
    for rows in torch.arange(GLOBAL_ROWS).split(ROWS):
        planes = document_planes(tokens[rows], extra)
        out = model(tokens[rows], labels[rows], mask[rows], training_capacity=True, **planes)
        ce = (out.cross_entropy_BS * mask[rows]).sum()
        log_z = (out.logit_z_BS * mask[rows]).sum()
        sums = sums + torch.stack((ce.detach(), log_z.detach(), mask[rows].sum().double()))
        total = total + (ce + coefficients[0].logit_z_loss_coeff * log_z) / mask.sum()
        moe, layers = coefficients[1], len(out.routing)
        megatron = moe.moe_loss_convention == "megatron"
        # From means over layers of a loss that is k when balanced to sums of one that is 1.
        balance, z = (layers / moe.moe_router_topk, layers) if megatron else (1, 1)
        for coefficient, loss in zip(moe.aux_loss_coeffs, out.aux_losses, strict=True):
            total = total + balance * coefficient * loss / count
        total = total + z * moe.moe_z_loss_coeff * out.router_z_loss / count
        routing.append(out.routing)
    return total, sums, routing


@cache
def expected(variant: str, extra: tuple[str, ...] = ()) -> Expected:
    """The reference's step, computed once per variant."""
    model = reference_model(variant)
    total, sums, routing = step_loss(model, extra=extra)
    total.backward()
    aux: dict[int, list[float]] = {}
    kept: dict[int, list[int]] = {}
    dropped = 0
    for layer in range(len(routing[0])):
        records = [micro_batch[layer] for micro_batch in routing]
        index = records[0].layer
        losses = [torch.stack([r.z_loss, *r.balance_losses]) for r in records]
        aux[index] = torch.stack(losses).mean(0).tolist()
        ids = torch.cat([r.ids_TK[r.kept_TK] for r in records])
        experts = model.moe.of_layer(index, model.model.num_layers).num_experts
        kept[index] = torch.bincount(ids, minlength=experts).tolist()
        dropped += sum(int((~r.kept_TK).sum()) for r in records)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Expected(sums, aux, kept, dropped, gradients)

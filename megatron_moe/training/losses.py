"""The loss of a step, normalised exactly over the global batch.

A step's cross entropy is sum(mask * ce) / N with N the real targets of the whole global batch,
whatever the micro-batches, ranks and paddings. The pipeline schedule divides each micro-batch's
loss by their number M, and gradients are averaged over the data-parallel size D; so each
micro-batch's loss is its plain sum times M * D / N. The losses of MoE layers are means over
micro-batches and data-parallel ranks by definition and need no such factor.
Shapes: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_moe.data.batch import Batch
from megatron_moe.training.run import TrainingRun

LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


def count_targets(batches: Sequence[Batch | None], run: TrainingRun) -> Tensor:
    """Real targets N of the global batch: fp64 scalar on the device, at least 1. No host read.

    To be called by ranks with a loss; sums over the data-parallel group.
    """
    masks = [batch.loss_mask_BS for batch in batches if batch is not None]
    count = torch.stack([mask_BS.sum(dtype=torch.float64) for mask_BS in masks]).sum()
    torch.distributed.all_reduce(count, group=run.ctx.pgs.dp)
    return count.clamp_(min=1.0)


def forward_function(
    run: TrainingRun, targets: Tensor | None, num_microbatches: int
) -> Callable[[Iterator[Batch | None], nn.Module], tuple[Tensor, LossFunction]]:
    """What the pipeline schedule calls for each chunk and micro-batch.

    Args:
        run: the run.
        targets: N of `count_targets`; ``None`` for an evaluation, whose sums are not normalised.
        num_microbatches: M of this step.
    """
    scale = None
    if targets is not None:
        scale = (num_microbatches * run.ctx.layout.dp / targets).float()

    def forward(batches: Iterator[Batch | None], chunk: nn.Module) -> tuple[Tensor, LossFunction]:
        batch = next(batches)
        if batch is None:
            return chunk(None), _no_loss
        output = chunk(batch.tokens_BS, batch.labels_BS, batch.positions_BS, batch.documents_BS)
        return output, micro_batch_loss(batch, scale, run.config.model.logit_z_loss_coeff)

    return forward


def micro_batch_loss(batch: Batch, scale: Tensor | None, z_coeff: float) -> LossFunction:
    """From per-token losses [2, B, S] (cross entropy, squared log Z) to the micro-batch's loss.

    The second result holds fp32 sums over real targets, for reporting: `sums` = (cross entropy,
    squared log Z, number of targets).
    """

    def loss(losses_2BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        sums = (losses_2BS.float() * batch.loss_mask_BS).sum(dim=(1, 2))
        total = sums[0] + z_coeff * sums[1]
        if scale is not None:
            total = total * scale
        reported = torch.cat((sums.detach(), batch.loss_mask_BS.sum().view(1)))
        return total, {"sums": reported}

    return loss


def total_sums(reported: Sequence[dict[str, Any]], run: TrainingRun) -> Tensor:
    """This rank's part of a step's sums: fp64 [3], zeros where the loss is not counted."""
    if reported and run.reports_loss:
        return torch.stack([entry["sums"] for entry in reported]).double().sum(dim=0)
    return torch.zeros(3, dtype=torch.float64, device=run.ctx.platform.device)


def _no_loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    raise AssertionError("a stage without data was asked for a loss")

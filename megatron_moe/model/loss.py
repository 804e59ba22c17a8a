"""Logits in fp32 and the vocabulary-parallel cross entropy with its z-term.

Per token: log Z - logit[target], and (log Z)^2, whose weighted mean keeps the logits from drifting
(OpenMoE's logit z-loss, weight 1e-4). Each rank holds V / TP columns; three all-reduces of [S, B]
join them. Shapes: S, B tokens; V vocabulary columns of this rank; H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from fused_kernels.row_blocks import row_blocks


class _Fp32Matmul(torch.autograd.Function):
    """(scale x) W^T in fp32, keeping only the operands in their own type for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.matmul(_scaled(x, dtype, scale), weight.to(dtype).t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        rows = _scaled(x.flatten(0, -2), grad.dtype, ctx.scale)
        grad_x = _scaled(torch.matmul(grad, weight.to(grad.dtype)), grad.dtype, ctx.scale)
        grad_weight = grad.flatten(0, -2).t().mm(rows)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def _scaled(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """``x`` in ``dtype`` times ``scale``; itself where that changes nothing."""
    return x.to(dtype) if scale == 1.0 else x.to(dtype) * scale


class Fp32LogitsLayer(ColumnParallelLinear):
    """The logits matrix, split over the vocabulary, multiplied in fp32 whatever the weights are.

    Attributes:
        logits_scale: factor on the input, applied in fp32.
    """

    logits_scale = 1.0

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:
        """[S, B, H] (a shard of S under sequence parallelism) -> [S, B, V of this rank], fp32."""
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            x = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        weight = self.weight if weight is None else weight
        return _Fp32Matmul.apply(x, weight, self.logits_scale), None


class _VocabParallelLoss(torch.autograd.Function):
    """See `vocab_parallel_loss`.

    Takes ownership of the logits: their memory holds exp(logit - max), which the backward pass
    divides by the total while it scales it, one pass less over the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
        columns = logits.shape[-1]
        exps = logits.detach().flatten(0, -2)
        top = exps.amax(dim=-1, keepdim=True)
        all_reduce(top, op=ReduceOp.MAX, group=group)
        index = (target - group.rank() * columns).reshape(-1, 1)
        ours = (index >= 0) & (index < columns)
        index = torch.where(ours, index, 0)
        both = top.new_empty(2, *top.shape)
        for part, maximum, chosen, picked, total in row_blocks(columns, exps, top, index, *both):
            torch.gather(part.sub_(maximum), 1, chosen, out=picked)
            torch.sum(part.exp_(), 1, keepdim=True, out=total)
        both[0].masked_fill_(~ours, 0.0)
        all_reduce(both, group=group)
        picked, total = both
        log_total = total.log()
        log_z = log_total + top
        ctx.save_for_backward(exps, total, index, ours, log_z)
        return torch.stack((log_total - picked, log_z.square())).view(2, *target.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        exps, total, index, ours, log_z = ctx.saved_tensors
        grad_ce, grad_z = grads[0].reshape(2, -1, 1)
        grad = exps.mul_((grad_ce + 2 * log_z * grad_z) / total)
        grad.scatter_add_(-1, index, -(grad_ce * ours))
        return grad.view(*grads[0].shape[1:], -1), None, None


def vocab_parallel_loss(logits_SBV: Tensor, target_SB: Tensor, group: ProcessGroup) -> Tensor:
    """Cross entropy and squared log-normaliser of every token.

    Args:
        logits_SBV: this rank's columns, fp32 (or fp64). Overwritten.
        target_SB: token ids in the whole vocabulary.
        group: the tensor-parallel group.

    Returns:
        [2, S, B]: cross entropy in nats, and (log Z)^2.
    """
    return _VocabParallelLoss.apply(logits_SBV, target_SB, group)

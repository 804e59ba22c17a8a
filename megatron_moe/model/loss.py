"""The logits matrix: logits in fp32, or the cross entropy and the z-term of every token.

Per token: log Z - logit[target], and (log Z)^2, whose weighted mean keeps the logits from drifting
(OpenMoE's logit z-loss, weight 1e-4). Each rank holds V / TP columns. Losses come from
`fused_kernels`' `linear_cross_entropy`, which computes the logits of a chunk of tokens at a time.

Ranks exchange three numbers of every token, in one all-gather of a micro-batch, however many chunks
it has: maximum, sum of exponentials and target's logit of its columns. The backward pass, which has
log Z by then, computes logits again and exchanges nothing but the gradient of the input, as every
column-parallel layer does. With the gradient computed in the forward pass instead, each chunk would
wait for two collectives.

Shapes: S, B tokens, T = S B; V vocabulary columns of this rank; H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_kernels.gemm import gemm, multiplies_halves, operand, result_dtype
from fused_kernels.operations import LinearCrossEntropy
from megatron_moe.model.logits_chunks import chunk_tokens
from megatron_moe.moe.main_grad import added_to_main_grad, main_grad_of


class _Fp32Matmul(torch.autograd.Function):
    """scale x W^T in fp32, keeping only the operands in their own type for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        rows = x.flatten(0, -2)
        out = x.new_empty(rows.shape[0], weight.shape[0], dtype=result_dtype(x.dtype))
        gemm(out, operand(rows), operand(weight).t(), alpha=scale)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        # Rounded where the GEMMs multiply 16 bits: both gradients are rounded to that, too.
        grad = grad.to(x.dtype) if multiplies_halves(x) else grad
        rows = operand(x.flatten(0, -2))
        grad_x, grad_weight = (torch.empty_like(y, dtype=grads[0].dtype) for y in (rows, weight))
        gemm(grad_x, grad, operand(weight), alpha=ctx.scale)
        gemm(grad_weight, grad.t(), rows, alpha=ctx.scale)
        return grad_x.view(x.shape).to(x.dtype), grad_weight.to(weight.dtype), None


class _LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        target: Tensor,
        scale: float,
        chunk: int,
        kernel: LinearCrossEntropy,
        group: dist.ProcessGroup,
    ) -> Tensor:
        x_TH, target_T = x.flatten(0, -2), target.reshape(-1)
        own_T = target_T - group.rank() * weight.shape[0]
        stats_3T, kept = kernel.forward(x_TH, weight, own_T, scale, chunk)
        log_z_T, loss_T = _joined(stats_3T, target_T // weight.shape[0], group)
        ctx.save_for_backward(x, weight, own_T, stats_3T, log_z_T, kept)
        ctx.scale, ctx.kernel = scale, kernel
        return torch.stack((loss_T, log_z_T.square())).view(2, *target.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, own_T, stats_3T, log_z_T, kept = ctx.saved_tensors
        grad_ce_T, grad_z_T = grads[0].reshape(2, -1)
        coefficients_2T = torch.stack((grad_ce_T + 2 * log_z_T * grad_z_T, grad_ce_T))
        main = main_grad_of(weight)
        fused = main is not None and main.dtype == stats_3T.dtype
        total_VH = None
        if ctx.needs_input_grad[1]:
            total_VH = main if fused else torch.zeros_like(weight, dtype=stats_3T.dtype)
        grad_TH = ctx.kernel.backward(
            x.flatten(0, -2),
            weight,
            own_T,
            ctx.scale,
            stats_3T,
            log_z_T,
            coefficients_2T,
            kept,
            total_VH,
        )
        grad_VH = None
        if total_VH is not None:
            grad_VH = added_to_main_grad(weight) if fused else total_VH.to(weight.dtype)
        return grad_TH.view(x.shape), grad_VH, None, None, None, None, None


def _joined(stats_3T: Tensor, owner_T: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Each token's log Z and cross entropy, from the numbers of each rank's columns.

    Args:
        stats_3T: of `LinearCrossEntropy.forward`.
        owner_T: the rank that has the target's column.
        group: the ranks.
    """
    top_T, total_T, picked_T = stats_3T
    if group.size() > 1:
        all_R3T = stats_3T.new_empty(group.size(), *stats_3T.shape)
        dist.all_gather_into_tensor(all_R3T.flatten(0, 1), stats_3T, group=group)
        tops_RT, totals_RT, picks_RT = all_R3T.unbind(1)
        top_T = tops_RT.amax(0)
        below_RT = tops_RT - top_T
        total_T = (totals_RT * below_RT.exp()).sum(0)
        owner_1T = owner_T.clamp(0, group.size() - 1).unsqueeze(0)
        picked_T = (picks_RT + below_RT).gather(0, owner_1T).squeeze(0)
    log_total_T = total_T.log()
    return log_total_T + top_T, log_total_T - picked_T


def linear_cross_entropy(
    x_SBH: Tensor,
    weight_VH: Tensor,
    target_SB: Tensor,
    kernel: LinearCrossEntropy,
    group: dist.ProcessGroup,
    scale: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Cross entropy and squared log-normaliser of every token.

    Gradients of the weight are added to its `main_grad` where Megatron-Core's wrapper has made one.

    Args:
        x_SBH: all tokens of the micro-batch, on every rank.
        weight_VH: this rank's rows of the logits matrix.
        target_SB: token ids in the whole vocabulary.
        kernel: the implementation.
        group: the tensor-parallel group.
        scale: factor of the logits.
        chunk: tokens whose logits exist at once; `None`: `chunk_tokens`.

    Returns:
        [2, S, B] in fp32 (fp64 for fp64): cross entropy in nats, and (log Z)^2.
    """
    chunk = chunk_tokens(weight_VH.shape[0]) if chunk is None else chunk
    return _LinearCrossEntropy.apply(x_SBH, weight_VH, target_SB, scale, chunk, kernel, group)


class LogitsLayer(ColumnParallelLinear):
    """The logits matrix, split over the vocabulary; logits are fp32 whatever the weights are.

    Attributes:
        logits_scale: factor of the logits.
        kernel: computes losses; set before `forward` gets targets.
        chunk: `--logits-chunk-tokens`.
    """

    logits_scale = 1.0
    kernel: LinearCrossEntropy
    chunk: int | None = None

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        target_SB: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """[S, B, H] (a shard of S under sequence parallelism) -> logits or losses.

        Args:
            input_: the residual stream.
            weight: of the tied embedding; `None` for its own.
            runtime_gather_output: not used; Megatron-Core's layer has it.
            target_SB: token ids of all S.

        Returns:
            [S, B, V] logits of this rank's columns, or with targets [2, S, B] as
            `linear_cross_entropy`; fp32. Both in one method, because Megatron-Core's hooks that
            gather parameters run before it.
        """
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            x = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        weight = self.weight if weight is None else weight
        if target_SB is None:
            return _Fp32Matmul.apply(x, weight, self.logits_scale), None
        losses = linear_cross_entropy(
            x, weight, target_SB, self.kernel, self.tp_group, self.logits_scale, self.chunk
        )
        return losses, None

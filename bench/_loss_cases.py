"""What `bench.linear_cross_entropy` compares: ours, all logits at once, gradients made in forward.

All have the losses [2, T] of a micro-batch as their result and add the weight's gradient to
`main_grad`, on one rank. Shapes: T tokens, V vocabulary, H hidden, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_kernels import select
from fused_kernels.row_blocks import row_blocks
from megatron_moe.model.loss import linear_cross_entropy

Z_WEIGHT = 1e-4


class WholeLogits(torch.autograd.Function):
    """All logits exist from the forward pass to the backward pass; one GEMM less than in chunks."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_VH: Tensor, target_T: Tensor) -> Tensor:
        exps = x_TH @ weight_VH.t()
        index = target_T.unsqueeze(1)
        top = exps.amax(dim=-1, keepdim=True)
        picked, total = torch.empty_like(top), torch.empty_like(top)
        parts = row_blocks(exps.shape[1], exps, top, index, picked, total)
        for part, maximum, chosen, its_logit, its_total in parts:
            torch.gather(part.sub_(maximum), 1, chosen, out=its_logit)
            torch.sum(part.exp_(), 1, keepdim=True, out=its_total)
        log_z = total.log() + top
        ctx.save_for_backward(x_TH, weight_VH, exps, total, index, log_z)
        return torch.cat((total.log() - picked, log_z.square()), 1).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TH, weight_VH, exps, total, index, log_z = ctx.saved_tensors
        ce, z = grads[0].unsqueeze(-1)
        grad = exps.mul_((ce + 2 * log_z * z) / total).scatter_add_(1, index, -ce)
        return grad @ weight_VH, grad.t() @ x_TH, None


class GradientsInForward(torch.autograd.Function):
    """Gradients of a chunk follow its logits at once, as in Liger (arXiv 2410.10989).

    The weights of the tokens' losses must be known, and the weight's gradient is held until the
    backward pass, which multiplies by the one factor that it learns. One rank: with several, log Z
    of each chunk is two collectives.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weight_VH: Tensor, target_T: Tensor, mask_T: Tensor, chunk: int
    ) -> Tensor:
        losses = x_TH.new_empty(2, x_TH.shape[0])
        grad_TH, grad_VH = torch.empty_like(x_TH), torch.zeros_like(weight_VH)
        memory = x_TH.new_empty(min(chunk, x_TH.shape[0]), weight_VH.shape[0])
        for start in range(0, x_TH.shape[0], chunk):
            rows = slice(start, min(start + chunk, x_TH.shape[0]))
            x, index = x_TH[rows], target_T[rows].unsqueeze(1)
            grad = torch.mm(x, weight_VH.t(), out=memory[: len(x)])
            top, picked, total = (x.new_empty(len(x), 1) for _ in range(3))
            weight = mask_T[rows].unsqueeze(1)
            for part, *one in row_blocks(grad.shape[1], grad, top, index, picked, total, weight):
                _softmax_gradient(part, *one)
            log_z = total.log() + top
            losses[:, rows] = torch.cat((total.log() - picked, log_z.square()), 1).t()
            grad.scatter_add_(1, index, -weight)
            torch.mm(grad, weight_VH, out=grad_TH[rows])
            grad_VH.addmm_(grad.t(), x)
        ctx.save_for_backward(grad_TH, grad_VH)
        return (losses[0] + Z_WEIGHT * losses[1]) @ mask_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_TH, grad_VH = ctx.saved_tensors
        return grad_TH.mul_(grads[0]), grad_VH.mul_(grads[0]), None, None, None


def _softmax_gradient(
    part: Tensor, top: Tensor, index: Tensor, picked: Tensor, total: Tensor, weight: Tensor
) -> None:
    """Of logits in place: softmax times (1 + 2 z log Z) times the token's weight."""
    torch.amax(part, 1, keepdim=True, out=top)
    torch.gather(part.sub_(top), 1, index, out=picked)
    torch.sum(part.exp_(), 1, keepdim=True, out=total)
    part.mul_(weight * (1 + 2 * Z_WEIGHT * (total.log() + top)) / total)


@dataclass
class Case:
    """One micro-batch: random tokens, of which a tenth has no loss.

    Args:
        tokens: T.
        columns: V.
        hidden: H.
    """

    tokens: int
    columns: int
    hidden: int
    operands: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.tokens, 1, self.hidden, generator=generator)
        weight = torch.randn(self.columns, self.hidden, generator=generator) / self.hidden**0.5
        target = torch.randint(0, self.columns, (self.tokens, 1), generator=generator)
        mask = (torch.rand(self.tokens, generator=generator) < 0.9).float() / self.tokens
        self.operands = x.requires_grad_(), torch.nn.Parameter(weight), target, mask

    @property
    def name(self) -> str:
        """E.g. `1024x4096x256`: tokens, vocabulary, hidden."""
        return f"{self.tokens}x{self.columns}x{self.hidden}"

    def steps(self, chunk: int) -> dict[str, Callable[[], None]]:
        """Forward and backward of each candidate, by name; ``chunk`` for those in chunks."""
        x, weight, target, mask = self.operands
        kernel, group = select("linear_cross_entropy").module, torch.distributed.group.WORLD
        weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]

        def whole() -> Tensor:
            losses = WholeLogits.apply(x.squeeze(1), weight, target.squeeze(1))
            return (losses[0] + Z_WEIGHT * losses[1]) @ mask

        def ours() -> Tensor:
            losses = linear_cross_entropy(x, weight, target, kernel, group, 1.0, chunk)  # type: ignore[arg-type]
            return (losses[0, :, 0] + Z_WEIGHT * losses[1, :, 0]) @ mask

        def in_forward() -> Tensor:
            return GradientsInForward.apply(x.squeeze(1), weight, target.squeeze(1), mask, chunk)

        def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
            def run() -> None:
                x.grad = weight.grad = None
                weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
                loss().backward()
                if not weight.grad_added_to_main_grad:  # type: ignore[attr-defined]
                    weight.main_grad.add_(weight.grad)  # type: ignore[attr-defined,operator]
                x.grad = weight.grad = None

            return run

        return {
            "whole": step(whole),
            "ours": step(ours),
            "gradients in forward": step(in_forward),
        }

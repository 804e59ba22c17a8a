"""DeepEP's dispatch and combine over gloo, with what Megatron-Core's wrapper takes and returns.

A token goes once to each rank that has an expert of it, with the ids of its experts there (-1 for
others) and their weights (0). On the way back, what ranks return for a token is added up. Gradients
take the opposite ways.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _exchange(x: Tensor, sends: list[int], receives: list[int], group: Any) -> Tensor:
    out = x.new_empty(sum(receives), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receives, sends, group=group)
    return out


class _Handle:
    """Which tokens went where."""

    def __init__(self, ids_TK: Tensor, num_experts: int, group: Any) -> None:
        self.group, self.tokens = group, ids_TK.shape[0]
        ranks, rank = group.size(), group.rank()
        self.local = num_experts // ranks
        there = [((ids_TK >= 0) & (ids_TK // self.local == r)).any(1) for r in range(ranks)]
        self.sent = torch.cat([mask.nonzero().flatten() for mask in there])
        self.sends = [int(mask.sum()) for mask in there]
        counts = torch.tensor(self.sends)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=group)
        self.receives, self.rank = received.tolist(), rank

    def go(self, x: Tensor) -> Tensor:
        return _exchange(x[self.sent], self.sends, self.receives, self.group)

    def come(self, x: Tensor) -> Tensor:
        back = _exchange(x, self.receives, self.sends, self.group)
        return back.new_zeros(self.tokens, *x.shape[1:]).index_add_(0, self.sent, back)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, probs: Tensor, experts: int, group: Any) -> Any:
        assert ids.dtype == torch.int64 and probs.dtype == torch.float32
        ctx.handle = handle = _Handle(ids, experts, group)
        ids_NK = handle.go(ids) - handle.rank * handle.local
        here = (ids_NK >= 0) & (ids_NK < handle.local)
        ids_NK = ids_NK.where(here, -1)
        ctx.save_for_backward(here)
        counts = torch.tensor([int((ids_NK == e).sum()) for e in range(handle.local)])
        ctx.mark_non_differentiable(ids_NK, counts)
        return handle.go(x), ids_NK, handle.go(probs).where(here, 0.0), counts, handle

    @staticmethod
    def backward(ctx: Any, dx: Tensor, _: Any, dprobs: Tensor, *unused: Any) -> Any:
        (here,) = ctx.saved_tensors
        return ctx.handle.come(dx), None, ctx.handle.come(dprobs.where(here, 0.0)), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, handle: _Handle) -> Tensor:
        ctx.handle = handle
        return handle.come(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.handle.go(grad), None


def fused_dispatch(x: Tensor, ids: Tensor, probs: Tensor, experts: int, group: Any) -> Any:
    return _Dispatch.apply(x, ids, probs, experts, group)


def fused_combine(y: Tensor, group: Any, handle: _Handle) -> tuple[Tensor, None]:
    return _Combine.apply(y, handle), None

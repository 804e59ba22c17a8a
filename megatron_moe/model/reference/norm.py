"""The norm of the reference model.

Shapes: the last dimension is what the mean is taken over: H hidden, or the channels of one or all
heads (`attention.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_moe.config.model import ModelConfig
from megatron_moe.model.reference.routing import full_precision


class RMSNorm(nn.Module):
    """T5's norm: x / sqrt(mean(x^2) + eps) in fp32, cast back, times a learned scale."""

    def __init__(self, model: ModelConfig, width: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.hidden_size if width is None else width))
        self.epsilon = model.norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W], W = H by default."""
        wide = full_precision(x)
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return wide.to(x.dtype) * self.weight

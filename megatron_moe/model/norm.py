"""The T5 RMSNorm of OpenMoE for the parallel model: no mean, no bias, fp32 reduction.

Megatron-Core's own PyTorch norm refuses sequence parallelism; this one marks its weight so that
the engine sums its gradient over the tensor-parallel ranks, each of which sees part of the tokens.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional as F


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Args:
        config: gives the parameter type and whether sequence parallelism is on.
        hidden_size: H.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., H]; the result has the type of ``x``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normalised = F.rms_norm(wide, (x.shape[-1],), None, self.eps)
        # Cast before scaling, as T5 does: bf16 results depend on the order.
        return normalised.to(x.dtype) * self.weight

"""The T5 RMSNorm of OpenMoE for the parallel model: no mean, no bias, fp32 reduction.

Megatron-Core's own PyTorch norm does not support sequence parallelism; this one marks its weight so
that Megatron-Core sums its gradient over the tensor-parallel ranks, each of which has a part of the
tokens.

The norms of queries and keys are of two forms. Over a head, it is the same norm; its weight is
whole on every rank, and Megatron-Core sums its gradient over the ranks, each of which has a part of
the heads (`TransformerConfig.qk_layernorm`). Over the whole projection, it is `SplitRMSNorm`.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from fused_kernels.autograd import rms_norm
from fused_kernels.operations import RmsNorm
from fused_kernels.reference import rms_norm as reference


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    Args:
        config: gives the parameter type and whether sequence parallelism is on.
        hidden_size: H.
        eps: added to the mean square.
        kernel: the implementation.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-6,
        kernel: RmsNorm = reference,
    ) -> None:
        super().__init__()
        self.eps, self.kernel = eps, kernel
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., H]; the result has the type of ``x``."""
        return rms_norm(x, self.weight, self.eps, self.kernel)


class SplitRMSNorm(torch.nn.Module):
    """The same norm over all heads of a projection, whose heads are split over ranks.

    Each rank has the weight of its own heads. The mean square is that of all heads: the ranks sum
    their sums of squares, one number for each token.

    Args:
        config: gives the parameter type.
        hidden_size: D, channels of a head; Megatron-Core passes it.
        heads: of all ranks.
        tp_group: the ranks.
        eps: added to the mean square.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        heads: int,
        tp_group: ProcessGroup,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.eps, self.width, self.tp_group = eps, heads * hidden_size, tp_group
        local = self.width // tp_group.size()
        self.weight = torch.nn.Parameter(torch.ones(local, dtype=config.params_dtype))

    def forward(self, x_SBND: Tensor) -> Tensor:
        """Normalise this rank's heads of queries or keys; the result has their type."""
        wide = x_SBND.to(torch.promote_types(x_SBND.dtype, torch.float32)).flatten(-2)
        squares = wide.square().sum(-1, keepdim=True)
        # The sum of one rank changes the outputs of all: its gradient, too, is summed over ranks,
        # by the backward of the copy.
        squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        squares = reduce_from_tensor_model_parallel_region(squares, self.tp_group)
        normalised = wide * torch.rsqrt(squares / self.width + self.eps)
        return (normalised.to(x_SBND.dtype) * self.weight).view(x_SBND.shape)

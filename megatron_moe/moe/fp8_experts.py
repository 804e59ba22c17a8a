"""The feed-forward layers of all experts with GEMMs in emulated FP8 (`--fp8-emulate`).

Rows without a token arrive as zeros, so they have no part in a scale. A block of scales along the
rows of an expert, of its weight gradients in `blockwise` and `mxfp8`, that is not full counts as
padded with zeros, which is how Transformer Engine's GEMMs get the rows of a local expert: padded
after the exchange, so capacity and drops stay as they are.

Shapes: E experts of this rank, N rows of one expert (slots of all sources and groups), H hidden,
F width, M = blocks * F.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_kernels.autograd import gated_silu
from fused_kernels.fp8.gemm import Fp8Gemm, Fp8Settings
from megatron_moe.moe.plan import Plan


class Fp8ExpertGemms(nn.Module):
    """Both GEMMs of all experts of a rank.

    Args:
        settings: the recipe.
        experts: E.
        device: of the scales.

    Attributes:
        input: x W_in.
        down: h W_out.
    """

    def __init__(self, settings: Fp8Settings, experts: int, device: torch.device) -> None:
        super().__init__()
        self.input = Fp8Gemm(settings, experts, device)
        self.down = Fp8Gemm(settings, experts, device)

    def forward(self, x_ENH: Tensor, weight_in: Tensor, weight_out: Tensor, plan: Plan) -> Tensor:
        """Outputs [E, N, H].

        Args:
            x_ENH: rows by expert, zero where empty.
            weight_in: [E, H, M], blocks gate (or linear, gate) and up side by side.
            weight_out: [E, F, H].
            plan: has the gate's kernel.
        """
        blocks = weight_in.shape[2] // weight_out.shape[1]
        z_ENM = self.input(x_ENH, weight_in.mT)
        if self.quantises_in_the_gate(x_ENH.device):
            return self.down.gated(z_ENM, blocks, weight_out.mT, plan.kernels.gated_silu)
        h_NF = gated_silu(z_ENM.flatten(0, 1), blocks, plan.kernels.gated_silu)
        h_ENF = h_NF.unflatten(0, x_ENH.shape[:2])
        y_ENH: Tensor = self.down(h_ENF, weight_out.mT)
        return y_ENH

    def quantises_in_the_gate(self, device: torch.device) -> bool:
        """Whether the gate's kernel writes FP8: not with `tensorwise`, whose scale needs all values
        first, nor on a GPU without an instruction for it (before compute capability 8.9). There
        the result is quantised in passes of its own, to the same bytes.
        """
        if self.down.settings.recipe == "tensorwise":
            return False
        return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)

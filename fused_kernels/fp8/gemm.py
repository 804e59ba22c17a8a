"""A GEMM of operands in FP8, forward and backward, and the scales that it keeps between steps.

y = x W^T is three GEMMs, each of which sums over another dimension, and each operand is quantised
along the dimension that is summed over:

    forward           y [T, N]  = x [T, K] by W [N, K], over K
    input gradient    dx [T, K] = dy [T, N] by W^T [K, N], over N
    weight gradient   dW [N, K] = dy^T [N, T] by x^T [K, T], over T

Shapes: T rows, K inputs, N outputs; a leading dimension is one of experts, each a GEMM of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fused_kernels.fp8 import rules
from fused_kernels.fp8.output import Fp8Output
from fused_kernels.fp8.rules import BLOCK, E4M3, E5M2, MX_BLOCK
from fused_kernels.operations import GatedSilu

Recipe = Literal["tensorwise", "delayed", "blockwise", "mxfp8"]
Operand = Literal["input", "weight", "gradient"]
OPERANDS: tuple[Operand, ...] = ("input", "weight", "gradient")


@dataclass(frozen=True, kw_only=True)
class Fp8Settings:
    """How operands are quantised; names of Transformer Engine.

    Args:
        recipe: what shares a scale, and when it is computed.
        hybrid: gradients in e5m2 rather than e4m3.
        margin: with `delayed`, scales are divided by 2^margin.
        history: with `delayed`, steps whose largest magnitudes are kept.
        most_recent: with `delayed`, the scale follows the last of them rather than the largest.
        replicas: with `delayed`, what gradients are divided by before they are recorded: where they
            are averaged over data-parallel replicas afterwards, each replica's are as many times
            larger. Scales then are those of one process, whatever the layout.
    """

    recipe: Recipe
    hybrid: bool = False
    margin: int = 0
    history: int = 1
    most_recent: bool = True
    replicas: int = 1

    def dtype_of(self, operand: Operand) -> torch.dtype:
        """The FP8 type of an operand."""
        return E5M2 if self.hybrid and operand == "gradient" else E4M3


class DelayedScale(nn.Module):
    """The scale of an operand from its largest magnitudes in earlier steps.

    `record` collects the step's largest magnitude, `update` makes the next step's scale of it:
    (largest FP8 value / amax) / 2^margin, as Transformer Engine does. Values that have grown since
    saturate. An amax of 0, or one that is not finite, leaves the scale.

    Args:
        settings: margin, history.
        dtype: FP8 type.
        experts: as many scales, each of an expert; `None` for one.
        device: where the buffers are.

    Attributes:
        amax_history: fp32 [history], or [history, experts]; row 0 is the step in progress.
        scale: fp32 [] or [experts].
    """

    amax_history: Tensor
    scale: Tensor

    def __init__(
        self,
        settings: Fp8Settings,
        dtype: torch.dtype,
        experts: int | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.settings, self.most = settings, torch.finfo(dtype).max
        shape = () if experts is None else (experts,)
        history = torch.zeros(settings.history, *shape, device=device)
        # Not of the module's state: checkpoints have them under logical names.
        self.register_buffer("amax_history", history, persistent=False)
        self.register_buffer("scale", torch.ones(shape, device=device), persistent=False)

    def record(self, x: Tensor, factor: int = 1) -> None:
        """Take the magnitudes of an operand of this step into account, divided by ``factor``."""
        self.record_amax(rules.amax_of(x) / factor)

    def record_amax(self, amax: Tensor) -> None:
        """The same of largest magnitudes, one for each scale."""
        row = self.amax_history[0]
        torch.maximum(row, amax.view_as(row), out=row)

    def update(self) -> None:
        """End the step: the next scale, and a new row of the history."""
        history = self.amax_history
        amax = history[0].clone() if self.settings.most_recent else history.amax(0)
        scale = (self.most / amax) / 2.0**self.settings.margin
        scale = scale.masked_fill(scale.isinf(), torch.finfo(torch.float32).max)
        self.scale.copy_(scale.where((amax > 0) & amax.isfinite(), self.scale))
        history.copy_(history.roll(-1, 0))
        history[0] = 0.0


class Fp8Gemm(nn.Module):
    """y = x W^T with both operands of each of its three GEMMs rounded to FP8.

    Args:
        settings: the recipe.
        experts: GEMMs in one, each with scales of its own; `None` for a plain one.
        device: of the scales of `delayed`.

    Attributes:
        scales: with `delayed`, a `DelayedScale` for each operand; else none.
    """

    def __init__(
        self,
        settings: Fp8Settings,
        experts: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.scales = nn.ModuleDict()
        if settings.recipe == "delayed":
            for operand in OPERANDS:
                dtype = settings.dtype_of(operand)
                self.scales[operand] = DelayedScale(settings, dtype, experts, device)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply.

        Args:
            x: [..., T, K], or with experts [E, T, K].
            weight: [N, K], or [E, N, K].

        Returns:
            [..., T, N] in the dtype of ``x``, accumulated in at least fp32.
        """
        y: Tensor = _Fp8Matmul.apply(x, weight, self)
        return y

    def gated(self, z_ENM: Tensor, blocks: int, weight: Tensor, kernel: GatedSilu) -> Tensor:
        """Multiply the gate's result, h = silu(gate) * up, which the gate's kernel quantises.

        Equal to `forward` of h bit for bit; h is not kept for the backward pass, but computed again
        there, where it is quantised for another dimension of sums.

        Args:
            z_ENM: [E, N, M], input of the gate.
            blocks: of the gate.
            weight: [E, H, F].
            kernel: of the gate; its `forward_fp8` must run on the device.

        Returns:
            [E, N, H].

        Raises:
            ValueError: with `tensorwise`, whose scale needs all of h first.
        """
        y_ENH: Tensor = _Fp8GatedMatmul.apply(z_ENM, weight, self, blocks, kernel)
        return y_ENH

    def output(self) -> Fp8Output:
        """How an operation quantises the input of this GEMM, of which it has the rows.

        Raises:
            ValueError: with `tensorwise`.
        """
        dtype = self.settings.dtype_of("input")
        if self.settings.recipe == "tensorwise":
            raise ValueError("a scale of tensorwise needs the whole tensor before it is quantised")
        if self.settings.recipe == "delayed":
            scale = self.kept()["input"].scale.view(-1)
            return Fp8Output(dtype=dtype, scaling="given", scale=scale)
        return Fp8Output(dtype=dtype, scaling=self.settings.recipe)

    def kept(self) -> dict[str, DelayedScale]:
        """The scales of `delayed` by operand; none of other recipes."""
        return {k: scale for k, scale in self.scales.items() if isinstance(scale, DelayedScale)}

    def rounded(self, operand: Operand, x: Tensor) -> Tensor:
        """An operand [..., M, K] of a sum over K after quantisation, in at least fp32."""
        settings, dtype = self.settings, self.settings.dtype_of(operand)
        wide = torch.promote_types(x.dtype, torch.float32)
        if settings.recipe == "mxfp8":
            return rules.dequantized(*rules.mxfp8(x, dtype), block=MX_BLOCK).to(wide)
        if settings.recipe == "blockwise":
            rows = BLOCK if operand == "weight" else 1
            quantised = rules.per_block(x, dtype, rows)
            return rules.dequantized(*quantised, rows=rows, block=BLOCK).to(wide)
        scale = None
        if settings.recipe == "delayed":
            kept = self.kept()[operand]
            factor = settings.replicas if operand == "gradient" else 1
            if self.training:  # an evaluation leaves no trace
                kept.record(x, factor)
            scale = kept.scale[..., None, None] / factor
        return rules.dequantized(*rules.per_tensor(x, dtype, scale)).to(wide)


class _Fp8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gemm: Fp8Gemm) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gemm = gemm
        rows = _matrix(x, weight)
        y = gemm.rounded("input", rows) @ gemm.rounded("weight", weight).mT
        return y.view(*x.shape[:-1], weight.shape[-2]).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        gemm: Fp8Gemm = ctx.gemm
        dy, rows = _matrix(grads[0], weight), _matrix(x, weight)
        dx = gemm.rounded("gradient", dy) @ gemm.rounded("weight", weight.mT).mT
        dw = gemm.rounded("gradient", dy.mT) @ gemm.rounded("input", rows.mT).mT
        return dx.view_as(x).to(x.dtype), dw.to(weight.dtype), None


class _Fp8GatedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_ENM: Tensor, weight: Tensor, gemm: Fp8Gemm, blocks: int, kernel: GatedSilu
    ) -> Tensor:
        ctx.save_for_backward(z_ENM, weight)
        ctx.gemm, ctx.blocks, ctx.kernel = gemm, blocks, kernel
        h = kernel.forward_fp8(z_ENM.flatten(0, 1), blocks, gemm.output())
        if h.amax is not None and gemm.training:
            gemm.kept()["input"].record_amax(h.amax)
        wide = torch.promote_types(z_ENM.dtype, torch.float32)
        h_ENF = h.dequantized().to(wide).unflatten(0, z_ENM.shape[:2])
        return (h_ENF @ gemm.rounded("weight", weight).mT).to(z_ENM.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        z_ENM, weight = ctx.saved_tensors
        gemm: Fp8Gemm = ctx.gemm
        dh = gemm.rounded("gradient", grads[0]) @ gemm.rounded("weight", weight.mT).mT
        flat = dh.to(z_ENM.dtype).flatten(0, 1)
        dz, h = ctx.kernel.backward(flat, z_ENM.flatten(0, 1), ctx.blocks)
        h_ENF = h.unflatten(0, z_ENM.shape[:2])
        dw = gemm.rounded("gradient", grads[0].mT) @ gemm.rounded("input", h_ENF.mT).mT
        return dz.view_as(z_ENM), dw.to(weight.dtype), None, None, None


def _matrix(x: Tensor, weight: Tensor) -> Tensor:
    """All rows of a plain GEMM as one matrix; those of experts as they are."""
    return x if weight.dim() == 3 else x.reshape(-1, x.shape[-1])

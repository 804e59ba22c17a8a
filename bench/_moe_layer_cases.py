"""What `bench.moe_layer` compares: our layer, Megatron-Core's two, and the bare GEMMs.

Shapes: E experts, K choices, T tokens, H hidden, F ffn, R rows kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.moe import MoELayer, RoutingDecision
from megatron_moe.platform.release import build_from_spec

CAPACITY_FACTOR = 1.25
ROWS = 2
"""Sequences of the micro-batch, so that a capacity group of rule `t5x` is half of it."""


@dataclass(frozen=True)
class Shape:
    """One MoE layer and the tokens it sees."""

    experts: int
    topk: int
    tokens: int
    hidden: int
    ffn: int

    @property
    def name(self) -> str:
        """E.g. `16x4096x768x2048`: experts, tokens, hidden, ffn."""
        return f"{self.experts}x{self.tokens}x{self.hidden}x{self.ffn}"

    def tokens_SBH(self, seed: int) -> Tensor:
        """Random activations [T / 2, 2, H]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.tokens // ROWS, ROWS, self.hidden, generator=generator)


SHAPES = (
    Shape(16, 2, 4096, 768, 2048),
    Shape(32, 2, 2048, 512, 1024),
    Shape(8, 2, 1024, 256, 512),
    Shape(16, 2, 512, 256, 512),
)
"""The shapes of one MoE layer that the targets are stated for; the first two are the large ones."""


def our_layer(shape: Shape, rule: str, factor: float | None, impl: str = "auto") -> MoELayer:
    """Our layer, three-matrix experts."""
    model = ModelConfig(hidden_size=shape.hidden, ffn_hidden_size=shape.ffn, ffn_variant="swiglu")
    moe = MoEConfig(
        num_experts=shape.experts,
        moe_router_topk=shape.topk,
        moe_capacity_rule=rule,  # type: ignore[arg-type]
        moe_expert_capacity_factor=factor,
        moe_expert_impl=impl,  # type: ignore[arg-type]
    )
    layer = MoELayer(model, moe, layer_number=0, num_moe_layers=1)
    layer.reset_parameters(seed=0)
    return layer


def stock_layer(shape: Shape, factor: float | None, pgs: Any) -> torch.nn.Module:
    """Megatron-Core's layer: all-to-all dispatcher, one module per expert; padded to capacity,
    or dropless without a factor.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=1,
        ffn_hidden_size=shape.ffn,
        moe_ffn_hidden_size=shape.ffn,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.topk,
        moe_router_pre_softmax=True,
        moe_router_dtype="fp32",
        moe_aux_loss_coeff=0.01,
        moe_z_loss_coeff=1e-4,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_token_dispatcher_type="alltoall",
        moe_expert_capacity_factor=factor,
        moe_pad_expert_input_to_capacity=factor is not None,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
    )
    spec = get_gpt_layer_local_spec(num_experts=shape.experts, moe_grouped_gemm=False)
    return build_from_spec(spec.submodules.mlp, config=config, layer_number=1, pg_collection=pgs)


class Step:
    """One forward and backward pass of a layer with fresh gradients of weights and input."""

    def __init__(self, layer: torch.nn.Module, x_SBH: Tensor) -> None:
        self.layer = layer
        self.x_SBH = x_SBH.clone().requires_grad_()
        self.grad_SBH = torch.randn_like(x_SBH)

    def clear(self) -> None:
        """Forget the gradients of the last pass."""
        for leaf in (self.x_SBH, *self.layer.parameters()):
            leaf.grad = None

    def __call__(self) -> None:
        self.clear()
        y = self.layer(self.x_SBH)
        (y[0] if isinstance(y, tuple) else y).backward(self.grad_SBH)


def kept_rows(layer: MoELayer, x_SBH: Tensor) -> list[int]:
    """Rows that each expert really keeps."""
    seen: list[RoutingDecision] = []
    layer.on_routing = seen.append
    layer(x_SBH)
    layer.on_routing = None
    routing = seen[0]
    kept = routing.scores.choices_TK[routing.kept_TK]
    return torch.bincount(kept, minlength=layer.moe.num_experts).tolist()


def bare_gemms(shape: Shape, rows: list[int], batched: bool) -> Callable[[], None]:
    """The GEMMs of three-matrix experts over ``rows`` rows, and nothing else.

    Forward, gradient of rows and gradient of weights; gate and up as one matrix, as in our layer.
    Outputs are allocated once, outside the measurement. Batched, every expert has as many rows as
    the fullest.
    """
    sizes = [max(rows)] * shape.experts if batched else rows
    total, (hidden, ffn) = sum(sizes), (shape.hidden, shape.ffn)
    x, dx, y, dy = (torch.randn(total, hidden) for _ in range(4))
    h, dh = (torch.randn(total, ffn) for _ in range(2))
    z, dz = (torch.randn(total, 2 * ffn) for _ in range(2))
    w_in, g_in = (torch.randn(shape.experts, hidden, 2 * ffn) for _ in range(2))
    w_out, g_out = (torch.randn(shape.experts, ffn, hidden) for _ in range(2))
    products = [
        (x, w_in, z), (h, w_out, y), (dy, w_out.transpose(1, 2), dh), (dz, w_in.transpose(1, 2), dx)
    ]  # fmt: skip
    weight_products = [(h, dy, g_out), (x, dz, g_in)]

    def one_by_one() -> None:
        for left, weight, out in products:
            parts = zip(left.split(sizes), weight, out.split(sizes), strict=True)
            for left_e, weight_e, out_e in parts:
                torch.mm(left_e, weight_e, out=out_e)
        for left, right, out in weight_products:
            for left_e, right_e, out_e in zip(
                left.split(sizes), right.split(sizes), out, strict=True
            ):
                torch.mm(left_e.t(), right_e, out=out_e)

    def at_once() -> None:
        stack = (shape.experts, sizes[0], -1)
        for left, weight, out in products:
            torch.bmm(left.view(stack), weight, out=out.view(stack))
        for left, right, out in weight_products:
            torch.bmm(left.view(stack).transpose(1, 2), right.view(stack), out=out)

    return at_once if batched else one_by_one

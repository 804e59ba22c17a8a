"""Small layers, shared by the tests of one process and of several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.model.reference.ffn import MoE as ReferenceMoE
from megatron_moe.moe import MoELayer, RoutingDecision

HIDDEN = 10
SEQUENCE, BATCH = 12, 2
DTYPE = torch.float64


def model_config(variant: str = "gated-swiglu") -> ModelConfig:
    return ModelConfig(hidden_size=HIDDEN, ffn_hidden_size=8, ffn_variant=variant)  # type: ignore[arg-type]


def moe_config(**settings: Any) -> MoEConfig:
    """Tight enough that choices drop, losses heavy enough to be seen in every gradient."""
    defaults = {
        "num_experts": 4,
        "moe_expert_capacity_factor": 1.0,
        "moe_min_capacity": 1,
        "moe_aux_loss_coeff": 0.3,
        "moe_z_loss_coeff": 0.2,
    }
    return MoEConfig(**{**defaults, **settings})


def layer_of(
    moe: MoEConfig, variant: str = "gated-swiglu", seed: int = 0, **where: Any
) -> MoELayer:
    """A layer whose router has clear preferences."""
    layer = MoELayer(
        model_config(variant), moe, layer_number=3, num_moe_layers=2, params_dtype=DTYPE, **where
    )
    layer.reset_parameters(seed)
    with torch.no_grad():
        layer.router.weight.mul_(20)
    return layer


def tokens(seed: int, sequence: int = SEQUENCE, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequence, batch, HIDDEN, generator=generator, dtype=DTYPE)


def watched(layer: MoELayer) -> list[RoutingDecision]:
    """A list that every later forward pass adds its decisions to."""
    seen: list[RoutingDecision] = []
    layer.on_routing = seen.append
    return seen


def set_loss_scale(scale: float) -> None:
    """What Megatron-Core's schedule does before a backward pass."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.full((1,), scale)


def reference_of(layer: MoELayer) -> ReferenceMoE:
    """The reference layer with the same weights."""
    reference = ReferenceMoE(layer.model, layer.moe, layer.layer_number).to(DTYPE)
    width = layer.model.ffn_hidden_size
    with torch.no_grad():
        reference.router.weight.copy_(layer.router.weight)
        reference.experts.gate.copy_(layer.experts.weight_in[..., :-width])
        reference.experts.up.copy_(layer.experts.weight_in[..., -width:])
        reference.experts.down.copy_(layer.experts.weight_out)
    return reference

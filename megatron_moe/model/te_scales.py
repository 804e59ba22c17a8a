"""Scales of the delayed recipe in Transformer Engine's layers, under the names of emulated ones.

Each linear layer has two states, for its forward and its backward pass, with a scale and a history
of amax for every operand: input, weight and output of GEMM i at 3 i, 3 i + 1 and 3 i + 2, the
gradients of its output and input at 2 i and 2 i + 1. An expert is a GEMM of a grouped layer. A
layer makes its states in its first forward pass; here they are made with the model, so that there
is something to load a checkpoint into. Transformer Engine's own way, a pickle in `_extra_state`,
is not taken.

Outputs and gradients of inputs are not quantised, and their scales are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_moe.config import RunConfig
from megatron_moe.model.fp8 import NamedScale, layers_of
from megatron_moe.model.openmoe import OpenMoEModel
from megatron_moe.moe.exchange import rank_of

_PLACES = {
    "input": ("scaling_fwd", 0, 3),
    "weight": ("scaling_fwd", 1, 3),
    "gradient": ("scaling_bwd", 0, 2),
}
"""By operand: the state, the place of GEMM 0, and the distance to the next GEMM."""


@dataclass(frozen=True)
class ScaleView:
    """The part of a layer's state that belongs to one operand; shares its memory.

    Args:
        scale: fp32, one for each GEMM.
        amax_history: fp32 [steps, GEMMs].
    """

    scale: Tensor
    amax_history: Tensor


def make_scales(chunks: Sequence[OpenMoEModel], config: RunConfig) -> None:
    """Give layers in FP8 with the delayed recipe their states; nothing without that recipe.

    Args:
        chunks: the model chunks of this rank, on their device, of Transformer Engine's layers.
        config: of the run.
    """
    precision = config.precision
    if precision.fp8_format is None or precision.fp8_recipe != "delayed":
        return
    from megatron.core.fp8_utils import get_fp8_recipe

    for layer in layers_of(chunks):
        if not precision.in_fp8(layer.layer_number - 1, config.model.num_layers):
            continue
        for _, linear, _ in _linears(layer):
            linear.fp8_meta["num_gemms"] = _gemms(linear)
            linear.fp8_meta["recipe"] = get_fp8_recipe(layer.config)
            linear.init_fp8_meta_tensors(linear.fp8_meta["recipe"])


def te_scales(chunks: Sequence[OpenMoEModel]) -> Iterator[NamedScale[ScaleView]]:
    """The scales that this rank's layers keep between steps; none of other recipes or layers."""
    for layer in layers_of(chunks):
        for name, linear, first in _linears(layer):
            for operand, (key, place, stride) in _PLACES.items():
                state = linear.fp8_meta.get(key)
                if not hasattr(state, "amax_history"):
                    continue
                view = ScaleView(state.scale[place::stride], state.amax_history[:, place::stride])
                full = f"layers.{layer.layer_number - 1}.{name}.{operand}"
                yield NamedScale(full, view, first)


def _linears(layer: Any) -> Iterator[tuple[str, Any, int | None]]:
    """Layers of Transformer Engine: name in checkpoints, module, first expert of a grouped one."""
    attention = layer.self_attention
    found: list[tuple[str, Any, int | None]] = [
        ("attention.qkv", attention.linear_qkv, None),
        ("attention.output", attention.linear_proj, None),
    ]
    ffn, prefix = (layer.shared, "shared") if layer.is_moe else (layer.ffn, "ffn")
    if ffn is not None:
        found.append((f"{prefix}.input", ffn.linear_fc1, None))
        found.append((f"{prefix}.down", ffn.linear_fc2, None))
    experts = layer.moe.experts if layer.is_moe else None
    if experts is not None and hasattr(experts, "linear_fc1"):
        first = rank_of(experts.groups.ep) * experts.num_local
        found.append(("moe.experts.input", experts.linear_fc1, first))
        found.append(("moe.experts.down", experts.linear_fc2, first))
    return ((name, linear, first) for name, linear, first in found if hasattr(linear, "fp8_meta"))


def _gemms(linear: Any) -> int:
    return int(getattr(linear, "num_gemms", 1))

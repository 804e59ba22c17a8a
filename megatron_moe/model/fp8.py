"""FP8 GEMMs on any device (`--fp8-emulate`): which they are, and the scales that they keep.

Operands are rounded to FP8 and back where Transformer Engine's layers would do it: inputs, weights
and output gradients of the linear layers of attention, dense feed-forward layers, shared experts
and experts. Embedding, logits, router, norms and the attention's own products are not touched, nor
are layers that `--first-last-layers-bf16` keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce

from fused_kernels.fp8.gemm import DelayedScale, Fp8Gemm, Fp8Settings
from megatron_moe.config import PrecisionConfig, RunConfig
from megatron_moe.model.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_moe.model.layer import OpenMoELayer
from megatron_moe.model.openmoe import OpenMoEModel
from megatron_moe.moe.exchange import rank_of
from megatron_moe.moe.experts import StackedExperts
from megatron_moe.moe.fp8_experts import Fp8ExpertGemms


def fp8_settings_of(precision: PrecisionConfig, replicas: int) -> Fp8Settings:
    """The flags in the terms of the emulation.

    Args:
        precision: the flags.
        replicas: data-parallel size.
    """
    return Fp8Settings(
        recipe=precision.fp8_recipe,
        hybrid=precision.fp8_format == "hybrid",
        margin=precision.fp8_margin,
        history=precision.fp8_amax_history_len,
        most_recent=precision.fp8_amax_compute_algo == "most_recent",
        replicas=replicas,
    )


def emulate_fp8(chunks: Sequence[OpenMoEModel], config: RunConfig, device: torch.device) -> None:
    """Give the linear layers and experts of layers in FP8 their GEMMs.

    Args:
        chunks: the model chunks of this rank.
        config: of the run.
        device: of their weights.
    """
    precision = config.precision
    settings = fp8_settings_of(precision, chunks[0].pg_collection.dp_cp.size())
    for layer in layers_of(chunks):
        if not precision.in_fp8(layer.layer_number - 1, config.model.num_layers):
            continue
        for linear in _linears(layer).values():
            linear.fp8 = Fp8Gemm(settings, device=device)
        if layer.is_moe:
            experts = layer.moe.experts
            assert isinstance(experts, StackedExperts)
            experts.fp8 = Fp8ExpertGemms(settings, experts.num_local, device)


def layers_of(chunks: Sequence[OpenMoEModel]) -> Iterator[OpenMoELayer]:
    """All layers of a rank, in order."""
    for chunk in chunks:
        yield from chunk.decoder.layers


def _linears(layer: OpenMoELayer) -> dict[str, Fp8ColumnParallelLinear | Fp8RowParallelLinear]:
    """The linear layers by their names in checkpoints; none of Transformer Engine's."""
    attention = layer.self_attention
    found = {"attention.qkv": attention.linear_qkv, "attention.output": attention.linear_proj}
    dense = {"shared": layer.shared} if layer.is_moe else {"ffn": layer.ffn}
    for name, ffn in dense.items():
        if ffn is not None:
            found |= {f"{name}.input": ffn.linear_fc1, f"{name}.down": ffn.linear_fc2}
    ours = Fp8ColumnParallelLinear | Fp8RowParallelLinear
    return {name: linear for name, linear in found.items() if isinstance(linear, ours)}


class ScaleTensors(Protocol):
    """What a checkpoint holds of the delayed recipe."""

    @property
    def scale(self) -> Tensor:
        """fp32, one for each GEMM."""

    @property
    def amax_history(self) -> Tensor:
        """fp32 [steps] or [steps, GEMMs]."""


ScaleState = TypeVar("ScaleState", bound=ScaleTensors, covariant=True)


@dataclass(frozen=True)
class NamedScale(Generic[ScaleState]):
    """A scale of the delayed recipe, and whose it is.

    Args:
        name: of the operand: `layers.3.attention.qkv.weight`, `layers.3.moe.experts.down.input`.
        state: its tensors, `scale` and `amax_history`.
        first: the first of its experts in the whole model; `None` for a dense layer.
    """

    name: str
    state: ScaleState
    first: int | None


def delayed_scales(chunks: Sequence[OpenMoEModel]) -> Iterator[NamedScale[DelayedScale]]:
    """The scales that this rank keeps between steps; none of other recipes."""
    for layer in layers_of(chunks):
        prefix = f"layers.{layer.layer_number - 1}."
        gemms: list[tuple[str, Fp8Gemm | None, int | None]] = []
        for name, linear in _linears(layer).items():
            gemms.append((name, linear.fp8, None))
        experts = layer.moe.experts if layer.is_moe else None
        if isinstance(experts, StackedExperts) and experts.fp8 is not None:
            first = rank_of(experts.groups.ep) * experts.num_local
            gemms.append(("moe.experts.input", experts.fp8.input, first))
            gemms.append(("moe.experts.down", experts.fp8.down, first))
        for name, gemm, owner in gemms:
            for operand, state in (gemm.kept() if gemm is not None else {}).items():
                yield NamedScale(f"{prefix}{name}.{operand}", state, owner)


def update_scales(chunks: Sequence[OpenMoEModel], pgs: ProcessGroupCollection) -> None:
    """End a step: every delayed scale follows the largest magnitude that any rank has seen.

    All ranks with a part of a tensor take part, so that scales do not depend on the layout: for a
    dense layer those of its pipeline stage, for an expert those that have it. Once a step, not once
    a micro-batch as Transformer Engine does: scales do not depend on their number either.
    """
    scales = list(delayed_scales(chunks))
    for expert, groups in ((False, (pgs.tp, pgs.dp_cp)), (True, (pgs.expt_tp, pgs.expt_dp))):
        own = [scale.state for scale in scales if (scale.first is not None) == expert]
        if not own:
            continue
        seen = torch.cat([state.amax_history[0].view(-1) for state in own])
        for group in groups:
            all_reduce(seen, op=ReduceOp.MAX, group=group)
        for state, amax in zip(own, seen.split([s.scale.numel() for s in own]), strict=True):
            state.amax_history[0].copy_(amax.view_as(state.scale))
            state.update()

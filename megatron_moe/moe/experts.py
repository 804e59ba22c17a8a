"""The experts of one rank: stacked weights, and the choice of how their GEMMs run.

Shapes: E experts of this rank, H hidden, F width of an expert on this rank, R buffer rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.errors import UsageError
from megatron_moe.moe import expert_gemm
from megatron_moe.moe.exchange import ExpertGroups, size_of

LOOP_MIN_MULTIPLY_ADDS = 0
"""On a CPU, multiply-adds of one expert's first GEMM from which `auto` takes `loop`."""


@dataclass(frozen=True)
class ExpertImpl:
    """How the expert GEMMs run, and why, for the log."""

    name: Literal["loop", "batched"]
    reason: str


def choose_impl(requested: str, x: Tensor) -> ExpertImpl:
    """`--moe-expert-impl` for activations like ``x``.

    Raises:
        UsageError: `loop` where the host cannot read row counts without waiting.
    """
    # A subclass of Tensor here is a fake one: it has no values to read.
    readable = x.device.type == "cpu" and type(x.detach()) is Tensor
    if requested == "loop" and not readable:
        raise UsageError("--moe-expert-impl", requested, f"auto or batched on {x.device.type}")
    if requested == "batched":
        return ExpertImpl("batched", "as asked")
    if requested == "loop":
        return ExpertImpl("loop", "as asked")
    if readable:
        return ExpertImpl("loop", "auto: on a CPU filled rows alone are computed")
    return ExpertImpl("batched", "auto: no host read on this device")


def gate_blocks(model: ModelConfig) -> int:
    """Blocks of the first matrix: gate and up, or linear, gate and up."""
    return 2 if model.ffn_variant == "swiglu" else 3


class Experts(nn.Module):
    """Stacked weights of this rank's experts.

    Args:
        model: hidden size and feed-forward variant.
        moe: number and width of experts.
        groups: expert parallelism divides the experts, expert tensor parallelism their width.
        params_dtype: dtype of the weights.
        device: where they are; `meta` for counting.

    Attributes:
        weight_in: [E, H, blocks * F], each block divided over expert-tensor ranks by itself.
        weight_out: [E, F, H].
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        groups: ExpertGroups,
        params_dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        width = moe.moe_ffn_hidden_size or model.ffn_hidden_size
        ranks, shards = size_of(groups.ep), size_of(groups.expt_tp)
        if moe.num_experts % ranks:
            raise UsageError("--num-experts", moe.num_experts, f"a multiple of {ranks} ranks")
        if width % shards:
            raise UsageError("--moe-ffn-hidden-size", width, f"a multiple of {shards} ranks")
        self.groups = groups
        self.num_local = moe.num_experts // ranks
        hidden, local = model.hidden_size, width // shards
        shape_in = (self.num_local, hidden, gate_blocks(model) * local)
        shape_out = (self.num_local, local, hidden)
        self.weight_in = nn.Parameter(torch.empty(shape_in, dtype=params_dtype, device=device))
        self.weight_out = nn.Parameter(torch.empty(shape_out, dtype=params_dtype, device=device))
        self._mark_for_engine(ranks, shards != size_of(groups.tp))

    def _mark_for_engine(self, ranks: int, other_shards: bool) -> None:
        """Attributes by which Megatron-Core reduces and counts gradients."""
        for weight, dimension in ((self.weight_in, 2), (self.weight_out, 1)):
            # False: reduced over the expert data-parallel group, not the dense one.
            weight.allreduce = ranks == 1 and not other_shards  # type: ignore[attr-defined]
            # True: no rank of the dense tensor-parallel group holds a duplicate to be skipped in
            # the gradient norm.
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            weight.partition_dim = dimension  # type: ignore[attr-defined]
            weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(
        self, rows_RH: Tensor, filled_E: Tensor, impl: ExpertImpl, gate: ModuleType
    ) -> Tensor:
        """Outputs for the rows that arrived from all sources.

        Args:
            rows_RH: blocks of sources, each `packed` for `loop`, `fixed` for `batched`.
            filled_E: rows that this rank filled for each of all experts.
            impl: which of the two.
            gate: the `gated_silu` kernel.
        """
        sources = self.groups.sources
        if impl.name == "loop":
            counts = self.groups.counts_by_source(filled_E).tolist()
            segments = expert_gemm.segments_of(counts, rows_RH.shape[0] // sources)
            return expert_gemm.loop(rows_RH, self.weight_in, self.weight_out, segments, gate)
        hidden = rows_RH.shape[1]
        by_source = rows_RH.view(sources, self.num_local, -1, hidden)
        by_expert = by_source.transpose(0, 1).reshape(self.num_local, -1, hidden)
        out = expert_gemm.batched(by_expert, self.weight_in, self.weight_out, gate)
        back = out.view(self.num_local, sources, -1, hidden).transpose(0, 1)
        return back.reshape(-1, hidden)

    @torch.no_grad()
    def reset_parameters(self, std_scale: float, seed: int) -> None:
        """Fill with N(0, std_scale / fan_in), for a layer that stands alone."""
        generator = torch.Generator(self.weight_in.device).manual_seed(seed)
        for weight in (self.weight_in, self.weight_out):
            weight.normal_(0.0, (std_scale / weight.shape[1]) ** 0.5, generator=generator)

"""The experts of one rank: their weights, and the choice of how their GEMMs run.

`Experts` is what a layer needs of them. `StackedExperts` holds all experts in two stacked weights
and has three implementations (`--moe-expert-impl`): `loop`, one GEMM per expert over its filled
rows, `batched`, GEMMs over several experts with the same number of rows, and `grouped`, grouped
GEMMs over filled rows alone. Which one is faster depends on the device and on the loads of a pass,
so `schedule` chooses for each pass, and with it the layout of the buffer. `expert_gemm.py` and
`grouped_gemm.py` have the arithmetic. `te_experts.py` has Transformer Engine's grouped GEMMs
(`--transformer-impl transformer_engine`).

Shapes: E experts of this rank, H hidden, F width of an expert on this rank, R buffer rows,
M = blocks * F columns of the fused input matrix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_moe.config import ModelConfig, MoEConfig
from megatron_moe.errors import UsageError
from megatron_moe.moe import expert_gemm, grouped_gemm
from megatron_moe.moe.exchange import ExpertGroups, size_of
from megatron_moe.moe.expert_gemm import ExpertBucket, make_buckets
from megatron_moe.moe.fp8_experts import Fp8ExpertGemms
from megatron_moe.moe.grouped_gemm import SortedRows, is_readable
from megatron_moe.moe.overlap import neighbours, overlapped
from megatron_moe.moe.plan import BufferLayout, Plan, Slots

PADDING_WORTH = ((30_000_000, 1.3), (100_000_000, 1.1), (math.inf, 1.02))
"""Multiply-adds of one expert's first GEMM up to which a CPU runs them faster in batched GEMMs, if
there are no more rows of them per filled row than this. Bare GEMMs of a forward and backward pass,
2 threads, one by one against batched over as many rows as the fullest expert has, ms: at 17M
multiply-adds and 1.25 rows per row 14.1 / 13.1; at 67M, 1.06: 23.0 / 21.4; at 134M, 1.15:
173 / 187; at 1007M, 1.00 (all experts full): 572 / 535."""


@dataclass(frozen=True)
class ExpertImpl:
    """How the expert GEMMs run.

    Args:
        name: `loop` over experts, `batched`, or `grouped`.
        reason: why, for the log.
        packed: whether it computes filled rows alone, which then lie next to each other.
        buckets: with `batched`, which experts share a GEMM and their rows; `None` for all slots of
            all experts.
    """

    name: Literal["loop", "batched", "grouped"]
    reason: str
    packed: bool = False
    buckets: tuple[ExpertBucket, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertSchedule:
    """The implementation of one pass and what it needs.

    Args:
        impl: the implementation.
        layout: where it wants each row.
        filled_E: int64 rows that this rank filled for each of all experts.
    """

    impl: ExpertImpl
    layout: BufferLayout
    filled_E: Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertWork:
    """What the choice of an implementation depends on.

    Args:
        readable: whether the host can read row counts without waiting.
        filled: rows of each expert, if they are all on this rank and readable.
        multiply_adds: of one row in the first GEMM of an expert, H * M.
        width: columns of the gated product, F.
    """

    readable: bool
    filled: list[int] | None
    multiply_adds: int
    width: int


def choose_impl(requested: str, work: ExpertWork) -> ExpertImpl:
    """`--moe-expert-impl` for some work.

    Raises:
        UsageError: `loop` where the host cannot read row counts without waiting.
    """
    if requested == "loop" and not work.readable:
        fix = "reading row counts would wait for the device"
        raise UsageError("--moe-expert-impl", requested, "auto, batched or grouped", fix)
    if requested == "loop":
        return ExpertImpl("loop", "as requested", packed=True)
    if requested == "grouped":
        return ExpertImpl("grouped", "as requested", packed=True)
    if requested == "batched":
        return ExpertImpl("batched", "as requested")
    if not work.readable:
        return ExpertImpl("batched", "auto: no host read on this device")
    if work.filled is not None and any(work.filled):
        buckets = make_buckets(work.filled, work.width, torch.get_num_threads())
        padding = sum(b.experts * b.rows for b in buckets) / sum(work.filled)
        size = max(work.filled) * work.multiply_adds
        if any(size < most and padding <= worth for most, worth in PADDING_WORTH):
            return ExpertImpl("batched", "auto: evenly loaded experts", buckets=tuple(buckets))
    return ExpertImpl("loop", "auto: on a CPU filled rows alone are computed", packed=True)


class Experts(nn.Module, ABC):
    """The experts of one rank.

    Args:
        model: hidden size and feed-forward variant.
        moe: number and width of experts.
        groups: expert parallelism divides the experts, expert tensor parallelism their width.

    Attributes:
        num_local: experts of this rank.
        width: F.
        chunks: of slots, whose exchanges overlap; 1 for exchanges in one piece.

    Raises:
        UsageError: experts or their width do not divide.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig, groups: ExpertGroups) -> None:
        super().__init__()
        width = moe.moe_ffn_hidden_size or model.ffn_hidden_size
        ranks, shards = size_of(groups.ep), size_of(groups.expt_tp)
        if moe.num_experts % ranks:
            expected = f"a multiple of --expert-model-parallel-size ({ranks})"
            raise UsageError("--num-experts", moe.num_experts, expected)
        if width % shards:
            expected = f"a multiple of --expert-tensor-parallel-size ({shards})"
            raise UsageError("--moe-ffn-hidden-size", width, expected)
        self.model, self.groups = model, groups
        self.num_local, self.width = moe.num_experts // ranks, width // shards
        self.chunks = moe.moe_a2a_overlap_chunks if ranks > 1 else 1

    def mark_for_megatron(self, weight: Tensor, dimension: int) -> None:
        """Set the attributes by which Megatron-Core reduces and counts gradients.

        Args:
            weight: a parameter.
            dimension: the one that expert tensor parallelism divides.
        """
        groups = self.groups
        other_shards = size_of(groups.expt_tp) != size_of(groups.tp)
        # False: reduced over the expert data-parallel group, not the dense one.
        weight.allreduce = size_of(groups.ep) == 1 and not other_shards  # type: ignore[attr-defined]
        # True: no rank of the dense tensor-parallel group holds a duplicate to be skipped in the
        # gradient norm.
        weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        weight.partition_dim = dimension  # type: ignore[attr-defined]
        weight.partition_stride = 1  # type: ignore[attr-defined]

    @abstractmethod
    def choose(self, filled_E: Tensor) -> ExpertImpl:
        """The implementation for so many rows per expert, [E over all ranks] int64."""

    def schedule(self, slots: Slots) -> ExpertSchedule:
        """How to compute the rows of these slots, and where they must lie."""
        filled_E, ranks = slots.filled_GE.sum(0), size_of(self.groups.ep)
        impl = self.choose(filled_E)
        if impl.buckets is not None:
            layout = BufferLayout.aligned([b.rows for b in impl.buckets for _ in range(b.experts)])
        elif impl.packed:
            layout = BufferLayout.packed(slots, ranks)
        else:
            layout = BufferLayout.fixed(slots, ranks, self.chunks)
        return ExpertSchedule(impl=impl, layout=layout, filled_E=filled_E)

    @abstractmethod
    def forward(self, rows_RH: Tensor, plan: Plan) -> Tensor:
        """Outputs for the rows that arrived, [R, H]: a block of rows from every source rank."""

    def by_expert(self, rows_RH: Tensor) -> Tensor:
        """Rows of the fixed layout, [source, expert, slot], as [expert, source and slot, H].

        A GEMM wants the rows of an expert from all sources together.
        """
        by_source = rows_RH.view(self.groups.sources, self.num_local, -1, rows_RH.shape[1])
        return by_source.transpose(0, 1).reshape(self.num_local, -1, rows_RH.shape[1])

    def by_source(self, rows_ERH: Tensor) -> Tensor:
        """The way back, [R, H]."""
        hidden = rows_ERH.shape[2]
        by_expert = rows_ERH.reshape(self.num_local, self.groups.sources, -1, hidden)
        return by_expert.transpose(0, 1).reshape(-1, hidden)

    @abstractmethod
    def reset_parameters(self, seed: int) -> None:
        """Fill with the model's standard deviations, for a layer outside of a model."""


MakeExperts = Callable[[ExpertGroups], Experts]
"""Builds the experts of a layer."""


class StackedExperts(Experts):
    """Stacked weights of this rank's experts.

    Args:
        model: hidden size and feed-forward variant.
        moe: number, width and implementation of experts.
        groups: expert parallelism divides the experts, expert tensor parallelism their width.
        params_dtype: dtype of the weights.
        device: where they are; `meta` for counting. They are uninitialized.

    Attributes:
        weight_in: [E, H, M], blocks gate (or linear, gate) and up side by side, each divided over
            expert-tensor ranks on its own.
        weight_out: [E, F, H].
        fp8: GEMMs in emulated FP8, if not `None`.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        groups: ExpertGroups,
        params_dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        super().__init__(model, moe, groups)
        self.fp8: Fp8ExpertGemms | None = None
        self.requested = moe.moe_expert_impl
        if moe.moe_expert_impl == "grouped" and device is not None:
            widths = model.hidden_size, self.width, model.input_blocks * self.width
            grouped_gemm.check_device(torch.device(device), params_dtype, *widths)
        shape_in = (self.num_local, model.hidden_size, model.input_blocks * self.width)
        shape_out = (self.num_local, self.width, model.hidden_size)
        self.weight_in = nn.Parameter(torch.empty(shape_in, dtype=params_dtype, device=device))
        self.weight_out = nn.Parameter(torch.empty(shape_out, dtype=params_dtype, device=device))
        self.mark_for_megatron(self.weight_in, 2)
        self.mark_for_megatron(self.weight_out, 1)

    def choose(self, filled_E: Tensor) -> ExpertImpl:
        """The implementation for so many rows per expert, [E over all ranks] int64."""
        if self.fp8 is not None:
            return ExpertImpl("batched", "emulated FP8")
        readable = is_readable(filled_E)
        filled = filled_E.tolist() if readable and self.groups.sources == 1 else None
        work = ExpertWork(
            readable=readable,
            filled=filled,
            multiply_adds=self.weight_in[0].numel(),
            width=self.width,
        )
        return choose_impl(self.requested, work)

    def forward(self, rows_RH: Tensor, plan: Plan) -> Tensor:
        """Outputs for the rows that arrived, [R, H]: a block of rows from every source rank."""
        impl, gate = plan.schedule.impl, plan.kernels.gated_silu
        weights = self.weight_in, self.weight_out
        if impl.name == "loop":
            counts = self.groups.counts_by_source(plan.schedule.filled_E).tolist()
            filled = expert_gemm.filled_rows(counts, rows_RH.shape[0] // self.groups.sources)
            return expert_gemm.loop(rows_RH, *weights, filled, gate)
        if impl.name == "grouped":
            return self._grouped(rows_RH, plan)
        if impl.buckets is not None:
            return expert_gemm.batched(rows_RH, *weights, impl.buckets, gate)
        if self.fp8 is not None:
            return self.by_source(self.fp8(self.by_expert(rows_RH), *weights, plan))
        if plan.flight is not None:
            buckets = self._equal_buckets(rows_RH)
            experts = list(neighbours([bucket.experts for bucket in buckets]))
            return overlapped(rows_RH, *weights, plan.flight, experts, gate)
        by_expert = self.by_expert(rows_RH).flatten(0, 1)
        out = expert_gemm.batched(by_expert, *weights, self._equal_buckets(by_expert), gate)
        return self.by_source(out.unflatten(0, (self.num_local, -1)))

    def _grouped(self, rows_RH: Tensor, plan: Plan) -> Tensor:
        """Of a packed buffer; the rows of several sources are sorted by expert first."""
        weights, kernels = (self.weight_in, self.weight_out), plan.kernels
        filled_E = plan.schedule.filled_E
        if plan.arrival is not None or self.groups.sources == 1:
            ends_E = filled_E.cumsum(0).int()
            if plan.arrival is not None:
                assert plan.arrival.ends_E is not None
                ends_E = plan.arrival.ends_E
            return grouped_gemm.grouped(rows_RH, *weights, ends_E, kernels.gated_silu)
        counts_NE = self.groups.counts_by_source(filled_E)
        block_rows = rows_RH.shape[0] // self.groups.sources
        order = SortedRows.of(counts_NE, block_rows, kernels.rank_in_expert)
        sorted_RH = order.sort(rows_RH)
        out_RH = grouped_gemm.grouped(sorted_RH, *weights, order.ends_E, kernels.gated_silu)
        return order.unsort(out_RH)

    def _equal_buckets(self, by_expert_RH: Tensor) -> list[ExpertBucket]:
        """Of a buffer in which all experts have the same number of rows."""
        rows = [by_expert_RH.shape[0] // self.num_local] * self.num_local
        threads = torch.get_num_threads() if is_readable(by_expert_RH) else 0
        return make_buckets(rows, self.width, threads)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fill with the model's standard deviations, for a layer outside of a model."""
        generator = torch.Generator(self.weight_in.device).manual_seed(seed)
        for weight, std_of in (
            (self.weight_in, self.model.in_std),
            (self.weight_out, self.model.out_std),
        ):
            weight.normal_(0.0, std_of(weight.shape[1]), generator=generator)

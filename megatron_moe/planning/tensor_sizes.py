"""Sizes of the tensors of one micro-batch on one rank, from which memory and traffic follow.

Letters: S sequence, B sequences of the micro-batch, T = S B tokens, t = T / TP tokens of this
rank's shard under sequence parallelism (else T), H hidden, n heads, g key and value heads, d head
width, F feed-forward width, m blocks of the gate's input (2 or 3), E experts, K choices, G capacity
groups, C slots, R buffer rows, R' rows that this rank's experts compute, V vocabulary, b bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_moe.config import RunConfig, moe_layer_pattern
from megatron_moe.config.model import QkNormScope
from megatron_moe.model.logical import expert_width
from megatron_moe.model.logits_chunks import chunk_tokens
from megatron_moe.moe.bounded_buffer import buffer_bound
from megatron_moe.moe.plan import capacity_of
from megatron_moe.parallel.layout import Layout
from megatron_moe.planning.memory import parameter_bytes

Device = Literal["cpu", "cuda"]
"""Whose implementations run: norms, recomputation and freed outputs differ between them."""


@dataclass(frozen=True, kw_only=True)
class TensorSizes:
    """Numbers of elements of a rank's tensors for one micro-batch."""

    bytes: int
    """b of parameters and activations."""
    tp: int
    sequence_parallel: bool
    rows: int
    """B."""
    row_tokens: int
    """S."""
    hidden: int
    heads: int
    """Of this rank."""
    kv_heads: int
    """Of this rank."""
    head_dim: int
    qk_norm: QkNormScope | None
    """Over what queries and keys are normalised, if they are."""
    gate_blocks: int
    """m."""
    ffn: int
    """Width of a dense layer on this rank."""
    shared: int
    """Width of the shared expert on this rank; 0 without one."""
    expert: int
    """Width of an expert on this rank."""
    experts: int
    local_experts: int
    topk: int
    sees_context: bool
    """Whether the router has a second product, of preceding tokens."""
    sums_loads: bool
    """Whether each micro-batch sums loads over data-parallel ranks."""
    groups: int
    slots: int
    """C."""
    slots_here: int
    """Slots of a group and expert that this rank can fill."""
    ep: int
    etp: int
    gathers_rows: bool
    """Whether ranks that share an expert gather each other's rows."""
    shares: int
    """Ranks that hold the same tokens and divide the slots."""
    grouped: bool
    """Whether experts compute packed rows by grouped GEMMs."""
    chunks: int
    """N of slots, whose exchanges overlap."""
    bound: int | None
    """Rows of a bounded buffer for each expert-parallel rank."""
    vocab: int
    """Columns of the logits on this rank."""
    logits_chunk: int
    """Most tokens whose logits exist at once."""

    @classmethod
    def of(cls, config: RunConfig, layout: Layout, vocab_size: int) -> TensorSizes:
        """The sizes of a run on a layout."""
        model, moe, tp = config.model, config.moe, layout.tp
        capacity = capacity_of(
            moe.with_most_capacity,
            rows=layout.micro_batch_size,
            row_tokens=layout.seq_length,
            training=True,
        )
        # As `moe/exchange.py`: the ranks that share an expert hold the same tokens already.
        same_tokens = layout.ep == 1 and tp == layout.etp
        shares = 1 if same_tokens else tp
        choices = layout.micro_batch_size * layout.seq_length * moe.moe_router_topk
        bound = buffer_bound(moe, choices=choices, ranks=layout.ep, shares=shares, training=True)
        return cls(
            bytes=parameter_bytes(config),
            tp=tp,
            sequence_parallel=layout.sequence_parallel,
            rows=layout.micro_batch_size,
            row_tokens=layout.seq_length,
            hidden=model.hidden_size,
            heads=model.num_attention_heads // tp,
            kv_heads=model.key_value_heads // tp,
            head_dim=model.kv_channels,
            qk_norm=model.qk_layernorm_scope if model.qk_layernorm else None,
            gate_blocks=model.input_blocks,
            ffn=model.ffn_hidden_size // tp,
            shared=(moe.moe_shared_expert_intermediate_size or 0) // tp,
            expert=expert_width(model, moe) // layout.etp,
            experts=moe.num_experts,
            local_experts=moe.num_experts // layout.ep,
            topk=moe.moe_router_topk,
            sees_context=moe.moe_router_type == "contextual",
            sums_loads="global_aux_loss" in moe.load_balancing_types and layout.dp > 1,
            groups=capacity.groups,
            slots=capacity.slots,
            slots_here=-(-capacity.slots // shares),
            ep=layout.ep,
            etp=layout.etp,
            gathers_rows=layout.etp > 1 and not same_tokens,
            shares=shares,
            chunks=moe.moe_a2a_overlap_chunks if layout.ep > 1 else 1,
            grouped=moe.moe_expert_impl == "grouped",
            bound=None if bound is None else bound.rows,
            vocab=vocab_size // tp,
            logits_chunk=config.parallel.logits_chunk_tokens or chunk_tokens(vocab_size // tp),
        )

    @property
    def tokens(self) -> int:
        """T, of the micro-batch's sequences."""
        return self.rows * self.row_tokens

    @property
    def shard_tokens(self) -> int:
        """Tokens of the residual stream on this rank: T / TP under sequence parallelism."""
        return self.tokens // self.tp if self.sequence_parallel else self.tokens

    @property
    def residual(self) -> int:
        """The residual stream: t H."""
        return self.shard_tokens * self.hidden

    @property
    def whole(self) -> int:
        """Activations of whole sequences: T H."""
        return self.tokens * self.hidden

    @property
    def queries(self) -> int:
        """T n d."""
        return self.tokens * self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """T g d."""
        return self.tokens * self.kv_heads * self.head_dim

    @property
    def buffer_rows(self) -> int:
        """R: a row for every slot of every expert that this rank fills; of packed rows, as many as
        choices could fill, or the bound.
        """
        slots = self.experts * self.groups * self.slots_here
        if not self.grouped:
            return slots
        most = min(slots // self.ep, self.tokens * self.topk)
        return self.ep * (self.bound or most)

    @property
    def expert_rows(self) -> int:
        """R': rows that arrive at this rank's experts."""
        return self.buffer_rows * (self.etp if self.gathers_rows else 1)

    @property
    def sorts_rows(self) -> bool:
        """Whether rows that arrive from several ranks are sorted by expert."""
        return self.grouped and (self.ep > 1 or self.gathers_rows)

    @property
    def rows_of_one_expert(self) -> int:
        """Rows that one of this rank's experts computes; grouped GEMMs the filled ones, of an even
        load.
        """
        rows = self.expert_rows
        if self.grouped:
            arriving = self.tokens * self.topk // self.shares
            rows = min(rows, arriving * (self.etp if self.gathers_rows else 1))
        return rows // self.local_experts

    @property
    def logits_chunks(self) -> int:
        """Chunks of tokens into which logits and loss are divided."""
        return max(1, -(-self.tokens // self.logits_chunk))

    @property
    def logits_rows(self) -> int:
        """Tokens C of a chunk; chunks are of about equal size."""
        return -(-self.tokens // self.logits_chunks)

    @property
    def logits(self) -> int:
        """C V."""
        return self.logits_rows * self.vocab


def layers_of_stage(config: RunConfig, layout: Layout, stage: int) -> tuple[tuple[bool, ...], ...]:
    """For each model chunk of a stage, whether each of its layers has experts."""
    pattern = moe_layer_pattern(config.moe.moe_layer_freq, config.model.num_layers)
    return tuple(
        tuple(pattern[layer] for layer in layout.layers_of_chunk(stage, chunk))
        for chunk in range(layout.num_chunks)
    )

"""OpenMoE on one device, written to be read: the oracle for every parallel layout.

Plain PyTorch with nothing of the engine and nothing of the fast MoE layer, so that agreement with
it means something. Generation, evaluation and analysis run on it too. Sources: Xue et al., OpenMoE
(arXiv 2402.01739), and its released training code; `docs/model.md` says where the two differ.

Shapes: B batch, S sequence, T = B S tokens row by row, H hidden, N heads, D head width, F
feed-forward width, V vocabulary, E experts, K choices per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig, moe_layer_pattern
from megatron_moe.errors import UsageError
from megatron_moe.model.logical import (
    expert_width,
    gate_blocks,
    initial_tensors,
    logical_parameters,
    softmax_scale,
)
from megatron_moe.model.reference_routing import Routing, full_precision, route


@dataclass(frozen=True)
class ReferenceOutput:
    """The result of one forward pass over one micro-batch."""

    logits: Tensor
    """[B, S, V], fp32."""
    cross_entropy_BS: Tensor | None
    """-log p(label) per position; `None` without labels."""
    logit_z_BS: Tensor | None
    """log(Z)^2 per position, Z the normaliser of the softmax; `None` without labels."""
    aux_loss: Tensor
    """Load-balancing loss, mean over MoE layers, without its coefficient."""
    router_z_loss: Tensor
    """Router z-loss, mean over MoE layers, without its coefficient."""
    routing: list[Routing]
    """One record per MoE layer, in order."""
    loss: Tensor | None
    """`total_loss` with this micro-batch's own number of targets; `None` without labels."""


def rotate(x_BNSD: Tensor, base: float, positions_BS: Tensor | None = None) -> Tensor:
    """Rotary position embedding, half-split: channel i is paired with channel i + D/2.

    Position p turns pair i by the angle p * base^(-2i/D). Angles, sine and cosine are fp32.
    Without positions they count from the start of the row.
    """
    x = full_precision(x_BNSD)
    length, width = x.shape[-2:]
    exponents = torch.arange(0, width, 2, device=x.device, dtype=x.dtype) / width
    positions = torch.arange(length, device=x.device, dtype=x.dtype)
    if positions_BS is not None:
        positions = positions_BS[:, None].to(x.dtype)
    angles = positions[..., None] * (1.0 / base**exponents)  # [S, D/2] or [B, 1, S, D/2]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_BNSD.dtype)


def gated(gate: Tensor, up: Tensor, model: ModelConfig) -> Tensor:
    """The inside of a feed-forward layer: [.., F] from the gate and up projections.

    `swiglu`: silu(gate) * up (paper). `gated-swiglu`, gate = [a|b]: a * silu(b) * up (released).
    """
    if model.ffn_variant == "swiglu":
        return F.silu(gate) * up
    a, b = gate.chunk(2, dim=-1)
    return a * F.silu(b) * up


class RMSNorm(nn.Module):
    """T5's norm: x / sqrt(mean(x^2) + eps) in fp32, cast back, times a learned scale."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.hidden_size))
        self.epsilon = model.norm_epsilon

    def forward(self, x_BSH: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        x = full_precision(x_BSH)
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return x.to(x_BSH.dtype) * self.weight


class Attention(nn.Module):
    """Causal attention with RoPE on queries and keys; heads are head-major in the N*D rows."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        inner = model.num_attention_heads * model.kv_channels
        self.query = nn.Linear(model.hidden_size, inner, bias=False)
        self.key = nn.Linear(model.hidden_size, inner, bias=False)
        self.value = nn.Linear(model.hidden_size, inner, bias=False)
        self.output = nn.Linear(inner, model.hidden_size, bias=False)

    def forward(
        self, x_BSH: Tensor, positions_BS: Tensor | None = None, documents_BS: Tensor | None = None
    ) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        heads, base = (self.model.num_attention_heads, -1), self.model.rotary_base
        query = self.query(x_BSH).unflatten(-1, heads).transpose(1, 2)
        key = self.key(x_BSH).unflatten(-1, heads).transpose(1, 2)
        value = self.value(x_BSH).unflatten(-1, heads).transpose(1, 2)
        query, key = rotate(query, base, positions_BS), rotate(key, base, positions_BS)
        if documents_BS is None:
            y_BNSD = self._attend(query, key, value)
        else:
            y_BNSD = torch.cat(
                [
                    self._by_document(query[b], key[b], value[b], ids)
                    for b, ids in enumerate(documents_BS)
                ]
            )
        return self.output(y_BNSD.transpose(1, 2).flatten(2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, N, S, D] each: every position attends to those up to itself."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=softmax_scale(self.model),
            dropout_p=self.model.attention_dropout if self.training else 0.0,
        )

    def _by_document(self, query: Tensor, key: Tensor, value: Tensor, ids_S: Tensor) -> Tensor:
        """[N, S, D] each: a row, document by document as if each were alone; [1, N, S, D]."""
        lengths = torch.unique_consecutive(ids_S, return_counts=True)[1].tolist()
        parts = [tensor[None].split(lengths, dim=2) for tensor in (query, key, value)]
        return torch.cat([self._attend(*part) for part in zip(*parts, strict=True)], dim=2)


class FeedForward(nn.Module):
    """A dense feed-forward layer of width F, also the shared expert."""

    def __init__(self, model: ModelConfig, width: int) -> None:
        super().__init__()
        self.model = model
        self.gate = nn.Linear(model.hidden_size, gate_blocks(model) * width, bias=False)
        self.up = nn.Linear(model.hidden_size, width, bias=False)
        self.down = nn.Linear(width, model.hidden_size, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        return self.down(gated(self.gate(x_BSH), self.up(x_BSH), self.model))


class Experts(nn.Module):
    """The E routed experts of a layer, each a feed-forward layer, stored [E, in, out]."""

    def __init__(self, model: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.model = model
        experts, hidden, width = moe.num_experts, model.hidden_size, expert_width(model, moe)
        self.gate = nn.Parameter(torch.empty(experts, hidden, gate_blocks(model) * width))
        self.up = nn.Parameter(torch.empty(experts, hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x_TH: Tensor, ids_TK: Tensor, probs_TK: Tensor, kept_TK: Tensor) -> Tensor:
        """Sum over a token's kept choices of probability times expert output, [T, H]."""
        y_TH = torch.zeros(x_TH.shape, dtype=probs_TK.dtype, device=x_TH.device)
        for expert in range(self.gate.shape[0]):
            # Experts without tokens run on no rows, so that their gradients are zeros, not None.
            token, choice = (kept_TK & (ids_TK == expert)).nonzero(as_tuple=True)
            x = x_TH[token]
            inner = gated(x @ self.gate[expert], x @ self.up[expert], self.model)
            y_TH.index_add_(0, token, inner @ self.down[expert] * probs_TK[token, choice, None])
        return y_TH.to(x_TH.dtype)


class MoE(nn.Module):
    """Router, capacity and routed experts; the shared expert belongs to the block."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, layer: int) -> None:
        super().__init__()
        self.moe = moe
        self.layer = layer
        self.router = nn.Linear(model.hidden_size, moe.num_experts, bias=False)
        self.experts = Experts(model, moe)

    def forward(self, x_BSH: Tensor, training_capacity: bool) -> tuple[Tensor, Routing]:
        """[B, S, H] -> [B, S, H] and what was decided. Dropped choices contribute zero."""
        x_TH = x_BSH.flatten(0, 1)
        logits_TE = F.linear(full_precision(x_TH), full_precision(self.router.weight))
        rows = x_BSH.shape[0]
        routing = route(logits_TE, rows, self.moe, self.layer, training_capacity=training_capacity)
        y_TH = self.experts(x_TH, routing.ids_TK, routing.probs_TK, routing.kept_TK)
        return y_TH.view_as(x_BSH), routing


class Block(nn.Module):
    """One transformer layer: attention, then a dense feed-forward layer or experts."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, layer: int, is_moe: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(model)
        self.attention = Attention(model)
        self.ffn_norm = RMSNorm(model)
        self.dropout = nn.Dropout(model.hidden_dropout)
        self.ffn = None if is_moe else FeedForward(model, model.ffn_hidden_size)
        self.moe = MoE(model, moe, layer) if is_moe else None
        width = moe.moe_shared_expert_intermediate_size if is_moe else None
        sequential = moe.moe_shared_expert_placement == "sequential"
        self.shared_norm = RMSNorm(model) if width is not None and sequential else None
        self.shared = None if width is None else FeedForward(model, width)

    def forward(
        self, x_BSH: Tensor, training_capacity: bool, *places_BS: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        """[B, S, H] -> [B, S, H] and, for an MoE layer, what its router decided."""
        x = x_BSH + self.dropout(self.attention(self.attention_norm(x_BSH), *places_BS))
        normed = self.ffn_norm(x)
        if self.ffn is not None:
            return x + self.dropout(self.ffn(normed)), None
        assert self.moe is not None
        branch, routing = self.moe(normed, training_capacity)
        if self.shared is not None and self.shared_norm is None:
            branch = branch + self.shared(normed)
        x = x + self.dropout(branch)
        if self.shared is not None and self.shared_norm is not None:
            x = x + self.dropout(self.shared(self.shared_norm(x)))
        return x, routing


class ReferenceOpenMoE(nn.Module):
    """The whole network. `state_dict()` has the logical names of `megatron_moe.model.logical`.

    Args:
        model: the dense part.
        moe: the expert part.
        vocab_size: V, padded.
        seed: of the initial values; `None` leaves the memory as it is, to be loaded.
        device: where; on `meta` there are no values.
        dtype: of parameters and activations: fp32, bf16 or fp64.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        vocab_size: int,
        *,
        seed: int | None = 1234,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.model = model
        self.moe = moe
        self.vocab_size = vocab_size
        parameters = logical_parameters(model, moe, vocab_size)
        pattern = moe_layer_pattern(moe.moe_layer_freq, model.num_layers)
        with torch.device("meta"):  # PyTorch's own initialisation would be thrown away
            self.embedding = nn.Embedding(vocab_size, model.hidden_size)
            self.layers = nn.ModuleList(
                Block(model, moe, layer, is_moe) for layer, is_moe in enumerate(pattern)
            )
            self.final_norm = RMSNorm(model)
            self.output: nn.Linear | None = None
            if model.untie_embeddings_and_output_weights:
                self.output = nn.Linear(model.hidden_size, vocab_size, bias=False)
        self.to(dtype).to_empty(device=device)
        if seed is not None and torch.device(device).type != "meta":
            self.load_logical(initial_tensors(parameters, seed))

    @torch.no_grad()
    def load_logical(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy every logical tensor in, one at a time, cast to this model's dtype.

        Raises:
            UsageError: a name is unknown, missing or given twice, or a shape differs.
        """
        missing = dict(self.named_parameters())
        for name, tensor in tensors:
            if name not in missing:
                raise UsageError("tensor", name, "a name of this model, once")
            parameter = missing.pop(name)
            if parameter.shape != tensor.shape:
                expected = f"shape {tuple(parameter.shape)}"
                raise UsageError(f"tensor {name}", tuple(tensor.shape), expected)
            parameter.copy_(tensor)
        if missing:
            expected = f"all tensors of the model; missing {next(iter(missing))}"
            raise UsageError("number of tensors missing", len(missing), expected)

    def hidden_states(
        self,
        tokens_BS: Tensor,
        *,
        training_capacity: bool,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Everything before the logits: [B, S, H] after the final norm, and the routing."""
        x_BSH = self.embedding(tokens_BS)
        routing = []
        for layer in self.layers:
            x_BSH, decided = layer(x_BSH, training_capacity, positions_BS, documents_BS)
            if decided is not None:
                routing.append(decided)
        return self.final_norm(x_BSH), routing

    def logits(self, x_BSH: Tensor) -> Tensor:
        """[.., H] -> [.., V] in fp32. Tied embeddings start as N(0, 1), hence their 1/sqrt(H)."""
        x = full_precision(x_BSH)
        if self.output is not None:
            return F.linear(x, full_precision(self.output.weight))
        return F.linear(x / math.sqrt(x.shape[-1]), full_precision(self.embedding.weight))

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor | None = None,
        loss_mask_BS: Tensor | None = None,
        *,
        training_capacity: bool,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
    ) -> ReferenceOutput:
        """One micro-batch.

        Args:
            tokens_BS: int64 ids.
            labels_BS: int64 ids to predict at each position.
            loss_mask_BS: weight of each position; `None` counts all.
            training_capacity: the capacity factor of training rather than evaluation.
            positions_BS: of the rotary embedding; `None` counts from the start of each row.
            documents_BS: attention stays among equal numbers, which never fall along a row; `None`
                lets it see the row. Capacity groups are the same with and without.
        """
        x_BSH, routing = self.hidden_states(
            tokens_BS,
            training_capacity=training_capacity,
            positions_BS=positions_BS,
            documents_BS=documents_BS,
        )
        logits = self.logits(x_BSH)
        cross_entropy_BS = logit_z_BS = None
        if labels_BS is not None:
            log_z_BS = logits.logsumexp(dim=-1)
            target_BS = logits.gather(-1, labels_BS.unsqueeze(-1)).squeeze(-1)
            cross_entropy_BS, logit_z_BS = log_z_BS - target_BS, log_z_BS.square()
        zero, layers = logits.new_zeros(()), max(len(routing), 1)
        output = ReferenceOutput(
            logits=logits,
            cross_entropy_BS=cross_entropy_BS,
            logit_z_BS=logit_z_BS,
            aux_loss=sum((r.balance_loss for r in routing), zero) / layers,
            router_z_loss=sum((r.z_loss for r in routing), zero) / layers,
            routing=routing,
            loss=None,
        )
        if labels_BS is None:
            return output
        return replace(output, loss=self.total_loss(output, loss_mask_BS))

    def total_loss(
        self,
        output: ReferenceOutput,
        loss_mask_BS: Tensor | None = None,
        num_targets: Tensor | float | None = None,
    ) -> Tensor:
        """Sum of mask (CE + c_z log(Z)^2) / targets + c_aux aux + c_router router_z, for training.

        Args:
            output: of a forward pass with labels.
            loss_mask_BS: weight of each position; `None` counts all.
            num_targets: what the sum is divided by; `None` means the sum of the mask. With several
                micro-batches, the mean of the targets of all of them makes their losses' mean the
                loss of the global batch.
        """
        assert output.cross_entropy_BS is not None
        assert output.logit_z_BS is not None
        per_token_BS = output.cross_entropy_BS + self.model.logit_z_loss_coeff * output.logit_z_BS
        if loss_mask_BS is None:
            loss_mask_BS = torch.ones_like(per_token_BS)
        targets = loss_mask_BS.sum() if num_targets is None else num_targets
        return (
            (loss_mask_BS * per_token_BS).sum() / targets
            + self.moe.moe_aux_loss_coeff * output.aux_loss
            + self.moe.moe_z_loss_coeff * output.router_z_loss
        )

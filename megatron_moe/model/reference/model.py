"""OpenMoE on one device, written to be read: the oracle for every parallel layout.

Plain PyTorch with nothing of the engine and nothing of the fast MoE layer, so that agreement with
it means something. Generation, evaluation and analysis run on it too. Sources: Xue et al., OpenMoE
(arXiv 2402.01739), and its released training code; `docs/model.md` says where the two differ.

Shapes: B batch, S sequence, T = B S tokens row by row, H hidden, N heads, D head width, F
feed-forward width, V vocabulary, E experts, K choices per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig, moe_layer_pattern
from megatron_moe.errors import UsageError
from megatron_moe.model.logical import initial_tensors, logical_parameters
from megatron_moe.model.reference.attention import Attention
from megatron_moe.model.reference.cache import Cache, LayerMemory
from megatron_moe.model.reference.ffn import Experts, FeedForward
from megatron_moe.model.reference.routing import Routing, capacity_factor, full_precision, route


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


class MoE(nn.Module):
    """Router, capacity and routed experts; the shared expert belongs to the block."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, layer: int) -> None:
        super().__init__()
        self.moe = moe
        self.layer = layer
        self.router = nn.Linear(model.hidden_size, moe.num_experts, bias=False)
        self.experts = Experts(model, moe)

    def forward(
        self, x_BSH: Tensor, training_capacity: bool, real_BS: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """[B, S, H] -> [B, S, H] and what was decided. Dropped choices contribute zero.

        Padding, where ``real_BS`` is false, goes to no expert.
        """
        x_TH = x_BSH.flatten(0, 1)
        logits_TE = F.linear(full_precision(x_TH), full_precision(self.router.weight))
        rows = x_BSH.shape[0]
        routing = route(logits_TE, rows, self.moe, self.layer, training_capacity=training_capacity)
        if real_BS is not None:
            routing = replace(routing, kept_TK=routing.kept_TK & real_BS.flatten()[:, None])
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
        self,
        x_BSH: Tensor,
        training_capacity: bool,
        *places_BS: Tensor | None,
        memory: LayerMemory | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """[B, S, H] -> [B, S, H] and, for an MoE layer, what its router decided."""
        mixed = self.attention(self.attention_norm(x_BSH), *places_BS, memory=memory)
        x = x_BSH + self.dropout(mixed)
        normed = self.ffn_norm(x)
        if self.ffn is not None:
            return x + self.dropout(self.ffn(normed)), None
        assert self.moe is not None
        real_BS = None if memory is None else memory.step.real_BS
        branch, routing = self.moe(normed, training_capacity, real_BS)
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
            self.embedding_dropout = nn.Dropout(model.hidden_dropout)
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
        x_BSH = self.embedding_dropout(self.embedding(tokens_BS))
        routing = []
        for layer in self.layers:
            x_BSH, decided = layer(x_BSH, training_capacity, positions_BS, documents_BS)
            if decided is not None:
                routing.append(decided)
        return self.final_norm(x_BSH), routing

    def new_cache(self, rows: int, slots: int | None = None) -> Cache:
        """For ``rows`` rows of up to ``slots`` tokens, by default all that the model allows."""
        where = self.embedding.weight
        slots = self.model.max_position_embeddings if slots is None else slots
        return Cache(self.model, rows, slots, device=where.device, dtype=where.dtype)

    def continued(
        self, tokens_BS: Tensor, cache: Cache, counts: Sequence[int] | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """`hidden_states` of tokens that follow those in the cache, which then holds them as well.

        Args:
            tokens_BS: int64 ids; a row with fewer than S is filled up with any id, at its end.
            cache: of this model.
            counts: tokens of each row that are no padding; `None` means S. Values for padding mean
                nothing, and it is kept by no expert.

        Raises:
            UsageError: a row becomes longer than the cache, or the model drops tokens, which would
                make the result depend on what comes later.
        """
        factor = capacity_factor(self.moe, training_capacity=False)
        if factor is not None:
            expected = "None (dropless) with a cache: a later token may displace an earlier one"
            raise UsageError("--moe-eval-capacity-factor", factor, expected)
        rows, length = tokens_BS.shape
        step = cache.begin(rows, length, counts)
        x_BSH = self.embedding_dropout(self.embedding(tokens_BS))
        routing = []
        for number, layer in enumerate(self.layers):
            memory = cache.layer(number, step)
            x_BSH, decided = layer(x_BSH, False, step.positions_BS, memory=memory)
            if decided is not None:
                routing.append(decided)
        cache.finish(step)
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

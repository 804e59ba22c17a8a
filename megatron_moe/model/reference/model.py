"""The network: from token ids to logits and losses.

    x = dropout(embedding[tokens])
    each block:             x = x + dropout(Attention(norm(x)))
        dense:              x = x + dropout(FFN(norm(x)))
        MoE, released:      x = x + dropout(MoE(norm(x)));  x = x + dropout(shared(norm(x)))
        MoE, paper (eq. 4): x = x + dropout(MoE(h) + shared(h)),  h = norm(x)
    logits = norm(x) W_out

Sources: Xue et al., OpenMoE (arXiv 2402.01739), and its released training code; `docs/model.md`
lists where the two differ.

Shapes: B batch rows, S sequence, T = B S tokens row by row, H hidden, V vocabulary.
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
from megatron_moe.model.reference.cache import KVCache, LayerCache
from megatron_moe.model.reference.ffn import FeedForward, MoE
from megatron_moe.model.reference.norm import RMSNorm
from megatron_moe.model.reference.routing import Routing, capacity_factor, full_precision


@dataclass(frozen=True)
class ReferenceOutput:
    """Result of one forward pass over one micro-batch."""

    logits: Tensor
    """[B, S, V], fp32."""
    cross_entropy_BS: Tensor | None
    """-log p(label) per position; `None` without labels."""
    logit_z_BS: Tensor | None
    """log(Z)^2 per position, Z = sum of exp(logits); `None` without labels."""
    aux_loss: Tensor
    """The first load-balancing loss, mean over MoE layers, without its coefficient."""
    aux_losses: tuple[Tensor, ...]
    """Likewise each of them."""
    router_z_loss: Tensor
    """Router z-loss, mean over MoE layers, without its coefficient."""
    routing: list[Routing]
    """One record per MoE layer, in order."""
    loss: Tensor | None
    """`total_loss` divided by the targets of this micro-batch; `None` without labels."""


class DecoderBlock(nn.Module):
    """One transformer layer: attention, then a dense feed-forward layer or experts.

    `moe` and `ffn` exclude each other. `shared` is the shared expert of an MoE layer; it has a
    norm of its own (`shared_norm`) in the sequential placement only.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig, layer: int, is_moe: bool) -> None:
        super().__init__()
        self.zeroes_padding = model.zero_padding_activations
        self.ignores_padding = moe.moe_ignore_padding_tokens
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
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        padding_BS: Tensor | None = None,
        cache: LayerCache | None = None,
        tokens_BS: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """[B, S, H] -> [B, S, H] and, for an MoE layer, its routing decisions."""
        zeroed_BS = padding_BS if self.zeroes_padding else None
        normed = without_padding(self.attention_norm(x_BSH), zeroed_BS)
        x = x_BSH + self.dropout(self.attention(normed, positions_BS, documents_BS, cache))
        normed = without_padding(self.ffn_norm(x), zeroed_BS)
        if self.ffn is not None:
            return x + self.dropout(self.ffn(normed)), None
        assert self.moe is not None
        valid_BS = None if cache is None else cache.step.valid_BS
        if padding_BS is not None and self.ignores_padding:
            valid_BS = padding_BS == 0
        context_BE = None if cache is None else cache.context_BE
        branch, routing = self.moe(
            normed, training_capacity, valid_BS, context_BE, tokens_BS, documents_BS
        )
        # Parallel placement: one branch, one dropout over the sum.
        if self.shared is not None and self.shared_norm is None:
            branch = branch + self.shared(normed)
        x = x + self.dropout(branch)
        if self.shared is not None and self.shared_norm is not None:
            normed = without_padding(self.shared_norm(x), zeroed_BS)
            x = x + self.dropout(self.shared(normed))
        return x, routing


def without_padding(x_BSH: Tensor, padding_BS: Tensor | None) -> Tensor:
    """``x_BSH`` times 0 at padding and 1 elsewhere, as released; as it is without padding."""
    return x_BSH if padding_BS is None else x_BSH * (padding_BS == 0).unsqueeze(-1)


class ReferenceOpenMoE(nn.Module):
    """The whole network. `state_dict()` has the logical names of `megatron_moe.model.logical`.

    Args:
        model: configuration of the dense part.
        moe: configuration of the MoE layers.
        vocab_size: V, padded.
        seed: seed of the initial values; `None` leaves parameters uninitialised, to be loaded.
        device: device of the parameters; `meta` allocates none.
        dtype: dtype of parameters and activations: fp32, bf16 or fp64.
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
        with torch.device("meta"):  # skips PyTorch's own initialisation, which is not used
            self.embedding = nn.Embedding(vocab_size, model.hidden_size)
            self.embedding_dropout = nn.Dropout(model.hidden_dropout)
            self.layers = nn.ModuleList(
                DecoderBlock(model, moe, layer, is_moe) for layer, is_moe in enumerate(pattern)
            )
            self.final_norm = RMSNorm(model)
            self.output: nn.Linear | None = None
            if model.untie_embeddings_and_output_weights:
                self.output = nn.Linear(model.hidden_size, vocab_size, bias=False)
        self.to(dtype)
        for part in self.modules():
            # Whatever the dtype: in bf16 small steps of a bias would be lost.
            if isinstance(part, MoE) and part.bias_E is not None:
                part.bias_E.data = full_precision(part.bias_E.data)
        self.to_empty(device=device)
        if seed is not None and torch.device(device).type != "meta":
            self.load_logical(initial_tensors(parameters, seed))

    @torch.no_grad()
    def load_logical(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy every logical tensor into the model, one at a time, cast to the model's dtype.

        Raises:
            UsageError: a name is unknown, missing or given twice, or a shape differs.
        """
        missing = dict(self.named_parameters())
        for name, tensor in tensors:
            if name not in missing:
                expected = "a tensor of this model, each given once"
                raise UsageError("name of a tensor", name, expected)
            parameter = missing.pop(name)
            if parameter.shape != tensor.shape:
                expected = str(tuple(parameter.shape))
                raise UsageError(f"shape of {name}", tuple(tensor.shape), expected)
            parameter.copy_(tensor)
        if missing:
            fix = f"the first one missing is {next(iter(missing))}"
            raise UsageError("number of missing tensors", len(missing), "0", fix)

    def hidden_states(
        self,
        tokens_BS: Tensor,
        *,
        training_capacity: bool,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        padding_BS: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Everything before the logits: [B, S, H] after the final norm, and the routing."""
        x_BSH = self.embedding_dropout(self.embedding(tokens_BS))
        routing = []
        for block in self.layers:
            x_BSH, decisions = block(
                x_BSH,
                training_capacity,
                positions_BS,
                documents_BS,
                padding_BS,
                tokens_BS=tokens_BS,
            )
            if decisions is not None:
                routing.append(decisions)
        zeroed_BS = padding_BS if self.model.zero_padding_activations else None
        return without_padding(self.final_norm(x_BSH), zeroed_BS), routing

    def new_cache(self, rows: int, slots: int | None = None) -> KVCache:
        """A KV cache for rows of up to ``slots`` tokens each, by default the model's maximum."""
        weight = self.embedding.weight
        slots = self.model.max_position_embeddings if slots is None else slots
        experts = None
        if self.moe.moe_router_type == "contextual":
            layers = range(self.model.num_layers)
            experts = [self.moe.of_layer(i, len(layers)).num_experts for i in layers]
        return KVCache(
            self.model, rows, slots, device=weight.device, dtype=weight.dtype, experts=experts
        )

    def hidden_states_with_cache(
        self, tokens_BS: Tensor, cache: KVCache, counts: Sequence[int] | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """`hidden_states` of tokens that follow the cached ones; adds them to the cache.

        Args:
            tokens_BS: int64 ids; a row with fewer than S tokens is padded at its end with any id.
            cache: from `new_cache` of this model.
            counts: tokens of each row that are not padding; `None` means S. Values at padding are
                meaningless, and no expert processes it.

        Raises:
            UsageError: a row becomes longer than the cache, or the model has a capacity factor,
                under which the result would depend on later tokens.
        """
        factor = capacity_factor(self.moe, training_capacity=False)
        if factor is not None:
            expected = "None (dropless) with a KV cache"
            reason = "under a capacity a later token may displace an earlier one"
            raise UsageError("--moe-eval-capacity-factor", factor, expected, reason)
        rows, length = tokens_BS.shape
        step = cache.begin(rows, length, counts)
        x_BSH = self.embedding_dropout(self.embedding(tokens_BS))
        routing = []
        for number, block in enumerate(self.layers):
            layer_cache = cache.layer(number, step)
            x_BSH, decisions = block(
                x_BSH, False, step.positions_BS, cache=layer_cache, tokens_BS=tokens_BS
            )
            if decisions is not None:
                routing.append(decisions)
        cache.finish(step)
        return self.final_norm(x_BSH), routing

    def logits(self, x_BSH: Tensor) -> Tensor:
        """[.., H] -> [.., V] in fp32.

        Tied embeddings are initialised as N(0, 1), which would give logits a standard deviation of
        sqrt(H); the factor 1/sqrt(H) of `--scale-tied-logits` brings it to 1, as in T5.
        """
        x = full_precision(x_BSH)
        if self.output is not None:
            return F.linear(x, full_precision(self.output.weight))
        if self.model.scale_tied_logits:
            x = x / math.sqrt(x.shape[-1])
        return F.linear(x, full_precision(self.embedding.weight))

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor | None = None,
        loss_mask_BS: Tensor | None = None,
        *,
        training_capacity: bool,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        padding_BS: Tensor | None = None,
    ) -> ReferenceOutput:
        """Forward pass over one micro-batch.

        Args:
            tokens_BS: int64 ids.
            labels_BS: int64 ids to predict at each position.
            loss_mask_BS: weight of each position; `None` weighs all alike.
            training_capacity: the capacity factor of training rather than evaluation.
            positions_BS: rotary positions; `None` counts from the start of each row.
            documents_BS: document number of each token, non-decreasing along a row; attention is
                restricted to equal numbers. `None` means the whole row. Capacity groups do not
                depend on it.
            padding_BS: not 0 at padding, which is set to zero at the input of every layer and of
                the logits with `--zero-padding-activations`, and not routed with
                `--moe-ignore-padding-tokens`; `None` if there is none.
        """
        x_BSH, routing = self.hidden_states(
            tokens_BS,
            training_capacity=training_capacity,
            positions_BS=positions_BS,
            documents_BS=documents_BS,
            padding_BS=padding_BS,
        )
        logits = self.logits(x_BSH)
        cross_entropy_BS = logit_z_BS = None
        if labels_BS is not None:
            log_z_BS = logits.logsumexp(dim=-1)
            target_BS = logits.gather(-1, labels_BS.unsqueeze(-1)).squeeze(-1)
            cross_entropy_BS, logit_z_BS = log_z_BS - target_BS, log_z_BS.square()
        zero, layers = logits.new_zeros(()), max(len(routing), 1)
        aux_losses = tuple(
            sum((r.balance_losses[i] for r in routing), zero) / layers
            for i in range(len(self.moe.load_balancing_types))
        )
        output = ReferenceOutput(
            logits=logits,
            cross_entropy_BS=cross_entropy_BS,
            logit_z_BS=logit_z_BS,
            aux_loss=aux_losses[0],
            aux_losses=aux_losses,
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
        """The training loss: sum(mask (CE + c_z log(Z)^2)) / targets + c_aux aux + c_rz router_z.

        With `--moe-loss-convention megatron` the load-balancing loss is divided by K, to be 1 when
        balanced, and both router losses are sums over MoE layers instead of means.

        Args:
            output: of a forward pass with labels.
            loss_mask_BS: weight of each position; `None` weighs all alike.
            num_targets: divisor of the sum; `None` means the sum of the mask. With several
                micro-batches, pass the mean number of targets per micro-batch: the mean of the
                losses is then the loss of the global batch.
        """
        assert output.cross_entropy_BS is not None
        assert output.logit_z_BS is not None
        per_token_BS = output.cross_entropy_BS + self.model.logit_z_loss_coeff * output.logit_z_BS
        if loss_mask_BS is None:
            loss_mask_BS = torch.ones_like(per_token_BS)
        targets = loss_mask_BS.sum() if num_targets is None else num_targets
        weighted = zip(self.moe.aux_loss_coeffs, output.aux_losses, strict=True)
        aux_loss = sum((c * loss for c, loss in weighted), torch.zeros_like(output.aux_loss))
        router_z_loss = output.router_z_loss
        if self.moe.moe_loss_convention == "megatron":
            layers = len(output.routing)
            aux_loss = aux_loss / self.moe.moe_router_topk * layers
            router_z_loss = router_z_loss * layers
        return (
            (loss_mask_BS * per_token_BS).sum() / targets
            + aux_loss
            + self.moe.moe_z_loss_coeff * router_z_loss
        )

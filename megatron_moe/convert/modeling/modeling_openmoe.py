"""OpenMoE for `transformers`: the network of the checkpoint beside this file.

    each block:             x = x + Attention(norm(x))
        dense:              x = x + FFN(norm(x))
        experts, released:  x = x + MoE(norm(x));  x = x + shared(norm(x))
        experts, parallel:  x = x + MoE(h) + shared(h),  h = norm(x)
    logits = norm(x) W_out

Needs torch and transformers, no other package. Unless `moe_capacity` says otherwise nothing is
dropped, so a row depends on nothing beside it: not on other rows, later tokens or padding, and
generation with a cache gives the logits of a pass over the whole row. Source: Xue et al., OpenMoE
(arXiv 2402.01739), and the released checkpoints.

Shapes: B rows, S new tokens of a row, U tokens that can be attended to, H hidden, N query heads,
M key and value heads, D head width, T = B S tokens row by row, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .configuration_openmoe import OpenMoeConfig
from .experts_openmoe import (
    OpenMoeExperts,
    OpenMoeMLP,
    OpenMoeRMSNorm,
    OpenMoeSparseMLP,
    capacity_group,
    full_precision,
    router_losses,
)

IGNORED = -100
"""Label of positions without a target."""
TIED: Any = {"lm_head.weight": "model.embed_tokens.weight"}
"""Tensors that may share their memory; before its fifth version `transformers` takes a list."""
if int(transformers.__version__.split(".")[0]) < 5:
    TIED = list(TIED)


@dataclass
class OpenMoeOutput(MoeCausalLMOutputWithPast):  # type: ignore[misc]
    """Output of `OpenMoeForCausalLM`; losses of the router are without their weights."""

    router_z_loss: Tensor | None = None
    """Mean of logsumexp(router logits)^2; with `output_router_logits`."""


@dataclass
class Step:
    """What all layers of one forward pass share."""

    cos: Tensor
    """[B, 1, S, D/2], of the angles of the new tokens."""
    sin: Tensor
    mask: Tensor | None
    """[B, 1, S, U], which tokens each new one attends to; `None` means all before it."""
    past: int
    """Cached tokens of a row."""
    valid: Tensor | None
    """[B, S], false for padding; `None` if there is none."""
    cache: Cache | None
    weights: bool
    """Whether to return attention probabilities."""

    def to(self, device: Any, **options: Any) -> Step:
        """A copy on a device: `accelerate` calls it where layers are on several."""
        names = ("cos", "sin", "mask", "valid")  # the cache places each layer's part itself
        found = {name: getattr(self, name) for name in names}
        moved: dict[str, Any] = {
            n: None if x is None else x.to(device, **options) for n, x in found.items()
        }
        return replace(self, **moved)


def rotate(x_BNSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: channel i is paired with channel i + D/2."""
    first, second = full_precision(x_BNSD).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_BNSD.dtype)


class OpenMoeAttention(nn.Module):
    """Causal attention with rotary positions; key heads may be shared by groups of queries."""

    def __init__(self, config: OpenMoeConfig, layer: int) -> None:
        super().__init__()
        self.layer_idx = layer
        self.width = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.scale = config.softmax_scale or config.head_dim**-0.5
        self.dropout = config.attention_dropout
        hidden, heads = config.hidden_size, config.num_attention_heads * self.width
        shared = config.num_key_value_heads * self.width
        self.q_proj = nn.Linear(hidden, heads, bias=False)
        self.k_proj = nn.Linear(hidden, shared, bias=False)
        self.v_proj = nn.Linear(hidden, shared, bias=False)
        self.o_proj = nn.Linear(heads, hidden, bias=False)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        self.norms_heads = config.qk_layernorm_scope == "head"
        if config.qk_layernorm:
            widths = (self.width, self.width) if self.norms_heads else (heads, shared)
            self.q_norm, self.k_norm = (OpenMoeRMSNorm(w, config.rms_norm_eps) for w in widths)

    def forward(self, x_BSH: Tensor, step: Step) -> tuple[Tensor, Tensor | None]:
        """[B, S, H] -> [B, S, H], and the probabilities [B, N, S, U] if they are wanted."""
        query = self._heads(self.q_proj(x_BSH), self.q_norm)
        key = self._heads(self.k_proj(x_BSH), self.k_norm)
        value = self._heads(self.v_proj(x_BSH), None)
        query, key = rotate(query, step.cos, step.sin), rotate(key, step.cos, step.sin)
        if step.cache is not None:
            key, value = step.cache.update(key, value, self.layer_idx)
        # A cache of fixed size is longer than what it holds.
        used = step.past + query.shape[2] if step.mask is None else step.mask.shape[-1]
        key, value = key[:, :, :used], value[:, :, :used]
        if self.groups > 1:
            key = key.repeat_interleave(self.groups, dim=1)
            value = value.repeat_interleave(self.groups, dim=1)
        y_BNSD, probabilities = self._attend(query, key, value, step)
        return self.o_proj(y_BNSD.transpose(1, 2).flatten(2)), probabilities

    def _heads(self, x_BSI: Tensor, norm: nn.Module | None) -> Tensor:
        """The output of a projection as heads, normalised, [B, S, I] -> [B, I / D, S, D]."""
        if norm is not None and not self.norms_heads:
            x_BSI = norm(x_BSI)
        heads = x_BSI.unflatten(-1, (-1, self.width))
        if norm is not None and self.norms_heads:
            heads = norm(heads)
        return heads.transpose(1, 2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, step: Step
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not step.weights:
            causal = step.mask is None and query.shape[2] > 1
            y_BNSD = F.scaled_dot_product_attention(
                query, key, value, step.mask, dropout, is_causal=causal, scale=self.scale
            )
            return y_BNSD, None
        logits = full_precision(query @ key.transpose(2, 3)) * self.scale
        mask = step.mask
        if mask is None:
            shape = logits.shape[-2:]
            mask = torch.ones(shape, dtype=torch.bool, device=key.device).tril(step.past)
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        probabilities = logits.softmax(dim=-1).to(query.dtype)
        return F.dropout(probabilities, dropout) @ value, probabilities


class OpenMoeDecoderLayer(nn.Module):
    """One block. The names of the modules are those of the published tensors."""

    def __init__(self, config: OpenMoeConfig, layer: int) -> None:
        super().__init__()
        hidden, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = OpenMoeRMSNorm(hidden, epsilon)
        self.self_attn = OpenMoeAttention(config, layer)
        self.post_attention_layernorm = OpenMoeRMSNorm(hidden, epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.is_moe = config.has_experts(layer)
        self.mlp: nn.Module = OpenMoeMLP(config, config.intermediate_size)
        self.pre_extra_mlp_layernorm: nn.Module | None = None
        self.extra_mlp: nn.Module | None = None
        if self.is_moe:
            self.mlp = OpenMoeSparseMLP(config)
            shared = config.shared_expert_intermediate_size
            if shared != 0:
                self.extra_mlp = OpenMoeMLP(config, shared or config.intermediate_size)
                if config.shared_expert_placement == "sequential":
                    self.pre_extra_mlp_layernorm = OpenMoeRMSNorm(hidden, epsilon)

    def forward(self, x_BSH: Tensor, step: Step) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[B, S, H] -> [B, S, H], router logits [T, E], attention probabilities."""
        branch, attention = self.self_attn(self.input_layernorm(x_BSH), step)
        x = x_BSH + self.dropout(branch)
        normed = self.post_attention_layernorm(x)
        if not self.is_moe:
            return x + self.dropout(self.mlp(normed)), None, attention
        branch, logits_TE = self.mlp(normed, step.valid)
        shared, norm = self.extra_mlp, self.pre_extra_mlp_layernorm
        if shared is not None and norm is None:
            branch = branch + shared(normed)
        x = x + self.dropout(branch)
        if shared is not None and norm is not None:
            x = x + self.dropout(shared(norm(x)))
        return x, logits_TE, attention


class OpenMoePreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What `transformers` needs to know about the network."""

    config_class = OpenMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("OpenMoeDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_cache_class = True

    def _init_weights(self, module: nn.Module) -> None:
        """Values of tensors that no file holds."""
        std = self.config.initializer_range
        if isinstance(module, OpenMoeRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding | OpenMoeExperts | OpenMoeSparseMLP):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, 0.0, std)


class OpenMoeModel(OpenMoePreTrainedModel):
    """Everything before the logits."""

    def __init__(self, config: OpenMoeConfig) -> None:
        super().__init__(config)
        config.check()
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout_rate)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(OpenMoeDecoderLayer(config, layer) for layer in layers)
        self.norm = OpenMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Hidden states of new tokens after the final norm, [B, S, H], and what else is wanted.

        Args:
            input_ids: [B, S].
            attention_mask: [B, past + S], 0 for padding, on either side; or [B, 1, S, U].
            position_ids: [B, S]; by default each row's tokens are counted without its padding.
            past_key_values: keys and values of earlier tokens.
            inputs_embeds: [B, S, H], in place of ids.
            use_cache: return the cache; without a value, outside of training.
            output_attentions: return attention probabilities.
            output_hidden_states: return the input of every layer and the last output.
            output_router_logits: return [T, E] of every MoE layer.
            return_dict: false for a tuple.

        Raises:
            ValueError: neither ids nor embeddings, or padding or a cache where experts have a
                capacity.
        """
        config = self.config
        config.check()  # once more: its values can be set at any time
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BSH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = config.use_cache and not self.training and config.moe_capacity == "dropless"
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        attentions = config.output_attentions if output_attentions is None else output_attentions
        step = self._step(x_BSH, attention_mask, position_ids, past_key_values, bool(attentions))
        states: list[Tensor] = []
        routers: list[Tensor] = []
        probabilities: list[Tensor | None] = []
        x_BSH = self.dropout(x_BSH)
        for layer in self.layers:
            states.append(x_BSH)
            if self.gradient_checkpointing and self.training:
                found = self._gradient_checkpointing_func(layer.__call__, x_BSH, step)
            else:
                found = layer(x_BSH, step)
            x_BSH = found[0]
            routers.extend(found[1:2] if layer.is_moe else ())
            probabilities.append(found[2])
        x_BSH = self.norm(x_BSH)
        states.append(x_BSH)
        hidden = (
            config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        router = (
            config.output_router_logits if output_router_logits is None else output_router_logits
        )
        output = MoeModelOutputWithPast(
            last_hidden_state=x_BSH,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(states) if hidden else None,
            attentions=tuple(probabilities) if attentions else None,
            router_logits=tuple(routers) if router else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _step(
        self,
        x_BSH: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        weights: bool,
    ) -> Step:
        """Positions, mask and padding of the new tokens."""
        length, device = x_BSH.shape[1], x_BSH.device
        past = 0 if cache is None else int(cache.get_seq_length())
        places_S = torch.arange(past, past + length, device=device)
        valid, mask, positions = None, None, places_S[None]
        if attention_mask is not None and attention_mask.dim() == 4:
            mask = attention_mask
        elif attention_mask is not None and not attention_mask.bool().all():
            seen_BU = attention_mask[:, : past + length].bool()
            valid = seen_BU[:, past:]
            positions = (seen_BU.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
            slots_U = torch.arange(past + length, device=device)
            own = slots_U == places_S[:, None]  # padding sees itself: a row of no keys gives NaN
            mask = (slots_U <= places_S[:, None]) & (seen_BU[:, None] | own)
            mask = mask[:, None]
        elif past and length > 1:
            slots_U = torch.arange(past + length, device=device)
            mask = (slots_U <= places_S[:, None])[None, None]
        if self.config.moe_capacity != "dropless" and (cache is not None or valid is not None):
            raise ValueError(
                f"moe_capacity must be 'dropless' with padding or a cache "
                f"(got {self.config.moe_capacity!r}): later tokens and other rows would displace "
                "earlier ones; pass use_cache=False and rows without padding"
            )
        kind = torch.float64 if x_BSH.dtype == torch.float64 else torch.float32
        positions = (positions if position_ids is None else position_ids).to(kind)
        exponents = torch.arange(0, self.config.head_dim, 2, device=device, dtype=kind)
        base: Any = self.config.rope_theta
        angles = positions[:, None, :, None] / base ** (exponents / self.config.head_dim)
        return Step(angles.cos(), angles.sin(), mask, past, valid, cache, weights)


class OpenMoeHead(nn.Linear):
    """The output matrix [V, H]; `model.lm_head.float()` saves a bf16 model its cast per token."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] -> [.., V], in fp32."""
        return F.linear(full_precision(x), full_precision(self.weight))


class OpenMoeForCausalLM(OpenMoePreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The language model."""

    _tied_weights_keys = TIED

    def __init__(self, config: OpenMoeConfig) -> None:
        super().__init__(config)
        self.model = OpenMoeModel(config)
        self.lm_head = OpenMoeHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The output matrix."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the output matrix; after a change of the vocabulary it is a plain `nn.Linear`."""
        rows, width = new_embeddings.weight.shape
        self.lm_head = OpenMoeHead(width, rows, bias=False, device="meta")
        self.lm_head.weight = new_embeddings.weight

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Inputs of the next step.

        Raises:
            ValueError: experts have a capacity for which the rows of the batch would compete.
        """
        config, (rows, length) = self.config, input_ids.shape
        competing = config.moe_capacity != "dropless" and rows > 1
        if competing and capacity_group(config, rows, length) > length:
            raise ValueError(
                f"generate must get one row (got {rows}): with moe_capacity "
                f"{config.moe_capacity!r} the rows of a batch share the slots of the experts"
            )
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, S, V] in fp32, and with labels the loss.

        The loss is the mean cross entropy. With `output_router_logits` it is the training loss:
        the z-loss of the logits and the two losses of the router are added with their weights.

        Args:
            input_ids: see `OpenMoeModel.forward`, as for all arguments not listed here.
            attention_mask: see there.
            position_ids: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            labels: [B, S], token ids, which are shifted here; `IGNORED` for none.
            output_router_logits: return router logits and losses.
            return_dict: false for a tuple.
            logits_to_keep: compute the last logits of a row only, or those at given places.
            num_items_in_batch: targets of all micro-batches of a step, the divisor of the loss.
            kwargs: passed on to the model.
        """
        router = self.config.output_router_logits
        router = router if output_router_logits is None else output_router_logits
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            output_router_logits=router,
            **kwargs,
        )
        x_BSH, keep = found.last_hidden_state, logits_to_keep
        kept = slice(-keep, None) if isinstance(keep, int) and keep else slice(None)
        x = x_BSH[:, keep if isinstance(keep, Tensor) else kept]
        if self.config.tie_word_embeddings and self.config.scale_tied_logits:
            x = full_precision(x) / math.sqrt(x.shape[-1])
        logits = self.lm_head(x)
        output = OpenMoeOutput(
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            router_logits=found.router_logits,
        )
        if router:
            valid = torch.ones(x_BSH.shape[:2], dtype=torch.bool, device=x_BSH.device)
            if attention_mask is not None and attention_mask.dim() == 2:
                valid = attention_mask[:, -x_BSH.shape[1] :].bool()
            losses = router_losses(self.config, found.router_logits, valid)
            output.aux_loss, output.router_z_loss = (each.to(logits.device) for each in losses)
        if labels is not None:
            output.loss = self._loss(output, labels, bool(router), num_items_in_batch)
        return output.to_tuple() if return_dict is False else output

    def _loss(
        self, output: OpenMoeOutput, labels: Tensor, whole: bool, items: Tensor | int | None
    ) -> Tensor:
        config, logits = self.config, output.logits[:, :-1].flatten(0, 1)
        targets = labels[:, 1:].to(logits.device).flatten()
        counted = targets != IGNORED
        logits, targets = logits[counted], targets[counted]
        each = F.cross_entropy(logits, targets, reduction="none")
        if whole:
            each = each + config.z_loss_factor * logits.logsumexp(dim=-1).square()
        divisor = counted.sum() if items is None else items
        loss = each.sum() / divisor
        if whole:
            # The share of this micro-batch: over all of a step, these are weighted means.
            share = counted.sum() / divisor
            loss = loss + share * config.router_aux_loss_factor * output.aux_loss
            loss = loss + share * config.router_z_loss_factor * output.router_z_loss
        return loss

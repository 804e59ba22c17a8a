"""OpenMoE for `transformers`: the network of the checkpoint beside this file.

    each block:             x = x + Attention(norm(x))
        dense:              x = x + FFN(norm(x))
        experts, released:  x = x + MoE(norm(x));  x = x + shared(norm(x))
        experts, parallel:  x = x + MoE(h) + shared(h),  h = norm(x)
    FFN(x) = inner(x W_gate, x W_up) W_down
    MoE(x)_t = sum over the kept choices (e, p) of token t of  p * FFN_e(x_t),  p = softmax(x W_r)
    logits = norm(x) W_out

Needs torch and transformers, no other package. Unless `moe_capacity` says otherwise nothing is
dropped, so a row depends on nothing beside it: not on other rows, later tokens or padding, and
generation with a cache gives the logits of a pass over the whole row. Source: Xue et al., OpenMoE
(arXiv 2402.01739), and the released checkpoints.

Shapes: B rows, S new tokens of a row, U tokens that can be attended to, H hidden, N query heads,
M key and value heads, D head width, T = B S tokens row by row, F feed-forward width, E experts,
K choices of a token, G capacity groups, A choices of a group, R rows over which the balance loss is
taken, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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

IGNORED = -100
"""Label of positions without a target."""
TIED: Any = {"lm_head.weight": "model.embed_tokens.weight"}
"""Tensors that may share their memory; before its fifth version `transformers` takes a list."""
if int(transformers.__version__.split(".")[0]) < 5:
    TIED = list(TIED)


def full_precision(x: Tensor) -> Tensor:
    """fp32, or fp64 if it already is: the precision of norms, angles, router and logits."""
    return x if x.dtype == torch.float64 else x.float()


class OpenMoeRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in fp32, cast back, times a learned scale."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[.., width] -> [.., width]."""
        y = full_precision(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon)
        return y.to(x.dtype) * self.weight


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """The gated activation, [.., F]; with `swiglu` the gate is [a | b] of width 2F."""
    if act == "silu":
        return F.silu(gate) * up
    a, b = gate.chunk(2, dim=-1)
    return a * F.silu(b) * up


class OpenMoeMLP(nn.Module):
    """A feed-forward layer: the dense layer, the shared expert, or an expert on its own."""

    def __init__(self, config: OpenMoeConfig, width: int) -> None:
        super().__init__()
        self.act = config.hidden_act
        hidden, blocks = config.hidden_size, 2 if self.act == "swiglu" else 1
        self.gate_proj = nn.Linear(hidden, blocks * width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] -> [.., H]."""
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.act))


class OpenMoeExperts(nn.Module):
    """Experts as three tensors [E, in, out]: the layout `stacked`."""

    def __init__(self, config: OpenMoeConfig, width: int) -> None:
        super().__init__()
        self.act = config.hidden_act
        experts, hidden, blocks = config.num_experts, config.hidden_size, 1 + (self.act != "silu")
        self.wi_gate = nn.Parameter(torch.empty(experts, hidden, blocks * width))
        self.wi_up = nn.Parameter(torch.empty(experts, hidden, width))
        self.wo = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor) -> Tensor:
        """Sum of the outputs of each token's experts, weighted, [T, H]."""

        def run(expert: int, x: Tensor) -> Tensor:
            inner = gated(x @ self.wi_gate[expert], x @ self.wi_up[expert], self.act)
            return inner @ self.wo[expert]

        return combine(run, len(self.wo), x_TH, ids_TK, weights_TK, kept_TK)


class OpenMoeExpertList(nn.ModuleList):
    """Experts as modules: the layout `unstacked`."""

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor) -> Tensor:
        """As `OpenMoeExperts`."""
        run = lambda expert, x: self[expert](x)  # noqa: E731
        return combine(run, len(self), x_TH, ids_TK, weights_TK, kept_TK)


def combine(
    run: Callable[[int, Tensor], Tensor],
    experts: int,
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    kept_TK: Tensor,
) -> Tensor:
    """Sum over the kept choices of each token of weight times expert output, [T, H], in fp32."""
    y_TH = torch.zeros(x_TH.shape, dtype=weights_TK.dtype, device=x_TH.device)
    # With gradients every expert runs, so that each has a gradient in every backward pass.
    used = range(experts) if torch.is_grad_enabled() else ids_TK[kept_TK].unique().tolist()
    for expert in used:
        token, choice = (kept_TK & (ids_TK == expert)).nonzero(as_tuple=True)
        y_TH.index_add_(0, token, run(expert, x_TH[token]) * weights_TK[token, choice, None])
    return y_TH.to(x_TH.dtype)


class OpenMoeRouter(nn.Linear):
    """The router of the layout `unstacked`, [E, H]."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] -> [.., E], in fp32."""
        return F.linear(full_precision(x), full_precision(self.weight))


class OpenMoeSparseMLP(nn.Module):
    """Router and experts: the K most probable experts, weighted by their probabilities."""

    def __init__(self, config: OpenMoeConfig) -> None:
        super().__init__()
        self.config = config
        width = config.moe_intermediate_size or config.intermediate_size
        experts, hidden = config.num_experts, config.hidden_size
        self.experts: nn.Module
        if config.expert_layout == "stacked":
            self.gate_weight = nn.Parameter(torch.empty(experts, hidden))
            self.experts = OpenMoeExperts(config, width)
        else:
            self.gate = OpenMoeRouter(hidden, experts, bias=False)
            self.experts = OpenMoeExpertList(OpenMoeMLP(config, width) for _ in range(experts))

    def forward(self, x_BSH: Tensor, valid_BS: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, S, H] -> [B, S, H], and router logits [T, E]; ``valid_BS`` is false for padding."""
        x_TH = x_BSH.flatten(0, 1)
        if self.config.expert_layout == "stacked":
            logits_TE = F.linear(full_precision(x_TH), full_precision(self.gate_weight))
        else:
            logits_TE = self.gate(x_TH)
        probs_TK, ids_TK = choices(logits_TE.softmax(dim=-1), self.config.router_topk)
        kept_TK = torch.ones_like(ids_TK, dtype=torch.bool)
        if valid_BS is not None:
            kept_TK &= valid_BS.flatten()[:, None]
        if self.config.moe_capacity != "dropless":
            kept_TK = within_capacity(self.config, ids_TK, probs_TK, *x_BSH.shape[:2])
        y_TH = self.experts(x_TH, ids_TK, probs_TK, kept_TK)
        return y_TH.view_as(x_BSH), logits_TE


def choices(probs_TE: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The largest probabilities of each token and their experts, [T, K]; ties by expert."""
    values, ids = probs_TE.sort(dim=-1, descending=True, stable=True)
    return values[:, :number], ids[:, :number]


def capacity_group(config: OpenMoeConfig, rows: int, length: int) -> int:
    """Tokens that compete for the slots of an expert.

    Raises:
        ValueError: the configured group neither divides a row nor consists of whole rows.
    """
    size = config.run_setting("moe_capacity_group_size", None)
    if size is None:
        per_row = config.run_setting("moe_capacity_rule", "t5x") == "t5x"
        return length if per_row else rows * length
    if (length % size and size % length) or (rows * length) % size:
        raise ValueError(
            f"the row must be a multiple of moe_capacity_group_size {size}, or the group whole "
            f"rows (got {rows} rows of {length}); set moe_capacity to 'dropless'"
        )
    return int(size)


def within_capacity(
    config: OpenMoeConfig, ids_TK: Tensor, probs_TK: Tensor, rows: int, length: int
) -> Tensor:
    """Which choices find one of the slots of their expert, [T, K].

    The choices of a group queue for their experts: all first choices in token order, then all
    second ones, or by probability (policy `probs`). Each expert takes as many as it has slots.
    """
    phase = "eval" if config.moe_capacity == "eval" else "expert"
    published = getattr(config, f"router_capacity_factor_{config.moe_capacity}")
    factor = config.run_setting(f"moe_{phase}_capacity_factor", published)
    if factor is None:
        return torch.ones_like(ids_TK, dtype=torch.bool)
    group, topk = capacity_group(config, rows, length), ids_TK.shape[1]
    rule = config.run_setting("moe_capacity_rule", "t5x")
    least = config.run_setting("moe_min_capacity", config.router_min_capacity)
    if rule == "t5x":
        slots = round(factor * group / config.num_experts)
    elif rule == "port":
        slots = math.floor(topk * factor * group / config.num_experts)
        slots += slots % 2
    else:  # Megatron-Core's; the order of its operations decides the last bit, and so the ceil
        slots, least = math.ceil((topk * group / config.num_experts) * factor), 0
    ids_GA = ids_TK.unflatten(0, (-1, group)).transpose(1, 2).flatten(1)
    order_GA = torch.arange(topk * group, device=ids_TK.device).expand_as(ids_GA)
    if config.run_setting("moe_token_drop_policy", "position") == "probs":
        probs_GA = probs_TK.unflatten(0, (-1, group)).transpose(1, 2).flatten(1)
        order_GA = probs_GA.argsort(dim=1, descending=True, stable=True)
    queue_GA = ids_GA.gather(1, order_GA)
    ahead_GA = F.one_hot(queue_GA, config.num_experts).cumsum(1).gather(2, queue_GA[..., None])
    kept_GA = ahead_GA[..., 0] <= max(slots, least)
    kept_GA = torch.zeros_like(kept_GA).scatter(1, order_GA, kept_GA)
    return kept_GA.unflatten(1, (topk, group)).transpose(1, 2).flatten(0, 1)


def router_losses(
    config: OpenMoeConfig, logits: tuple[Tensor, ...], valid_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """Load-balancing loss and z-loss of the router, means over MoE layers, without weights.

    The first is E sum_e f_e P_e, which is K when balanced: f_e choices of e per token, P_e its mean
    probability, over each row, over all rows, or, with the capacity of training, over each capacity
    group. Padding does not count.
    """
    over = config.run_setting("moe_router_load_balancing_type", "seq_aux_loss")
    rows = 1 if over == "aux_loss" else len(valid_BS)
    if over == "group_aux_loss" and config.moe_capacity == "train":
        rows = valid_BS.numel() // capacity_group(config, *valid_BS.shape)
    valid_RT1 = valid_BS.reshape(rows, -1, 1)
    tokens_R1 = valid_RT1.sum(dim=1).clamp(min=1)
    balance = z_loss = valid_BS.new_zeros((), dtype=torch.float32)
    for logits_TE in (each.to(valid_BS.device) for each in logits):  # layers on several devices
        probs_TE = logits_TE.softmax(dim=-1)
        chosen_TE = torch.zeros_like(probs_TE)
        chosen_TE.scatter_(1, choices(probs_TE, config.router_topk)[1], 1.0)
        f_RE, p_RE = (
            (x.unflatten(0, (rows, -1)) * valid_RT1).sum(dim=1) / tokens_R1
            for x in (chosen_TE, probs_TE)
        )
        if over != "none":
            balance = balance + config.num_experts * (f_RE * p_RE).sum(dim=1).mean()
        square_T = logits_TE.logsumexp(dim=-1).square()
        z_loss = z_loss + (square_T * valid_BS.flatten()).sum() / valid_BS.sum()
    layers = max(len(logits), 1)
    return balance / layers, z_loss / layers


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

"""What the network is: sizes, the two published variants, initialisation.

Every field is a command-line flag; names are Megatron-LM's where it has one.
Sources: Xue et al., "OpenMoE" (arXiv 2402.01739) and its released training code. The *paper*
variant counts parameters as the paper does, the *released* one is what was trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_moe.config.fields import (
    AtLeastOne,
    BelowOne,
    NonNegative,
    OmittedAtDefault,
    Positive,
)

FfnVariant = Literal["swiglu", "gated-swiglu"]
QkNormScope = Literal["head", "projection"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dense part of the network."""

    num_layers: Annotated[int, AtLeastOne] = 4
    """Transformer layers L."""
    hidden_size: Annotated[int, AtLeastOne] = 256
    """Width H of the residual stream."""
    ffn_hidden_size: Annotated[int, AtLeastOne] = 512
    """Width F of a dense feed-forward layer."""
    num_attention_heads: Annotated[int, AtLeastOne] = 4
    """Attention heads n, of queries; also of keys and values without `--group-query-attention`."""
    group_query_attention: Annotated[bool, OmittedAtDefault] = False
    """Grouped-query attention (arXiv 2305.13245): `--num-query-groups` key and value heads, each
    shared by n / g consecutive query heads."""
    num_query_groups: Annotated[int, AtLeastOne, OmittedAtDefault] = 1
    """Key and value heads g, a divisor of n and a multiple of the tensor-parallel size; 1 is
    multi-query attention. As in Megatron-LM, it has no effect without `--group-query-attention`."""
    kv_channels: Annotated[int, AtLeastOne] = 64
    """Width d of one head. n * d need not equal H (8B: 24 x 128 = 3072 over H = 2048)."""
    max_position_embeddings: Annotated[int, AtLeastOne] = 2048
    """Longest sequence, in tokens, that the model is declared for."""
    rotary_base: Annotated[float, Positive] = 10000.0
    """Base of the rotary position embedding."""
    norm_epsilon: Annotated[float, Positive] = 1e-6
    """Added to the mean square in RMSNorm."""
    ffn_variant: FfnVariant = "gated-swiglu"
    """`swiglu`: (x W_up * silu(x W_gate)) W_down, three matrices (paper). `gated-swiglu`: four,
    [a|b] = x W_gate; (a * silu(b) * (x W_up)) W_down (released)."""
    qk_layernorm: Annotated[bool, OmittedAtDefault] = False
    """RMSNorm with a learned scale on queries and keys, after their projections and before the
    rotary embedding. It undoes the 1/sqrt(d) in the query initialisation: use it with
    `--softmax-scale None`."""
    qk_layernorm_scope: Annotated[QkNormScope, OmittedAtDefault] = "head"
    """Over what `--qk-layernorm` takes the mean square: `head` (Megatron-LM), the d channels of one
    head, with a scale [d] for all heads; or `projection` (OLMoE, arXiv 2409.02060), all heads of a
    token, with a scale for each channel of each head."""
    softmax_scale: Annotated[float | None, Positive] = 1.0
    """Attention logits are q.k times this. 1.0 in the released model, whose query initialisation
    holds the 1/sqrt(d); `None` means 1/sqrt(d)."""
    untie_embeddings_and_output_weights: bool = True
    """Separate input embedding and logits matrix (released: yes)."""
    scale_tied_logits: Annotated[bool, OmittedAtDefault] = True
    """Multiply the logits of tied embeddings by 1/sqrt(H), as T5 does; Megatron-LM does not. No
    effect on untied ones."""
    attention_dropout: Annotated[float, BelowOne] = 0.0
    """Dropout on attention probabilities; 0 in pretraining."""
    hidden_dropout: Annotated[float, BelowOne] = 0.0
    """Dropout on the embedding and on each residual branch; 0 in pretraining."""
    init_method_std: Annotated[float | None, NonNegative, OmittedAtDefault] = None
    """Megatron-LM's initialisation instead of `--init-variance-scale`: all matrices start as
    N(0, std^2), those that write to the residual stream divided by sqrt(2 L). On the command line
    it is also the default of `--embedding-init-method-std` and `--router-init-method-std`."""
    init_variance_scale: Annotated[float, NonNegative] = 0.1
    """Attention, FFN, expert and logits weights start as N(0, scale / fan_in)."""
    embedding_init_method_std: Annotated[float, NonNegative] = 1.0
    """Standard deviation of the embedding at the start."""
    router_init_method_std: Annotated[float, NonNegative] = 0.02
    """Standard deviation of router weights at the start."""
    zero_padding_activations: Annotated[bool, OmittedAtDefault] = False
    """Set padded positions to zero at the input of every attention, feed-forward and MoE layer and
    of the logits, as the released code does. Their router scores are then uniform and choose
    experts 0 to k - 1, and they count in capacity and balance loss. Otherwise they are ordinary
    tokens. Only rows of `ul2` and `sft` have padding."""
    logit_z_loss_coeff: Annotated[float, NonNegative] = 1e-4
    """Weight of mean(log(Z)^2) over target tokens, Z the softmax normaliser of the logits."""

    def in_std(self, fan_in: int) -> float:
        """Standard deviation at the start of matrices that read the residual stream, and of the
        logits matrix, by their number of inputs.
        """
        if self.init_method_std is not None:
            return self.init_method_std
        return math.sqrt(self.init_variance_scale / fan_in)

    def out_std(self, fan_in: int) -> float:
        """The same of matrices that write to the residual stream."""
        if self.init_method_std is not None:
            return self.init_method_std / math.sqrt(2.0 * self.num_layers)
        return math.sqrt(self.init_variance_scale / fan_in)

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values: g with grouped-query attention, else n."""
        return self.num_query_groups if self.group_query_attention else self.num_attention_heads

    @property
    def gate_blocks(self) -> int:
        """Blocks of F columns in W_gate: 2 ([a|b]) in `gated-swiglu`, 1 in `swiglu`."""
        return 2 if self.ffn_variant == "gated-swiglu" else 1

    @property
    def input_blocks(self) -> int:
        """Blocks of F columns in [W_gate | W_up], which one GEMM multiplies: 3 or 2."""
        return self.gate_blocks + 1

    def attention_lines(self) -> list[str]:
        """Settings of attention that have no effect, or that hardly anyone means, for the log."""
        lines = []
        if self.num_query_groups != 1 and not self.group_query_attention:
            lines.append(
                f"--num-query-groups {self.num_query_groups} has no effect without"
                f" --group-query-attention: all {self.num_attention_heads} heads have keys and"
                " values of their own"
            )
        if self.qk_layernorm and self.softmax_scale == 1.0:
            lines.append(
                "--softmax-scale 1.0 with --qk-layernorm: logits of attention start with a standard"
                f" deviation of {self.kv_channels**0.5:.3g}, the square root of --kv-channels;"
                " --softmax-scale None gives 1"
            )
        return lines

"""What the network is: sizes, the two published variants, initialisation.

Every field is a command-line flag; names are Megatron-LM's where it has one.
Sources: Xue et al., "OpenMoE" (arXiv 2402.01739) and its released training code. The *paper*
variant counts parameters as the paper does, the *released* one is what was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_moe.config.fields import AtLeastOne, BelowOne, NonNegative, Positive

FfnVariant = Literal["swiglu", "gated-swiglu"]


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
    """Attention heads n; no grouped-query attention."""
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
    softmax_scale: Annotated[float | None, Positive] = 1.0
    """Attention logits are q.k times this. 1.0 in the released model, whose query initialisation
    holds the 1/sqrt(d); `None` means 1/sqrt(d)."""
    untie_embeddings_and_output_weights: bool = True
    """Separate input embedding and logits matrix (released: yes)."""
    attention_dropout: Annotated[float, BelowOne] = 0.0
    """Dropout on attention probabilities; 0 in pretraining."""
    hidden_dropout: Annotated[float, BelowOne] = 0.0
    """Dropout on the embedding and on each residual branch; 0 in pretraining."""
    init_variance_scale: Annotated[float, NonNegative] = 0.1
    """Attention, FFN, expert and logits weights start as N(0, scale / fan_in)."""
    embedding_init_method_std: Annotated[float, NonNegative] = 1.0
    """Standard deviation of the embedding at the start."""
    router_init_method_std: Annotated[float, NonNegative] = 0.02
    """Standard deviation of router weights at the start."""
    logit_z_loss_coeff: Annotated[float, NonNegative] = 1e-4
    """Weight of mean(log(Z)^2) over target tokens, Z the softmax normaliser of the logits."""

    @property
    def gate_blocks(self) -> int:
        """Blocks of F columns in W_gate: 2 ([a|b]) in `gated-swiglu`, 1 in `swiglu`."""
        return 2 if self.ffn_variant == "gated-swiglu" else 1

    @property
    def input_blocks(self) -> int:
        """Blocks of F columns in [W_gate | W_up], which one GEMM multiplies: 3 or 2."""
        return self.gate_blocks + 1

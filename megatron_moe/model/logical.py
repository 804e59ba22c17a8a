"""The logical parameters of OpenMoE: layout-free names, shapes and initial values.

Everything that moves weights (the reference model, the parallel model's shards, checkpoints, the
parity tests) uses these names, and every layout starts from the same values: a tensor's initial
value is a function of the seed and its name alone.

Shapes: V vocabulary, H hidden, n heads, g key and value heads (n without grouped-query attention),
d head width, F feed-forward width, E experts. Matrices applied to the residual stream are
stored [out, in]; expert matrices [E, in, out].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig, moe_layer_pattern
from megatron_moe.errors import UsageError

if TYPE_CHECKING:
    import torch

ParameterKind = Literal[
    "embedding", "norm", "attention", "ffn", "router", "expert", "shared", "output"
]


OF_GEMMS: tuple[ParameterKind, ...] = ("attention", "ffn", "expert", "shared")
"""Kinds whose matrices the GEMMs of layers multiply by: no embedding, logits, router or norm."""


@dataclass(frozen=True)
class LogicalParameter:
    """One tensor of the model, whole and unfused."""

    shape: tuple[int, ...]
    """Shape in the layouts of this module's docstring."""
    std: float | None
    """Standard deviation of its normal initial values; `None` means all ones (norm scales), 0 all
    zeros (biases)."""
    kind: ParameterKind
    """What it belongs to. `expert` tensors have the expert as their first dimension."""
    split: bool = False
    """A norm scale with a value for each channel of each head, which tensor parallelism splits; all
    other norm scales are whole on every rank."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def expert_width(model: ModelConfig, moe: MoEConfig) -> int:
    """Width F of one expert."""
    return moe.moe_ffn_hidden_size or model.ffn_hidden_size


def softmax_scale(model: ModelConfig) -> float:
    """What attention logits are multiplied by; `--softmax-scale None` is 1/sqrt(d)."""
    return model.kv_channels**-0.5 if model.softmax_scale is None else model.softmax_scale


def logical_parameters(
    model: ModelConfig, moe: MoEConfig, vocab_size: int
) -> dict[str, LogicalParameter]:
    """All tensors of the model by name, in the order of the forward pass.

    Args:
        model: the dense part.
        moe: the expert part.
        vocab_size: V, padded.

    Raises:
        UsageError: a size is impossible (see `check_sizes`).
    """
    check_sizes(model, moe, vocab_size)
    width = model.hidden_size
    parameters = {
        "embedding.weight": LogicalParameter(
            (vocab_size, width), model.embedding_init_method_std, "embedding"
        )
    }
    for i, is_moe in enumerate(moe_layer_pattern(moe.moe_layer_freq, model.num_layers)):
        prefix = f"layers.{i}"
        parameters.update(_attention(model, prefix))
        parameters[f"{prefix}.ffn_norm.weight"] = LogicalParameter((width,), None, "norm")
        if is_moe:
            parameters.update(_moe(model, moe.of_layer(i, model.num_layers), prefix))
        else:
            parameters.update(_ffn(model, f"{prefix}.ffn", model.ffn_hidden_size, "ffn"))
    parameters["final_norm.weight"] = LogicalParameter((width,), None, "norm")
    if model.untie_embeddings_and_output_weights:
        parameters["output.weight"] = LogicalParameter(
            (vocab_size, width), model.in_std(width), "output"
        )
    return parameters


def check_sizes(model: ModelConfig, moe: MoEConfig, vocab_size: int) -> None:
    """Reject sizes with which no model exists, whatever the layout.

    Raises:
        UsageError: a size below one, an odd head width (RoPE pairs channels), a softmax scale that
            is not positive, query groups that do not divide the heads, or more choices per token
            than experts.
    """
    sizes = {
        "--num-layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--ffn-hidden-size": model.ffn_hidden_size,
        "--num-attention-heads": model.num_attention_heads,
        "--kv-channels": model.kv_channels,
        "--num-experts": moe.num_experts,
        "--vocab-size": vocab_size,
    }
    for flag, optional in (
        ("--moe-ffn-hidden-size", moe.moe_ffn_hidden_size),
        ("--moe-shared-expert-intermediate-size", moe.moe_shared_expert_intermediate_size),
    ):
        if optional is not None:
            sizes[flag] = optional
    for flag, size in sizes.items():
        if size < 1:
            raise UsageError(flag, size, ">= 1")
    if model.kv_channels % 2:
        raise UsageError("--kv-channels", model.kv_channels, "an even number (RoPE pairs channels)")
    if model.softmax_scale is not None and not model.softmax_scale > 0:
        raise UsageError("--softmax-scale", model.softmax_scale, "> 0, or None")
    if model.num_attention_heads % model.key_value_heads:
        expected = f"a divisor of --num-attention-heads ({model.num_attention_heads})"
        raise UsageError("--num-query-groups", model.key_value_heads, expected)
    least = moe.numbers_of_experts[0]
    if not 1 <= moe.moe_router_topk <= least:
        expected = f"between 1 and --num-experts ({least})"
        raise UsageError("--moe-router-topk", moe.moe_router_topk, expected)


def initial_tensor(name: str, parameter: LogicalParameter, seed: int) -> torch.Tensor:
    """The whole tensor's initial value, fp32 on the CPU, [*parameter.shape].

    A pure function of its arguments: it reads and changes no global random state.
    """
    if parameter.kind != "expert":
        return _normal(name, parameter.shape, parameter.std, seed)
    import torch  # here, not above: names, shapes and counts need no torch

    experts = range(parameter.shape[0])
    return torch.stack([initial_expert(name, parameter, seed, e) for e in experts])


def initial_expert(name: str, parameter: LogicalParameter, seed: int, expert: int) -> torch.Tensor:
    """One expert's slice of `initial_tensor`, [in, out]: a rank makes only the experts it holds."""
    return _normal(f"{name}:{expert}", parameter.shape[1:], parameter.std, seed)


def initial_tensors(
    parameters: dict[str, LogicalParameter], seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """All initial tensors, one at a time."""
    for name, parameter in parameters.items():
        yield name, initial_tensor(name, parameter, seed)


def _normal(key: str, shape: tuple[int, ...], std: float | None, seed: int) -> torch.Tensor:
    import torch  # as in `initial_tensor`

    if std is None or std == 0.0:
        return torch.ones(shape) if std is None else torch.zeros(shape)
    # A cryptographic hash, so that near-by seeds and names share nothing.
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator).mul_(std)


def _attention(model: ModelConfig, prefix: str) -> Iterator[tuple[str, LogicalParameter]]:
    hidden, inner = model.hidden_size, model.num_attention_heads * model.kv_channels
    shared = model.key_value_heads * model.kv_channels
    std = model.in_std(hidden)
    # Initial attention logits have the same spread whatever the scale: with the released scale of
    # 1.0 the query weights carry the 1/sqrt(d), with a scale of 1/sqrt(d) they carry nothing.
    # Megatron-LM's initialisation, with `--init-method-std`, makes no difference between them.
    query_std = std / (softmax_scale(model) * math.sqrt(model.kv_channels))
    if model.init_method_std is not None:
        query_std = std
    yield f"{prefix}.attention_norm.weight", LogicalParameter((hidden,), None, "norm")
    for name, rows, its_std in (
        ("query", inner, query_std),
        ("key", shared, std),
        ("value", shared, std),
    ):
        yield (
            f"{prefix}.attention.{name}.weight",
            LogicalParameter((rows, hidden), its_std, "attention"),
        )
    if model.qk_layernorm:
        whole = model.qk_layernorm_scope == "projection"
        for name, rows in (("query", inner), ("key", shared)):
            size = rows if whole else model.kv_channels
            scale = LogicalParameter((size,), None, "norm", split=whole)
            yield f"{prefix}.attention.{name}_norm.weight", scale
    output = LogicalParameter((hidden, inner), model.out_std(inner), "attention")
    yield f"{prefix}.attention.output.weight", output


def _ffn(
    model: ModelConfig, prefix: str, width: int, kind: ParameterKind
) -> Iterator[tuple[str, LogicalParameter]]:
    hidden, std = model.hidden_size, model.in_std(model.hidden_size)
    gate = LogicalParameter((model.gate_blocks * width, hidden), std, kind)
    yield f"{prefix}.gate.weight", gate
    yield f"{prefix}.up.weight", LogicalParameter((width, hidden), std, kind)
    down = LogicalParameter((hidden, width), model.out_std(width), kind)
    yield f"{prefix}.down.weight", down


def _moe(model: ModelConfig, moe: MoEConfig, prefix: str) -> Iterator[tuple[str, LogicalParameter]]:
    hidden, experts, width = model.hidden_size, moe.num_experts, expert_width(model, moe)
    std = model.in_std(hidden)
    shape = (moe.router_rows, hidden)
    router = LogicalParameter(shape, model.router_init_method_std, "router")
    yield f"{prefix}.moe.router.weight", router
    if moe.moe_router_type == "contextual":
        yield f"{prefix}.moe.router.context_weight", router
    if moe.has_expert_bias:
        yield f"{prefix}.moe.router.expert_bias", LogicalParameter((experts,), 0.0, "router")
    gate = LogicalParameter((experts, hidden, model.gate_blocks * width), std, "expert")
    yield f"{prefix}.moe.experts.gate", gate
    yield f"{prefix}.moe.experts.up", LogicalParameter((experts, hidden, width), std, "expert")
    down = LogicalParameter((experts, width, hidden), model.out_std(width), "expert")
    yield f"{prefix}.moe.experts.down", down
    shared = moe.moe_shared_expert_intermediate_size
    if shared is not None:
        if moe.moe_shared_expert_placement == "sequential":
            yield f"{prefix}.shared_norm.weight", LogicalParameter((hidden,), None, "norm")
        yield from _ffn(model, f"{prefix}.shared", shared, "shared")

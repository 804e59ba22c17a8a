"""How many parameters and how much arithmetic: totals, activated, per rank, FLOPs per token.

All numbers are plain integers, derived from `megatron_moe.model.logical` and the sizes alone; no
torch. `docs/model.md` has the derivation and a comparison with the numbers in the paper.

Letters: L layers, H hidden, n heads, g key and value heads, d head width, F feed-forward width,
V vocabulary, E experts, K choices per token, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig, moe_layer_pattern
from megatron_moe.errors import UsageError
from megatron_moe.model.logical import (
    LogicalParameter,
    ParameterKind,
    expert_width,
    logical_parameters,
)

EMBEDDINGS: tuple[ParameterKind, ...] = ("embedding", "output")
"""What "without embeddings" leaves out: the input embedding and, if untied, the logits matrix."""


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters of the whole model, each tensor once."""

    by_kind: dict[str, int]
    """Total per kind of `LogicalParameter`."""
    activated_by_kind: dict[str, int]
    """The same for what one token uses: K of the E experts of a layer, everything else."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.by_kind.values())

    @property
    def total_without_embeddings(self) -> int:
        """All but embedding and logits matrices."""
        return _without_embeddings(self.by_kind)

    @property
    def activated(self) -> int:
        """Parameters that one token uses, embedding and logits matrices counted whole."""
        return sum(self.activated_by_kind.values())

    @property
    def activated_without_embeddings(self) -> int:
        """Parameters that one token uses, but embedding and logits matrices."""
        return _without_embeddings(self.activated_by_kind)


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Floating-point operations of the forward pass for one token; a multiply-add counts two.

    Only matrix products count, as in the PaLM paper's appendix B: norms, softmaxes, activations
    and the embedding look-up are left out, and nothing is added for recomputation.
    """

    attention_projections: int
    """Query and output, key and value: 2 * (2 H n d + 2 H g d) per layer."""
    attention_scores: int
    """q.k and the sum of values, causal half only: 2 * 2 n d * (S + 1) / 2 per layer."""
    ffn: int
    """Dense feed-forward layers: 2 * m H F, m = 3 matrices or 4 (gated-swiglu)."""
    router: int
    """2 H E per MoE layer, twice that with `--moe-router-type contextual`, R times with `norm` of
    rank R."""
    experts: int
    """K routed experts, 2 * m H F each, per MoE layer."""
    shared: int
    """The shared expert of each MoE layer."""
    logits: int
    """2 H V."""

    @property
    def forward(self) -> int:
        """FLOPs of one token's forward pass."""
        return (
            self.attention_projections
            + self.attention_scores
            + self.ffn
            + self.router
            + self.experts
            + self.shared
            + self.logits
        )

    @property
    def training(self) -> int:
        """Forward and backward: three times the forward pass, as each product has two gradients."""
        return 3 * self.forward

    def training_with_drops(self, kept_fraction: float) -> float:
        """`training` with only the choices that found a slot: what was really computed.

        Args:
            kept_fraction: share of the K choices that were kept, between 0 and 1.
        """
        return self.training - 3 * self.experts * (1 - kept_fraction)


@dataclass(frozen=True, kw_only=True)
class RankParameters:
    """Parameters held by each rank of one pipeline stage."""

    dense: int
    """Those that all data-parallel ranks hold alike: embeddings, attention, norms, router, ..."""
    expert: int
    """Those of the rank's own experts."""

    @property
    def total(self) -> int:
        """All parameters of the rank."""
        return self.dense + self.expert


def count_parameters(model: ModelConfig, moe: MoEConfig, vocab_size: int) -> ParameterCounts:
    """Count the model's parameters, total and activated, per kind.

    Args:
        model: the dense part.
        moe: the expert part.
        vocab_size: V, padded.
    """
    totals: dict[str, int] = {}
    activated: dict[str, int] = {}
    for parameter in logical_parameters(model, moe, vocab_size).values():
        used = parameter.numel
        if parameter.kind == "expert":
            used = used // parameter.shape[0] * moe.moe_router_topk
        totals[parameter.kind] = totals.get(parameter.kind, 0) + parameter.numel
        activated[parameter.kind] = activated.get(parameter.kind, 0) + used
    return ParameterCounts(by_kind=totals, activated_by_kind=activated)


def flops_per_token(
    model: ModelConfig, moe: MoEConfig, vocab_size: int, seq_length: int
) -> TokenFlops:
    """FLOPs of one token, the mean over a sequence of `seq_length` tokens.

    All K choices count, dropped or not: the model's arithmetic, not one batch's. MFU is
    `training * tokens/s / peak`; `training_with_drops` in place of `training` gives what was done.
    """
    layers = range(model.num_layers)
    return _flops(model, moe, layers, seq_length, 2 * model.hidden_size * vocab_size)


def flops_per_stage(
    model: ModelConfig,
    moe: MoEConfig,
    vocab_size: int,
    seq_length: int,
    chunk_layers: Sequence[int],
    pp: int,
) -> tuple[TokenFlops, ...]:
    """`flops_per_token` of each pipeline stage; the last one has the logits.

    Args:
        model: the dense part.
        moe: the expert part.
        vocab_size: V, padded.
        seq_length: S.
        chunk_layers: layers of every model chunk, in the order of the model.
        pp: stages; chunk c is on stage c % ``pp``.
    """
    of_stage: list[list[int]] = [[] for _ in range(pp)]
    for layer, stage in enumerate(stages_of_layers(chunk_layers, pp)):
        of_stage[stage].append(layer)
    logits = 2 * model.hidden_size * vocab_size
    return tuple(
        _flops(model, moe, mine, seq_length, logits if stage == pp - 1 else 0)
        for stage, mine in enumerate(of_stage)
    )


def stages_of_layers(chunk_layers: Sequence[int], pp: int) -> list[int]:
    """The pipeline stage of each layer; arguments as for `flops_per_stage`."""
    return [chunk % pp for chunk, count in enumerate(chunk_layers) for _ in range(count)]


def _flops(
    model: ModelConfig, moe: MoEConfig, numbers: Sequence[int], seq_length: int, logits: int
) -> TokenFlops:
    """Of some layers, by their numbers, and of the logits if they are there."""
    pattern = moe_layer_pattern(moe.moe_layer_freq, model.num_layers)
    with_experts = [layer for layer in numbers if pattern[layer]]
    moe_layers, layers = len(with_experts), len(numbers)
    rows = sum(moe.of_layer(layer, model.num_layers).router_rows for layer in with_experts)
    matrices = 2 if moe.moe_router_type == "contextual" else 1  # of a router
    inner = model.num_attention_heads * model.kv_channels
    shared_heads = model.key_value_heads * model.kv_channels
    per_width = 2 * (model.input_blocks + 1) * model.hidden_size
    shared = moe.moe_shared_expert_intermediate_size or 0
    return TokenFlops(
        attention_projections=layers * 4 * model.hidden_size * (inner + shared_heads),
        # A token at position p attends to p + 1 keys: (S + 1) / 2 on average, hence the half.
        attention_scores=layers * 2 * inner * (seq_length + 1),
        ffn=(layers - moe_layers) * per_width * model.ffn_hidden_size,
        router=2 * model.hidden_size * rows * matrices,
        experts=moe_layers * moe.moe_router_topk * per_width * expert_width(model, moe),
        shared=moe_layers * per_width * shared,
        logits=logits,
    )


def parameters_per_rank(
    model: ModelConfig,
    moe: MoEConfig,
    vocab_size: int,
    *,
    tp: int = 1,
    pp: int = 1,
    chunk_layers: Sequence[int] | None = None,
    ep: int = 1,
    etp: int = 1,
) -> tuple[RankParameters, ...]:
    """Parameters on each rank of every pipeline stage; all ranks of a stage hold equally many.

    Tensor parallelism divides all but routers and norms (a norm over all heads, too, is divided),
    expert and expert-tensor parallelism the experts. The embedding is on the first stage, the final
    norm and the logits matrix on the last; tied, the last stage holds a copy of the embedding.

    Args:
        model: the dense part.
        moe: the expert part.
        vocab_size: V, padded.
        tp: tensor-parallel size.
        pp: pipeline stages.
        chunk_layers: layers of every model chunk, in the order of the model; chunk c is on stage
            c % ``pp``. `None`: one chunk per stage, with as many layers each.
        ep: expert-parallel size.
        etp: expert-tensor-parallel size.

    Raises:
        UsageError: a degree does not divide what it splits.
    """
    _check_divisible(model, moe, vocab_size, tp, 1 if chunk_layers else pp, ep, etp)
    of_layers = stages_of_layers(chunk_layers or [model.num_layers // pp] * pp, pp)
    dense, expert = [0] * pp, [0] * pp
    for name, parameter in logical_parameters(model, moe, vocab_size).items():
        for stage in stages_of(name, of_layers, pp, model.untie_embeddings_and_output_weights):
            if parameter.kind == "expert":
                expert[stage] += parameter.numel // (ep * etp)
            else:
                dense[stage] += _dense_share(parameter, tp)
    return tuple(RankParameters(dense=d, expert=e) for d, e in zip(dense, expert, strict=True))


def _without_embeddings(by_kind: dict[str, int]) -> int:
    return sum(count for kind, count in by_kind.items() if kind not in EMBEDDINGS)


def _dense_share(parameter: LogicalParameter, tp: int) -> int:
    whole = parameter.kind in ("norm", "router") and not parameter.split
    return parameter.numel if whole else parameter.numel // tp


def stages_of(name: str, of_layers: Sequence[int], pp: int, untied: bool) -> set[int]:
    """Pipeline stages that hold a logical tensor.

    Args:
        name: of the logical tensor.
        of_layers: the stage of each layer, from `stages_of_layers`.
        pp: pipeline stages.
        untied: whether the logits matrix is not the embedding, which is then on the first stage
            alone.
    """
    owner, _, rest = name.partition(".")
    if owner == "layers":
        return {of_layers[int(rest.partition(".")[0])]}
    if owner == "embedding":
        return {0} if untied else {0, pp - 1}
    return {pp - 1}


def _check_divisible(
    model: ModelConfig, moe: MoEConfig, vocab_size: int, tp: int, chunks: int, ep: int, etp: int
) -> None:
    shared = moe.moe_shared_expert_intermediate_size or 0
    splits = (
        ("--num-layers", model.num_layers, "pipeline chunks", chunks),
        ("--num-attention-heads", model.num_attention_heads, "--tensor-model-parallel-size", tp),
        ("--num-query-groups", model.key_value_heads, "--tensor-model-parallel-size", tp),
        ("--ffn-hidden-size", model.ffn_hidden_size, "--tensor-model-parallel-size", tp),
        ("--moe-shared-expert-intermediate-size", shared, "--tensor-model-parallel-size", tp),
        ("padded vocabulary", vocab_size, "--tensor-model-parallel-size", tp),
        *(("--num-experts", n, "--expert-model-parallel-size", ep) for n in moe.numbers_of_experts),
        ("width of an expert", expert_width(model, moe), "--expert-tensor-parallel-size", etp),
    )
    for what, size, degree, ranks in splits:
        if ranks < 1 or size % ranks:
            raise UsageError(what, size, f"a multiple of {degree} ({ranks})")


def fewest_ranks(*, tp: int, pp: int, ep: int, etp: int) -> int:
    """The smallest world size that a layout fits: its dense and its expert ranks must tile it."""
    return pp * math.lcm(tp, ep * etp)

"""The expert layers: how many, where, and how tokens are routed, dropped and balanced."""

from __future__ import annotations

import ast
import pkgutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_moe.config.fields import (
    AbsentMeans,
    AtLeastOne,
    BelowOne,
    Flag,
    NonNegative,
    OmittedAtDefault,
    Positive,
    Range,
)
from megatron_moe.errors import UsageError

CapacityRule = Literal["t5x", "port", "megatron"]
LoadBalancing = Literal[
    "seq_aux_loss", "aux_loss", "group_aux_loss", "global_aux_loss", "none", "quantile_balancing"
]
LossConvention = Literal["openmoe", "megatron"]
ScoreFunction = Literal["softmax", "sigmoid"]


def added(folder: Path) -> tuple[str, ...]:
    """Names of the implementations that files in a folder add; nothing is imported."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules([str(folder)])))


# Values that a new file under megatron_moe/moe/ extends: its name becomes valid here, and
# `moe/registry.py` imports it when a layer with that value is built.
if TYPE_CHECKING:
    RouterType = str
    DispatcherType = str
    DropPolicyName = str
else:
    _MOE = Path(__file__).parents[1] / "moe"
    _ROUTERS = ("linear", *added(_MOE / "routers"))
    _DISPATCHERS = ("alltoall", *added(_MOE / "dispatchers"))
    _DROP_POLICIES = ("position", "probs", *added(_MOE / "drop_policies"))
    RouterType = Literal[_ROUTERS]
    DispatcherType = Literal[_DISPATCHERS]
    DropPolicyName = Literal[_DROP_POLICIES]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture-of-experts part of the network."""

    num_experts: Annotated[int, AtLeastOne] = 8
    """Experts E of each MoE layer, over all expert-parallel ranks."""
    moe_layer_num_experts: Annotated[tuple[int, ...] | None, AtLeastOne, OmittedAtDefault] = None
    """Experts of each MoE layer, in order, instead of one number for all, e.g. `8 16 16 4`;
    `--num-experts` is then the largest of them, and need not be given."""
    moe_layer_freq: str = "([0]*1+[1])*2"
    """Which layers are MoE: a 0/1 list per layer, written as Megatron-LM writes it, e.g.
    `([0]*3+[1])*8`; or an integer N, which as in Megatron-LM means layers i with i % N == 0.
    OpenMoE's own rule, (i + 1) % N == 0, is `([0]*(N-1)+[1])*(L/N)`."""
    moe_router_topk: Annotated[int, AtLeastOne] = 2
    """Experts k that a token chooses."""
    moe_ffn_hidden_size: Annotated[int | None, AtLeastOne] = None
    """Width of one expert; `None` means `--ffn-hidden-size`."""
    moe_shared_expert_intermediate_size: Annotated[int | None, AtLeastOne] = 512
    """Width of the shared expert, `None` for no shared expert."""
    moe_shared_expert_placement: Literal["sequential", "parallel"] = "sequential"
    """`sequential` (released): x += MoE(norm2 x); x += shared(norm3 x). `parallel` (paper, eq. 4):
    x += MoE(norm2 x) + shared(norm2 x)."""
    moe_capacity_rule: CapacityRule = "t5x"
    """Slots C of one expert for a group of T tokens. `t5x`: round(cf T / E), one group per row.
    `port`: floor(k cf T / E) rounded up to an even number, one group per micro-batch. `megatron`:
    ceil(k T / E cf) without a minimum, one group per micro-batch (Megatron-LM)."""
    moe_expert_capacity_factor: Annotated[float | None, Positive] = 1.25
    """Capacity factor cf in training; `None` drops nothing: C = group size, so on a GPU the buffers
    have E / k times the rows that are needed, but with `--moe-expert-impl grouped`."""
    moe_eval_capacity_factor: Annotated[float | None, Positive] = 2.0
    """Capacity factor cf in evaluation; `None` drops nothing."""
    moe_layer_capacity_factors: Annotated[tuple[float, ...] | None, Positive, OmittedAtDefault] = (
        None
    )
    """Capacity factor in training of each MoE layer, in order, instead of one for all, e.g.
    `1.5 1.25 1.0 1.0`."""
    moe_target_drop_rate: Annotated[
        float | None, Range(0, 1, low_excluded=True, high_excluded=True), OmittedAtDefault
    ] = None
    """Share of choices that may be dropped in training: each MoE layer takes the smallest of a few
    capacity factors that keeps to it, by the loads of the last steps. It begins with
    `--moe-expert-capacity-factor`."""
    moe_capacity_factor_range: Annotated[tuple[float, float], Positive, OmittedAtDefault] = (
        0.5,
        4.0,
    )
    """Least and largest factor of `--moe-target-drop-rate`."""
    moe_min_capacity: Annotated[int, AtLeastOne] = 4
    """Least slots per expert and group."""
    moe_capacity_group_size: Annotated[int | None, AtLeastOne] = None
    """Tokens that compete for one set of slots; `None` takes the rule's own group. Tokens are taken
    row by row, so a group is part of a row, a row, or whole rows."""
    moe_token_drop_policy: DropPolicyName = "position"
    """Which choices keep a slot when an expert is full. `position` (OpenMoE): all first choices in
    token order, then all second choices. `probs`: the highest router probability, ties by
    position. `random`: as `position`, with the tokens in another order in every training step.
    `fair`: as `position`, with the slots of an expert spread evenly over its choices, and over
    steps to each of them equally often."""
    moe_ignore_padding_tokens: Annotated[bool, AbsentMeans(False)] = True
    """Padding takes no slots, and is in no loss of the router and no statistic of routing: their
    denominators are the real tokens. No expert computes it. Otherwise it is routed as text is, as
    published. Only rows of `ul2` and `sft` have padding. A run that was saved without this setting
    is one with `--no-moe-ignore-padding-tokens`."""
    moe_router_load_balancing_type: LoadBalancing | tuple[LoadBalancing, ...] = "seq_aux_loss"
    """Over which tokens E * sum_e f_e P_e is taken: each row (`seq_aux_loss`), each capacity group
    (`group_aux_loss`, as released), the micro-batch (`aux_loss`), or no such loss (`none`).
    `global_aux_loss`: f of all data-parallel ranks and micro-batches of the step so far. Several
    losses are added up; metrics show the first.
    `quantile_balancing`: no loss, but a bias of each expert, which enters the choices alone: with
    it the expert would have been chosen by its share of the last step's tokens."""
    moe_aux_loss_coeff: Annotated[float | tuple[float, ...], NonNegative] = 0.01
    """Weight of the load-balancing loss, or of each of several ones, in the units of
    `--moe-loss-convention`."""
    moe_z_loss_coeff: Annotated[float, NonNegative] = 1e-4
    """Weight of the router z-loss mean(logsumexp(logits)^2), in the units of
    `--moe-loss-convention`."""
    moe_z_loss_over: Annotated[Literal["all", "chosen"], OmittedAtDefault] = "all"
    """Experts whose logits enter the router z-loss of a token: all, or the chosen ones, so that the
    others are free to fall."""
    moe_loss_convention: Annotated[LossConvention, OmittedAtDefault] = "openmoe"
    """Units of both coefficients. `openmoe`: the load-balancing loss is k when balanced, and both
    losses are averaged over MoE layers. `megatron`: it is 1 when balanced, and both are summed over
    MoE layers, as in Megatron-LM."""
    moe_dispatch_impl: Annotated[
        Literal["auto", "native", "triton", "reference"], Flag("--kernel-impl")
    ] = "auto"
    """Kernels of MoE dispatch and combine, of the gate of every feed-forward layer, dense ones
    included, and of norms, rotary positions and the router: `native` is C++ for CPUs (the first
    three) and `triton` is Triton for GPUs (all), both compiled at first use, `reference` is plain
    PyTorch; `auto` logs its choice at startup. `--moe-dispatch-impl` is accepted as well."""
    moe_expert_impl: Literal["auto", "loop", "batched", "grouped"] = "auto"
    """Expert GEMMs: one per expert over its filled rows (`loop`, for CPUs), one batched GEMM over
    the whole fixed-shape buffer (`batched`, without host reads, for GPUs and dry runs), or grouped
    GEMMs over the filled rows (`grouped`, without host reads; on a GPU bf16 and compute capability
    9.0 or 10.0)."""
    moe_dropless_buffer_factor: Annotated[float | None, AtLeastOne, OmittedAtDefault] = None
    """With `--moe-expert-capacity-factor None` and grouped GEMMs, rows of the expert buffer for
    each expert-parallel rank, as a multiple of the even load (choices / ranks). Choices past that
    overflow: they are dropped in the order of `--moe-token-drop-policy`, counted and reported.
    `None`: rows for every choice."""
    moe_router_force_load_balancing: Annotated[bool, OmittedAtDefault] = False
    """Choose experts at random, evenly: for benchmarks alone. The log says so in every line, and
    figures belong next to those of real routing."""
    moe_input_jitter_eps: Annotated[float | None, BelowOne, OmittedAtDefault] = None
    """Multiply what the router sees in training, and nothing else, by uniform noise in
    [1 - eps, 1 + eps]."""
    moe_router_type: Annotated[RouterType, OmittedAtDefault] = "linear"
    """What makes the logits of the experts. `linear` (OpenMoE): a matrix. `contextual`: also a
    moving average of the tokens before. `token_hash`: as `linear`, but the choices are a fixed
    function of the token's id. `norm`: norms of a low-rank factor of each expert. Other values are
    the files of `moe/routers/`."""
    moe_router_document_pool: Annotated[tuple[int, int] | None, AtLeastOne, OmittedAtDefault] = None
    """Least and largest size of the pool of experts that the tokens of a document choose from in
    training (EMO, arXiv 2605.06663): those that the document as a whole scores highest."""
    moe_router_norm_rank: Annotated[int, AtLeastOne, OmittedAtDefault] = 16
    """Rows of the factor of each expert, with `--moe-router-type norm`."""
    moe_router_context_decay: Annotated[float, BelowOne, OmittedAtDefault] = 0.9
    """How much of that average each token keeps, with `--moe-router-type contextual`."""
    moe_router_score_function: Annotated[ScoreFunction, OmittedAtDefault] = "softmax"
    """From logits to scores: a softmax over all experts, or the sigmoid of each logit; the weights
    of k > 1 sigmoid scores are divided by their sum."""
    moe_router_pre_softmax: Annotated[bool, OmittedAtDefault] = True
    """Softmax before the selection (OpenMoE): the k largest scores are the weights, as they are.
    After it (`--no-moe-router-pre-softmax`, Megatron-LM's default): a softmax over the k chosen
    logits, with weights that sum to 1. Without effect on sigmoid scores."""
    moe_router_topk_scaling_factor: Annotated[float | None, Positive, OmittedAtDefault] = None
    """Factor of the combine weights; `None` for 1."""
    moe_router_num_groups: Annotated[int | None, AtLeastOne, OmittedAtDefault] = None
    """Groups of consecutive experts of which a token chooses `--moe-router-group-topk`, by the sum
    of the best k / `--moe-router-group-topk` scores of each, before it chooses experts of these.
    As many as expert-parallel ranks: device-limited routing. `None`: no such limit."""
    moe_router_group_topk: Annotated[int | None, AtLeastOne, OmittedAtDefault] = None
    """Groups whose experts a token can choose; see `--moe-router-num-groups`."""
    moe_router_enable_expert_bias: Annotated[bool, OmittedAtDefault] = False
    """Balance by a bias of each expert, which is added to its scores for the choices, not for the
    weights; after each step it goes up where the load was below the mean, and down where it was
    above. Megatron-LM has it for sigmoid scores alone."""
    moe_router_bias_update_rate: Annotated[float, NonNegative, OmittedAtDefault] = 1e-3
    """By how much that bias goes up or down."""
    moe_router_quantile_balancing_ema: Annotated[float, BelowOne, OmittedAtDefault] = 0.0
    """Share of the old bias in the new one, with `--moe-router-load-balancing-type
    quantile_balancing`."""
    moe_token_dispatcher_type: Annotated[DispatcherType, OmittedAtDefault] = "alltoall"
    """How tokens reach their experts. `alltoall`: over expert-parallel ranks. `deepep`: by DeepEP's
    kernels, where the package `deep_ep` is installed, with `--moe-expert-impl grouped`. Other
    values are the files of `moe/dispatchers/`."""
    moe_a2a_overlap_chunks: Annotated[int, AtLeastOne, OmittedAtDefault] = 1
    """Chunks N of the slots of every expert: the all-to-all of one is hidden behind the GEMMs of
    another, and that of the first behind a parallel shared expert. With `--moe-expert-impl batched`
    and expert parallelism; results are those of 1."""

    @property
    def router_rows(self) -> int:
        """Rows of a router's matrix: one for each expert, or those of its factor."""
        per_expert = self.moe_router_norm_rank if self.moe_router_type == "norm" else 1
        return self.num_experts * per_expert

    @property
    def balances_by_quantile(self) -> bool:
        """Whether experts have a bias that quantiles set."""
        return "quantile_balancing" in self.load_balancing_types

    @property
    def load_balancing_types(self) -> tuple[str, ...]:
        """`--moe-router-load-balancing-type` as several, also if it is one."""
        kinds = self.moe_router_load_balancing_type
        return (kinds,) if isinstance(kinds, str) else kinds

    @property
    def aux_loss_coeffs(self) -> tuple[float, ...]:
        """The weight of each of `load_balancing_types`, as given."""
        weights = self.moe_aux_loss_coeff
        return weights if isinstance(weights, tuple) else (weights,)

    @property
    def has_expert_bias(self) -> bool:
        """Whether experts have a bias, whatever sets it."""
        return self.moe_router_enable_expert_bias or self.balances_by_quantile

    def of_layer(self, layer: int, num_layers: int) -> MoEConfig:
        """The configuration of one MoE layer: its own number of experts, and capacity in training.

        Args:
            layer: 0-based number of the transformer layer.
            num_layers: transformer layers of the whole model.
        """
        factors, experts = self.moe_layer_capacity_factors, self.moe_layer_num_experts
        if factors is None and experts is None:
            return self
        before = sum(moe_layer_pattern(self.moe_layer_freq, num_layers)[:layer])
        own = self
        if factors is not None:
            own = replace(own, moe_expert_capacity_factor=factors[before])
        if experts is not None:
            own = replace(own, num_experts=experts[before], moe_layer_num_experts=None)
        return own

    @property
    def numbers_of_experts(self) -> tuple[int, ...]:
        """The different E of MoE layers, ascending."""
        return tuple(sorted(set(self.moe_layer_num_experts or (self.num_experts,))))

    @property
    def with_most_capacity(self) -> MoEConfig:
        """The configuration of the layer and the step with the largest buffers in training."""
        factor = self.moe_expert_capacity_factor
        if self.moe_layer_capacity_factors is not None:
            factor = max(self.moe_layer_capacity_factors)
        if self.moe_target_drop_rate is not None:
            factor = self.moe_capacity_factor_range[1]
        return replace(self, moe_expert_capacity_factor=factor)

    def openmoe_coefficients(self, num_moe_layers: int) -> tuple[tuple[float, ...], float]:
        """All coefficients in units of `openmoe`, whatever `--moe-loss-convention` is.

        Example: k = 2 and 4 MoE layers; 0.005 and 2.5e-5 in units of `megatron` are 0.01 and 1e-4.

        Args:
            num_moe_layers: MoE layers of the whole model.

        Returns:
            Weights of each load-balancing loss and of the router z-loss.
        """
        balance, z = self.aux_loss_coeffs, self.moe_z_loss_coeff
        if self.moe_loss_convention == "openmoe":
            return balance, z
        factor = num_moe_layers, self.moe_router_topk
        return tuple(each * factor[0] / factor[1] for each in balance), z * num_moe_layers


def capacity_group_tokens(moe: MoEConfig, *, rows: int, row_tokens: int) -> int:
    """Tokens of one capacity group of a micro-batch.

    Args:
        moe: rule and group size.
        rows: sequences B of the micro-batch.
        row_tokens: tokens S of a sequence, over all ranks that share it.

    Raises:
        UsageError: the group size is neither a part of a row, a row, nor a number of whole rows
            that divides those of the micro-batch.
    """
    tokens, size = rows * row_tokens, moe.moe_capacity_group_size
    if size is None:
        return row_tokens if moe.moe_capacity_rule == "t5x" else tokens
    if size > 0 and (row_tokens % size == 0 or (size % row_tokens == 0 and tokens % size == 0)):
        return size
    expected = f"a divisor of the row ({row_tokens} tokens) or whole rows that divide {rows} rows"
    fix = ""
    if size > 0 and size % row_tokens == 0:
        least = size // row_tokens
        fix = f"a group lies in one micro-batch: set --micro-batch-size {least} or a multiple of it"
    raise UsageError("--moe-capacity-group-size", size, expected, fix)


MAX_ENTRIES = 65536
"""Entries of a pattern at most. `[0]*999999999` must be an error, not an allocation."""


def moe_layer_pattern(freq: str, num_layers: int) -> tuple[bool, ...]:
    """For each layer, whether it is an MoE layer.

    Args:
        freq: `--moe-layer-freq`: an integer N (layers with i % N == 0, Megatron-LM's meaning), or
            a list expression of 0 and 1 built with `[..]`, `+`, `*` and parentheses.
        num_layers: L.

    Raises:
        UsageError: the text is not such an expression, or it does not give L zeros and ones.
    """
    example = f"([0]*3+[1])*{num_layers // 4 or 1}"
    valid = f"an integer, or a 0/1 list of length {num_layers} such as {example}"
    try:
        value = _list_value(ast.parse(freq, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError):
        raise UsageError("--moe-layer-freq", freq, valid) from None
    if isinstance(value, int):
        if value < 1:
            raise UsageError("--moe-layer-freq", freq, valid)
        return tuple(i % value == 0 for i in range(num_layers))
    if len(value) != num_layers or any(v not in (0, 1) for v in value):
        raise UsageError("--moe-layer-freq", freq, valid, f"it gives {len(value)} entries")
    return tuple(v == 1 for v in value)


def _list_value(node: ast.expr) -> int | list[int]:
    """The value of an expression of integers, lists, `+` and `*`; anything else is a ValueError."""
    if isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value <= 4096:
        return node.value
    if isinstance(node, ast.List):
        items = [_list_value(item) for item in node.elts]
        if all(isinstance(item, int) for item in items):
            return [item for item in items if isinstance(item, int)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _list_value(node.left), _list_value(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
            return _repeat(left, right)
    raise ValueError("not a list expression")


def _repeat(values: list[int], times: int) -> list[int]:
    if len(values) * times > MAX_ENTRIES:
        raise ValueError("too long")
    return values * times

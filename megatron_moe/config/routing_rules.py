"""Rules of experts and routers: their numbers, groups, pools and balance."""

from __future__ import annotations

from dataclasses import replace

from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import UsageError


def check_routing(config: RunConfig) -> None:
    """Check the settings of experts and routers, for each number of experts.

    Raises:
        UsageError: the first rule that does not hold, by flag.
    """
    _check_layer_experts(config)
    for experts in config.moe.numbers_of_experts:
        _check_router(replace(config.moe, num_experts=experts))


def _check_layer_experts(config: RunConfig) -> None:
    """`--moe-layer-num-experts`."""
    moe, layers = config.moe, len(config.moe_layers)
    experts, flag = moe.moe_layer_num_experts, "--moe-layer-num-experts"
    if experts is None:
        return
    found = " ".join(map(str, experts))
    if len(experts) != layers:
        raise UsageError(flag, found, f"{layers} numbers, one for each MoE layer")
    if min(experts) < moe.moe_router_topk:
        raise UsageError(flag, found, f">= --moe-router-topk ({moe.moe_router_topk})")
    if moe.num_experts != max(experts):
        expected = f"{max(experts)}, the largest of {flag}, or left out"
        raise UsageError("--num-experts", moe.num_experts, expected)


def _check_router(moe: MoEConfig) -> None:
    least, default = moe.moe_min_capacity, MoEConfig().moe_min_capacity
    if moe.moe_capacity_rule == "megatron" and least != default:
        expected = "unset with --moe-capacity-rule megatron, which has no minimum"
        raise UsageError("--moe-min-capacity", least, expected)
    softmax = moe.moe_router_score_function == "softmax"
    if softmax and not moe.moe_router_pre_softmax and moe.moe_router_topk == 1:
        expected = ">= 2 with --no-moe-router-pre-softmax"
        fix = "the weight of a single choice would always be 1; use --moe-router-pre-softmax"
        raise UsageError("--moe-router-topk", 1, expected, fix)
    _check_expert_groups(moe)
    _check_balance_losses(moe)
    if moe.balances_by_quantile:
        _check_quantiles(moe)
    if moe.moe_router_document_pool is not None:
        _check_pools(moe, moe.moe_router_document_pool)


def _check_pools(moe: MoEConfig, sizes: tuple[int, int]) -> None:
    """`--moe-router-document-pool`."""
    flag, found = "--moe-router-document-pool", " ".join(map(str, sizes))
    if not moe.moe_router_topk <= sizes[0] <= sizes[1] <= moe.num_experts:
        expected = f"two sizes from --moe-router-topk ({moe.moe_router_topk})"
        raise UsageError(flag, found, f"{expected} to --num-experts ({moe.num_experts}), in order")
    for other, given in (
        ("--moe-router-num-groups", moe.moe_router_num_groups is not None),
        ("--moe-router-type token_hash", moe.moe_router_type == "token_hash"),
        ("--moe-z-loss-over chosen", moe.moe_z_loss_over == "chosen"),
        ("--moe-router-force-load-balancing", moe.moe_router_force_load_balancing),
        ("quantile_balancing", moe.balances_by_quantile),
    ):
        if given:
            raise UsageError(flag, found, f"unset with {other}")


def _check_balance_losses(moe: MoEConfig) -> None:
    """`--moe-router-load-balancing-type` and `--moe-aux-loss-coeff`, if they are several."""
    kinds, weights = moe.load_balancing_types, moe.aux_loss_coeffs
    found, flag = " ".join(kinds), "--moe-router-load-balancing-type"
    if not kinds or len(set(kinds)) < len(kinds) or (len(kinds) > 1 and "none" in kinds):
        raise UsageError(flag, found, "one or several, each once, none alone")
    if len(kinds) != len(weights):
        given = " ".join(map(str, weights))
        raise UsageError("--moe-aux-loss-coeff", given, f"a number for each of {found}")


def _check_quantiles(moe: MoEConfig) -> None:
    """`--moe-router-load-balancing-type quantile_balancing`."""
    beside = "with --moe-router-load-balancing-type quantile_balancing"
    if moe.moe_router_enable_expert_bias:
        fix = "there is one bias, which either flag sets"
        raise UsageError("--moe-router-enable-expert-bias", True, f"unset {beside}", fix)
    if moe.moe_router_num_groups is not None:
        fix = "whether a token chooses an expert depends on its group as well"
        flag = "--moe-router-num-groups"
        raise UsageError(flag, moe.moe_router_num_groups, f"unset {beside}", fix)
    if moe.moe_router_topk == moe.num_experts:
        expected = f"< --num-experts ({moe.num_experts}) {beside}"
        raise UsageError("--moe-router-topk", moe.moe_router_topk, expected)


def _check_expert_groups(moe: MoEConfig) -> None:
    """`--moe-router-num-groups` and `--moe-router-group-topk`."""
    groups, best, topk = moe.moe_router_num_groups, moe.moe_router_group_topk, moe.moe_router_topk
    if groups is None and best is None:
        return
    if groups is None or best is None:
        given, missing = "--moe-router-num-groups", "--moe-router-group-topk"
        if groups is None:
            given, missing = missing, given
        raise UsageError(missing, None, f"given with {given}")
    if moe.num_experts % groups:
        expected = f"a divisor of --num-experts ({moe.num_experts})"
        raise UsageError("--moe-router-num-groups", groups, expected)
    size = moe.num_experts // groups
    if best > min(groups, topk):
        expected = f"<= --moe-router-num-groups ({groups}) and <= --moe-router-topk ({topk})"
        raise UsageError("--moe-router-group-topk", best, expected)
    if topk > best * size or topk // best > size:
        expected = f"<= the experts of --moe-router-group-topk {best} groups ({best * size})"
        raise UsageError("--moe-router-topk", topk, expected)

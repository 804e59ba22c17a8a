"""Flags that stand for other flags, or that set several, resolved when read.

Most are Megatron-LM's. Each is a flag with a docstring like any other, but not a part of the run's
configuration: what it stands for is stored instead, so that a `config.json` has one way to say a
thing. A command line that contradicts itself is an error, whatever the order of its words.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated

from megatron_moe.config.fields import AtLeastOne
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.run import RunConfig, flag_of
from megatron_moe.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Shorthands:
    """Shorthands for other flags."""

    swiglu: bool = False
    """The same as `--ffn-variant swiglu`: gate and up projections, SiLU, down projection."""
    recompute_activations: bool = False
    """The same as `--recompute-granularity selective`."""
    moe_layer_recompute: bool = False
    """Adds `moe` to `--recompute-modules`, with `--recompute-granularity selective`."""
    save_retain_interval: Annotated[int | None, AtLeastOne] = None
    """The same as `--keep-last 1 --keep-every N`: the newest checkpoint and those of every N steps
    stay. A multiple of `--save-interval`."""
    moe_expert_split_factor: Annotated[int, AtLeastOne] = 1
    """Fine-grained experts (DeepSeekMoE, arXiv 2401.06066): m times as many experts, each 1/m as
    wide, and m times as many choices a token, of what the other flags say."""
    moe_num_shared_experts: Annotated[int, AtLeastOne] = 1
    """Shared experts, each of `--moe-shared-expert-intermediate-size`. Their sum is one shared
    expert as wide as all of them, which is what is built, as in Megatron-LM."""


def expand(shorthands: Shorthands, config: RunConfig, given: Collection[str]) -> RunConfig:
    """The configuration with what the shorthands stand for.

    Args:
        shorthands: as given.
        config: from the other flags.
        given: names of the fields that the command line sets.

    Raises:
        UsageError: a shorthand contradicts another flag.
    """
    if shorthands.swiglu:
        config = _set(config, "--swiglu", given, "model", ffn_variant="swiglu")
    if shorthands.recompute_activations:
        flag = "--recompute-activations"
        config = _set(config, flag, given, "parallel", recompute_granularity="selective")
    if shorthands.moe_layer_recompute:
        flag = "--moe-layer-recompute"
        config = _set(config, flag, given, "parallel", recompute_granularity="selective")
        modules = config.parallel.recompute_modules
        added = (*modules, *(() if "moe" in modules else ("moe",)))
        config = replace(config, parallel=replace(config.parallel, recompute_modules=added))
    if shorthands.save_retain_interval is not None:
        config = _retain(config, shorthands.save_retain_interval, given)
    config = replace(config, moe=_experts(shorthands, config, given))
    if "init_method_std" in given and config.model.init_method_std is not None:
        config = _one_std(config, config.model.init_method_std, given)
    elif "init_variance_scale" in given:  # instead of a preset's
        config = replace(config, model=replace(config.model, init_method_std=None))
    return config


def _set(
    config: RunConfig, shorthand: str, given: Collection[str], section: str, **values: object
) -> RunConfig:
    """Set fields, unless the command line sets them to something else."""
    settings = getattr(config, section)
    for name, value in values.items():
        other = getattr(settings, name)
        if name in given and other != value:
            expected = f"used without {flag_of(name)} {other}"
            fix = f"it stands for {flag_of(name)} {value}"
            raise UsageError(shorthand, "both", expected, fix)
    return replace(config, **{section: replace(settings, **values)})


def _retain(config: RunConfig, interval: int, given: Collection[str]) -> RunConfig:
    flag, saves = "--save-retain-interval", config.checkpoint.save_interval
    if saves is None or interval % saves:
        expected = f"a multiple of --save-interval ({saves})"
        raise UsageError(flag, interval, expected)
    return _set(config, flag, given, "checkpoint", keep_last=1, keep_every=interval)


def _experts(shorthands: Shorthands, config: RunConfig, given: Collection[str]) -> MoEConfig:
    """Numbers and widths of experts: the largest of a list, several shared ones, split ones."""
    moe = config.moe
    if moe.moe_layer_num_experts and "num_experts" not in given:
        moe = replace(moe, num_experts=max(moe.moe_layer_num_experts))
    if (count := shorthands.moe_num_shared_experts) > 1:
        width = moe.moe_shared_expert_intermediate_size
        if width is None:
            expected = "used with a --moe-shared-expert-intermediate-size"
            raise UsageError("--moe-num-shared-experts", count, expected)
        moe = replace(moe, moe_shared_expert_intermediate_size=count * width)
    factor = shorthands.moe_expert_split_factor
    return moe if factor == 1 else split_experts(moe, factor, config.model.ffn_hidden_size)


def split_experts(moe: MoEConfig, factor: int, ffn_hidden_size: int) -> MoEConfig:
    """Experts cut into equal parts along their width, each an expert of its own.

    Parameters and arithmetic of experts are unchanged, and so are slots of an expert: under the
    rule `t5x`, which does not count choices, capacity factors grow by the same factor.

    Args:
        moe: of the experts that are cut.
        factor: m parts.
        ffn_hidden_size: width of an expert whose own is not given.

    Raises:
        UsageError: the parts are not equally wide.
    """
    width = moe.moe_ffn_hidden_size or ffn_hidden_size
    if width % factor:
        expected = f"a divisor of the width of an expert ({width})"
        raise UsageError("--moe-expert-split-factor", factor, expected)
    by = factor if moe.moe_capacity_rule == "t5x" else 1
    train, evaluation = moe.moe_expert_capacity_factor, moe.moe_eval_capacity_factor
    layers, factors = moe.moe_layer_num_experts, moe.moe_layer_capacity_factors
    low, high = moe.moe_capacity_factor_range
    targeted = moe.moe_target_drop_rate is not None
    pool = moe.moe_router_document_pool
    return replace(
        moe,
        num_experts=factor * moe.num_experts,
        moe_router_topk=factor * moe.moe_router_topk,
        moe_ffn_hidden_size=width // factor,
        moe_layer_num_experts=layers and tuple(factor * count for count in layers),
        moe_expert_capacity_factor=train and by * train,
        moe_eval_capacity_factor=evaluation and by * evaluation,
        moe_layer_capacity_factors=factors and tuple(by * each for each in factors),
        moe_capacity_factor_range=(by * low, by * high) if targeted else (low, high),
        moe_router_document_pool=pool and (factor * pool[0], factor * pool[1]),
    )


def _one_std(config: RunConfig, std: float, given: Collection[str]) -> RunConfig:
    """As in Megatron-LM, `--init-method-std` is the default of embedding and router as well."""
    if "init_variance_scale" in given:
        expected = "used without --init-variance-scale"
        raise UsageError("--init-method-std", "both", expected, "give one of the two")
    model = config.model
    if "embedding_init_method_std" not in given:
        model = replace(model, embedding_init_method_std=std)
    if "router_init_method_std" not in given:
        model = replace(model, router_init_method_std=std)
    return replace(config, model=model)

"""Flags of Megatron-LM that stand for other flags, or that set several, resolved when read.

Each is a flag with a docstring like any other, but not a part of the run's configuration: what it
stands for is stored instead, so that a `config.json` has one way to say a thing. A command line
that contradicts itself is an error, whatever the order of its words.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated

from megatron_moe.config.fields import AtLeastOne
from megatron_moe.config.run import RunConfig, flag_of
from megatron_moe.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Shorthands:
    """Megatron-LM's shorthands for other flags."""

    swiglu: bool = False
    """The same as `--ffn-variant swiglu`: gate and up projections, SiLU, down projection."""
    recompute_activations: bool = False
    """The same as `--recompute-granularity selective`."""
    moe_layer_recompute: bool = False
    """Adds `moe` to `--recompute-modules`, with `--recompute-granularity selective`."""
    save_retain_interval: Annotated[int | None, AtLeastOne] = None
    """The same as `--keep-last 1 --keep-every N`: the newest checkpoint and those of every N steps
    stay. A multiple of `--save-interval`."""


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

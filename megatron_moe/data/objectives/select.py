"""From `--objective` to a data set class and what it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_moe.config import RunConfig
from megatron_moe.data.batch import extra_planes
from megatron_moe.data.causal import CausalDataset
from megatron_moe.data.objectives.prefix_lm import PrefixLmDataset
from megatron_moe.data.objectives.sft import SftDataset, SftPlan
from megatron_moe.data.objectives.ul2 import Ul2Dataset, plan_ul2
from megatron_moe.tokenizer.build import Tokenizer, unpadded_vocab_size


@dataclass(frozen=True, kw_only=True)
class ObjectivePlan:
    """What the samples of a run are made by."""

    dataset: type[Any]
    """Class of the samples of one source."""
    token_limit: int
    """No id of the text may reach it: the vocabulary's size, or the lowest sentinel."""
    settings: Any = None
    """What it needs besides data, seed and length."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What decides the samples, besides data, seed, length and tokenizer; empty for `causal`, so
    that its runs go on from checkpoints that know no objective."""


def plan_objective(config: RunConfig, tokenizer: Tokenizer) -> ObjectivePlan:
    """Check the objective's flags. The same on every rank, and communicates nothing.

    Raises:
        UsageError: flags that do not fit the objective, the tokenizer or the rows.
    """
    objective = config.objective
    name, eod = objective.objective, objective.eod_mask_loss
    resets = extra_planes(objective)
    if name == "ul2":
        plan = plan_ul2(config, tokenizer)
        return ObjectivePlan(
            dataset=Ul2Dataset,
            token_limit=plan.sentinels[-1],
            settings=plan,
            identity={"objective": name, **plan.identity},
        )
    limit = unpadded_vocab_size(config.data, tokenizer)
    if name == "sft":
        pack = config.objective.sft_pack
        identity = {"objective": name, "pack": pack, **_reset_identity(resets)}
        settings = SftPlan(pack=pack)
        return ObjectivePlan(
            dataset=SftDataset, token_limit=limit, settings=settings, identity=identity
        )
    identity = {"objective": name} if name != "causal" or eod else {}
    if eod:
        identity["eod_mask_loss"] = True
    identity |= _reset_identity(resets)
    dataset = PrefixLmDataset if name == "prefix-lm" else CausalDataset
    return ObjectivePlan(dataset=dataset, token_limit=limit, identity=identity)


def _reset_identity(resets: tuple[str, ...]) -> dict[str, Any]:
    """Empty without resets, so that runs go on from checkpoints that know none."""
    return {"reset": list(resets)} if resets else {}

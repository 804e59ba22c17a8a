"""From `--objective` to a dataset class and its settings.

A new objective is a dataset class in a module of its own and a branch in `plan_objective`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megatron_moe.config import RunConfig
from megatron_moe.data.batch import reset_planes
from megatron_moe.data.causal import CausalDataset
from megatron_moe.data.objectives.prefix_lm import PrefixLmDataset
from megatron_moe.data.objectives.sft import SftDataset, SftPlan
from megatron_moe.data.objectives.ul2 import Ul2Dataset, plan_ul2
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.build import unpadded_vocab_size


@dataclass(frozen=True, kw_only=True)
class ObjectivePlan:
    """How the samples of a run are made."""

    dataset: type[Any]
    """Dataset class of the samples of one source."""
    token_limit: int
    """All ids of the text must be below it: the vocabulary size, or the lowest sentinel."""
    settings: Any = None
    """What the class needs besides data, seed and length."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Everything that decides the samples, besides data, seed, length and tokenizer; empty for
    `causal`, so that its runs resume from checkpoints that were written before objectives."""


def plan_objective(config: RunConfig, tokenizer: Tokenizer) -> ObjectivePlan:
    """Fit the objective to the tokenizer and the rows. The same on every rank; no communication.

    Conflicts between flags are errors of `config.validate` before this is called.

    Raises:
        UsageError: the objective does not fit the tokenizer or the row length, or the start token
            the vocabulary.
    """
    plan = _plan(config, tokenizer)
    start, size = config.objective.decoder_start_token_id, config.data.vocab_size
    if start is None:
        return plan
    size = size or unpadded_vocab_size(config.data, tokenizer)
    if start >= size:
        expected = f"an id of the vocabulary, of {size} ids"
        raise UsageError("--decoder-start-token-id", start, expected)
    return replace(plan, identity={**plan.identity, "decoder_start_token_id": start})


def _plan(config: RunConfig, tokenizer: Tokenizer) -> ObjectivePlan:
    objective = config.objective
    name, eod = objective.objective, objective.eod_mask_loss
    resets = reset_planes(objective)
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
    """Return nothing without resets, so that runs resume from checkpoints written before them."""
    return {"reset": list(resets)} if resets else {}

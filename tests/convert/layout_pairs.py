"""What ranks do in `test_layout_pairs`: load checkpoints of many layouts, one after another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_moe.config import RunConfig
from tests.checkpoint.layouts import Case, build, gathered, load, spoil


class OneWidth(Case):
    """With feed-forward layers of one width, as the Hugging Face layout has them."""

    def config(self) -> RunConfig:
        run = super().config()
        width = run.model.ffn_hidden_size
        widths = {"moe_ffn_hidden_size": width, "moe_shared_expert_intermediate_size": width}
        return replace(run, moe=replace(run.moe, **widths))


def load_all(
    rank: int, world_size: int, *, case: Case, whole: list[Path], weights: list[Path]
) -> tuple[Any, list[str]]:
    """What this rank holds after the first load, and the sources after which it holds another.

    Args:
        rank: of this process.
        world_size: ranks.
        case: the layout that loads.
        whole: checkpoints with optimizer state.
        weights: checkpoints without.
    """
    run = build(case)
    # Other formats hold no settings of data and training, so a run finetunes from what they give.
    checkpoint = replace(run.config.checkpoint, finetune=True)
    finetuning = replace(run, config=replace(run.config, checkpoint=checkpoint))
    first: Any = None
    odd = []
    for source in (*whole, *weights):
        spoil(run)
        bare = source in weights
        options = {"identity": None, "with_optimizer": False, "with_rng": False} if bare else {}
        load(finetuning if bare else run, source, **options)
        held = gathered(run)
        if first is None:
            first = held
        elif not all(a[:2] == b[:2] and torch.equal(a[4], b[4]) for a, b in pairs(first, held)):
            odd.append(str(source))
    return first, odd


def pairs(first: Any, second: Any) -> Any:
    """Blocks side by side."""
    return zip(first, second, strict=True)

"""Configurations and batches of an objective, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_moe.config import ObjectiveConfig, RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.data.pipeline import Data, build_data
from tests.data.corpus import run_config

GLOBAL = 8
STEPS = 5
Row = tuple[list[int], list[int], list[float]]
"""Tokens, labels and mask."""


def objective_config(*paths: str, **changes: Any) -> RunConfig:
    """``changes`` go to the objective, the data or the train section."""
    own = {k: v for k, v in changes.items() if k in ObjectiveConfig.__dataclass_fields__}
    rest = {k: v for k, v in changes.items() if k not in own}
    return replace(run_config(*paths, **rest), objective=ObjectiveConfig(**own))


def data_of(
    *paths: str, dp: tuple[int, int] = (0, 1), micro: int = 2, consumed: int = 0, **changes: Any
) -> Data:
    settings = {"micro_batch_size": micro, "train_iters": STEPS, **changes}
    return build_data(
        objective_config(*paths, **settings),
        dp_rank=dp[0],
        dp_size=dp[1],
        num_microbatches=GLOBAL // (micro * dp[1]),
        consumed_train_samples=consumed,
        reads_data=True,
    )


def rows(batches: Any) -> list[Row]:
    found = []
    for batch in batches:
        assert isinstance(batch, Batch)
        parts = (batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS)
        found += list(zip(*(part.tolist() for part in parts), strict=True))
    return found


def order(*paths: str, dp_size: int, micro: int, consumed: int = 0, **changes: Any) -> list[Row]:
    """Rows of the global order, put together from what every rank reads."""
    ranks = [
        rows(data_of(*paths, dp=(r, dp_size), micro=micro, consumed=consumed, **changes).train)
        for r in range(dp_size)
    ]
    blocks = range(len(ranks[0]) // micro)
    return [row for b in blocks for rank in ranks for row in rank[b * micro : (b + 1) * micro]]

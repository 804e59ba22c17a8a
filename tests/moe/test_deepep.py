"""The dispatcher `deepep`, with DeepEP's exchange over gloo in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_kernels.reference import rank_in_expert
from megatron_moe.errors import UsageError
from megatron_moe.moe.dispatchers import deepep
from megatron_moe.moe.exchange import ExpertGroups
from tests.moe import ranks
from tests.moe.cases import moe_config
from tests.support.pool import Pool

SETTINGS: dict[str, Any] = {"moe_expert_impl": "grouped", "moe_token_dispatcher_type": "deepep"}


def test_choices_of_other_ranks_have_no_row() -> None:
    """The example of `place_by_expert`, with a token that is not of this rank at all."""
    ids = torch.tensor([[1, -1], [0, 1], [-1, -1]])
    placement, ends = deepep.place_by_expert(ids, 2, 3, rank_in_expert)
    assert placement.rows_TK.tolist() == [[1, 0], [0, 2], [0, 0]]
    assert placement.owned_TK.tolist() == [[True, False], [True, True], [False, False]]
    assert placement.source_R.tolist() == [1, 0, 1]
    assert ends.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("world_size", "tp", "ep", "capacity"),
    [
        (2, 1, 2, 1.0),
        pytest.param(2, 2, 2, 1.0, marks=pytest.mark.slow),
        pytest.param(4, 2, 2, None, marks=pytest.mark.slow),
        pytest.param(4, 1, 4, 1.0, marks=pytest.mark.slow),
    ],
)
def test_a_layout_equals_one_process(
    pool: Pool, world_size: int, tp: int, ep: int, capacity: float | None
) -> None:
    settings = {**SETTINGS, "moe_expert_capacity_factor": capacity}
    dropped = pool.run(ranks.check_deepep, world_size, tp=tp, ep=ep, settings=settings)
    assert (sum(dropped) > 0) == (capacity is not None)


def test_it_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.moe import fused_a2a

    with pytest.raises(UsageError, match=r"alltoall here \(got 'deepep'\); .* no CUDA device"):
        deepep.fused_exchange()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused_a2a, "fused_dispatch", None)
    with pytest.raises(UsageError, match=r"the package deep_ep .* is not installed"):
        deepep.fused_exchange()
    groups = ExpertGroups.of(None)
    with pytest.raises(UsageError, match="alltoall without expert parallelism"):
        deepep.FusedDispatcher(moe_config(**SETTINGS), groups)
    with pytest.raises(UsageError, match="alltoall without --moe-expert-impl grouped"):
        deepep.FusedDispatcher(moe_config(moe_token_dispatcher_type="deepep"), groups)
    bound = {"moe_expert_capacity_factor": None, "moe_dropless_buffer_factor": 2.0}
    with pytest.raises(UsageError, match="alltoall with --moe-dropless-buffer-factor"):
        deepep.FusedDispatcher(moe_config(**SETTINGS, **bound), groups)

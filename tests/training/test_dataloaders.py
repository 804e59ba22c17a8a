"""Which data a rank reads, and that the data of later phases is checked and stays the same."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_moe.checkpoint import TrainState
from megatron_moe.errors import UsageError
from megatron_moe.training import dataloaders as module
from megatron_moe.training.dataloaders import build_dataloaders, check_coordinates, coordinates
from megatron_moe.training.resume import ResumePoint
from tests.training.phase_tables import TABLE, schedule_of


def _layout(tp: int, dp: int, pp: int) -> Any:
    return SimpleNamespace(tp=tp, dp=dp, pp=pp)


def test_ranks_are_numbered_tensor_parallel_first_and_pipeline_last():
    expected = [(tp, dp, pp) for pp, dp, tp in product(range(3), range(2), range(2))]
    assert [coordinates(_layout(2, 2, 3), rank) for rank in range(12)] == expected
    assert coordinates(_layout(2, 2, 2), 5) == (1, 0, 1)


def test_groups_that_are_numbered_otherwise_are_an_error():
    ctx: Any = SimpleNamespace(rank=5, tp_rank=1, dp_rank=1, pp_rank=0)
    with pytest.raises(RuntimeError, match=r"rank 5 must be \(1, 0, 1\) \(got \(1, 1, 0\)"):
        check_coordinates(_layout(2, 2, 2), ctx)


class Opened:
    """Stands for `open_data`: a fingerprint for each phase, by its sequence length and seed."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.content = "as at the start"

    def __call__(self, config: Any, layout: Any, rank: int, consumed: int) -> Any:
        key = f"{config.data.seq_length}/{config.train.seed}"
        self.calls.append((key, config.data.num_workers, consumed))
        fingerprint = f"{key} {self.content}"
        described = {"fingerprint": fingerprint, "seed": self.content}
        return SimpleNamespace(fingerprint=fingerprint, described=described)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    found = Opened()
    monkeypatch.setattr(module, "open_data", found)
    return found


def test_later_phases_are_checked_without_workers_and_completed_ones_are_not_opened(
    opened, tmp_path
):
    schedule = schedule_of(TABLE, "--train-iters 20 --num-workers 3", tmp_path)
    # 10 steps: the first phase of 8 x 8 samples, and 2 x 4 of the second.
    resume = ResumePoint(state=TrainState(iteration=10, consumed_train_samples=72))
    found = build_dataloaders(schedule, 0, resume)
    assert opened.calls == [("32/5", 0, 0), ("64/1234", 3, 8)]
    assert found.current.fingerprint == "64/1234 as at the start"


def test_data_that_changed_since_the_start_is_an_error_where_its_phase_begins(opened, tmp_path):
    schedule = schedule_of(TABLE, "--train-iters 20", tmp_path)
    found = build_dataloaders(schedule, 0, ResumePoint(state=TrainState()))
    data = found.enter_phase(schedule.phases[1])
    assert found.current is data
    assert opened.calls[-1][2] == 0
    opened.content = "changed"
    with pytest.raises(UsageError) as error:
        found.enter_phase(schedule.phases[2])
    assert error.value.what == f"{schedule.phases[2].label}: training data"
    assert error.value.expected == "what it was when the run started"
    found = "--seed: as at the start when the run started, changed in this run"
    assert error.value.found == found

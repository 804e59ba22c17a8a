"""The data of each phase on this rank: all of it checked before the first step, opened when needed.

Data is opened before process groups exist, from the rank's number alone. So a missing or broken
file ends all ranks with one error message, and no rank waits in a collective, which has a timeout,
while another builds a sample index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_moe.config import RunConfig
from megatron_moe.config.phases import errors_of_phase
from megatron_moe.data.batch import every_stage_reads
from megatron_moe.data.identity import data_differences
from megatron_moe.data.pipeline import Data, build_data
from megatron_moe.errors import UsageError
from megatron_moe.parallel.context import ParallelContext
from megatron_moe.parallel.layout import Layout
from megatron_moe.training.consumed import check_data, has_records
from megatron_moe.training.phases import Phase, RunSchedule
from megatron_moe.training.resume import ResumePoint


class PhaseDataLoaders:
    """The data of the current phase, and how to open that of the next one.

    Args:
        rank: this rank.
        at_start: by number of the phase, what the data of each later phase was when the run
            started, see `data.identity`.
        current: data of the phase of the next step.
    """

    def __init__(self, rank: int, at_start: Mapping[int, dict[str, Any]], current: Data) -> None:
        self.current = current
        self._rank, self._at_start = rank, at_start

    def enter_phase(self, phase: Phase) -> Data:
        """Open the data of a phase from its first sample; it becomes `current`.

        Raises:
            UsageError: it is missing, broken, or not what it was when the run started.
        """
        with errors_of_phase(phase.label):
            data = open_data(phase.config, phase.layout, self._rank, 0)
            before, where = self._at_start.get(phase.number), "when the run started"
            if before is not None and before["fingerprint"] != data.fingerprint:
                lines = data_differences(before, data.described, before["fingerprint"], where)
                raise UsageError("training data", "; ".join(lines), f"what it was {where}")
        self.current = data
        return data


def build_dataloaders(schedule: RunSchedule, rank: int, resume: ResumePoint) -> PhaseDataLoaders:
    """Check the data of the current and all later phases, and open that of the current one.

    Called on every rank; communicates nothing, so bad data ends all ranks with the same message.
    Sample indices are built here, so that a later phase finds them in the cache instead of
    stopping the run to build them. The data of completed phases need not exist any more.

    Args:
        schedule: the phases of the run.
        rank: this rank.
        resume: where the run starts.

    Raises:
        UsageError: data is missing or broken, or not what the current phase began with.
    """
    state = resume.state
    current = schedule.at(state.iteration)
    at_start: dict[int, dict[str, Any]] = {}
    for phase in schedule.phases:
        if phase.number > current.number:
            with errors_of_phase(phase.label):
                checked = open_data(_without_workers(phase.config), phase.layout, rank, 0)
            at_start[phase.number] = checked.described
    with errors_of_phase(current.label):
        consumed = state.consumed_train_samples - current.first_sample
        data = open_data(current.config, current.layout, rank, consumed)
    if resume.records and (schedule.has_phases or has_records(state)):
        check_data(current, state, resume.records[-1], data.described)
    return PhaseDataLoaders(rank, at_start, data)


def _without_workers(config: RunConfig) -> RunConfig:
    """Worker processes would start to read ahead now, for a phase that may be days away."""
    return replace(config, data=replace(config.data, num_workers=0))


def open_data(config: RunConfig, layout: Layout, rank: int, consumed_samples: int) -> Data:
    """This rank's data, starting after ``consumed_samples`` sequences."""
    tp_rank, dp_rank, pp_rank = coordinates(layout, rank)
    return build_data(
        config,
        dp_rank=dp_rank,
        dp_size=layout.dp,
        num_microbatches=layout.num_microbatches,
        consumed_train_samples=consumed_samples,
        # Middle stages may need planes or tokens; reading costs less than sending them.
        reads_data=tp_rank == 0 and (pp_rank in (0, layout.pp - 1) or every_stage_reads(config)),
    )


def coordinates(layout: Layout, rank: int) -> tuple[int, int, int]:
    """(Tensor-parallel, data-parallel, pipeline) rank of a global rank.

    Megatron-LM's order: tensor-parallel ranks are adjacent, then data-parallel ranks, then pipeline
    stages. With TP 2, DP 2 and PP 2, rank 5 = 1 + 2 * (0 + 2 * 1) is (1, 0, 1).
    """
    return rank % layout.tp, rank // layout.tp % layout.dp, rank // (layout.tp * layout.dp)


def check_coordinates(layout: Layout, ctx: ParallelContext) -> None:
    """Make sure that Megatron-Core's process groups number the ranks in the same way.

    Raises:
        RuntimeError: they do not, and ranks would read each other's data.
    """
    expected = coordinates(layout, ctx.rank)
    found = (ctx.tp_rank, ctx.dp_rank, ctx.pp_rank)
    if expected != found:
        raise RuntimeError(
            f"(TP, DP, PP) of rank {ctx.rank} must be {expected} (got {found} from Megatron-Core)"
        )

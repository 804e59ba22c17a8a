"""The data of each stage: all of it checked before training starts, opened when it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_moe.config import RunConfig
from megatron_moe.config.phases import errors_of_phase
from megatron_moe.data.pipeline import Data
from megatron_moe.errors import UsageError
from megatron_moe.training.consumed import KEY, check_data
from megatron_moe.training.phases import Phase, RunSchedule
from megatron_moe.training.placement import open_data
from megatron_moe.training.resume import ResumePoint


@dataclass(frozen=True, kw_only=True)
class PhaseDataLoaders:
    """Opens the data of stages on this rank."""

    rank: int
    fingerprints: Mapping[int, str]
    """Of the data of stages still to come, as it was at the start; by number of the stage."""

    def open(self, stage: Phase, consumed: int = 0) -> Data:
        """The data of a stage.

        Args:
            stage: one of the run's.
            consumed: sequences that the stage has taken already.

        Raises:
            UsageError: it is missing, broken, or not what it was when the run started.
        """
        with errors_of_phase(stage.label):
            data = open_data(stage.config, stage.layout, self.rank, consumed)
            before = self.fingerprints.get(stage.number)
            if before not in (None, data.fingerprint):
                expected = f"{before}, as when the run started"
                raise UsageError("training data", data.fingerprint, expected)
        return data


def build_dataloaders(
    schedule: RunSchedule, rank: int, start: ResumePoint
) -> tuple[PhaseDataLoaders, Data]:
    """Check the data of all stages that are not over, and open that of the first of them.

    To be called on every rank; communicates nothing, so bad data ends all ranks with one line.
    Sample indices are built now, so that a later stage finds them in the cache. The data of stages
    that are over need not exist any more.

    Raises:
        UsageError: any of it is missing or broken, or not what the stage under way began with.
    """
    now, state = schedule.at(start.state.iteration), start.state
    later = [stage for stage in schedule.phases if stage.number > now.number]
    fingerprints: dict[int, str] = {}
    for stage in later:
        with errors_of_phase(stage.label):
            found = open_data(_without_workers(stage.config), stage.layout, rank, 0)
        fingerprints[stage.number] = found.fingerprint
    supply = PhaseDataLoaders(rank=rank, fingerprints=fingerprints)
    data = supply.open(now, state.consumed_train_samples - now.first_sample)
    if start.records and (schedule.has_phases or KEY in state.extra):
        check_data(now, state, start.records[-1], data.fingerprint)
    return supply, data


def _without_workers(config: RunConfig) -> RunConfig:
    """Processes that read ahead would start at once and wait for days."""
    return replace(config, data=replace(config.data, num_workers=0))

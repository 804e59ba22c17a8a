"""What a run has consumed so far, by stage: saved with checkpoints, and not to be contradicted.

A run that goes on may have another stage table, or none, or have begun without one, as long as the
table says of every step that was taken what was really done: the same samples of the same data in
the same steps. What is still to come may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_moe.checkpoint import TrainState
from megatron_moe.checkpoint.metadata import CheckpointMetadata
from megatron_moe.config import RunConfig
from megatron_moe.config.phases import FLAG
from megatron_moe.errors import UsageError
from megatron_moe.training.phases import Phase, RunSchedule

KEY = "stages"
"""Of the records in a checkpoint's `TrainState.extra`."""
_DECIDE = {
    "objective": ("objective", "ul2_inputs_length", "ul2_fill_rows", "eod_mask_loss", "sft_pack"),
    "data": ("seq_length", "split"),
    "train": ("seed",),
}
"""Settings that decide samples, whatever the files are called and wherever they are."""


@dataclass(frozen=True, kw_only=True)
class PhaseRecord:
    """What was done of a stage."""

    name: str
    """Empty for a run without a stage table."""
    first_iteration: int
    iterations: int
    """Steps done."""
    first_sample: int
    samples: int
    """Sequences consumed."""
    fingerprint: str
    """Of its data."""
    config: dict[str, Any]
    """Of a run of this stage alone, as `RunConfig.to_dict` gives it."""

    @property
    def last_iteration(self) -> int:
        """Steps of the run until the last one of this record."""
        return self.first_iteration + self.iterations


def record_of(stage: Phase, state: TrainState, fingerprint: str) -> PhaseRecord:
    """What is done of the stage that took the last step."""
    return PhaseRecord(
        name=stage.name,
        first_iteration=stage.first_iteration,
        iterations=state.iteration - stage.first_iteration,
        first_sample=stage.first_sample,
        samples=state.consumed_train_samples - stage.first_sample,
        fingerprint=fingerprint,
        config=stage.config.to_dict(),
    )


def to_extra(records: Sequence[PhaseRecord]) -> dict[str, Any]:
    """As `TrainState.extra` holds them."""
    return {KEY: [asdict(record) for record in records]}


def recorded(state: TrainState, opened: CheckpointMetadata) -> tuple[PhaseRecord, ...]:
    """The stages that a checkpoint was made by; one without a name if there was no table.

    Raises:
        UsageError: the checkpoint has something else there.
    """
    if KEY not in state.extra:
        whole = PhaseRecord(
            name="",
            first_iteration=0,
            iterations=state.iteration,
            first_sample=0,
            samples=state.consumed_train_samples,
            fingerprint=opened.identity.data_fingerprint,
            config=opened.config.to_dict(),
        )
        return (whole,)
    entries, kinds = state.extra[KEY], {f.name: f.type for f in fields(PhaseRecord)}
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or entry.keys() != kinds.keys():
            expected = f"stages with {', '.join(kinds)}"
            raise UsageError(f"stages of checkpoint {opened.path}", entry, expected)
    return tuple(PhaseRecord(**entry) for entry in entries)


def check_consumed(
    schedule: RunSchedule, state: TrainState, records: Sequence[PhaseRecord]
) -> None:
    """Refuse to go on with a run that says otherwise of what was done.

    Raises:
        UsageError: names the stage, and what it is and was.
    """
    if not schedule.has_phases:
        if len(records) > 1:
            done = ", ".join(record.name for record in records)
            fix = "--finetune takes the weights alone"
            raise UsageError(FLAG, None, f"the table of the run to go on with: {done}", fix)
        return
    for record, stage in zip(records, schedule.phases, strict=False):
        _check_place(stage, record, ended=record is not records[-1])
        _check_settings(stage, record)
    if len(records) > len(schedule.phases) or state.iteration > schedule.iterations:
        expected = f"stages that hold the {state.iteration} steps of the checkpoint"
        raise UsageError(FLAG, schedule.config.train.stages, expected)


def _check_place(stage: Phase, record: PhaseRecord, ended: bool) -> None:
    """The stage holds the steps and samples of the record, and ends with it if it is over."""
    first, last = record.first_iteration, record.last_iteration
    fits = stage.first_iteration == first and last <= stage.last_iteration
    if not fits or (ended and last != stage.last_iteration):
        found = f"steps {stage.first_iteration + 1} to {stage.last_iteration}"
        done = f"steps {first + 1} to {last}" + ("" if ended else " within it")
        raise UsageError(stage.label, found, f"{done}, which the checkpoint has done")
    consumed = record.first_sample + record.samples
    if stage.samples_at(last) != consumed:
        expected = f"{consumed} after {last} steps, as in the checkpoint"
        fix = "another batch size needs a stage of its own"
        raise UsageError(f"{stage.label}: samples", stage.samples_at(last), expected, fix)


def _check_settings(stage: Phase, record: PhaseRecord) -> None:
    """Whatever the data is called, it was cut and hidden in this way."""
    for section, names in _DECIDE.items():
        before = record.config.get(section, {})
        for name in names:
            value = getattr(getattr(stage.config, section), name)
            if name in before and before[name] != value:
                flag = f"{stage.label}: --{name.replace('_', '-')}"
                expected = f"{before[name]}, as for the steps that the checkpoint has done"
                raise UsageError(flag, value, expected)


def check_data(stage: Phase, state: TrainState, record: PhaseRecord, fingerprint: str) -> None:
    """The data of a stage under way must be what it began with.

    Raises:
        UsageError: it is not.
    """
    under_way = stage.first_iteration == record.first_iteration and record.iterations > 0
    if under_way and state.iteration < stage.last_iteration and record.fingerprint != fingerprint:
        expected = f"{record.fingerprint}, as for the steps that the checkpoint has done"
        raise UsageError(f"{stage.label}: training data", fingerprint, expected)


def previous_settings(record: PhaseRecord, source: str) -> RunConfig:
    """The configuration that the last steps were taken with."""
    return RunConfig.from_dict(record.config, source)

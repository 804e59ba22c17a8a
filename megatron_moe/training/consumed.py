"""What a run has consumed so far, by phase: saved with checkpoints and checked on resume.

A run may resume with a changed phase table, without one, or with a first one, as long as the table
assigns to every completed step what that step really did: the same samples of the same data.
Anything about later steps may change.

The on-disk key of the records is `stages`, the name of the flag that reads the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_moe.checkpoint import TrainState
from megatron_moe.checkpoint.metadata import CheckpointMetadata
from megatron_moe.config import RunConfig
from megatron_moe.config.phases import FLAG
from megatron_moe.config.run import flag_of
from megatron_moe.data.identity import data_differences
from megatron_moe.errors import CheckpointError, UsageError
from megatron_moe.training.capacity import CAPACITY
from megatron_moe.training.phases import Phase, RunSchedule
from megatron_moe.training.spikes import SPIKES, SpikeWatch

KEY = "stages"
"""Key of the records in a checkpoint's `TrainState.extra`."""
DATA = "data"
"""Key of what the training data was, in a checkpoint's `TrainState.extra`."""
PROBE = "routing_probe"
"""Key of the first and the last probe of the routing, in a checkpoint's `TrainState.extra`."""
_DECIDE = {
    "objective": (
        "objective",
        "ul2_inputs_length",
        "ul2_fill_rows",
        "eod_mask_loss",
        "sft_pack",
        "sft_share",
        "decoder_start_token_id",
    ),
    "data": ("seq_length", "split"),
    "train": ("seed",),
}
"""Settings that decide the content of samples. Paths are not among them: data may move, and is
compared by fingerprint."""


@dataclass(frozen=True, kw_only=True)
class PhaseRecord:
    """The completed part of a phase."""

    name: str
    """Empty for a run without a phase table."""
    first_iteration: int
    """Steps of the run before the phase."""
    iterations: int
    """Completed steps of the phase."""
    first_sample: int
    """Sequences of the run before the phase."""
    samples: int
    """Sequences consumed by the phase."""
    fingerprint: str
    """Of the phase's data."""
    config: dict[str, Any]
    """Of a run of this phase alone, as `RunConfig.to_dict` returns it."""

    @property
    def last_iteration(self) -> int:
        """Steps of the run up to and including the last one of this record."""
        return self.first_iteration + self.iterations


def record_of(phase: Phase, state: TrainState, fingerprint: str) -> PhaseRecord:
    """The record of the phase that took the last step."""
    return PhaseRecord(
        name=phase.name,
        first_iteration=phase.first_iteration,
        iterations=state.iteration - phase.first_iteration,
        first_sample=phase.first_sample,
        samples=state.consumed_train_samples - phase.first_sample,
        fingerprint=fingerprint,
        config=phase.config.to_dict(),
    )


def saved_extra(
    records: Sequence[PhaseRecord],
    *,
    has_phases: bool,
    data: Mapping[str, Any],
    spikes: SpikeWatch | None = None,
    probe: Mapping[str, Any] | None = None,
    capacity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All of `TrainState.extra` of a checkpoint; `Trainer.save` writes nothing else there.

    State that a run has to save besides steps and samples is one more key here. Unlike a new field
    of `TrainState`, it leaves checkpoints of earlier versions readable; `resolve_resume_point`
    reads it, with a default for those.

    Args:
        records: the phases up to the step of the checkpoint.
        has_phases: whether the run has a phase table; the records are saved only then.
        data: what the training data is, see `data.identity`; for errors that name a difference.
        spikes: of a run with `--loss-spike-policy`.
        capacity: of a run with `--moe-target-drop-rate`, see `CapacityControl.to_json`.
        probe: of a run that has taken a probe of its routing, see `RoutingProbe.to_json`.
    """
    stages = {KEY: [asdict(record) for record in records]} if has_phases else {}
    judged = {SPIKES: spikes.to_json()} if spikes is not None else {}
    probed = {PROBE: dict(probe)} if probe is not None else {}
    sized = {CAPACITY: dict(capacity)} if capacity is not None else {}
    return {**stages, DATA: dict(data), **judged, **probed, **sized}


def has_records(state: TrainState) -> bool:
    """Whether the run that saved this state had a phase table."""
    return KEY in state.extra


def recorded(state: TrainState, opened: CheckpointMetadata) -> tuple[PhaseRecord, ...]:
    """The phases that a checkpoint was trained in; one without a name if there was no table.

    Raises:
        UsageError: the checkpoint's records have other keys.
    """
    if not has_records(state):
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
            expected = f"an object with the keys {', '.join(kinds)}"
            raise UsageError(f"each of '{KEY}' in checkpoint {opened.path}", entry, expected)
    return tuple(PhaseRecord(**entry) for entry in entries)


def check_consumed(
    schedule: RunSchedule, state: TrainState, records: Sequence[PhaseRecord]
) -> None:
    """Check that the schedule agrees with the steps that the checkpoint has completed.

    Example: the checkpoint has records of `ul2`, steps 1 to 8, and `causal`, steps 9 to 10. The
    first phase must then end at step 8 exactly; the second must begin there and may end at 10 or
    later; a third is free.

    Raises:
        UsageError: names the phase, its setting, and the recorded one.
    """
    if not schedule.has_phases:
        if len(records) > 1:
            done = ", ".join(record.name for record in records)
            fix = "--finetune loads only the weights"
            raise UsageError(FLAG, None, f"the phase table of the run to resume: {done}", fix)
        return
    for record, phase in zip(records, schedule.phases, strict=False):
        _check_range(phase, record, completed=record is not records[-1])
        _check_settings(phase, record)
    if len(records) > len(schedule.phases) or state.iteration > schedule.iterations:
        expected = f"a table that covers the {state.iteration} iterations of the checkpoint"
        raise UsageError(FLAG, schedule.config.train.stages, expected)


def _check_range(phase: Phase, record: PhaseRecord, completed: bool) -> None:
    """The phase contains the recorded steps and samples, and ends with them if it is completed."""
    first, last = record.first_iteration, record.last_iteration
    fits = phase.first_iteration == first and last <= phase.last_iteration
    if not fits or (completed and last != phase.last_iteration):
        found = f"{phase.first_iteration + 1} to {phase.last_iteration}"
        expected = f"{first + 1} to {last}" + ("" if completed else " or later")
        what = f"{phase.label}: iterations"
        raise UsageError(what, found, f"{expected}, as recorded in the checkpoint")
    consumed = record.first_sample + record.samples
    if phase.samples_at(last) != consumed:
        what = f"{phase.label}: samples after {last} iterations"
        fix = "use another phase for another batch size"
        expected = f"{consumed}, as recorded in the checkpoint"
        raise UsageError(what, phase.samples_at(last), expected, fix)


def _check_settings(phase: Phase, record: PhaseRecord) -> None:
    """Samples are cut and masked as they were, wherever the files are now."""
    for section, names in _DECIDE.items():
        before = record.config.get(section, {})
        for name in names:
            value = getattr(getattr(phase.config, section), name)
            # A checkpoint of an earlier version may lack a setting that was added since.
            if name in before and before[name] != value:
                flag = f"{phase.label}: {flag_of(name)}"
                expected = f"{before[name]}, as recorded in the checkpoint"
                raise UsageError(flag, value, expected)


def check_data(
    phase: Phase, state: TrainState, record: PhaseRecord, data: Mapping[str, Any]
) -> None:
    """Check that a phase in progress has the data that it began with.

    Args:
        phase: the phase of the next step.
        state: the run's progress; with what its data was, unless an earlier version saved it.
        record: of the last phase that took a step.
        data: what the data of ``phase`` is now, see `data.identity`.

    Raises:
        CheckpointError: it has other data; names what differs.
    """
    in_progress = phase.first_iteration == record.first_iteration and record.iterations > 0
    other = record.fingerprint not in ("", data["fingerprint"])  # empty in a converted checkpoint
    if in_progress and state.iteration < phase.last_iteration and other:
        lines = data_differences(state.extra.get(DATA), data, record.fingerprint)
        what, expected = f"{phase.label}: training data", "that of the checkpoint"
        raise CheckpointError(what, f"{len(lines)} differences", expected, "", lines)


def previous_settings(record: PhaseRecord, source: str) -> RunConfig:
    """The configuration of the last completed steps."""
    return RunConfig.from_dict(record.config, source)

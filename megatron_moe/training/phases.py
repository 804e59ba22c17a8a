"""The phases of a run: where each begins and ends, and its configuration, layout and plan.

A run without `--phases` is one phase. Everything follows from the configuration and the number of
ranks, is resolved before training starts, and needs no torch, so that `--describe` shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from megatron_moe.config import RunConfig
from megatron_moe.config.phases import SETTINGS, PhaseSpec, Unit, errors_of_phase, read_phases
from megatron_moe.config.rampup import BatchSizes
from megatron_moe.config.run import flag_of
from megatron_moe.errors import UsageError
from megatron_moe.parallel.layout import Layout, resolve_layout
from megatron_moe.training.optim.schedule import learning_rate
from megatron_moe.training.plan import TrainingPlan, counts_samples, resolve_plan


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run with settings of its own."""

    name: str
    """Empty for a run without `--phases`."""
    label: str
    """Name and file, for messages."""
    number: int
    """From 1."""
    config: RunConfig
    """That of a run of this phase alone: `train_iters` is the length of the phase."""
    layout: Layout
    plan: TrainingPlan
    """Of this phase alone."""
    first_iteration: int
    """Steps of the run before the phase."""
    first_sample: int
    """Sequences of the run before the phase."""
    first_token: int
    """Tokens of the run before the phase: sequences times their lengths, padding included."""
    rate_origin: int
    """Step of the run from which the learning rate counts its steps."""

    @property
    def last_iteration(self) -> int:
        """Steps of the run up to the end of the phase."""
        return self.first_iteration + self.plan.iterations

    @property
    def samples(self) -> int:
        """Sequences of the whole phase."""
        return self.plan.batch_sizes.samples_of(self.plan.iterations)

    @property
    def last_token(self) -> int:
        """Tokens of the run up to the end of the phase."""
        return self.first_token + self.samples * self.config.data.seq_length

    def samples_at(self, iteration: int) -> int:
        """Sequences that the run has consumed after ``iteration`` steps, the last in this phase."""
        return self.first_sample + self.plan.batch_sizes.samples_of(
            iteration - self.first_iteration
        )

    def batch_size(self, consumed: int) -> int:
        """Sequences of the step after ``consumed`` ones of the run."""
        return self.plan.batch_sizes.at(consumed - self.first_sample)

    def rate(self, completed: int) -> float:
        """The learning rate of the step that follows ``completed`` steps of the run."""
        own = completed - self.rate_origin
        if self.plan.rate.unit == "samples":
            own = self.samples_at(completed) - (self.first_sample if self.rate_origin else 0)
        return learning_rate(self.config.optimizer, self.plan.rate, own)


@dataclass(frozen=True, kw_only=True)
class RunSchedule:
    """A whole run."""

    config: RunConfig
    """As given on the command line, without the settings of any phase."""
    phases: tuple[Phase, ...]

    @property
    def iterations(self) -> int:
        """Steps of the run."""
        return self.phases[-1].last_iteration

    @property
    def has_phases(self) -> bool:
        """Whether `--phases` is given."""
        return self.config.train.stages is not None

    def at(self, iteration: int) -> Phase:
        """The phase of the step after ``iteration`` steps; at the end of the run, the last one."""
        unfinished = (phase for phase in self.phases if iteration < phase.last_iteration)
        return next(unfinished, self.phases[-1])


def resolve_run_schedule(
    config: RunConfig, world_size: int, padded_vocab_size: int | None = None
) -> RunSchedule:
    """Resolve all phases and check everything but their data.

    Args:
        config: the run, validated.
        world_size: ranks.
        padded_vocab_size: V after padding, if known already.

    Raises:
        UsageError: a layout is impossible, a length is missing or too short, or the steps of a
            learning rate do not fit into it. The name of the phase comes first.
    """
    if config.train.stages is not None:
        return _resolve_table(config, config.train.stages, world_size, padded_vocab_size)
    layout = resolve_layout(config, world_size, padded_vocab_size)
    whole = Phase(
        name="",
        label="",
        number=1,
        config=config,
        layout=layout,
        plan=resolve_plan(config, layout.global_batch_size),
        first_iteration=0,
        first_sample=0,
        first_token=0,
        rate_origin=0,
    )
    return RunSchedule(config=config, phases=(whole,))


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A phase whose place in the run is known, while the length of the run is not yet.

    A learning rate that counts steps of the run decays over all of them, so plans can be resolved
    only when the end of the last phase is known.
    """

    spec: PhaseSpec
    config: RunConfig
    layout: Layout
    iterations: int
    first_iteration: int
    first_sample: int
    first_token: int

    @property
    def samples(self) -> int:
        """Sequences of the phase."""
        sizes = BatchSizes.of(self.config.train, self.layout.global_batch_size)
        return sizes.samples_of(self.iterations)


def _resolve_table(
    config: RunConfig, path: str, world_size: int, vocab_size: int | None
) -> RunSchedule:
    drafts: list[_Draft] = []
    for spec in read_phases(path):
        with errors_of_phase(spec.label):
            applied = spec.applied(config)
            layout = resolve_layout(applied, world_size, vocab_size)
            drafts.append(_draft(spec, applied, layout, drafts))
    last = drafts[-1]
    total = last.first_iteration + last.iterations, last.first_sample + last.samples
    phases = []
    for number, draft in enumerate(drafts, 1):
        with errors_of_phase(draft.spec.label):
            phases.append(_resolve_phase(number, draft, *total))
    return RunSchedule(config=config, phases=tuple(phases))


def _draft(spec: PhaseSpec, config: RunConfig, layout: Layout, before: Sequence[_Draft]) -> _Draft:
    sizes = BatchSizes.of(config.train, layout.global_batch_size)
    iteration = sample = token = 0
    if before:
        last = before[-1]
        samples = last.samples
        iteration = last.first_iteration + last.iterations
        sample = last.first_sample + samples
        token = last.first_token + samples * last.config.data.seq_length
    flag, unit, until = _end(spec, config)
    length, step = config.data.seq_length, sizes.at(0)
    if unit == "iteration":
        steps = until - iteration
    else:
        room = until - sample if unit == "samples" else (until - token) // length
        steps = sizes.iterations_of(room) if room > 0 else 0
    if steps < 1:
        least = {"iteration": iteration + 1, "samples": sample + step}
        expected = f">= {least.get(unit, token + step * length)}, one step after the phases before"
        raise UsageError(flag, until, expected)
    return _Draft(
        spec=spec,
        config=config,
        layout=layout,
        iterations=steps,
        first_iteration=iteration,
        first_sample=sample,
        first_token=token,
    )


def _end(spec: PhaseSpec, config: RunConfig) -> tuple[str, Unit, int]:
    """The setting that ends the phase, the unit it counts in, and the end."""
    if spec.unit is not None:
        return f"until-{spec.unit}", spec.unit, spec.until
    if config.train.train_iters is not None:
        return "--train-iters", "iteration", config.train.train_iters
    if config.train.train_samples is not None:
        return "--train-samples", "samples", config.train.train_samples
    fix = "or set --train-samples, or an end of this phase in the file"
    raise UsageError("--train-iters", None, "a number of steps, as the phase has no end", fix)


def _resolve_phase(number: int, draft: _Draft, iterations: int, samples: int) -> Phase:
    """A phase of a run of so many steps and sequences."""
    config, from_run = draft.config, draft.spec.lr_from == "run"
    rate = config.optimizer
    if counts_samples(config):
        whole = config.train.train_samples or samples
        decays = rate.lr_decay_samples or (whole if from_run else draft.samples)
        rate = replace(rate, lr_decay_samples=decays)
    else:
        steps = rate.lr_decay_iters or (iterations if from_run else draft.iterations)
        rate = replace(rate, lr_decay_iters=steps)
    alone = replace(
        config,
        train=replace(config.train, train_iters=draft.iterations, train_samples=None, stages=None),
        optimizer=rate,
    )
    return Phase(
        name=draft.spec.name,
        label=draft.spec.label,
        number=number,
        config=alone,
        layout=draft.layout,
        plan=resolve_plan(alone, draft.layout.global_batch_size),
        first_iteration=draft.first_iteration,
        first_sample=draft.first_sample,
        first_token=draft.first_token,
        rate_origin=0 if from_run else draft.first_iteration,
    )


def phase_lines(schedule: RunSchedule) -> list[str]:
    """One line for each phase as it will run; none without `--phases`."""
    if not schedule.has_phases:
        return []
    return [_line(phase, len(schedule.phases)) for phase in schedule.phases]


def _line(phase: Phase, count: int) -> str:
    config, rate = phase.config, phase.config.optimizer
    counted = "run" if phase.rate_origin == 0 else "phase"
    unit = "steps" if phase.plan.rate.unit == "iterations" else "sequences"
    dropout = (config.model.hidden_dropout, config.model.attention_dropout)
    sizes = phase.plan.batch_sizes
    batch = f"{sizes.full}" if sizes.constant else f"{sizes.start} to {sizes.full}"
    return (
        f"phase {phase.number}/{count} {phase.name}: steps {phase.first_iteration + 1} to"
        f" {phase.last_iteration}, {config.objective.objective},"
        f" {batch} sequences of {config.data.seq_length},"
        f" {phase.first_token:.4g} to {phase.last_token:.4g} tokens,"
        f" lr {rate.lr:g} {rate.lr_decay_style} by the {counted}'s {unit}"
        + (f", dropout {dropout[0]:g} hidden {dropout[1]:g} attention" if any(dropout) else "")
    )


def differences(before: RunConfig, after: RunConfig) -> list[str]:
    """The settings of a phase in which two configurations differ, one line each."""
    old, new = asdict(before), asdict(after)
    return [
        f"{flag_of(name)} was {_shown(old[section][name])}, is {_shown(new[section][name])}"
        for name, section in SETTINGS.items()
        if old[section][name] != new[section][name]
    ]


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

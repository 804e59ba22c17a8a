"""The stages of a run, one after the other: where each begins and ends, and what it is made of.

A run without `--stages` is one stage. Everything follows from the configuration and the number of
ranks, is checked before training starts, and needs no torch, so that `--describe` shows it too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from megatron_moe.config import RunConfig
from megatron_moe.config.phases import FLAG, SETTINGS, PhaseSpec, Unit, read_phases
from megatron_moe.config.rampup import FLAG as RAMPUP
from megatron_moe.config.rampup import BatchSizes
from megatron_moe.errors import UsageError
from megatron_moe.parallel.layout import Layout, resolve_layout
from megatron_moe.training.optim.schedule import learning_rate
from megatron_moe.training.plan import TrainingPlan, resolve_plan


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run with settings of its own."""

    name: str
    """Empty for a run without a stage table."""
    label: str
    """The stage and its table, for messages."""
    number: int
    """From 1."""
    config: RunConfig
    """Of a run of this stage alone: `train_iters` is its own length."""
    layout: Layout
    plan: TrainingPlan
    """Of this stage alone."""
    first_iteration: int
    """Steps of the run before it."""
    first_sample: int
    """Sequences of the run before it."""
    first_token: int
    """Positions of the run before it."""
    rate_origin: int
    """Steps of the run before those that its learning rate counts."""

    @property
    def last_iteration(self) -> int:
        """Steps of the run until its end."""
        return self.first_iteration + self.plan.iterations

    @property
    def samples(self) -> int:
        """Sequences of the whole stage."""
        return self.plan.batch_sizes.samples_of(self.plan.iterations)

    @property
    def last_token(self) -> int:
        """Positions of the run until its end."""
        return self.first_token + self.samples * self.config.data.seq_length

    def samples_at(self, iteration: int) -> int:
        """Sequences that the run has consumed after ``iteration`` steps, this stage's last one."""
        return self.first_sample + self.plan.batch_sizes.samples_of(
            iteration - self.first_iteration
        )

    def batch_size(self, consumed: int) -> int:
        """Sequences of the step after ``consumed`` ones of the run."""
        return self.plan.batch_sizes.at(consumed - self.first_sample)

    def rate(self, completed: int) -> float:
        """The learning rate of the step that follows ``completed`` steps of the run."""
        own = completed - self.rate_origin
        return learning_rate(self.config.optimizer, own, self.plan.decay_iterations)


@dataclass(frozen=True, kw_only=True)
class RunSchedule:
    """A whole run."""

    config: RunConfig
    """As given: what the command line says, without any stage's settings."""
    phases: tuple[Phase, ...]

    @property
    def iterations(self) -> int:
        """Steps of the run."""
        return self.phases[-1].last_iteration

    @property
    def has_phases(self) -> bool:
        """Whether there is a stage table."""
        return self.config.train.stages is not None

    def at(self, iteration: int) -> Phase:
        """The stage of the step after ``iteration`` steps; at the end of the run, the last one."""
        going_on = (stage for stage in self.phases if iteration < stage.last_iteration)
        return next(going_on, self.phases[-1])


@contextlib.contextmanager
def named(label: str) -> Iterator[None]:
    """Mistakes inside are said to be of a stage; an empty label says nothing."""
    try:
        yield
    except UsageError as error:
        if not label:
            raise
        what = f"{label}: {error.what}"
        raise UsageError(what, error.found, error.expected, error.fix) from None


def resolve_run_schedule(
    config: RunConfig, world_size: int, padded_vocab_size: int | None = None
) -> RunSchedule:
    """Work out all stages and check everything but their data.

    Args:
        config: the run.
        world_size: ranks.
        padded_vocab_size: V after padding, if known already.

    Raises:
        UsageError: a layout, length, interval, rate or stage that cannot be meant; of a stage, its
            name comes first.
    """
    if config.train.stages is not None:
        return _staged(config, config.train.stages, world_size, padded_vocab_size)
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
    """A stage whose place in the run is known, but not yet the length of the run."""

    spec: PhaseSpec
    config: RunConfig
    layout: Layout
    iterations: int
    first_iteration: int
    first_sample: int
    first_token: int


def _staged(config: RunConfig, path: str, world_size: int, vocab_size: int | None) -> RunSchedule:
    if config.train.rampup_batch_size is not None:
        found = " ".join(map(str, config.train.rampup_batch_size))
        expected = f"no value beside {FLAG}"
        raise UsageError(RAMPUP, found, expected, "give it to the stage that ramps")
    specs = read_phases(path)
    _check_length_flags(config, specs[-1])
    drafts: list[_Draft] = []
    for spec in specs:
        with named(spec.label):
            staged = spec.applied(config)
            layout = resolve_layout(staged, world_size, vocab_size)
            drafts.append(_draft(spec, staged, layout, drafts))
    last = drafts[-1]
    total = last.first_iteration + last.iterations
    stages = []
    for number, draft in enumerate(drafts, 1):
        with named(draft.spec.label):
            stages.append(_stage(number, draft, total))
    return RunSchedule(config=config, phases=tuple(stages))


def _check_length_flags(config: RunConfig, last: PhaseSpec) -> None:
    """The run ends with its last stage, or where the command line says."""
    for flag, value in (
        ("--train-iters", config.train.train_iters),
        ("--train-samples", config.train.train_samples),
    ):
        if value is not None and last.unit is not None:
            raise UsageError(flag, value, f"no value: {last.label}, the last one, has an end")
    if config.train.train_iters is not None and config.train.train_samples is not None:
        found, expected = config.train.train_iters, "no --train-samples"
        raise UsageError("--train-iters", found, expected, "give one of the two")


def _draft(spec: PhaseSpec, config: RunConfig, layout: Layout, before: Sequence[_Draft]) -> _Draft:
    sizes = BatchSizes.of(config.train, layout.global_batch_size)
    iteration = sample = token = 0
    if before:
        last = before[-1]
        added = BatchSizes.of(last.config.train, last.layout.global_batch_size)
        samples = added.samples_of(last.iterations)
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
        expected = f"at least {least.get(unit, token + step * length)}, a step of this stage after"
        raise UsageError(flag, until, f"{expected} those before it")
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
    """Where the stage's end is said, in what it is counted, and the end."""
    if spec.unit is not None:
        return f"until-{spec.unit}", spec.unit, spec.until
    if config.train.train_iters is not None:
        return "--train-iters", "iteration", config.train.train_iters
    if config.train.train_samples is not None:
        return "--train-samples", "samples", config.train.train_samples
    fix = "or --train-samples, or end the last stage in the table"
    raise UsageError("--train-iters", None, "a number of steps: the stage is open", fix)


def _stage(number: int, draft: _Draft, total: int) -> Phase:
    """A stage whose run is ``total`` steps long."""
    config, from_run = draft.config, draft.spec.lr_from == "run"
    decay = config.optimizer.lr_decay_iters or (total if from_run else draft.iterations)
    alone = replace(
        config,
        train=replace(config.train, train_iters=draft.iterations, train_samples=None, stages=None),
        optimizer=replace(config.optimizer, lr_decay_iters=decay),
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
    """The stage table as it will be run; empty without one."""
    if not schedule.has_phases:
        return []
    return [_line(stage, len(schedule.phases)) for stage in schedule.phases]


def _line(stage: Phase, count: int) -> str:
    config, rate = stage.config, stage.config.optimizer
    counted = "run" if stage.rate_origin == 0 else "stage"
    dropout = (config.model.hidden_dropout, config.model.attention_dropout)
    sizes = stage.plan.batch_sizes
    batch = f"{sizes.full}" if sizes.constant else f"{sizes.start} to {sizes.full}"
    return (
        f"stage {stage.number}/{count} {stage.name}: steps {stage.first_iteration + 1} to"
        f" {stage.last_iteration}, {config.objective.objective},"
        f" {batch} sequences of {config.data.seq_length},"
        f" {stage.first_token:.4g} to {stage.last_token:.4g} tokens,"
        f" lr {rate.lr:g} {rate.lr_decay_style} by the {counted}'s steps"
        + (f", dropout {dropout[0]:g} hidden {dropout[1]:g} attention" if any(dropout) else "")
    )


def differences(before: RunConfig, after: RunConfig) -> list[str]:
    """What a stage can set and two configurations have differently, one line each."""
    old, new = asdict(before), asdict(after)
    return [
        f"--{name.replace('_', '-')} was {_shown(old[section][name])},"
        f" is {_shown(new[section][name])}"
        for name, section in SETTINGS.items()
        if old[section][name] != new[section][name]
    ]


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

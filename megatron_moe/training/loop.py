"""The training loop: fetch, step, report, evaluate, save, until the run or this start ends.

Where a stage of the run ends, everything that the next one has differently changes there: data,
shape of the batches, learning rate, dropout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from megatron_moe.checkpoint import TrainState
from megatron_moe.checkpoint.manager import CheckpointManager, host_rank_group
from megatron_moe.data.batch import Batch, extra_planes, fetch_step
from megatron_moe.data.pipeline import Data
from megatron_moe.model.counting import flops_per_token
from megatron_moe.moe.statistics import collect_statistics, reset_statistics
from megatron_moe.training.consumed import PhaseRecord, record_of, to_extra
from megatron_moe.training.dropout import set_dropout
from megatron_moe.training.evaluation import evaluate_split
from megatron_moe.training.finite import NonFiniteError
from megatron_moe.training.metrics import Evaluation, Meter, StepRecord, Summary
from megatron_moe.training.phases import Phase, RunSchedule
from megatron_moe.training.reporting import Reporter
from megatron_moe.training.resume import ResumePoint, metadata_of
from megatron_moe.training.run import TrainingRun
from megatron_moe.training.signals import ExitSignal
from megatron_moe.training.step import train_step
from megatron_moe.training.supply import PhaseDataLoaders


@dataclass
class _Session:
    """What changes while the loop runs."""

    run: TrainingRun
    schedule: RunSchedule
    stage: Phase
    supply: PhaseDataLoaders
    data: Data
    reporter: Reporter
    meter: Meter
    saves: CheckpointManager
    signal: ExitSignal | None
    progress: TrainState
    saved_at: int | None
    over: list[PhaseRecord]
    first: StepRecord | None = None
    last: StepRecord | None = None
    valid: Evaluation | None = None
    seconds: float = 0.0
    tokens: int = 0


def train(
    run: TrainingRun,
    schedule: RunSchedule,
    supply: PhaseDataLoaders,
    data: Data,
    start: ResumePoint,
    reporter: Reporter,
) -> Summary:
    """Train from ``start`` to the end of the run or of this start of it (`--exit-interval`).

    A step whose gradient is not finite ends it too: the summary says so, nothing is saved.

    Args:
        run: model and optimizer, built for the stage of the next step.
        schedule: the stages of the whole run.
        supply: the data of stages to come.
        data: that of the stage of the next step.
        start: where the run begins or goes on.
        reporter: who tells.
    """
    settings, progress = schedule.config.checkpoint, start.state
    stage = schedule.at(progress.iteration)
    session = _Session(
        run=run,
        schedule=schedule,
        stage=stage,
        supply=supply,
        data=data,
        reporter=reporter,
        meter=make_meter(run),
        saves=CheckpointManager(schedule.config, run.ctx, reporter.say),
        signal=_exit_signal(schedule, run),
        progress=progress,
        saved_at=progress.iteration if settings.load == settings.save else None,
        over=[r for r in start.records if r.first_iteration < stage.first_iteration],
    )
    for chunk in run.wrapped:
        chunk.train()
    session.meter.resume()
    failure = None
    try:
        _steps(session)
        _finish(session)
    except NonFiniteError as error:
        _report(session)
        session.saves.finish()
        failure = str(error)
    except BaseException:
        session.saves.abandon()
        raise
    finally:
        if session.signal is not None:
            session.signal.close()
    return Summary(
        state=session.progress,
        first=session.first,
        last=session.last,
        valid=session.valid,
        tokens_per_second=session.tokens / session.seconds if session.seconds else 0.0,
        failure=failure,
    )


def _steps(session: _Session) -> None:
    schedule, save_interval = session.schedule, session.schedule.config.checkpoint.save_interval
    exit_interval = schedule.config.train.exit_interval
    while session.progress.iteration < schedule.iterations:
        if session.progress.iteration == session.stage.last_iteration:
            _next_stage(session)
        _one_step(session)
        session.saves.poll()
        done = session.progress.iteration
        ends, stage_ends = done == schedule.iterations, done == session.stage.last_iteration
        if done % schedule.config.logging.log_interval == 0 or stage_ends:
            _report(session)
        if (done % session.run.config.train.eval_interval == 0 or stage_ends) and not ends:
            _evaluate(session, "validation")
        if save_interval and done % save_interval == 0:
            _save(session)
        if exit_interval and done % exit_interval == 0 and not ends:
            session.reporter.say(f" leaving at iteration {done}, a multiple of --exit-interval")
            return
        if session.signal is not None and not ends and session.signal.agreed():
            session.reporter.say(f" leaving at iteration {done}: SIGTERM")
            return


def _exit_signal(schedule: RunSchedule, run: TrainingRun) -> ExitSignal | None:
    if not schedule.config.train.exit_signal_handler:
        return None
    minutes = schedule.config.parallel.distributed_timeout_minutes
    return ExitSignal(host_rank_group(run.ctx, timedelta(minutes=minutes)))


def _next_stage(session: _Session) -> None:
    """Go over to the stage of the next step; parameters and random states are left alone."""
    session.meter.pause()
    before, done = session.stage, session.progress
    session.over.append(record_of(before, done, session.data.fingerprint))
    session.stage = stage = session.schedule.at(done.iteration)
    session.data = session.supply.open(stage)
    session.run = enter_stage(session.run, stage)
    _set_sizes(session.meter, session.run)
    session.reporter.stage(before, stage, session.data, done)
    session.meter.resume()


def enter_stage(run: TrainingRun, stage: Phase) -> TrainingRun:
    """The same model and optimizer, with the settings of a stage."""
    set_dropout(run.chunks, stage.config.model)
    ctx = replace(run.ctx, layout=stage.layout)
    return replace(run, config=stage.config, plan=stage.plan, ctx=ctx)


def _one_step(session: _Session) -> None:
    run, progress, stage = session.run, session.progress, session.stage
    batch_size = stage.batch_size(progress.consumed_train_samples)
    batches = next_batches(run, session.data.train, batch_size)
    rate = stage.rate(progress.iteration)
    result = train_step(run, batches, rate, progress.iteration + 1)
    session.progress = replace(
        progress,
        iteration=progress.iteration + 1,
        consumed_train_samples=progress.consumed_train_samples + batch_size,
    )
    session.meter.add(
        session.progress.iteration,
        session.progress.consumed_train_samples,
        batch_size,
        rate,
        result.grad_norm,
        result.sums,
    )


def _finish(session: _Session) -> None:
    """What happens at the end whatever the intervals: report, evaluate, save."""
    _report(session)
    if session.progress.iteration == session.schedule.iterations:
        _evaluate(session, "validation")
        _evaluate(session, "test")
    _save(session)
    session.saves.finish()


def _report(session: _Session) -> None:
    records, speed = session.meter.collect()
    if speed is None:
        return
    run = session.run
    layers = collect_statistics(run.chunks, run.ctx.pgs)
    reset_statistics(run.chunks)
    session.reporter.interval(records, speed, layers)
    session.first = session.first or records[0]
    session.last = records[-1]
    session.seconds += speed.seconds_per_step * len(records)
    session.tokens += sum(record.batch_size for record in records) * run.config.data.seq_length


def _evaluate(session: _Session, name: str) -> None:
    run, data = session.run, session.data
    if run.config.train.eval_iters == 0 or not (
        data.has_test if name == "test" else data.has_valid
    ):
        return
    session.meter.pause()
    size, split = run.plan.batch_sizes.full, "test" if name == "test" else "valid"
    found = evaluate_split(run, data, split, lambda batches: next_batches(run, batches, size))
    session.reporter.evaluation(name, session.progress.iteration, found)
    if name == "validation":
        session.valid = found
    session.meter.resume()


def _save(session: _Session) -> None:
    progress, schedule = session.progress, session.schedule
    if schedule.config.checkpoint.save is None or session.saved_at == progress.iteration:
        return
    session.meter.pause()
    records = list(session.over)
    if progress.iteration > session.stage.first_iteration:
        records.append(record_of(session.stage, progress, session.data.fingerprint))
    session.saves.save(
        replace(progress, extra=to_extra(records) if schedule.has_phases else {}),
        chunks=session.run.wrapped,
        optimizer=session.run.optimizer,
        identity=metadata_of(session.run, session.data),
    )
    session.saved_at = progress.iteration
    session.meter.resume()


def next_batches(
    run: TrainingRun, batches: Iterator[Batch] | None, batch_size: int
) -> Sequence[Batch | None]:
    """This rank's micro-batches of the next global batch; ``None`` each if its stage needs none."""
    layout = run.ctx.layout
    num_microbatches = batch_size // (layout.micro_batch_size * layout.dp)
    extra = extra_planes(run.config.objective)
    if not run.ctx.needs_data and not extra:
        return [None] * num_microbatches
    return fetch_step(
        batches,
        num_microbatches,
        run.ctx.pgs.tp,
        (layout.micro_batch_size, run.config.data.seq_length),
        run.ctx.platform.device,
        extra,
    )


def make_meter(run: TrainingRun) -> Meter:
    """A meter with the model's arithmetic and the device's peak."""
    config, platform = run.config, run.ctx.platform
    peak = config.logging.device_peak_tflops or platform.peak_tflops(config.train.bf16)
    meter = Meter(
        platform=platform,
        tokens_per_sample=0,
        flops_per_token=0.0,
        world_size=run.ctx.world_size,
        peak_tflops=peak,
    )
    _set_sizes(meter, run)
    return meter


def _set_sizes(meter: Meter, run: TrainingRun) -> None:
    """What a sample is depends on the stage."""
    config, length = run.config, run.config.data.seq_length
    flops = flops_per_token(config.model, config.moe, run.vocab_size, length)
    meter.tokens_per_sample, meter.flops_per_token = length, flops.training

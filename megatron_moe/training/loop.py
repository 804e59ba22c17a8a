"""The training loop: fetch, step, report, evaluate, save, until the run or this start ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_moe.checkpoint import TrainState
from megatron_moe.data.batch import Batch
from megatron_moe.data.distribute import fetch_step
from megatron_moe.data.pipeline import Data
from megatron_moe.model.counting import flops_per_token
from megatron_moe.moe.statistics import collect_statistics, reset_statistics
from megatron_moe.training.evaluation import evaluate_split
from megatron_moe.training.finite import NonFiniteError
from megatron_moe.training.metrics import Evaluation, Meter, StepRecord, Summary
from megatron_moe.training.reporting import Reporter
from megatron_moe.training.resume import save_run
from megatron_moe.training.run import TrainingRun
from megatron_moe.training.schedule import learning_rate
from megatron_moe.training.step import train_step


@dataclass
class _Session:
    """What changes while the loop runs."""

    run: TrainingRun
    data: Data
    reporter: Reporter
    meter: Meter
    progress: TrainState
    saved_at: int | None
    first: StepRecord | None = None
    last: StepRecord | None = None
    valid: Evaluation | None = None
    seconds: float = 0.0
    tokens: int = 0


def train(run: TrainingRun, data: Data, progress: TrainState, reporter: Reporter) -> Summary:
    """Train from ``progress`` to the end of the run or of this start of it (`--exit-interval`).

    A step whose gradient is not finite ends it too: the summary says so, nothing is saved.
    """
    settings = run.config.checkpoint
    session = _Session(
        run=run,
        data=data,
        reporter=reporter,
        meter=make_meter(run),
        progress=progress,
        saved_at=progress.iteration if settings.load == settings.save else None,
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
        failure = str(error)
    return Summary(
        state=session.progress,
        first=session.first,
        last=session.last,
        valid=session.valid,
        tokens_per_second=session.tokens / session.seconds if session.seconds else 0.0,
        failure=failure,
    )


def _steps(session: _Session) -> None:
    run, train_settings = session.run, session.run.config.train
    save_interval = run.config.checkpoint.save_interval
    while session.progress.iteration < run.plan.iterations:
        _one_step(session)
        done = session.progress.iteration
        ends = done == run.plan.iterations
        leaves = train_settings.exit_interval and done % train_settings.exit_interval == 0
        if done % run.config.logging.log_interval == 0:
            _report(session)
        if done % train_settings.eval_interval == 0 and not ends:
            _evaluate(session, "validation")
        if save_interval and done % save_interval == 0:
            _save(session)
        if leaves and not ends:
            session.reporter.say(f" leaving at iteration {done}, a multiple of --exit-interval")
            return


def _one_step(session: _Session) -> None:
    run, progress = session.run, session.progress
    batch_size = run.plan.batch_sizes.at(progress.consumed_train_samples)
    batches = next_batches(run, session.data.train, batch_size)
    rate = learning_rate(run.config.optimizer, progress.iteration, run.plan.decay_iterations)
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
    if session.progress.iteration == session.run.plan.iterations:
        _evaluate(session, "validation")
        _evaluate(session, "test")
    _save(session)


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
    progress = session.progress
    if session.run.config.checkpoint.save is None or session.saved_at == progress.iteration:
        return
    session.meter.pause()
    where = save_run(session.run, session.data, progress)
    session.reporter.say(f" saved iteration {progress.iteration} to {where}")
    session.saved_at = progress.iteration
    session.meter.resume()


def next_batches(
    run: TrainingRun, batches: Iterator[Batch] | None, batch_size: int
) -> Sequence[Batch | None]:
    """This rank's micro-batches of the next global batch; ``None`` each if its stage needs none."""
    layout = run.ctx.layout
    num_microbatches = batch_size // (layout.micro_batch_size * layout.dp)
    if not run.ctx.needs_data:
        return [None] * num_microbatches
    return fetch_step(
        batches,
        num_microbatches,
        run.ctx.pgs.tp,
        (layout.micro_batch_size, run.config.data.seq_length),
        run.ctx.platform.device,
    )


def make_meter(run: TrainingRun) -> Meter:
    """A meter with the model's arithmetic and the device's peak."""
    config, platform = run.config, run.ctx.platform
    flops = flops_per_token(
        config.model, config.moe, run.vocab_size, config.data.seq_length
    ).training
    peak = config.logging.device_peak_tflops or platform.peak_tflops(config.train.bf16)
    return Meter(
        platform=platform,
        tokens_per_sample=config.data.seq_length,
        flops_per_token=flops,
        world_size=run.ctx.world_size,
        peak_tflops=peak,
    )

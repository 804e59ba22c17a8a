"""The training loop: step, report, evaluate, save, until the run ends or this start of it does.

`Trainer` holds the progress of a run and decides what happens when; everything that it uses is
passed in. One step of it is in `training/step.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from megatron_moe.checkpoint.load import load_checkpoint
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.errors import NonFinite
from megatron_moe.moe.statistics import (
    LedgerError,
    check_ledger,
    collect_statistics,
    reset_statistics,
)
from megatron_moe.training.capacity import CAPACITY, CapacityControl
from megatron_moe.training.consumed import PROBE, record_of, saved_extra
from megatron_moe.training.dataloaders import PhaseDataLoaders
from megatron_moe.training.diagnosis import diagnose
from megatron_moe.training.evaluation import evaluate_split
from megatron_moe.training.exit_request import LOG_FAILURE, ExitRequest
from megatron_moe.training.log import timers_line
from megatron_moe.training.metrics import Evaluation, Interval, Meter, Summary
from megatron_moe.training.phases import Phase, RunSchedule
from megatron_moe.training.probe import RoutingProbe
from megatron_moe.training.replicas import ReplicaError, check_replicas
from megatron_moe.training.reporting import Reporter
from megatron_moe.training.resume import ResumePoint, identity_of
from megatron_moe.training.run import TrainingRun
from megatron_moe.training.save_directory import continues_save
from megatron_moe.training.spikes import SPIKES, LossSpikeError, Spike, SpikeWatch
from megatron_moe.training.step import NonFiniteError, fetch_batches, train_step
from megatron_moe.training.step_hook import Hook
from megatron_moe.training.tracing import RoutingTraces

_FAILURES = (NonFiniteError, NonFinite, LossSpikeError, ReplicaError, LedgerError)
"""Errors that all ranks raise at the same place: the run reports what it has, and saves nothing."""


class Trainer:
    """Trains from a resume point to the end of the run, or of this start of it.

    All ranks call the same methods in the same order: each of them may communicate.

    Args:
        run: model and optimizer with the settings of the phase of the next step, loaded.
        schedule: the phases of the whole run.
        dataloaders: the data of the current phase and of later ones.
        resume: step and sample to start from, and the phases before it.
        meter: collects steps for the reports.
        checkpoints: saves the run.
        reporter: log, metrics file and TensorBoard.
        exit_request: asks for an early exit; ``None`` if no flag allows one.
        hooks: called around steps and evaluations.
    """

    def __init__(
        self,
        *,
        run: TrainingRun,
        schedule: RunSchedule,
        dataloaders: PhaseDataLoaders,
        resume: ResumePoint,
        meter: Meter,
        checkpoints: CheckpointManager,
        reporter: Reporter,
        exit_request: ExitRequest | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.run, self.schedule, self.dataloaders = run, schedule, dataloaders
        self.meter, self.checkpoints, self.reporter = meter, checkpoints, reporter
        self.exit_request, self.hooks = exit_request, tuple(hooks)
        self.state = resume.state
        """Completed steps and consumed samples of the run."""
        self.phase = schedule.at(self.state.iteration)
        """The phase of the last step, or of the first one to come."""
        self.completed = [
            record
            for record in resume.records
            if record.first_iteration < self.phase.first_iteration
        ]
        """Records of the phases before it."""
        continues = continues_save(schedule.config.checkpoint)
        self.saved_iteration = self.state.iteration if continues else None
        """The step of the newest checkpoint in `--save`, if it is one of this run."""
        self.validation: Evaluation | None = None
        watches = schedule.config.train.loss_spike_policy is not None
        saved = resume.state.extra.get(SPIKES)
        self.spikes = SpikeWatch(schedule.config.train, saved) if watches else None
        """Judges each step, with `--loss-spike-policy`."""
        self.probe: RoutingProbe | None = None
        """Watches the routing, every `--routing-log-interval` steps."""
        if schedule.config.logging.routing_log_interval and run.config.moe_layers:
            self.probe = RoutingProbe(schedule.config, resume.state.extra.get(PROBE))
        self.capacity: CapacityControl | None = None
        """Sets the capacity of MoE layers, with `--moe-target-drop-rate`."""
        if run.config.moe.moe_target_drop_rate is not None and run.config.moe_layers:
            self.capacity = CapacityControl(run.config, resume.state.extra.get(CAPACITY))
            self.capacity.apply(run.chunks)
        self.traces = RoutingTraces(schedule.config, lambda *why: self.reporter.leave_out(*why))

    def train(self) -> Summary:
        """Train until the end of the run, a request to exit or a number that is not finite.

        After a gradient, a loss or weights that are not finite the summary has a `failure`, and
        nothing is saved: the newest checkpoint is from before the steps that led to it. With
        `--log-failure-policy stop` it has one as well, after the save.
        """
        for chunk in self.run.wrapped:
            chunk.train()
        self.meter.resume()
        failure = None
        try:
            for hook in self.hooks:
                hook.start()
            reason = self._train_until_exit()
            self._finish()
            failure = reason if reason == LOG_FAILURE else None
        except _FAILURES as error:
            self.report(final=True)
            self.checkpoints.finish()
            *details, failure = str(error).split("\n")
            for line in details:
                self.reporter.log(f" {line}")
        except BaseException:
            # Other ranks may have failed as well, so nothing that waits for them can be called.
            self.checkpoints.abandon()
            raise
        finally:
            for hook in self.hooks:
                hook.close()
            if self.exit_request is not None:
                self.exit_request.close()
        summary = Summary(
            state=self.state,
            first=self.meter.first,
            last=self.meter.last,
            valid=self.validation,
            tokens_per_second=self.meter.tokens_per_second,
            failure=failure,
        )
        self.reporter.end(summary)
        return summary

    @property
    def finished(self) -> bool:
        """Whether all steps of the run are completed."""
        return self.state.iteration == self.schedule.iterations

    def _train_until_exit(self) -> str:
        """Take steps to the end of the run, or to a request to exit, which is returned."""
        config = self.schedule.config
        save_interval = config.checkpoint.save_interval
        while self.state.iteration < self.schedule.iterations:
            if self.state.iteration == self.phase.last_iteration:
                self.enter_phase(self.schedule.at(self.state.iteration))
            for hook in self.hooks:
                hook.before_step(self.state.iteration)
            self.train_step()
            self.checkpoints.poll()
            iteration = self.state.iteration
            for hook in self.hooks:
                hook.after_step(iteration)
            hashes = config.train.check_weight_hash_across_dp_replicas_interval
            if hashes and iteration % hashes == 0:
                check_replicas(self.run, iteration)
            phase_ends = iteration == self.phase.last_iteration
            # The last step of a phase is reported with it: the next phase has another sequence
            # length, by which the meter counts tokens, and other held-out data.
            if phase_ends or iteration % config.logging.log_interval == 0:
                self.report()
            if self.probe is not None and self.probe.due(iteration):
                self.take_probe(self.probe)
            # Before the evaluation, which may take longer than the steps since the last save.
            if save_interval and iteration % save_interval == 0:
                self.save()
            evaluates = phase_ends or iteration % self.run.config.train.eval_interval == 0
            if evaluates and not self.finished:  # after the last step, `_finish` evaluates
                self.evaluate("validation")
            if not self.finished and (reason := self._exit_reason()):
                self.reporter.log(f" exiting at iteration {iteration}: {reason}")
                return reason
        return ""

    def _exit_reason(self) -> str:
        """Why to exit before the next step, the same on every rank; empty to continue."""
        interval = self.schedule.config.train.exit_interval
        if interval and self.state.iteration % interval == 0:
            return f"--exit-interval {interval}"
        # The ranks are only asked where the answer matters: it is an all-reduce on the host.
        return self.exit_request.agreed() if self.exit_request is not None else ""

    def _finish(self) -> None:
        """Report, save and evaluate at the end, whatever the intervals are."""
        self.report()
        self.save()
        self.checkpoints.finish()
        if last := self.run.timers.collect(1):  # of the save, after the last report
            self.reporter.log(timers_line(last))
        if self.finished:
            self.evaluate("validation")
            self.evaluate("test")

    def enter_phase(self, phase: Phase) -> None:
        """Switch data, settings and learning-rate schedule to those of the next phase.

        Parameters, optimizer state and random states stay as they are.
        """
        self.meter.pause()
        before, data = self.phase, self.dataloaders.current
        self.completed.append(record_of(before, self.state, data.fingerprint))
        self.phase = phase
        data = self.dataloaders.enter_phase(phase)
        self.run = self.run.in_phase(phase)
        self.meter.enter_phase(self.run.config)
        self.reporter.phase(before, phase, data, self.state)
        self.meter.resume()

    def train_step(self) -> None:
        """Take one optimizer step.

        Raises:
            NonFiniteError: on every rank, with the layer and the samples that it began with; the
                step does not count, parameters are unchanged.
        """
        state = self.state
        batch_size = self.phase.batch_size(state.consumed_train_samples)
        with self.run.timers.measure_data():
            batches = fetch_batches(self.run, self.dataloaders.current.train, batch_size)
        rate = self.phase.rate(state.iteration)
        takes_update = None if self.spikes is None else self.spikes.takes_update
        step, first = state.iteration + 1, state.consumed_train_samples
        samples = first, first - self.phase.first_sample
        traced = self.traces.around(self.run, self.dataloaders.current, batches, step, samples)
        try:
            with traced:
                result = train_step(self.run, batches, rate, step, takes_update)
        except NonFiniteError as error:
            with self.run.timers.paused():
                found = diagnose(self.run, batches, state.consumed_train_samples)
            raise NonFiniteError(f"{error}; {found}") from None
        self.state = replace(
            state,
            iteration=state.iteration + 1,
            consumed_train_samples=state.consumed_train_samples + batch_size,
        )
        self.meter.add(
            self.state.iteration,
            self.state.consumed_train_samples,
            batch_size,
            rate,
            result.grad_norm,
            result.sums,
            result.zeros,
            result.params_square,
        )
        if self.capacity is not None:
            for line in self.capacity.after_step(self.run.chunks, self.run.ctx.pgs):
                self.reporter.log(f" {line}")
        spike = None if self.spikes is None else self.spikes.at(self.state.iteration)
        if spike is not None:
            self.after_spike(spike, state.consumed_train_samples)

    def after_spike(self, spike: Spike, first_sample: int) -> None:
        """Log a loss spike, and with `rollback` restore the newest checkpoint in `--save`.

        The steps since that checkpoint have no effect then, and the run goes on with the next one:
        step numbers, samples and the learning rate advance as usual. Random states do too.

        Args:
            spike: of the step that was just taken; its update was not applied, except with
                `continue`.
            first_sample: of its batch.

        Raises:
            LossSpikeError: on every rank: there is no checkpoint of this run in `--save` yet.
        """
        assert self.spikes is not None
        samples = f"samples {first_sample} to {self.state.consumed_train_samples - 1}"
        line = f"{self.spikes.describe(spike)}; {samples}"
        self.reporter.log(f" WARNING: {line}; --loss-spike-policy {spike.action}")
        if spike.action != "rollback":
            return
        self.meter.pause()
        self.checkpoints.finish()
        config = self.schedule.config
        if not self.saved_iteration or config.checkpoint.save is None:
            raise LossSpikeError(f"{line}; no checkpoint in --save to roll back to")
        load_checkpoint(
            config.checkpoint.save,
            config=config,
            ctx=self.run.ctx,
            chunks=self.run.wrapped,
            optimizer=self.run.optimizer,
            step=self.saved_iteration,
            with_rng=False,
        )
        self.spikes.restored(self.saved_iteration)
        self.reporter.log(f" weights and optimizer state are those of {self.saved_iteration} again")
        self.meter.resume()

    def report(self, *, final: bool = False) -> None:
        """Report the steps since the last report; nothing if there are none.

        Args:
            final: the run has failed, and reports whatever it has.

        Raises:
            NonFiniteError: on every rank: the loss of a step is infinite or not a number.
            LedgerError: on every rank: an MoE layer has lost or repeated tokens.
        """
        records, speed = self.meter.collect()
        if speed is None:
            return
        if self.spikes is not None:
            records = self.spikes.mark(records)
        layers = collect_statistics(self.run.chunks, self.run.ctx.pgs)
        reset_statistics(self.run.chunks)
        speed = self.meter.with_routing(speed, layers)
        phase = self.phase if self.schedule.has_phases else None
        timers = self.run.timers.collect(len(records))
        self.reporter.interval(
            Interval(
                records=records,
                speed=speed,
                layers=layers,
                phase=phase,
                timers=timers,
                forced_routing=self.run.config.moe.moe_router_force_load_balancing,
                buffer_factor=self.run.config.moe.moe_dropless_buffer_factor,
            )
        )
        if final:
            return
        # Not after a failed step: its tokens were routed, and it is not among the records.
        config = self.run.config
        positions = sum(record.batch_size for record in records) * config.data.seq_length
        moe = config.moe
        check_ledger(layers, positions, moe.moe_router_topk, moe.moe_ignore_padding_tokens)
        bad = [r for r in records if not math.isfinite(r.lm_loss + r.logit_z)]
        if bad:
            found = f"{bad[0].lm_loss} at iteration {bad[0].iteration}"
            raise NonFiniteError(f"training loss must be finite (got {found})")

    def take_probe(self, probe: RoutingProbe) -> None:
        """Watch the routing of the probe's rows, without effect on training."""
        self.meter.pause()
        with self.run.timers.paused():
            result = probe.take(self.run, self.dataloaders.current, self.state.iteration)
        if result is not None:
            self.reporter.probe(result)
        self.meter.resume()

    def evaluate(self, name: Literal["validation", "test"]) -> None:
        """Evaluate held-out data of the current phase; nothing if there is none.

        Raises:
            NonFiniteError: on every rank: its loss is infinite or not a number.
        """
        run, data = self.run, self.dataloaders.current
        exists = data.has_test if name == "test" else data.has_valid
        if run.config.train.eval_iters == 0 or not exists:
            return
        self.meter.pause()
        for hook in self.hooks:
            hook.before_evaluation()
        with run.timers.paused():
            # A save that is in progress is complete as soon as it can be, not after the evaluation.
            poll = self.checkpoints.poll
            result = evaluate_split(run, data, "test" if name == "test" else "valid", poll)
        for hook in self.hooks:
            hook.after_evaluation()
        self.reporter.evaluation(name, self.state.iteration, result)
        if name == "validation":
            self.validation = result
        self.meter.resume()
        for domain, part in {"": result, **result.domains}.items():
            if not math.isfinite(part.lm_loss):
                found = f"{part.lm_loss} at iteration {self.state.iteration}"
                what = f"{name} loss" + (f" of {domain}" if domain else "")
                raise NonFiniteError(f"{what} must be finite (got {found})")

    def save(self) -> None:
        """Save to `--save`, unless this step is there already.

        Raises:
            NonFinite: on every rank: weights or optimizer state are not finite; nothing is saved.
        """
        iteration = self.state.iteration
        if self.schedule.config.checkpoint.save is None or self.saved_iteration == iteration:
            return
        self.meter.pause()
        data, records = self.dataloaders.current, list(self.completed)
        # A phase without a completed step has nothing to resume from.
        if iteration > self.phase.first_iteration:
            records.append(record_of(self.phase, self.state, data.fingerprint))
        extra = saved_extra(
            records,
            has_phases=self.schedule.has_phases,
            data=data.described,
            spikes=self.spikes,
            probe=None if self.probe is None else self.probe.to_json(),
            capacity=None if self.capacity is None else self.capacity.to_json(),
        )
        with self.run.timers.measure("save-checkpoint"):
            self.checkpoints.save(
                replace(self.state, extra=extra),
                chunks=self.run.wrapped,
                optimizer=self.run.optimizer,
                identity=identity_of(self.run, data),
            )
        self.saved_iteration = iteration
        self.meter.resume()

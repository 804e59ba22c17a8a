"""The lines of the log, as pure functions of what they tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from megatron_moe.checkpoint import TrainState
from megatron_moe.config import LoggingConfig
from megatron_moe.config.rampup import BatchSizes
from megatron_moe.data.composition import share_lines
from megatron_moe.data.pipeline import Data
from megatron_moe.model.counting import count_parameters
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.statistics import LayerStatistics
from megatron_moe.training.metrics import (
    Evaluation,
    StepRecord,
    Summary,
    Throughput,
    mean_loss,
)
from megatron_moe.training.phases import Phase, RunSchedule, differences, phase_lines
from megatron_moe.training.run import TrainingRun

Layers = Mapping[int, LayerStatistics]
"""Routing since the last log interval, by 0-based layer number."""


def starting_lines(
    run: TrainingRun, schedule: RunSchedule, data: Data, state: TrainState
) -> list[str]:
    """Where the run is, how it is laid out, what it trains, which implementations were taken."""
    config, layout, platform = run.config, run.ctx.layout, run.ctx.platform
    counts = count_parameters(config.model, config.moe, run.vocab_size)
    lines = [
        f" platform {platform.kind}, {platform.backend}, "
        f"{len(platform.patches)} patches of the engine, {'bf16' if config.train.bf16 else 'fp32'}",
        f" layout: world {layout.world_size} = TP {layout.tp} x PP {layout.pp} x DP {layout.dp};"
        f" experts ETP {layout.etp} x EP {layout.ep} x EDP {layout.edp};"
        f" chunks per stage {layout.num_chunks}",
        f" model: {counts.total:,} parameters, {counts.activated:,} activated per token,"
        f" vocabulary {run.vocab_size}",
        f" step: {layout.global_batch_size} sequences of {config.data.seq_length}"
        f" = {layout.num_microbatches} micro-batches of {layout.micro_batch_size} on {layout.dp}"
        f" data-parallel ranks; {schedule.iterations} iterations",
        *(f" {line}" for line in phase_lines(schedule)),
        *_rampup_line(run.plan.batch_sizes),
        *_data_lines(data),
    ]
    layer = next((m for c in run.chunks for m in c.modules() if isinstance(m, MoELayer)), None)
    if layer is not None:
        where = layer.describe(layout.micro_batch_size, config.data.seq_length)
        lines.append(f" {where}")
    if state.iteration:
        where = f" in stage {schedule.at(state.iteration).name}" if schedule.has_phases else ""
        load = config.checkpoint.load
        lines.append(f" going on from iteration {state.iteration} of {load}{where}")
    return lines


def switch_lines(before: Phase, after: Phase, data: Data, state: TrainState) -> list[str]:
    """Where one stage ends, what the next has differently, and what its data is made of."""
    return [
        f" stage {after.number} {after.name} begins after iteration {state.iteration},"
        f" {state.consumed_train_samples} samples, {after.first_token} tokens; before it"
        f" {before.name}",
        *(f" stage {after.name}: {line}" for line in differences(before.config, after.config)),
        *_data_lines(data),
    ]


def _data_lines(data: Data) -> list[str]:
    """Which training data it is, and its sources with their shares."""
    return [
        f" training data {data.fingerprint}; validation {'yes' if data.has_valid else 'none'}",
        *(f"   {line}" for line in share_lines(data.shares)),
    ]


def _rampup_line(sizes: BatchSizes) -> list[str]:
    if sizes.constant:
        return []
    return [
        f" batch-size ramp-up: from {sizes.start} sequences by {sizes.increment} at a time to"
        f" {sizes.full} over the first {sizes.samples} samples"
    ]


def progress_line(
    records: Sequence[StepRecord],
    speed: Throughput,
    layers: Layers,
    iterations: int,
    stage: str = "",
) -> str:
    """One interval in one line: means over the interval for losses, the last step for the rest."""
    last = records[-1]
    parts = [
        f" iteration {last.iteration}/{iterations}",
        *([f"stage {stage}"] if stage else []),
        f"samples {last.consumed_samples}",
        f"batch {last.batch_size}",
        f"lr {last.learning_rate:.4E}",
        f"lm loss {mean_loss(records):.6E}",
    ]
    if layers:
        parts += [
            f"aux {mean(layer.aux_loss for layer in layers.values()):.4f}",
            f"router z {mean(layer.z_loss for layer in layers.values()):.4f}",
            f"dropped {mean(layer.drop_rate for layer in layers.values()):.2%}",
        ]
    parts += [
        f"grad norm {last.grad_norm:.4f}",
        f"{speed.tokens_per_second:.0f} tokens/s",
        f"{speed.tflops_per_device:.4g} TFLOP/s/device",
    ]
    if speed.mfu is not None:
        parts.append(f"MFU {speed.mfu:.1%}")
    parts += [
        f"{speed.memory_bytes / 2**20:.0f} MiB",
        f"{speed.seconds_per_step * 1e3:.1f} ms/iter",
    ]
    return " | ".join(parts)


def evaluation_line(name: str, iteration: int, found: Evaluation) -> str:
    """A held-out loss, and those of its domains."""
    parts = [
        f" {name} at iteration {iteration}",
        f"lm loss {found.lm_loss:.6E}",
        f"perplexity {found.perplexity:.4E}",
        f"targets {found.targets}",
        *(f"{domain} {part.lm_loss:.6E}" for domain, part in found.domains.items()),
    ]
    return " | ".join(parts)


def final_lines(summary: Summary, logging: LoggingConfig) -> list[str]:
    """First and last training loss, held-out loss, speed, where to look."""
    state = summary.state
    how = "done" if summary.failure is None else "stopped"
    lines = [
        f" {how} at iteration {state.iteration}, {state.consumed_train_samples} samples consumed"
    ]
    if summary.first is not None and summary.last is not None:
        lines.append(
            f" training loss: first {summary.first.lm_loss:.6f} (iteration"
            f" {summary.first.iteration}), last {summary.last.lm_loss:.6f} (iteration"
            f" {summary.last.iteration}) | {summary.tokens_per_second:.0f} tokens/s"
        )
    if summary.valid is not None:
        lines.append(
            f" validation loss: {summary.valid.lm_loss:.6f} over {summary.valid.targets} targets"
        )
    if logging.tensorboard_dir is not None:
        lines.append(f" logs: tensorboard --logdir {logging.tensorboard_dir}")
    if summary.failure is not None:
        lines.append(f" error: {summary.failure}")
    return lines

"""The log on standard output: its lines, as functions of what they report, and the sink.

Programs read some of them (`examples/`): fields are separated by ` | `, and the lines of steps and
evaluations begin with ` iteration N/` and ` validation at iteration N`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from statistics import mean

from megatron_moe.checkpoint import TrainState
from megatron_moe.config import LoggingConfig, RunConfig
from megatron_moe.config.rampup import BatchSizes
from megatron_moe.data.composition import share_lines
from megatron_moe.data.pipeline import Data
from megatron_moe.model.counting import count_parameters
from megatron_moe.model.logits_chunks import chunk_tokens
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.registry import kernels_for
from megatron_moe.platform.transformer_engine import choose_impl
from megatron_moe.training.captured import WARM_UP
from megatron_moe.training.metrics import Evaluation, Interval, Summary, Throughput
from megatron_moe.training.phases import Phase, RunSchedule, differences, phase_lines
from megatron_moe.training.probe_statistics import ProbeResult
from megatron_moe.training.run import TrainingRun


class LogSink:
    """Prints the log.

    Args:
        logging: destinations, of which the last lines name TensorBoard's.
        iterations: steps of the whole run, for `12/100`.
    """

    def __init__(self, logging: LoggingConfig, iterations: int) -> None:
        self._logging, self._iterations = logging, iterations

    def start(self, run: TrainingRun, schedule: RunSchedule, data: Data, state: TrainState) -> None:
        """What is trained, where, and from which step."""
        _print(starting_lines(run, schedule, data, state))

    def phase(self, before: Phase, after: Phase, data: Data, state: TrainState) -> None:
        """What the phase changes, and what its data is made of."""
        _print(phase_change_lines(before, after, data, state))

    def interval(self, interval: Interval) -> None:
        """One line for the interval."""
        print_line(progress_line(interval, self._iterations))
        if (overflow := overflow_line(interval)) is not None:
            print_line(overflow)
        if interval.timers:
            print_line(timers_line(interval.timers))

    def evaluation(self, name: str, iteration: int, result: Evaluation) -> None:
        """One line for the evaluation."""
        print_line(evaluation_line(name, iteration, result))

    def probe(self, result: ProbeResult) -> None:
        """One line for the probe."""
        print_line(probe_line(result))

    def end(self, summary: Summary) -> None:
        """Losses, speed, and where to look."""
        _print(final_lines(summary, self._logging))
        try:
            sys.stdout.flush()
        except OSError:
            # Lines that are still kept would fail once more when the interpreter exits, and make
            # the exit code 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_line(line: str) -> None:
    """Print at once: a log that is buffered in a pipe is empty when a run is killed.

    A line that cannot be written, e.g. to a file on a full disk, is kept with those after it until
    it can: a run does not end because its log does. The first such error is on standard error.
    """
    try:
        print(line, flush=True)
    except OSError as error:
        warnings.warn(f"standard output cannot be written: {error}", stacklevel=1)


def _print(lines: list[str]) -> None:
    for line in lines:
        print_line(line)


def _fp8_lines(config: RunConfig) -> list[str]:
    """The format and the layers that are in it; none without FP8."""
    fp8, layers = config.precision, range(config.model.num_layers)
    if fp8.fp8_format is None:
        return []
    count = sum(fp8.in_fp8(layer, len(layers)) for layer in layers)
    how = "emulated: operands are rounded" if fp8.fp8_emulate else "Transformer Engine"
    return [
        f" FP8: {fp8.fp8_format}, {fp8.fp8_recipe}, {how}; {count} of {len(layers)} layers, not the"
        " router, logits and norms"
    ]


def starting_lines(
    run: TrainingRun, schedule: RunSchedule, data: Data, state: TrainState
) -> list[str]:
    """Platform, layout, model, batch, data, and the implementations that were selected."""
    config, layout, platform = run.config, run.ctx.layout, run.ctx.platform
    counts = count_parameters(config.model, config.moe, run.vocab_size)
    return [
        f" platform: {platform.kind}, {platform.backend}, {len(platform.patches)} Megatron-Core"
        f" patches, {'bf16' if config.train.bf16 else 'fp32'}",
        f" layout: world {layout.world_size} = TP {layout.tp} x PP {layout.pp} x DP {layout.dp};"
        f" experts ETP {layout.etp} x EP {layout.ep} x EDP {layout.edp};"
        f" model chunks per rank {layout.num_chunks}",
        f" model: {counts.total:,} parameters, {counts.activated:,} activated per token,"
        f" vocabulary {run.vocab_size}",
        *_fp8_lines(config),
        f" step: {layout.global_batch_size} sequences of {config.data.seq_length}"
        f" = {layout.num_microbatches} micro-batches of {layout.micro_batch_size} on {layout.dp}"
        f" data-parallel ranks; {schedule.iterations} iterations",
        *(f" {line}" for line in phase_lines(schedule)),
        *(f" {line}" for line in (*config.model.attention_lines(), *config.routing_lines())),
        *_rampup_line(run.plan.batch_sizes),
        *_data_lines(data),
        *_implementation_lines(run),
        _logits_line(run),
        *_forced_routing_line(run),
        *_resume_line(run, schedule, state),
    ]


def _implementation_lines(run: TrainingRun) -> list[str]:
    """What runs, and why, of what `--transformer-impl` and the flags of experts leave open."""
    layers = choose_impl(run.config, run.ctx.platform.kind)
    lines = [f" layers: {layers.name} ({layers.reason})"]
    if run.captured is not None:
        lines.append(
            f" CUDA graph: forward and backward passes of a step, captured after {WARM_UP} steps"
        )
    layer = next((m for c in run.chunks for m in c.modules() if isinstance(m, MoELayer)), None)
    if layer is not None:
        rows, tokens = run.ctx.layout.micro_batch_size, run.config.data.seq_length
        lines.append(f" {layer.describe(rows, tokens)}")
        lines += _bound_line(layer, rows * tokens)
    return lines


def _bound_line(layer: MoELayer, tokens: int) -> list[str]:
    """What a bounded buffer holds, and that choices past it are dropped."""
    bound = layer.dispatcher.bound(tokens * layer.moe.moe_router_topk, training=True)
    if bound is None:
        return []
    return [
        f" expert buffers: {bound.ranks} x {bound.rows} rows on each rank"
        f" (--moe-dropless-buffer-factor {layer.moe.moe_dropless_buffer_factor:g}); choices past"
        " that are dropped in training, unlike in a model without a capacity, and reported"
    ]


def _logits_line(run: TrainingRun) -> str:
    """How many chunks of a micro-batch's logits there are, and of what size."""
    config, layout = run.config, run.ctx.layout
    tokens, columns = layout.micro_batch_size * config.data.seq_length, run.vocab_size // layout.tp
    most = config.parallel.logits_chunk_tokens or chunk_tokens(columns)
    count = -(-tokens // most)
    size = -(-tokens // count)
    selected = kernels_for(config.moe, run.ctx.platform.device.type).selected
    kernel = next(kernel for kernel in selected if kernel.operation == "linear_cross_entropy")
    return (
        f" logits: {count} x {size} tokens, {size * columns / 2**18:.4g} MiB at a time;"
        f" kernel: {kernel.implementation} ({kernel.reason})"
    )


def _forced_routing_line(run: TrainingRun) -> list[str]:
    if not run.config.moe.moe_router_force_load_balancing:
        return []
    return [
        " WARNING: --moe-router-force-load-balancing: experts are chosen at random, as no model"
        " does. Publish the speed of real routing next to the one measured here"
    ]


def _resume_line(run: TrainingRun, schedule: RunSchedule, state: TrainState) -> list[str]:
    if not state.iteration:
        return []
    phase = f", phase {schedule.at(state.iteration).name}" if schedule.has_phases else ""
    return [
        f" resuming from iteration {state.iteration} of {run.config.checkpoint.load}{phase}",
    ]


def phase_change_lines(before: Phase, after: Phase, data: Data, state: TrainState) -> list[str]:
    """Where a phase begins, the settings that change, and the composition of its data."""
    return [
        f" phase {after.number} {after.name} begins after iteration {state.iteration}"
        f" ({state.consumed_train_samples} samples, {after.first_token} tokens); previous phase"
        f" {before.name}",
        *(f" phase {after.name}: {line}" for line in differences(before.config, after.config)),
        *_data_lines(data),
    ]


def _data_lines(data: Data) -> list[str]:
    """Fingerprint of the training data, and its sources with their shares."""
    return [
        f" training data {data.fingerprint}; validation data: {'yes' if data.has_valid else 'no'}",
        *(f"   {line}" for line in share_lines(data.shares)),
    ]


def _rampup_line(sizes: BatchSizes) -> list[str]:
    if sizes.constant:
        return []
    return [
        f" batch-size ramp-up: from {sizes.start} to {sizes.full} sequences in increments of"
        f" {sizes.increment} over the first {sizes.samples} samples"
    ]


def progress_line(interval: Interval, iterations: int) -> str:
    """One interval in one line: means over the interval for losses, the last step for the rest."""
    last, speed, layers = interval.records[-1], interval.speed, interval.layers.values()
    parts = [
        f" iteration {last.iteration}/{iterations}",
        *([f"phase {interval.phase.name}"] if interval.phase is not None else []),
        f"samples {last.consumed_samples}",
        f"batch {last.batch_size}",
        f"lr {last.learning_rate:.4E}",
        f"lm loss {interval.lm_loss:.6E}",
    ]
    if layers:
        parts += [
            f"aux {mean(layer.aux_loss for layer in layers):.4f}",
            f"router z {mean(layer.z_loss for layer in layers):.4f}",
            f"dropped {mean(layer.drop_rate for layer in layers):.2%}",
        ]
    parts += [
        f"grad norm {last.grad_norm:.4f}",
        *([f"num zeros {last.zeros_in_grad}"] if last.zeros_in_grad is not None else []),
        *([f"params norm {last.params_norm:.4f}"] if last.params_norm is not None else []),
        *(["FORCED ROUTING"] if interval.forced_routing else []),
        f"{speed.tokens_per_second:.0f} tokens/s",
        *_utilization(speed),
    ]
    parts += [
        f"{speed.memory_bytes / 2**20:.0f} MiB",
        f"{speed.seconds_per_step * 1e3:.1f} ms/iter",
    ]
    return " | ".join(parts)


def overflow_line(interval: Interval) -> str | None:
    """The choices of each layer that found no row in a bounded buffer; `None` if all did."""
    parts = [
        f"layer {number}: {layer.dropped_choices:.0f} ({layer.drop_rate:.2%})"
        for number, layer in interval.layers.items()
        if layer.dropped_choices
    ]
    if interval.buffer_factor is None or not parts:
        return None
    bound = f"--moe-dropless-buffer-factor {interval.buffer_factor:g}"
    return f" OVERFLOW of expert buffers, choices dropped past {bound}: {', '.join(parts)}"


def _utilization(speed: Throughput) -> list[str]:
    """The arithmetic that the model asks for, and in brackets what was done of it."""
    tflops = speed.done_tflops_per_device
    done = "" if tflops is None else f" ({tflops:.4g} done)"
    parts = [f"{speed.tflops_per_device:.4g} TFLOP/s/device{done}"]
    if speed.mfu is not None:
        done = "" if speed.done_mfu is None else f" ({speed.done_mfu:.1%} done)"
        parts.append(f"MFU {speed.mfu:.1%}{done}")
    return parts


def timers_line(timers: Mapping[str, tuple[float, float]]) -> str:
    """Milliseconds of a step by timer, least and most over the ranks that measured it."""
    parts = [f"{name} {low * 1e3:.2f} {high * 1e3:.2f}" for name, (low, high) in timers.items()]
    return " | ".join([" (min, max) ms/iter over ranks", *parts])


def evaluation_line(name: str, iteration: int, result: Evaluation) -> str:
    """A held-out loss, and those of its domains."""
    parts = [
        f" {name} at iteration {iteration}",
        f"lm loss {result.lm_loss:.6E}",
        f"perplexity {result.perplexity:.4E}",
        f"targets {result.targets}",
        *(f"{domain} {part.lm_loss:.6E}" for domain, part in result.domains.items()),
    ]
    return " | ".join(parts)


def probe_line(result: ProbeResult) -> str:
    """Means over the MoE layers of a probe of the routing."""
    layers = result.layers.values()
    parts = [f" routing at iteration {result.iteration}", f"tokens {result.tokens}"]
    for name in ("previous", "first"):
        same = [getattr(layer, name) for layer in layers]
        if None not in same:
            parts.append(f"agreement with {name} probe {mean(s.choices for s in same):.1%}")
    parts.append(f"chance {result.chance:.1%}")
    shares = [layer.token_share for layer in layers if layer.token_share is not None]
    chances = [x.token_share_chance for x in layers if x.token_share_chance is not None]
    if shares:
        parts.append(f"explained by token id {mean(shares):.1%}, by chance {mean(chances):.1%}")
    return " | ".join(parts)


def final_lines(summary: Summary, logging: LoggingConfig) -> list[str]:
    """First and last training loss, held-out loss, speed, and how to open TensorBoard."""
    state = summary.state
    outcome = "done" if summary.failure is None else "stopped"
    lines = [
        f" {outcome} at iteration {state.iteration}, {state.consumed_train_samples} samples"
        " consumed"
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

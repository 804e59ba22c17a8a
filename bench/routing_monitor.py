"""What watching the routing costs, as a share of training steps of the tiny preset.

    python -m bench.routing_monitor

Three parts, with their default intervals: the counts of every pass of an MoE layer, timed within
the steps; collecting and writing them to TensorBoard and the routing log every `--log-interval`
steps; and the probe every `--routing-log-interval` steps. One process on a CPU.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench._one_rank import one_rank
from bench.record import Record
from megatron_moe.config import RunConfig
from megatron_moe.config.presets import PRESETS

VOCAB = 4096
STEPS = 40
"""Timed steps: enough that the pending passes of a layer are added up several times."""
REPEATS = 9
MOST = 2.0
"""Percent of the training time that all of it may cost."""


def configuration(folder: str) -> RunConfig:
    """The tiny preset on synthetic documents."""
    run = PRESETS["openmoe-tiny"]
    data = replace(
        run.data,
        mock_data=True,
        vocab_size=VOCAB,
        tokenizer_type="NullTokenizer",
        data_cache_path=folder,
        num_workers=0,
    )
    return replace(run, data=data, train=replace(run.train, train_iters=1000, eval_iters=1))


def _seconds(call: Callable[[], Any]) -> float:
    """Median time of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(REPEATS):
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def measure(config: RunConfig, ctx: Any, folder: str) -> list[Record]:
    """The three parts and their sum, in percent of a step."""
    from megatron_moe.model.build import build_model
    from megatron_moe.moe.observing import moe_layers
    from megatron_moe.training.dataloaders import open_data
    from megatron_moe.training.plan import resolve_plan
    from megatron_moe.training.probe import RoutingProbe
    from megatron_moe.training.run import prepare_run
    from megatron_moe.training.step import fetch_batches, train_step

    chunks = build_model(config, ctx.layout, ctx.pgs, VOCAB, ctx.platform.device)
    plan = resolve_plan(config, ctx.layout.global_batch_size)
    run = prepare_run(config, plan, ctx, chunks, VOCAB)
    data = open_data(config, ctx.layout, 0, 0)
    batches = fetch_batches(run, data.train, ctx.layout.global_batch_size)
    counters = [layer.statistics for layer in moe_layers(run.chunks).values()]

    counting: list[float] = []

    def timed(add: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            before = time.perf_counter()
            add(*arguments)
            counting.append(time.perf_counter() - before)

        return call

    for counter in counters:
        counter.add = timed(counter.add)  # type: ignore[method-assign]
    steps: list[float] = []
    while len(steps) <= STEPS:
        before = time.perf_counter()
        train_step(run, batches, 1e-4, 1)
        steps.append(time.perf_counter() - before)
        if len(steps) == 1:  # warms up
            counting.clear()
    seconds = statistics.median(steps[1:])
    for counter in counters:
        del counter.add
    logging, probe = config.logging, RoutingProbe(config)
    parts = {
        "counting": sum(counting) / sum(steps[1:]),
        "report": _seconds(_report(run, folder)) / (logging.log_interval * seconds),
        "probe": _seconds(lambda: probe.take(run, data, 1))
        / (logging.routing_log_interval * seconds),
    }
    records = [
        Record(name=f"routing_monitor/{name}", value=100 * share, unit="% of a step")
        for name, share in parts.items()
    ]
    total = 100 * sum(parts.values())
    whole = Record(
        name="routing_monitor/all",
        value=total,
        unit="% of a step",
        target=f"<= {MOST}",
        met=total <= MOST,
    )
    return [*records, whole]


def _report(run: Any, folder: str) -> Callable[[], None]:
    """Collects the statistics, and writes them as the sinks of a run do."""
    from megatron_moe.moe.statistics import collect_statistics
    from megatron_moe.training.metrics import Interval, StepRecord, Throughput
    from megatron_moe.training.routing_log import RoutingLogSink
    from megatron_moe.training.sinks import Sink
    from megatron_moe.training.tensorboard import TensorBoardSink

    step = StepRecord(
        iteration=1,
        consumed_samples=1,
        batch_size=1,
        learning_rate=1.0,
        grad_norm=1.0,
        lm_loss=1.0,
        logit_z=1.0,
        targets=1,
    )
    speed = Throughput(
        seconds_per_step=1.0,
        tokens_per_second=1.0,
        tflops_per_device=1.0,
        mfu=None,
        memory_bytes=0,
    )
    sinks: list[Sink] = [
        TensorBoardSink(f"{folder}/board", 0),
        RoutingLogSink(Path(folder) / "routing", 0),
    ]

    def report() -> None:
        layers = collect_statistics(run.chunks, run.ctx.pgs)
        for sink in sinks:
            sink.interval(Interval(records=[step], speed=speed, layers=layers, phase=None))

    return report


def records() -> list[Record]:
    """See `measure`."""
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(folder)
        with one_rank(config, VOCAB) as ctx:
            return measure(config, ctx, folder)


if __name__ == "__main__":
    from bench.run import table

    print(table(records()))

"""Reports reach every sink, on rank 0 only; a new sink is one class."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_moe.config import LoggingConfig, RunConfig
from megatron_moe.moe.statistics import LayerStatistics
from megatron_moe.training.log import LogSink, overflow_line
from megatron_moe.training.metrics import Interval, Meter, StepRecord
from megatron_moe.training.reporting import MetricsFileSink, Reporter, Sink, build_reporter
from megatron_moe.training.tensorboard import TensorBoardSink


class Notes:
    """A toy sink."""

    def __init__(self, name: str, events: list[tuple[Any, ...]]) -> None:
        self.name, self.events = name, events

    def start(self, run: Any, schedule: Any, data: Any, state: Any) -> None:
        self.events.append((self.name, "start", run, schedule, data, state))

    def phase(self, before: Any, after: Any, data: Any, state: Any) -> None:
        self.events.append((self.name, "phase", before, after, data, state))

    def interval(self, interval: Any) -> None:
        self.events.append((self.name, "interval", interval))

    def evaluation(self, name: str, iteration: int, result: Any) -> None:
        self.events.append((self.name, "evaluation", name, iteration, result))

    def probe(self, result: Any) -> None:
        self.events.append((self.name, "probe", result))

    def end(self, summary: Any) -> None:
        self.events.append((self.name, "end", summary))


EVENTS: dict[str, tuple[Any, ...]] = {
    "start": (1, 2, 3, 4),
    "phase": (5, 6, 7, 8),
    "interval": (9,),
    "evaluation": ("test", 10, 11),
    "probe": (12,),
    "end": (13,),
}


def test_every_event_reaches_every_sink_in_order():
    events: list[tuple[Any, ...]] = []
    sinks: dict[str, Sink] = {"a": Notes("a", events), "b": Notes("b", events)}
    reporter = Reporter(sinks, writes=True)
    for name, arguments in EVENTS.items():
        getattr(reporter, name)(*arguments)
    assert events == [(sink, name, *args) for name, args in EVENTS.items() for sink in "ab"]


def test_only_rank_0_has_sinks_and_prints(tmp_path, capsys):
    logging = LoggingConfig(
        metrics_file=str(tmp_path / "new" / "metrics.jsonl"), tensorboard_dir=str(tmp_path / "tb")
    )
    config = RunConfig(logging=logging)
    other = build_reporter(config, 20, rank=1, first_iteration=0)
    for name, arguments in EVENTS.items():
        getattr(other, name)(*arguments)
    other.log(" a line")
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
    first = build_reporter(config, 20, rank=0, first_iteration=0)
    kinds = [type(sink) for sink in first._sinks.values()]
    assert kinds == [LogSink, MetricsFileSink, TensorBoardSink]
    first.log(" a line")
    assert capsys.readouterr().out == " a line\n"
    assert len(build_reporter(RunConfig(), 20, rank=0, first_iteration=0)._sinks) == 1


def _record(iteration: int, loss: float, targets: int) -> StepRecord:
    return StepRecord(
        iteration=iteration,
        consumed_samples=0,
        batch_size=1,
        learning_rate=0.1,
        grad_norm=1.0,
        lm_loss=loss,
        logit_z=0.0,
        targets=targets,
    )


def test_the_loss_of_an_interval_is_the_mean_over_targets_not_over_steps():
    records = [_record(1, 2.0, 30), _record(2, 4.0, 10), _record(3, 9.0, 0)]
    speed: Any = None
    interval = Interval(records=records, speed=speed, layers={}, phase=None)
    assert interval.lm_loss == pytest.approx((2.0 * 30 + 4.0 * 10) / 40)


def test_a_meter_sums_up_tokens_by_the_sequence_length_of_each_phase(monkeypatch):
    import torch

    from megatron_moe.training import metrics

    # Sums and arithmetic are not under test: only what is counted, and by which length.
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda table: None)
    monkeypatch.setattr(
        metrics, "flops_per_token", lambda *args: SimpleNamespace(training=float(args[-1]))
    )
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: float(next(clock)))

    def config(length: int) -> Any:
        logging = SimpleNamespace(device_peak_tflops=1e-12)
        data, train = SimpleNamespace(seq_length=length), SimpleNamespace(bf16=False)
        return SimpleNamespace(logging=logging, data=data, train=train, model=None, moe=None)

    platform = SimpleNamespace(
        synchronize=lambda: None,
        device_memory_stats=lambda: {"max_allocated": 5, "allocated": 3, "reserved": 4},
    )
    ctx = SimpleNamespace(platform=platform, world_size=2)
    run: Any = SimpleNamespace(config=config(32), ctx=ctx, vocab_size=128)
    meter = Meter(run)
    assert meter.collect() == ([], None)
    assert meter.tokens_per_second == 0.0
    sums = torch.tensor([6.0, 0.0, 3.0], dtype=torch.float64)
    meter.add(1, 4, 4, 0.1, 1.0, sums)
    meter.add(2, 8, 4, 0.1, 1.0, sums)
    (first, second), speed = meter.collect()
    assert (first.lm_loss, first.targets, second.consumed_samples) == (2.0, 3, 8)
    # 10 seconds of the clock since the last collection.
    assert speed is not None
    assert (speed.tokens_per_second, speed.seconds_per_step) == (2 * 4 * 32 / 10, 5.0)
    assert speed.mfu == pytest.approx(32 * (2 * 4 * 32) / 10 / 2)
    meter.pause()
    meter.enter_phase(config(64))
    meter.resume()
    meter.add(3, 10, 2, 0.1, 1.0, sums)
    (third,), speed = meter.collect()
    assert speed is not None
    assert speed.tokens_per_second == 2 * 64 / 20
    assert (meter.first, meter.last) == (first, third)
    assert meter.tokens_per_second == pytest.approx((2 * 4 * 32 + 2 * 64) / 30)


def _layer(load: tuple[float, ...], kept: tuple[float, ...]) -> LayerStatistics:
    nothing = dict.fromkeys(
        ("router_entropy", "router_confidence", "logit_rms", "aux_loss", "z_loss"), 0.0
    )
    at = ((0.0,), (0.0,)), (((0.0, 0.0),), ((0.0, 0.0),))
    return LayerStatistics(
        load=load, kept=kept, tokens=4.0, micro_batches=1.0, tokens_at=at[0], kept_at=at[1],
        **nothing,
    )  # fmt: skip


def test_choices_that_overflow_a_bounded_buffer_are_named_by_layer():
    speed: Any = None
    layers = {1: _layer((6.0, 2.0), (5.0, 2.0)), 3: _layer((4.0, 4.0), (4.0, 4.0))}
    records = [_record(1, 2.0, 30)]
    full = Interval(records=records, speed=speed, layers=layers, phase=None, buffer_factor=1.25)
    assert overflow_line(full) == (
        " OVERFLOW of expert buffers, choices dropped past --moe-dropless-buffer-factor 1.25: "
        "layer 1: 1 (12.50%)"
    )
    # With a capacity, drops are no overflow; without drops there is nothing to say.
    assert overflow_line(replace(full, buffer_factor=None)) is None
    assert overflow_line(replace(full, layers={3: layers[3]})) is None

"""`Trainer`: the order of steps, reports, evaluations and saves, as its collaborators see it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_moe.checkpoint import TrainState
from megatron_moe.config.cli import parse_args
from megatron_moe.training import trainer as module
from megatron_moe.training.consumed import KEY
from megatron_moe.training.phases import resolve_run_schedule
from megatron_moe.training.resume import ResumePoint
from megatron_moe.training.step import NonFiniteError, StepResult
from megatron_moe.training.timing import StepTimers
from megatron_moe.training.trainer import Trainer
from tests.training.phase_tables import TABLE, schedule_of
from tests.training.tiny import MODEL


class HeldOut(str):
    """A held-out loss that says of which data it is."""

    lm_loss: float = 2.0
    domains: dict[str, Any] = {}  # noqa: RUF012


class Collaborators:
    """Everything that a `Trainer` is given; each call is an entry of `events`."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.unread, self.first, self.last, self.tokens_per_second = 0, None, None, 0.0
        self.current = SimpleNamespace(
            train=None,
            has_valid=True,
            has_test=True,
            fingerprint="data of phase 1",
            described={},
        )
        self.run = SimpleNamespace(
            wrapped=[SimpleNamespace(train=lambda: self.note("train mode"))],
            chunks=[],
            optimizer=None,
            ctx=SimpleNamespace(pgs=None),
            timers=StepTimers(0),
            in_phase=self.in_phase,
        )
        self.saved: list[tuple[int, list[tuple[str, int]]]] = []
        self.asked, self.signalled_at = 0, -1

    def note(self, event: str) -> None:
        self.events.append(event)

    def in_phase(self, phase: Any) -> Any:
        self.note(f"settings of {phase.name}")
        self.run.config = phase.config
        return self.run

    # The data loaders and the meter
    def enter_phase(self, entered: Any) -> Any:
        if hasattr(entered, "number"):
            self.current.fingerprint = f"data of phase {entered.number}"
            self.note(f"data of {entered.name}")
        return self.current

    def with_routing(self, speed: Any, layers: Any) -> Any:
        return speed

    def pause(self) -> None:
        self.note("pause")

    def resume(self) -> None:
        self.note("resume")

    def add(self, iteration: int, samples: int, *rest: Any) -> None:
        self.unread += 1

    def collect(self) -> tuple[list[Any], Any]:
        unread, self.unread = self.unread, 0
        record = SimpleNamespace(iteration=0, lm_loss=1.0, logit_z=1.0, batch_size=8)
        return [record] * unread, object() if unread else None

    # The checkpoint manager
    def save(self, state: TrainState, *, chunks: Any, optimizer: Any, identity: Any) -> None:
        self.note(f"save {state.iteration}")
        assert identity == "identity of " + self.current.fingerprint
        records = state.extra.get(KEY, [])
        self.saved.append((state.iteration, [(r["name"], r["iterations"]) for r in records]))

    def poll(self) -> None:
        self.note("poll")

    def finish(self) -> None:
        self.note("finish saves")

    def abandon(self) -> None:
        self.note("abandon saves")

    # The reporter
    def interval(self, interval: Any) -> None:
        name = interval.phase.name if interval.phase is not None else "-"
        self.note(f"report {len(interval.records)} {name}")

    def evaluation(self, name: str, iteration: int, result: Any) -> None:
        self.note(f"{name} {iteration} on {result}")

    def phase(self, before: Any, after: Any, data: Any, state: TrainState) -> None:
        self.note(f"{before.name} -> {after.name}")

    def log(self, line: str) -> None:
        self.note(line)

    def end(self, summary: Any) -> None:
        self.note("end")

    # The exit signal
    def agreed(self) -> str:
        self.asked += 1
        return "SIGTERM" if self.asked == self.signalled_at else ""

    def close(self) -> None:
        self.note("close")


def trainer_of(
    parts: Collaborators,
    directory: Path,
    line: str,
    *,
    table: str | None = TABLE,
    resume: Any = None,
) -> Trainer:
    if table is None:
        schedule = resolve_run_schedule(parse_args([*MODEL, *line.split()]).config, 1)
    else:
        schedule = schedule_of(table, line, directory)
    resume = resume or ResumePoint(state=TrainState())
    parts.run.config = schedule.at(resume.state.iteration).config
    everything: Any = parts
    return Trainer(
        run=everything.run,
        schedule=schedule,
        dataloaders=everything,
        resume=resume,
        meter=everything,
        checkpoints=everything,
        reporter=everything,
        exit_request=everything,
    )


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Collaborators:
    found = Collaborators()

    def step(run: Any, batches: Any, rate: float, iteration: int, *_: Any) -> StepResult:
        found.note(f"step {iteration}")
        return StepResult(sums=None, grad_norm=1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "train_step", step)
    monkeypatch.setattr(module, "fetch_batches", lambda run, data, size: [None] * size)
    monkeypatch.setattr(module, "evaluate_split", lambda run, data, *_: HeldOut(data.fingerprint))
    monkeypatch.setattr(module, "diagnose", lambda run, batches, first: f"first sample {first}")
    monkeypatch.setattr(module, "identity_of", lambda run, data: "identity of " + data.fingerprint)
    monkeypatch.setattr(module, "collect_statistics", lambda chunks, pgs: {})
    monkeypatch.setattr(module, "reset_statistics", lambda chunks: None)
    return found


def after(events: list[str], step: int) -> list[str]:
    """The events from one step to the next, without the clock's."""
    begin = events.index(f"step {step}") + 1
    rest = events[begin:]
    end = next((i for i, event in enumerate(rest) if event.startswith("step ")), len(rest))
    return [event for event in rest[:end] if event not in ("pause", "resume")]


FLAGS = "--train-iters 20 --log-interval 5 --save-interval 6 --eval-iters 1 --eval-interval 4"


def test_what_happens_after_each_step(parts, tmp_path):
    trainer = trainer_of(parts, tmp_path, f"{FLAGS} --save {tmp_path}")
    summary = trainer.train()
    events = parts.events
    assert [e for e in events if e.startswith("step ")] == [f"step {n}" for n in range(1, 21)]
    assert events[:3] == ["train mode", "resume", "step 1"]
    assert after(events, 3) == ["poll"]
    assert after(events, 4) == ["poll", "validation 4 on data of phase 1"]
    assert after(events, 5) == ["poll", "report 5 first"]
    assert after(events, 6) == ["poll", "save 6"]
    # The phase is reported and evaluated on its own data before the next one begins.
    assert after(events, 8) == [
        "poll",
        "report 3 first",
        "validation 8 on data of phase 1",
        "data of second",
        "settings of second",
        "first -> second",
    ]
    assert after(events, 12) == ["poll", "save 12", "validation 12 on data of phase 2"]
    assert after(events, 20) == [
        "poll",
        "report 5 third",
        "save 20",
        "finish saves",
        "validation 20 on data of phase 3",
        "test 20 on data of phase 3",
        "close",
        "end",
    ]
    assert parts.saved == [
        (6, [("first", 6)]),
        (12, [("first", 8), ("second", 4)]),
        (18, [("first", 8), ("second", 6), ("third", 4)]),
        (20, [("first", 8), ("second", 6), ("third", 6)]),
    ]
    assert parts.asked == 19, "after the last step there is nothing to exit from"
    assert (summary.state.iteration, summary.failure) == (20, None)
    assert summary.state.consumed_train_samples == 8 * 8 + 6 * 4 + 6 * 12


def test_the_clock_stops_for_everything_but_steps(parts, tmp_path):
    trainer_of(parts, tmp_path, f"{FLAGS} --save {tmp_path}").train()
    running = False
    for event in parts.events:
        if event in ("pause", "resume"):
            assert running is (event == "pause"), "a pause inside a pause would count twice"
            running = event == "resume"
        elif event.startswith(("step ", "report ")):
            assert running, event
        elif event.startswith(("validation ", "test ", "save ", "data of ", "first -> ")):
            assert not running, event


def test_exit_interval_ends_a_start_after_one_save_and_its_evaluation(parts, tmp_path):
    trainer = trainer_of(parts, tmp_path, f"{FLAGS} --save {tmp_path} --exit-interval 12")
    assert trainer.train().state.iteration == 12
    assert after(parts.events, 12) == [
        "poll",
        "save 12",
        "validation 12 on data of phase 2",
        " exiting at iteration 12: --exit-interval 12",
        "report 2 second",
        "finish saves",
        "close",
        "end",
    ]
    assert parts.asked == 11, "ranks are not asked where the exit is decided already"


def test_a_signal_ends_a_start_after_the_step_at_which_ranks_agree(parts, tmp_path):
    parts.signalled_at = 3
    trainer_of(parts, tmp_path, f"{FLAGS} --save {tmp_path}").train()
    assert after(parts.events, 3) == [
        "poll",
        " exiting at iteration 3: SIGTERM",
        "report 3 first",
        "save 3",
        "finish saves",
        "close",
        "end",
    ]


def test_a_non_finite_gradient_reports_the_steps_before_it_and_saves_nothing(
    parts, tmp_path, monkeypatch
):
    step = module.train_step

    def failing(run: Any, batches: Any, rate: float, iteration: int, *_: Any) -> StepResult:
        if iteration == 3:
            raise NonFiniteError("gradient norm must be finite")
        return step(run, batches, rate, iteration)

    monkeypatch.setattr(module, "train_step", failing)
    summary = trainer_of(parts, tmp_path, f"{FLAGS} --save {tmp_path}").train()
    assert after(parts.events, 2) == ["poll", "report 2 first", "finish saves", "close", "end"]
    assert summary.failure == "gradient norm must be finite; first sample 16"
    assert (summary.state.iteration, parts.saved) == (2, [])


def test_another_error_abandons_the_save_in_progress(parts, tmp_path, monkeypatch):
    def failing(*_: Any) -> None:
        raise OSError("disk")

    monkeypatch.setattr(parts, "poll", failing)
    with pytest.raises(OSError, match="disk"):
        trainer_of(parts, tmp_path, f"{FLAGS} --save {tmp_path}").train()
    assert parts.events[-2:] == ["abandon saves", "close"]


def test_a_step_that_was_loaded_from_the_same_directory_is_not_saved_again(parts, tmp_path):
    flags = f"{FLAGS} --save {tmp_path} --load {tmp_path}"
    resume = ResumePoint(state=TrainState(iteration=20, consumed_train_samples=160))
    trainer_of(parts, tmp_path, flags, resume=resume).train()
    assert parts.saved == []
    assert [e for e in parts.events if e.startswith("step ")] == []


def test_a_run_without_phases_reports_and_records_none(parts, tmp_path):
    flags = f"--train-iters 5 --eval-iters 0 --save {tmp_path}"
    trainer_of(parts, tmp_path, flags, table=None).train()
    reports = [event for event in parts.events if event.startswith("report")]
    assert reports == ["report 4 -", "report 1 -"]
    assert not any(event.startswith("validation") for event in parts.events)
    assert parts.saved == [(5, [])]

"""Learning rates that count consumed sequences, as Megatron-LM's with `--train-samples`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_moe.config.cli import parse_args
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.training.phases import RunSchedule, resolve_run_schedule

RUN = "--micro-batch-size 2 --global-batch-size 12 --lr 1 --lr-decay-style linear"
RAMP = "--rampup-batch-size 4 4 16"
BEFORE = [0, 4, 8, 16, 28, 40]
"""Sequences consumed before each step: batches of 4, 4, 8 and then 12."""


def schedule_of(line: str) -> RunSchedule:
    config = parse_args(line.split()).config
    validate(config)
    return resolve_run_schedule(config, 1)


def rates(schedule: RunSchedule) -> list[float]:
    return [schedule.at(step).rate(step) for step in range(schedule.iterations)]


def test_warm_up_and_decay_in_sequences_during_a_ramp_by_hand() -> None:
    """Warm-up over 8 sequences, then 1 - (n - 8) / 40."""
    found = schedule_of(
        f"{RUN} {RAMP} --train-samples 52 --lr-warmup-samples 8 --lr-decay-samples 48"
    )
    assert [found.phases[0].samples_at(step) for step in range(6)] == BEFORE
    assert rates(found) == pytest.approx([0.0, 0.5, 1.0, 0.8, 0.5, 0.2])
    # Without a length in sequences, the rate counts steps: the run has six.
    assert rates(schedule_of(f"{RUN} {RAMP} --train-samples 52")) == pytest.approx(
        [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )


def test_the_decay_defaults_to_the_sequences_of_the_run() -> None:
    """60 sequences are six steps and 8 sequences more; the decay is over all 60."""
    found = schedule_of(f"{RUN} {RAMP} --train-samples 60 --lr-warmup-samples 10")
    assert found.iterations == 6
    assert rates(found) == pytest.approx(
        [0.0, 0.4, 0.8, 1 - 6 / 50, 1 - 18 / 50, 1 - 30 / 50],
    )


def test_a_fraction_is_of_the_decay_in_the_unit_of_the_run() -> None:
    """Of 48 sequences 1/6 are 8; of 8 steps, 1/4 are 2."""
    samples = f"{RUN} {RAMP} --train-samples 52 --lr-decay-samples 48 --lr-warmup-fraction"
    assert rates(schedule_of(f"{samples} {1 / 6!r}")) == pytest.approx([0, 0.5, 1, 0.8, 0.5, 0.2])
    steps = schedule_of(f"{RUN} --train-iters 8 --lr-warmup-fraction 0.25")
    assert rates(steps) == pytest.approx([0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    whole = schedule_of(f"{RUN} --train-samples 48 --lr-warmup-fraction 0.375")  # 18 of 48
    assert rates(whole) == pytest.approx([0, 12 / 18, 1 - 6 / 30, 1 - 18 / 30])


STYLES = {
    "linear": "",
    "cosine": "",
    "inverse-square-root": "",
    "constant": "",
    "WSD": "--lr-wsd-decay-samples 100 --lr-wsd-decay-style minus_sqrt",
}


@pytest.mark.parametrize("style", list(STYLES))
@pytest.mark.parametrize("ramp", ["", "--rampup-batch-size 4 4 100"])
def test_every_style_is_megatron_cores_scheduler_stepped_by_the_batches(
    style: str, ramp: str
) -> None:
    line = (
        f"--micro-batch-size 2 --global-batch-size 12 --lr 0.01 --min-lr 0.001 {ramp}"
        f" --lr-decay-style {style} {STYLES[style]} --train-samples 480 --lr-warmup-samples 57"
        " --lr-decay-samples 333 --lr-warmup-init 0.0001"
    )
    schedule, group = schedule_of(line), dict[str, float]()
    config, phase = schedule.config.optimizer, schedule.phases[0]
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=1e-4,
        max_lr=0.01,
        min_lr=0.001,
        lr_warmup_steps=57,
        lr_decay_steps=333,
        lr_decay_style=style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=480,
        wd_incr_style="constant",
        wsd_decay_steps=config.lr_wsd_decay_samples,
        lr_wsd_decay_style="minus_sqrt",
    )
    theirs, consumed = [], 0
    for _ in range(schedule.iterations):
        theirs.append(group["lr"])
        batch = phase.batch_size(consumed)
        scheduler.step(batch)
        consumed += batch
    assert rates(schedule) == pytest.approx(theirs, rel=1e-12, abs=0)
    assert len(set(theirs)) > 3


PHASES = """
[[stage]]
name = "first"
until-samples = 48
rampup-batch-size = [4, 4, 16]
[[stage]]
name = "own"
until-samples = 96
lr = 0.5
lr-warmup-samples = 24
[[stage]]
name = "last"
"""


def test_phases_count_the_runs_sequences_or_their_own(tmp_path: Path) -> None:
    table = tmp_path / "phases.toml"
    table.write_text(PHASES)
    found = schedule_of(
        f"{RUN} --phases {table} --train-samples 120 --lr-warmup-samples 8 --lr-decay-samples 108"
    )
    # The first phase has 5 steps, of 40 sequences: 52 would be more than 48. The second, of its
    # own, 4 steps of 12, 24 of which warm up and 24 decay. The third is in the run's decay.
    assert [phase.first_sample for phase in found.phases] == [0, 40, 88]
    assert rates(found) == pytest.approx(
        [0, 0.5, 1, 0.92, 0.8, 0, 0.25, 0.5, 0.25, 1 - 80 / 100, 1 - 92 / 100]
    )


WRONG = {
    "--train-iters 9 --lr-decay-samples 4": "--lr-decay-samples must be used with --train-samples",
    "--train-iters 9 --lr-warmup-samples 4": "--lr-warmup-samples must be used with",
    "--train-samples 99 --lr-warmup-samples 4 --lr-decay-iters 5": (
        "--lr-decay-iters must be unset with --lr-warmup-samples (got 5)"
    ),
    "--train-samples 99 --lr-warmup-samples 4 --lr-warmup-iters 1": (
        "--lr-warmup-iters must be 0 with --lr-warmup-samples (got 1)"
    ),
    "--train-samples 99 --lr-warmup-samples 4 --lr-warmup-fraction 0.1": (
        "--lr-warmup-samples must be 0 with --lr-warmup-fraction (got 4)"
    ),
    "--train-iters 9 --lr-warmup-iters 4 --lr-warmup-fraction 0.1": (
        "--lr-warmup-iters must be 0 with --lr-warmup-fraction (got 4)"
    ),
    "--train-iters 9 --lr-warmup-fraction 1.0": "--lr-warmup-fraction must be >= 0 and < 1",
    "--train-samples 99 --lr-warmup-samples 99": (
        "--lr-warmup-samples must be < 99, the sequences of the linear decay (got 99)"
    ),
    "--train-samples 99 --lr-wsd-decay-samples 9": (
        "--lr-wsd-decay-samples must be used with --lr-decay-style WSD"
    ),
}


@pytest.mark.parametrize("line", list(WRONG))
def test_units_that_contradict_each_other_are_errors(line: str) -> None:
    with pytest.raises(UsageError) as error:
        schedule_of(f"{RUN} {line}")
    assert WRONG[line] in str(error.value)

"""`--use-checkpoint-opt_param-scheduler`: a resumed run keeps the learning rates of the first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_moe.config.cli import parse_args
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from tests.training.tiny import MODEL, pretrain_rank

FLAG = "--use-checkpoint-opt_param-scheduler"
FIRST = "--lr 8e-3 --lr-warmup-iters 0 --lr-decay-style linear --weight-decay 0.25"
THEN = "--lr 1e-4 --lr-warmup-iters 3 --lr-decay-style cosine --min-lr 1e-5 --weight-decay 0"


def rates_of(pool, corpus: str, folder: Path, flags: str) -> dict[int, float]:
    """Learning rates of a run by step, counted from 1."""
    file = folder / "metrics.jsonl"
    argv = [*MODEL, "--data-path", corpus, "--save", str(folder), "--metrics-file", str(file)]
    ((code, log, error),) = pool.run(pretrain_rank, 1, argv=[*argv, *flags.split()])
    assert (code, error) == (0, ""), log
    steps = map(json.loads, file.read_text().splitlines())
    return {step["iteration"]: step["learning_rate"] for step in steps}


@pytest.mark.parametrize("length", ["--train-iters 8", "--train-samples 64 --lr-decay-samples 64"])
def test_the_rates_and_the_length_of_the_decay_are_the_saved_ones(
    pool, corpus, tmp_path: Path, length: str
) -> None:
    rates_of(pool, corpus, tmp_path, f"{length} {FIRST} --exit-interval 4")
    resumed = f"--load {tmp_path} --train-iters 10 {THEN} {FLAG}"
    rates_of(pool, corpus, tmp_path, f"{resumed} --exit-interval 6")
    found = rates_of(pool, corpus, tmp_path, resumed)  # what the second start saved, in turn
    # 8e-3 * (1 - n / 8) after n steps; the floor of the first run, 0, from its end on.
    expected = [8e-3, 7e-3, 6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3, 0.0, 0.0]
    assert list(found.values()) == pytest.approx(expected, abs=1e-12)


def test_without_the_flag_the_new_rates_take_effect(pool, corpus, tmp_path: Path) -> None:
    rates_of(pool, corpus, tmp_path, f"--train-iters 8 {FIRST} --exit-interval 4")
    found = rates_of(pool, corpus, tmp_path, f"--load {tmp_path} --train-iters 5 {THEN}")
    assert found[5] == pytest.approx(1e-5 + (1e-4 - 1e-5) * 0.5)  # half of the decay, 3 to 5


def test_a_warm_up_in_a_fraction_of_steps_is_not_taken_as_one_of_sequences(
    pool, corpus, tmp_path: Path
) -> None:
    first = "--train-iters 8 --lr 8e-3 --lr-warmup-fraction 0.25 --lr-warmup-iters 0 "
    rates_of(pool, corpus, tmp_path, first + "--exit-interval 4")
    then = f"--lr 1 {FLAG} --train-samples 80 --load {tmp_path}".split()
    ((code, _, error),) = pool.run(pretrain_rank, 1, argv=[*MODEL, "--data-path", corpus, *then])
    assert code == 2
    assert "--train-samples must be unset: the warm-up of the checkpoint" in error


WRONG = {
    FLAG: "--use-checkpoint-opt-param-scheduler must be used with --load",
    f"{FLAG} --load x --finetune": "must be used without --finetune",
}


@pytest.mark.parametrize("line", list(WRONG))
def test_it_needs_a_run_that_goes_on(line: str) -> None:
    with pytest.raises(UsageError) as error:
        validate(parse_args(["--train-iters", "1", *line.split()]).config)
    assert WRONG[line] in str(error.value)

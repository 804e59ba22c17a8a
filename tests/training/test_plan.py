"""The length of a run, and the settings that are rejected before it starts."""

from __future__ import annotations

import pytest

from megatron_moe.config.cli import parse_args
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.training.plan import resolve_plan


def _plan(line: str, global_batch_size: int = 8):
    config = parse_args(line.split()).config
    validate(config)
    return resolve_plan(config, global_batch_size)


def test_lengths():
    plan = _plan("--train-iters 30 --seq-length 16")
    assert (plan.iterations, plan.rate.decay, plan.batch_sizes.full) == (30, 30, 8)
    assert _plan("--train-samples 83").iterations == 10
    assert _plan("--train-iters 30 --lr-decay-iters 20").rate.decay == 20


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("", "--train-iters"),
        ("--train-iters 0", "--train-iters"),
        ("--train-iters 3 --train-samples 8", "--train-iters"),
        ("--train-samples 7", "--train-samples"),
        ("--train-iters 3 --log-interval 0", "--log-interval"),
        ("--train-iters 3 --eval-interval 0", "--eval-interval"),
        ("--train-iters 3 --eval-iters -1", "--eval-iters"),
        ("--train-iters 3 --exit-interval -1", "--exit-interval"),
        ("--train-iters 3 --save-interval 2", "--save-interval"),
        ("--train-iters 3 --lr -1", "--lr"),
        ("--train-iters 3 --lr nan", "--lr"),
        ("--train-iters 3 --min-lr 1 --lr 0.1", "--min-lr"),
        ("--train-iters 3 --lr-warmup-init 1 --lr 0.1", "--lr-warmup-init"),
        ("--train-iters 3 --lr-warmup-iters 3", "--lr-warmup-iters"),
        ("--train-iters 3 --adam-beta2 1", "--adam-beta2"),
        ("--train-iters 3 --clip-grad -1", "--clip-grad"),
        (
            "--train-iters 3 --optimizer sgd --use-distributed-optimizer",
            "--use-distributed-optimizer",
        ),
    ],
)
def test_invalid_settings_are_rejected_by_flag(line, flag):
    with pytest.raises(UsageError) as error:
        _plan(line)
    assert error.value.what == flag


def test_a_run_may_end_within_the_warm_up_of_the_published_recipe():
    assert _plan("--preset openmoe-8b-32e --train-iters 100").iterations == 100

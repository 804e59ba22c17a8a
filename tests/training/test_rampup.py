"""The batch-size ramp-up against Megatron-Core's and by hand, and runs that ramp and resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_moe.config import RunConfig, TrainConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.config.rampup import FLAG, BatchSizes
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.training.plan import resolve_plan
from tests.training.tiny import MODEL, pretrain_rank

RAMP = ["--rampup-batch-size", "4", "4", "16", "--global-batch-size", "12"]
"""Two increments, one every 8 samples."""
BATCHES = [4, 4, 8, 12, 12, 12, 12, 12]
_DP2 = (2, ["--micro-batch-size", "1"])
_PP2 = (2, ["--pipeline-model-parallel-size", "2"])


def _sizes(full: int, *ramp: int) -> BatchSizes:
    (start, increment, samples) = ramp
    return BatchSizes.of(TrainConfig(rampup_batch_size=(start, increment, samples)), full)


@pytest.mark.parametrize(
    "ramp", [(12, 4, 4, 16), (64, 16, 16, 1000), (64, 8, 8, 777), (1024, 128, 128, 10**6)]
)
def test_every_batch_is_megatron_cores(ramp):
    full, start, increment, samples = ramp
    calculator = RampupBatchsizeNumMicroBatchesCalculator(
        full, 1, 1, False, 1, start, increment, samples
    )
    ours, consumed, seen = _sizes(*ramp), 0, set()
    while consumed < samples + 3 * full:
        calculator.update(consumed, consistency_check=True)
        assert ours.at(consumed) == calculator.get_current_running_global_batch_size(), consumed
        seen.add(ours.at(consumed))
        consumed += ours.at(consumed)
    assert seen == set(range(start, full + 1, increment))


def test_steps_and_samples_by_hand():
    sizes = _sizes(12, 4, 4, 16)
    assert [sizes.at(n) for n in (0, 7, 8, 15, 16, 100)] == [4, 4, 8, 8, 12, 12]
    # Before the steps: 0, 4, 8, 16, 28, 40, ...
    assert [sizes.samples_of(n) for n in range(7)] == [0, 4, 8, 16, 28, 40, 52]
    samples = (0, 3, 4, 7, 8, 15, 16, 27, 28, 39, 40)
    assert [sizes.iterations_of(n) for n in samples] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    constant = BatchSizes.of(TrainConfig(), 8)
    assert (constant.at(0), constant.samples_of(3), constant.iterations_of(17)) == (8, 24, 2)


def _pretrain(pool, world: int, directory: Path, corpus: str, flags: list[str]) -> str:
    argv = [*MODEL, "--lr-decay-style", "constant", "--data-path", corpus, "--split", "90,10,0"]
    argv += ["--eval-iters", "1", "--eval-interval", "3", "--save", str(directory), *flags]
    argv += ["--metrics-file", str(directory / "metrics.jsonl")]
    results = pool.run(pretrain_rank, world, argv=argv)
    for code, _, error in results:
        assert code == 0, error
    return results[0][1]


def _steps(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_a_run_that_resumes_during_the_ramp_is_bitwise_one_that_never_stopped(
    workers, pool, corpus, tmp_path
):
    flags = [*RAMP, "--train-iters", "8", "--num-workers", workers]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    out = _pretrain(pool, 1, whole, corpus, flags)
    _pretrain(pool, 1, parts, corpus, [*flags, "--exit-interval", "2"])
    _pretrain(pool, 1, parts, corpus, [*flags, "--exit-interval", "3", "--load", str(parts)])
    _pretrain(pool, 1, parts, corpus, [*flags, "--load", str(parts)])
    steps = _steps(whole)
    assert [step["batch_size"] for step in steps] == BATCHES
    consumed = [sum(BATCHES[: n + 1]) for n in range(8)]
    assert [step["consumed_samples"] for step in steps] == consumed
    assert _steps(parts) == steps
    for file in sorted((whole / "iter_0000008").glob("*.safetensors")):
        assert (parts / "iter_0000008" / file.name).read_bytes() == file.read_bytes()
    assert "ramp-up: from 4 to 12 sequences in increments of 4 over the first 16 samples" in out
    assert " | batch 12 | " in out


@pytest.mark.parametrize(("world", "layout"), [_DP2, _PP2], ids=["DP2", "PP2"])
def test_every_layout_takes_the_same_steps(world, layout, pool, corpus, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    # 77 samples: eight steps, and 1 sample that is no step.
    flags = [*RAMP, "--train-samples", "77"]
    _pretrain(pool, 1, one, corpus, flags + layout[:2] if "batch" in layout[0] else flags)
    _pretrain(pool, world, other, corpus, flags + layout)
    assert [step["batch_size"] for step in _steps(other)] == BATCHES
    for mine, theirs in zip(_steps(one), _steps(other), strict=True):
        assert mine["targets"] == theirs["targets"]
        assert mine["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_the_ramp_reads_the_samples_of_a_run_without_one(pool, corpus, tmp_path):
    """As many samples in all, so the same order; steps of 4 read what the first ramp steps read."""
    ramp, small = tmp_path / "ramp", tmp_path / "small"
    _pretrain(pool, 1, ramp, corpus, [*RAMP, "--train-samples", "76"])
    _pretrain(pool, 1, small, corpus, ["--global-batch-size", "4", "--train-samples", "76"])
    first, second = _steps(ramp), _steps(small)
    for mine, theirs in list(zip(first, second, strict=False))[:2]:
        same = ("iteration", "consumed_samples", "lm_loss_hex", "grad_norm_hex", "learning_rate")
        assert [mine[key] for key in same] == [theirs[key] for key in same]
    # The third step has the samples of two of theirs.
    assert first[2]["targets"] == second[2]["targets"] + second[3]["targets"]
    assert first[2]["lm_loss"] != pytest.approx(second[2]["lm_loss"], rel=1e-6)


def _resolve(config: RunConfig, world: int) -> None:
    validate(config)
    resolve_layout(config, world, 128)


@pytest.mark.parametrize(
    ("line", "world"),
    [
        ("4 4 0", 1),
        ("0 4 16", 1),
        ("4 3 16", 1),
        ("12 4 16", 1),
        ("16 4 16", 1),
        ("2 2 16 --micro-batch-size 4", 1),
        ("2 2 16", 2),
        (
            "4 4 16 --pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2"
            " --num-layers 8 --moe-layer-freq [0,1]*4 --global-batch-size 16",
            4,
        ),
    ],
)
def test_invalid_values_are_rejected_by_flag(line, world):
    flags = ["--global-batch-size", "12", "--train-iters", "3", FLAG, *line.split()]
    config = parse_args([*MODEL, *flags]).config
    with pytest.raises(UsageError) as error:
        _resolve(config, world)
    assert error.value.what == FLAG


def test_a_run_shorter_than_its_first_batch_is_rejected():
    config = parse_args([*MODEL, *RAMP, "--train-samples", "3"]).config
    with pytest.raises(UsageError) as error:
        resolve_plan(config, 12)
    assert error.value.what == "--train-samples"

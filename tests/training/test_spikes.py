"""`--loss-spike-policy`: cases by hand, the same on all ranks, and a resumed run decides alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint.contents import finish_parameter_gather
from megatron_moe.config import TrainConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.training.spikes import LossSpikeError, SpikeWatch
from megatron_moe.training.step import train_step
from megatron_moe.training.trainer import Trainer
from tests.training.ranks import fingerprint, rank_batches, tiny_run
from tests.training.tiny import MODEL, pretrain_rank

EP2 = ["--expert-model-parallel-size", "2", "--use-distributed-optimizer"]
JUDGED = ["--loss-spike-window", "10", "--loss-spike-sigma", "0.01"]
"""Low enough for ordinary steps to be spikes; the first judged one is 6, after the save of 4."""


def watch_of(policy: Any = "skip", **settings: Any) -> SpikeWatch:
    values = {"loss_spike_window": 4, "loss_spike_sigma": 3.0, **settings}
    return SpikeWatch(TrainConfig(loss_spike_policy=policy, **values))


def filled(watch: SpikeWatch) -> SpikeWatch:
    """Losses 4, 5, 4, 5: mean 4.5, deviation 0.5, so the limit is 6. Norms 1, 3, 1, 3: 5."""
    for number, (loss, norm) in enumerate([(4.0, 1.0), (5.0, 3.0)] * 2, 1):
        assert watch.judge(number, loss, norm)
    return watch


@pytest.mark.parametrize(
    ("loss", "norm", "spike"),
    [(5.99, 4.99, False), (6.01, 1.0, True), (4.0, 5.01, True), (0.0, 0.0, False)],
)
def test_limits_are_mean_and_deviations_of_the_window(loss, norm, spike):
    assert filled(watch_of()).judge(5, loss, norm) is not spike


def test_a_spike_does_not_move_the_window_and_a_step_does():
    watch = filled(watch_of())
    assert not watch.judge(5, 100.0, 1.0)
    assert not watch.judge(6, 6.01, 1.0)
    assert watch.judge(7, 5.9, 1.0)
    assert watch.losses == [5.0, 4.0, 5.0, 5.9]
    assert watch.at(7) is None
    assert [spike.iteration for spike in watch.spikes] == [5, 6]


def test_nothing_is_judged_before_half_a_window():
    watch = watch_of()
    assert watch.judge(1, 4.0, 1.0)
    assert watch.judge(2, 400.0, 100.0)
    assert not watch.judge(3, 4000.0, 1.0)


def test_policies():
    assert filled(watch_of("continue")).judge(5, 100.0, 1.0)
    assert not filled(watch_of("rollback")).judge(5, 100.0, 1.0)
    with pytest.raises(LossSpikeError, match=r"iteration 5: lm loss 100 \(limit 6\), grad norm 1 "):
        filled(watch_of("stop")).judge(5, 100.0, 1.0)
    limited = filled(watch_of(loss_spike_limit=2))
    assert not limited.judge(5, 100.0, 1.0)
    assert not limited.judge(6, 100.0, 1.0)
    with pytest.raises(LossSpikeError, match="more than --loss-spike-limit 2"):
        limited.judge(7, 100.0, 1.0)


def test_state_survives_json():
    watch = watch_of()
    filled(watch).judge(5, 100.1, 1.0)
    again = SpikeWatch(watch._train, json.loads(json.dumps(watch.to_json())))
    assert again.to_json() == watch.to_json()
    with pytest.raises(UsageError, match="'loss_spikes' of the checkpoint must be an object"):
        SpikeWatch(watch._train, {"losses": [1.0]})


def _skipped(rank: int, world_size: int, *, flags: list[str]) -> dict[str, Any]:
    run = tiny_run(world_size, flags)
    train_step(run, rank_batches(run), 1e-3, 1)
    finish_parameter_gather(run.wrapped)
    before = fingerprint(run)
    first = train_step(run, rank_batches(run), 1e-3, 2, lambda *_: False)
    finish_parameter_gather(run.wrapped)
    unchanged = fingerprint(run) == before
    second = train_step(run, rank_batches(run), 1e-3, 3)
    return {
        "unchanged": unchanged,
        "same": first.grad_norm == second.grad_norm,
        "updated": fingerprint(run) != before,
    }


@pytest.mark.parametrize("flags", [EP2, [*EP2, "--overlap-grad-reduce", "--overlap-param-gather"]])
def test_a_skipped_step_changes_no_bit_of_weights_and_moments(pool, flags):
    for values in pool.run(_skipped, 2, flags=flags):
        assert values == {"unchanged": True, "same": True, "updated": True}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def argv_of(corpus: str, folder: Path, *flags: str) -> list[str]:
    argv = [*MODEL, "--data-path", corpus, "--train-iters", "14", "--hidden-dropout", "0.1", *EP2]
    argv += ["--save", str(folder), "--save-interval", "4", "--exit-interval", "100"]
    return [*argv, "--metrics-file", str(folder / "metrics.jsonl"), *JUDGED, *flags]


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param("continue", marks=pytest.mark.slow),
        pytest.param("skip", marks=pytest.mark.slow),
        "rollback",
    ],
)
def test_a_resumed_run_decides_as_one_that_was_not_stopped(pool, corpus, tmp_path, policy):
    """Stopped after step 8 by a killed start: the next one takes 9 and later steps again."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = ["--loss-spike-policy", policy]
    for folder, more in ((whole, []), (resumed, ["--exit-interval", "8"])):
        results = pool.run(pretrain_rank, 2, argv=argv_of(corpus, folder, *flags, *more))
        assert [code for code, *_ in results] == [0, 0], results
        warned = [line for line in results[0][1].splitlines() if "WARNING: loss spike" in line]
    again = argv_of(corpus, resumed, *flags, "--load", str(resumed))
    assert [code for code, *_ in pool.run(pretrain_rank, 2, argv=again)] == [0, 0]
    steps = lines_of(whole / "metrics.jsonl")
    assert lines_of(resumed / "metrics.jsonl") == steps
    spikes = [step["iteration"] for step in steps if "loss_spike" in step]
    assert {step.get("loss_spike", policy) for step in steps} == {policy}
    assert any(n <= 8 for n in spikes), spikes
    assert any(n > 8 for n in spikes), spikes
    assert len(warned) == sum(n <= 8 for n in spikes)
    for rank in range(2):
        name = f"iter_0000014/rank-{rank:05d}.safetensors"
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    saved = json.loads((whole / "iter_0000014/state.json").read_text())["train"]["extra"]
    found = saved["loss_spikes"]["spikes"]
    assert [spike["iteration"] for spike in found] == spikes
    restored = [4 * ((n - 1) // 4) for n in spikes] if policy == "rollback" else [None] * len(found)
    assert [spike["restored"] for spike in found] == restored


def _rolled_back(rank: int, world_size: int, *, argv: list[str]) -> list[Any]:
    """Fingerprints of weights and moments after each step, by step, and the exit code."""
    whole, found = Trainer.train_step, {}

    def step(trainer: Any) -> None:
        whole(trainer)
        found[trainer.state.iteration] = hash(tuple(fingerprint(trainer.run)))

    Trainer.train_step = step
    try:
        return [found, pretrain_rank(rank, world_size, argv=argv)]
    finally:
        Trainer.train_step = whole


def test_rollback_restores_the_newest_checkpoint_to_the_bit(pool, corpus, tmp_path):
    argv = argv_of(corpus, tmp_path, "--loss-spike-policy", "rollback")
    for found, (code, *_) in pool.run(_rolled_back, 2, argv=argv):
        assert code == 0
        spikes = [s["iteration"] for s in lines_of(tmp_path / "metrics.jsonl") if "loss_spike" in s]
        for n in spikes:
            assert found[n] == found[4 * ((n - 1) // 4)], n
        assert len(set(found.values())) > 5


def test_stop_ends_the_run_with_code_1_and_saves_nothing(pool, corpus, tmp_path):
    argv = argv_of(corpus, tmp_path, "--loss-spike-policy", "stop", "--save-interval", "100")
    results = pool.run(pretrain_rank, 2, argv=argv)
    assert [code for code, *_ in results] == [1, 1]
    last = results[0][1].splitlines()[-1]
    assert last.startswith(" error: loss spike at iteration ")
    assert last.endswith("; --loss-spike-policy stop")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rules():
    def check(line: str) -> None:
        validate(parse_args([*MODEL, "--train-iters", "9", *line.split()]).config)

    check("--loss-spike-policy skip --loss-spike-sigma 3")
    with pytest.raises(UsageError, match=r"--loss-spike-sigma must be used with --loss-spike-pol"):
        check("--loss-spike-sigma 3")
    with pytest.raises(UsageError, match=r"--loss-spike-policy must be used with --save and --sa"):
        check("--loss-spike-policy rollback --save x")
    with pytest.raises(UsageError, match=r"--loss-spike-policy must be used without --no-save-op"):
        check("--loss-spike-policy rollback --save x --save-interval 2 --no-save-optim")

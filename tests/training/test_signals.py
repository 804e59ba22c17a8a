"""SIGTERM with `--exit-signal-handler`: all ranks save the same step, once, and can resume."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint import latest_step, verify
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.training.trainer import ExitSignal, Trainer
from tests.faults.killing import fork
from tests.training.tiny import MODEL, pretrain_rank

EP2 = ["--expert-model-parallel-size", "2", "--use-distributed-optimizer"]


def _argv(corpus: str, directory: Path, *flags: str) -> list[str]:
    argv = [*MODEL, *EP2, "--hidden-dropout", "0.1", "--data-path", corpus, "--train-iters", "12"]
    argv += ["--metrics-file", str(directory / "metrics.jsonl"), "--save", str(directory)]
    return [*argv, "--exit-signal-handler", *flags]


def _signalled(rank: int, world_size: int, *, argv: list[str], step: int, where: str) -> Any:
    """A run in which rank 1 gets SIGTERM at some place of a step."""
    whole, sent = getattr(Trainer, where), []

    def counted(trainer: Trainer, *rest: Any) -> None:
        whole(trainer, *rest)
        if rank == 1 and trainer.state.iteration == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    setattr(Trainer, where, counted)
    try:
        return pretrain_rank(rank, world_size, argv=argv), signal.getsignal(signal.SIGTERM)
    finally:
        setattr(Trainer, where, whole)


@pytest.mark.parametrize("where", ["train_step", "evaluate", "save"])
@pytest.mark.parametrize("extra", [[], ["--async-save"]])
def test_all_ranks_save_the_same_step_and_resume_from_it(pool, corpus, tmp_path, where, extra):
    often = ["--save-interval", "2", "--eval-interval", "2", "--eval-iters", "1"]
    often += ["--split", "80,20,0", *extra]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pool.run(pretrain_rank, 2, argv=_argv(corpus, whole, *often))
    argv = _argv(corpus, parts, *often)
    results = pool.run(_signalled, 2, argv=argv, step=6, where=where)
    assert [code for (code, *_), _ in results] == [0, 0]
    assert [handler for _, handler in results] == [signal.SIG_DFL] * 2
    log = results[0][0][1].splitlines()
    assert " exiting at iteration 6: SIGTERM" in log
    assert sum(text.startswith(" saved iteration 6 to") for text in log) == 1
    assert sorted(p.name for p in parts.glob("iter_*")) == [f"iter_000000{n}" for n in (2, 4, 6)]
    assert latest_step(parts) == 6
    verify(parts)
    results = pool.run(pretrain_rank, 2, argv=[*argv, "--load", str(parts)])
    assert [code for code, *_ in results] == [0, 0], results[0][2]
    assert (parts / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_a_second_signal_ends_the_process_at_once():
    def body() -> None:
        noted = ExitSignal(RankGroup())
        assert not noted.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(9)

    assert fork(body) == -signal.SIGTERM


def test_processes_of_a_rank_still_end_by_it():
    noted = ExitSignal(RankGroup())

    def body() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(9)

    try:
        assert fork(body) == -signal.SIGTERM
        assert not noted.agreed()
    finally:
        noted.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

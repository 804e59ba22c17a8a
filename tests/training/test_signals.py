"""SIGTERM with `--exit-signal-handler`: all ranks save the same step, once, and can resume."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint import latest_step, verify
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.platform.signals import SignalThread
from megatron_moe.training import exit_request as module
from megatron_moe.training.exit_request import ExitRequest
from megatron_moe.training.trainer import Trainer
from tests.faults.killing import fork, start_fork
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
@pytest.mark.parametrize("extra", [pytest.param([], marks=pytest.mark.slow), ["--async-save"]])
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


REPEAT = 0.5
"""Seconds, for tests of `REPEAT_SECONDS`."""


def _request(**options: Any) -> ExitRequest:
    module.REPEAT_SECONDS = REPEAT  # in a child
    return ExitRequest(RankGroup(), **options)


def test_signals_close_together_are_one_request():
    def body() -> None:
        request = _request()
        assert request.agreed() == ""
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.agreed() == "SIGTERM"
        time.sleep(2 * REPEAT)
        request.close()
        os._exit(9)

    assert fork(body) == 9


def test_a_later_signal_ends_a_process_at_once_even_if_its_main_thread_hangs():
    def body() -> None:
        _request(number=signal.SIGINT)
        main = os.getpid()
        if os.fork() == 0:
            for _ in range(2):
                time.sleep(2 * REPEAT)
                os.kill(main, signal.SIGINT)
            os._exit(0)
        # As in a collective for ranks that are gone: no handler written in Python runs.
        mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        for _ in range(2):
            libc.pthread_mutex_lock(mutex)

    assert fork(body) == 128 + signal.SIGINT


def test_no_signal_interrupts_a_save():
    def body() -> None:
        request = _request(saving=lambda: True)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2 * REPEAT)
        assert request.agreed() == "SIGTERM"
        os._exit(9)

    assert fork(body) == 9


def test_processes_of_a_rank_still_end_by_it():
    outer = SignalThread(signal.SIGTERM, lambda: None)  # as the failure monitor's
    request = ExitRequest(RankGroup())

    def body() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(9)

    try:
        assert fork(body) == -signal.SIGTERM
        assert not request.agreed()
    finally:
        request.close()
        outer.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_close_does_not_wait_for_processes_that_were_forked_later():
    def body() -> None:
        request = _request()
        child = start_fork(lambda: time.sleep(60))
        request.close()
        os.kill(child, signal.SIGKILL)
        os._exit(9)

    assert fork(body) == 9


def test_a_run_exits_when_its_time_is_over(pool, corpus, tmp_path):
    argv = _argv(corpus, tmp_path, "--exit-duration-in-mins", "0.0001")
    argv.remove("--exit-signal-handler")
    results = pool.run(pretrain_rank, 2, argv=argv)
    assert [code for code, *_ in results] == [0, 0]
    assert " exiting at iteration 1: --exit-duration-in-mins 0.0001" in results[0][1].splitlines()
    assert latest_step(tmp_path) == 1

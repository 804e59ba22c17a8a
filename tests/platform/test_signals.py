"""Data-loader workers of a rank and the signals that ask the run to exit."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import psutil
import pytest
from torch.utils.data import Dataset

from megatron_moe.data.loader import BatchShard, MicroBatchSampler, build_loader
from megatron_moe.platform.signals import EXIT_SIGNALS, SignalThread, exit_signals_blocked


class Rows(Dataset[Any]):
    """Row i holds the number i."""

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"tokens": [index], "labels": [index], "loss_mask": [1]}


def loader(workers: int, timeout: float = 0) -> Any:
    shard = BatchShard(micro_batch_size=1, num_microbatches=1, dp_rank=0, dp_size=1)
    sampler = MicroBatchSampler(shard, 0, 40)
    return build_loader(Rows(), sampler, workers, persistent=False, timeout=timeout)


def workers_of_this_process(before: set[int]) -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.pid not in before]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_go_on_when_every_process_of_a_rank_is_signalled(workers):
    before = {child.pid for child in psutil.Process().children()}
    rows = iter(loader(workers))
    found = [int(next(rows)[0, 0, 0])]
    children = workers_of_this_process(before)
    assert len(children) == workers
    for number in EXIT_SIGNALS:
        for child in children:
            child.send_signal(number)
        found.append(int(next(rows)[0, 0, 0]))
    found += [int(row[0, 0, 0]) for row in rows]
    assert found == list(range(40))
    psutil.wait_procs(children, timeout=60)
    assert not any(child.is_running() for child in children)


def test_a_worker_that_is_signalled_while_it_starts_goes_on():
    starting = []

    def signalled() -> None:
        if starting:
            os.kill(os.getpid(), signal.SIGTERM)

    os.register_at_fork(after_in_child=signalled)
    starting.append(True)
    rows = iter(loader(2))
    starting.clear()
    assert [int(row[0, 0, 0]) for row in rows] == list(range(40))


def test_a_blocked_signal_reaches_this_process_afterwards():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with exit_signals_blocked():
            # To this thread: another one of the process would not hold it back.
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            assert seen == []
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_threads_of_several_signals_pass_them_on():
    """The one that is constructed last receives all signals of the process."""
    seen: list[str] = []
    arrived = {number: threading.Event() for number in (signal.SIGTERM, signal.SIGUSR1)}
    first = SignalThread(signal.SIGTERM, arrived[signal.SIGTERM].set, lambda: seen.append("TERM"))
    second = SignalThread(signal.SIGUSR1, arrived[signal.SIGUSR1].set, lambda: seen.append("USR1"))
    try:
        for number, event in arrived.items():
            os.kill(os.getpid(), number)
            assert event.wait(60)
    finally:
        second.close()
        first.close()
    assert seen == ["TERM", "USR1"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

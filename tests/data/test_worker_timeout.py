"""A worker process that does not run: an error after `--data-loader-timeout`, with its process."""

from __future__ import annotations

import psutil
import pytest

from megatron_moe.data.loader import WorkerTimeoutError
from tests.platform.test_signals import loader, workers_of_this_process


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_worker_is_an_error_that_names_its_process(workers):
    before = {child.pid for child in psutil.Process().children()}
    rows = iter(loader(workers, timeout=2))
    assert int(next(rows)[0, 0, 0]) == 0
    worker = workers_of_this_process(before)[0]
    worker.suspend()
    with pytest.raises(WorkerTimeoutError) as caught:
        list(rows)
    assert str(caught.value) == (
        "data-loader workers have not returned a micro-batch for 2 seconds (--data-loader-timeout);"
        f" process {worker.pid} is stopped"
    )
    worker.resume()


@pytest.mark.slow
def test_the_timeout_changes_no_sample():
    assert [int(row[0, 0, 0]) for row in loader(2, timeout=60)] == list(range(40))
    assert [int(row[0, 0, 0]) for row in loader(0, timeout=60)] == list(range(40))

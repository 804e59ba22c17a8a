"""Who failed, from answers written here; and what a thread waits for, from its own stack."""

from __future__ import annotations

import json
import sys
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe.parallel.failure_report import (
    COLLECTIVE,
    EXCEPTION,
    HANG,
    TERMINATED,
    WAKED,
    Answer,
    report_of,
)
from megatron_moe.parallel.waiting import (
    Wait,
    frames_of,
    frames_of_error,
    pending_collectives,
    ranks_text,
    wait_in,
)
from megatron_moe.processes import ENDED, STOPPED

TP = Wait(operation="all_reduce", group="tensor model parallel", ranks=(0, 1))


def answer(rank: int, reason: str = WAKED, wait: Wait | None = TP, **values: Any) -> Answer:
    values = {"host": "a", "pid": 1, "doing": "step 3", "seconds": 1.0} | values
    return Answer(rank=rank, reason=reason, wait=wait, **values)


def cause(*answers: Answer, world_size: int = 3) -> tuple[str, tuple[int, ...]]:
    report = report_of(answers, world_size)
    return report.cause, report.culprits


def test_the_cause_comes_before_its_consequences() -> None:
    raised = answer(1, EXCEPTION, None, error="Traceback\nValueError: x\n")
    broken = answer(0, COLLECTIVE, error="Connection closed by peer")
    assert cause(broken, raised, answer(2)) == ("exception", (1,))
    assert cause(broken, raised) == ("exception", (1,))
    assert cause(broken, answer(1, TERMINATED, None, lost={2: ENDED})) == (ENDED, (2,))
    assert cause(broken, answer(1, lost={2: STOPPED})) == (STOPPED, (2,))
    assert cause(answer(0, HANG, lost={2: STOPPED}), world_size=4) == (STOPPED, (2,))
    assert cause(broken, answer(1)) == ("did not answer", (2,))
    assert cause(answer(0, HANG), answer(1), answer(2, wait=None))[1] == (2,)
    assert cause(answer(0, HANG), answer(1), answer(2)) == ("", ())


def test_a_rank_that_answers_is_not_lost() -> None:
    """It was stopped when another rank looked, and goes on."""
    late = answer(2, wait=None)
    assert cause(answer(0, HANG, lost={2: STOPPED}), answer(1), late)[0] == "waits in no collective"


def test_equal_texts_of_a_thousand_ranks_are_printed_once() -> None:
    stacks = {"MainThread": ["a.py:1 step: wait()"]}
    answers = [answer(rank, HANG, stacks=stacks) for rank in range(1024) if rank != 7]
    lines = report_of(answers, 1024).lines()
    assert lines == [
        "run failed: rank 7 did not answer",
        "  ranks 0-6, 8-1023: step 3",
        "  ranks 0-6, 8-1023: waits in all_reduce of the tensor model parallel group (ranks 0-1)",
        "ranks 0-6, 8-1023:",
        "  thread MainThread:",
        "    a.py:1 step: wait()",
    ]
    assert [ranks_text([3]), ranks_text([1, 2, 5])] == ["rank 3", "ranks 1-2, 5"]


def test_the_original_traceback_is_last_and_others_are_not_printed() -> None:
    raised = answer(1, EXCEPTION, None, error="Traceback\nValueError: x\n")
    report = report_of([answer(0, COLLECTIVE, error="Connection closed"), raised], 2)
    assert report.lines()[0] == "run failed: rank 1 raised ValueError: x"
    assert report.lines()[-3:] == ["rank 1:", "Traceback", "ValueError: x"]
    assert "Connection closed" not in "\n".join(report.lines())
    assert json.loads(json.dumps(report.to_json()))["answers"][0]["error"] == "Connection closed"


def test_answers_survive_their_encoding() -> None:
    sent = answer(3, lost={2: ENDED}, stacks={"a": ["b\nc"]}, error="é\n")
    assert "\n" not in sent.to_json()
    assert Answer.from_json(sent.to_json()) == sent


def wait_of_a_thread(group: dist.ProcessGroup | None) -> tuple[Wait | None, list[Any], str]:
    """What a rank waits for that nobody joins; the flight recorder's word; the error at its end."""
    failed: list[BaseException] = []

    def collective() -> None:
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=collective)
    thread.start()
    found, pending = None, []
    while not (found and pending) and thread.is_alive():
        found = wait_in(frames_of(sys._current_frames().get(thread.ident or 0)))
        pending = pending_collectives()
    thread.join()
    assert wait_in(frames_of_error(failed[0])) == found
    return found, pending, str(failed[0])


def lonely_rank(rank: int, world_size: int) -> Any:
    """Rank 0 waits for rank 1, which never comes."""
    limit = timedelta(seconds=2)
    group = dist.new_group([0, 1], timeout=limit, group_desc="DATA_PARALLEL_GROUP")
    found = wait_of_a_thread(group) if rank == 0 else None
    dist.barrier()
    dist.destroy_process_group(group)
    return found


def test_the_collective_and_the_group_of_a_thread_that_waits(pool) -> None:
    (found, pending, error), _ = pool.run(lonely_rank, 2)
    assert found == Wait(operation="all_reduce", group="data parallel", ranks=(0, 1))
    assert pending[-1]["operation"].endswith("all_reduce")
    assert pending[-1]["group"] == "DATA_PARALLEL_GROUP"
    assert "/gloo/" in error


def test_a_thread_that_computes_waits_for_nothing() -> None:
    assert wait_in(frames_of(sys._getframe())) is None

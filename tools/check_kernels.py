"""Compile every Triton kernel for GPUs that are not there, and check what the code uses.

For each kernel as it is started at the size of OpenMoE-8B and for compute capabilities 8.0, 9.0 and
10.0: no stack and no local memory, at most as many registers as stated, shared memory within the
device's limit, 128 bits at once where rows are copied. The table of `docs/kernels.md` is compared
with the result, or written.

    python tools/check_kernels.py
    python tools/check_kernels.py --write

It runs nothing: bytes over bandwidth are a lower bound of a kernel's time, not its time.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe.command_line import Parser
from megatron_moe.errors import USAGE_EXIT_CODE, UsageError

if TYPE_CHECKING:
    from fused_kernels.triton.ahead_of_time import Resources
    from fused_kernels.triton.sizes import Case

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- table of tools/check_kernels.py -->", "<!-- end of table -->"
CAPABILITIES = (80, 90, 100)
"""Of the table's columns: A100; H100 and H200; B200. An operation in FP8 has none of the first."""
BANDWIDTHS = (3.35, 4.8, 8.0)
"""TB/s of H100 SXM, H200 and B200, from their data sheets."""
MOST_REGISTERS = 128
"""Of a thread. Of 65,536 on an SM this leaves 16 warps."""
MOST_SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory of a program, by capability. Source: CUDA Programming Guide."""
SECONDS = 120
"""For one kernel and capability; most take two."""
STARTING = 60
"""Seconds more for the first job of a process, which imports torch and Triton."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One kernel to compile.

    Args:
        case: index of the operation in `cases.CASES`.
        launch: index of the kernel in it.
        kernel: its name.
        capability: e.g. 90.
    """

    case: int
    launch: int
    kernel: str
    capability: int


Outcomes = dict[Job, "Resources | str"]
"""What the code of each uses, or why there is none."""


def jobs() -> list[Job]:
    """Every kernel of every operation for every capability."""
    from fused_kernels.triton.cases import CASES

    return [
        Job(case=c, launch=number, kernel=launch.name, capability=capability)
        for c, case in enumerate(CASES)
        for number, launch in enumerate(_launches(case))
        for capability in case.capabilities
    ]


def _launches(case: Case) -> list[Any]:
    """What an operation starts at the size of OpenMoE-8B."""
    import torch

    from fused_kernels.triton.launch import recorded
    from fused_kernels.triton.sizes import OPENMOE_8B

    run = case.run(OPENMOE_8B, torch.device("meta"))
    with recorded() as launches:
        run()
    return launches


def _work(connection: Any) -> None:
    """A process that compiles one job after the other, until it is ended."""
    from fused_kernels.triton.ahead_of_time import compiled
    from fused_kernels.triton.cases import CASES

    while True:
        job = connection.recv()
        try:
            found: Resources | str = compiled(
                _launches(CASES[job.case])[job.launch], job.capability
            )
        except Exception as error:
            found = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[-1]}"
        connection.send(found)


@dataclass(frozen=True)
class _Busy:
    """A job, the process that compiles it, and until when it may."""

    job: Job
    process: BaseProcess
    deadline: float


def compile_all(work: Sequence[Job], processes: int, seconds: float = SECONDS) -> Outcomes:
    """Compile in ``processes`` processes; one that takes longer than ``seconds`` is ended."""
    pending, outcomes = list(reversed(work)), Outcomes()
    busy: dict[Any, _Busy] = {}
    for _ in range(min(processes, len(pending))):
        _begin(busy, pending.pop(), seconds)
    while busy:
        soonest = min(one.deadline for one in busy.values())
        ready = wait(list(busy), timeout=max(0.0, soonest - time.monotonic()))
        for connection, one in list(busy.items()):
            late = time.monotonic() >= one.deadline
            if connection not in ready and not late:
                continue
            del busy[connection]
            outcomes[one.job] = _answer(connection, one, connection in ready, seconds)
            if not pending:
                one.process.kill()
            elif one.process.is_alive():
                connection.send(pending[-1])
                busy[connection] = _Busy(pending.pop(), one.process, time.monotonic() + seconds)
            else:
                _begin(busy, pending.pop(), seconds)
    return outcomes


def _begin(busy: dict[Any, _Busy], job: Job, seconds: float) -> None:
    """Start a process with its first job; importing Triton takes a few seconds more."""
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=_work, args=(other,), daemon=True)
    process.start()
    other.close()
    mine.send(job)
    busy[mine] = _Busy(job, process, time.monotonic() + seconds + STARTING)


def _answer(connection: Any, one: _Busy, ready: bool, seconds: float) -> Resources | str:
    """What the process found; one that is late or has failed is no more afterwards."""
    try:
        if ready:
            found: Resources | str = connection.recv()
            return found
        return f"did not end within {seconds:g} s"
    except EOFError:
        return "the compiler's process ended"
    finally:
        if not ready or not one.process.is_alive():
            one.process.kill()
            one.process.join()


def problems(outcomes: Outcomes) -> list[str]:
    """What is not as it must be, a line each."""
    from fused_kernels.triton.cases import CASES

    found = []
    for job, used in outcomes.items():
        case = CASES[job.case]
        where = f"{case.name}, {job.kernel} for sm_{job.capability}"
        wrong = [used] if isinstance(used, str) else _wrong(used, case)
        found += [f"{where}: {line}" for line in wrong]
    return found


def _wrong(used: Resources, case: Case) -> list[str]:
    """What a kernel's code uses and must not, or does not and must."""
    bounds = [
        ("bytes of stack", used.stack, 0),
        ("bytes of local memory", used.local, 0),
        ("loads and stores of local memory", used.spills, 0),
        ("registers", used.registers, MOST_REGISTERS),
        ("bytes of shared memory", used.shared, MOST_SHARED[used.capability]),
    ]
    wrong = [f"{value} {what}, at most {most}" for what, value, most in bounds if value > most]
    if case.copies_rows:
        narrow = [("loads", used.wide_loads), ("stores", used.wide_stores)]
        wrong += [f"no {what} of 128 bits" for what, count in narrow if not count]
    if case.writes_fp8 and not used.to_fp8:
        wrong.append("no conversions to FP8")
    return wrong


def table(outcomes: Outcomes) -> str:
    """The rows of `docs/kernels.md`: a kernel each, with the bytes of its operation."""
    from fused_kernels.triton.cases import CASES
    from fused_kernels.triton.sizes import OPENMOE_8B

    bounds = ", ".join(f"{bandwidth:g}" for bandwidth in BANDWIDTHS)
    lines = [
        "| operation | kernel | MB moved | over least | "
        f"bound, us at {bounds} TB/s | registers | shared, bytes | occupancy, at most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kernels = dict.fromkeys((job.case, job.launch, job.kernel) for job in outcomes)
    for c, number, kernel in kernels:
        used = [
            outcomes.get(Job(case=c, launch=number, kernel=kernel, capability=capability), "-")
            for capability in CAPABILITIES
        ]
        cells = ["", "", "", ""]
        if number == 0:
            case, size = CASES[c], OPENMOE_8B
            moved, least = case.moved(size), case.least(size)
            times = " / ".join(f"{least / bandwidth / 1e6:.3g}" for bandwidth in BANDWIDTHS)
            cells = [f"`{case.name}`", f"{moved / 1e6:.3g}", f"{moved / least:.2f}", times]
        resources = [
            " / ".join("-" if isinstance(one, str) else text(one) for one in used)
            for text in (
                lambda one: str(one.registers),
                lambda one: str(one.shared),
                lambda one: f"{one.occupancy:.0%}",
            )
        ]
        lines.append(f"| {cells[0]} | `{kernel}` | {' | '.join([*cells[1:], *resources])} |")
    return "\n".join(lines)


def check_page(rows: str, write: bool) -> bool:
    """Whether the page has this table; with ``write`` it has afterwards."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    made = f"{before}{BEGIN}\n{rows}\n{END}{rest.split(END)[1]}"
    if write:
        PAGE.write_text(made, encoding="utf-8")
    return made == PAGE.read_text(encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Compile and check; 1 if a kernel is not as it must be, or the page is out of date."""
    parser = Parser("check_kernels.py", __doc__)
    parser.add_argument("--write", action="store_true", help="write the table of docs/kernels.md")
    parser.add_argument("--processes", type=int, default=2, help="that compile at once")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        print(UsageError("triton", "not installed", "installed", "make setup"), file=sys.stderr)
        return USAGE_EXIT_CODE
    # Its own process would otherwise get an interpreter's functions, and so would its workers.
    os.environ.pop("TRITON_INTERPRET", None)
    outcomes = compile_all(jobs(), options.processes)
    outcomes = {job: outcomes[job] for job in jobs()}
    found = problems(outcomes)
    if not check_page(table(outcomes), options.write):
        found.append("docs/kernels.md is out of date; write it with --write")
    for line in found:
        print(f"check-kernels: {line}", file=sys.stderr)
    print(f"check-kernels: {len(outcomes)} kernels compiled, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

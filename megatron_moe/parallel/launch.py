"""Starting and ending a program on many ranks.

torchrun, or Slurm's srun (`slurm.py`), starts the ranks and passes to each its rank and their
number, in environment variables. Before the first process group they communicate over the
launcher's key-value store:

- `startup_barrier` waits until all ranks are ready to create process groups;
- a usage error that any rank finds before that is printed once, however many ranks find it, and all
  ranks exit with code 2 (`run_or_exit`);
- `Rendezvous` gathers and broadcasts what must be known before the groups, such as the checkpoint
  to resume from: it decides what is built.

Why not let each rank print its error and exit? A launcher that sees one rank exit terminates the
others, so that a rank which is a second behind would end with a signal instead of the error.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_moe.console import escape_unprintable
from megatron_moe.errors import USAGE_EXIT_CODE, UsageError
from megatron_moe.parallel.slurm import torchrun_variables
from megatron_moe.processes import end_with_launcher
from megatron_moe.text import printable

if TYPE_CHECKING:
    import torch.distributed as dist

STARTUP_TIMEOUT = timedelta(seconds=120)
"""How long a rank with a usage error waits for the others to get as far."""
PREEMPTED_EXIT_STATUS = 75
"""Of a run that saved and ended before its last step: `EX_TEMPFAIL` of sysexits.h."""
EXIT_STATUS_FILE = "OPENMOE_EXIT_STATUS_FILE"
"""Environment variable with the file in which ranks note the status for their launcher."""
_RUNNING_TIMEOUT = timedelta(seconds=10)
"""The same once process groups exist: ranks without an error may never come."""
_POLL_INTERVAL = timedelta(seconds=2)
"""How often a waiting rank checks whether another one has failed, and will never answer."""
_ERROR_COUNT = "errors"
"""Key of the number of ranks that found a usage error."""
_FIX = "start the program with torchrun"
_TASK_COUNTS = (
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "JSM_NAMESPACE_SIZE",
    "FLUX_JOB_SIZE",
)
"""Processes that were started together: by Slurm, Open MPI, MPICH and Intel MPI, MVAPICH2, LSF and
Flux."""


@dataclass(frozen=True, kw_only=True)
class Launched:
    """This process as the launcher started it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the ranks of this node."""
    alone: bool = True
    """Started directly: there is no launcher, and no other rank."""


def launched() -> Launched:
    """Read torchrun's variables; without any, this is a world of one rank.

    A task of `srun` gets them from Slurm's, here, so that it is a rank as if torchrun had started
    it; see `slurm.py`.

    Raises:
        UsageError: some are set and others missing, or they are not numbers.
    """
    names = ("RANK", "WORLD_SIZE")
    if not any(name in os.environ for name in names):
        os.environ.update(torchrun_variables(os.environ))
    if not any(name in os.environ for name in names):
        return Launched()
    rank, world_size = (_number(name) for name in names)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UsageError(f"environment variable {name}", None, "set, as RANK is", _FIX)
    if not 0 <= rank < world_size:
        expected = f">= 0 and < WORLD_SIZE ({world_size})"
        raise UsageError("environment variable RANK", rank, expected, _FIX)
    local_rank = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0
    return Launched(rank=rank, world_size=world_size, local_rank=local_rank, alone=False)


def launched_to_train() -> Launched:
    """`launched`, where every process that a launcher started must be a rank.

    `mpirun -n 8 python pretrain_openmoe.py` starts eight processes, of which each would be a world
    of one rank: eight trainings that write into one directory.

    Raises:
        UsageError: as `launched`; or another launcher than torchrun and srun has started several
            processes.
    """
    here = launched()
    if not here.alone:
        return here
    for name in _TASK_COUNTS:
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            expected = "1 without RANK and WORLD_SIZE: each process would train on its own"
            fix = "let each node run one torchrun, which starts its ranks (examples/*_slurm.sbatch)"
            raise UsageError(
                f"environment variable {name}",
                int(count),
                expected,
                f"{fix}; to train on one process all the same, unset {name}",
            )
    return here


def _number(name: str) -> int:
    value = os.environ.get(name)
    if value is None or not value.isdigit():
        raise UsageError(f"environment variable {name}", value, "a number", _FIX)
    return int(value)


def run_or_exit(main: Callable[[], None], prog: str = "pretrain_openmoe.py") -> None:
    """Run a program; a `UsageError` becomes one line on standard error and exit code 2.

    Ranks with the same error print it once. Before process groups exist, the ranks without an error
    wait in `startup_barrier` or a `Rendezvous` and exit with code 2 as well; later they are in the
    middle of their work, and the launcher terminates them. No rank outlives torchrun.
    """
    escape_unprintable()
    end_with_launcher(os.environ)
    try:
        main()
    except UsageError as error:
        _exit(f"{prog}: error: {error}")


@contextlib.contextmanager
def ended_reader_is_fine() -> Iterator[None]:
    """Print for a reader such as `head`, which may exit before it has read everything."""
    try:
        yield
    except BrokenPipeError:
        # Otherwise the interpreter fails once more, when it flushes standard output at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit(line: str) -> NoReturn:
    here = _launched_with_others()
    if here is None:
        note_exit_status(USAGE_EXIT_CODE)
        print(line, file=sys.stderr, flush=True)
        sys.exit(USAGE_EXIT_CODE)
    import torch.distributed as dist

    running = dist.is_initialized()
    timeout = _RUNNING_TIMEOUT if running else STARTUP_TIMEOUT
    store = launcher_store("running" if running else "startup", timeout)
    text = hashlib.sha256(printable(line).encode()).hexdigest()
    if store.add(f"printed/{text}", 1) == 1:
        print(line, file=sys.stderr, flush=True)
    store.add(_ERROR_COUNT, 1)
    with contextlib.suppress(dist.DistError):  # some rank never arrived
        barrier(store, "startup", here, timeout)
    exit_together(store, here, timeout)


def _launched_with_others() -> Launched | None:
    """This process, if the launcher has started other ranks."""
    try:
        here = launched()
    except UsageError:
        return None
    return here if here.world_size > 1 else None


def startup_barrier(world_size: int, timeout: timedelta) -> tuple[dist.Store, int]:
    """Wait until every rank is ready to create process groups.

    Does not return if a rank has a usage error: that rank prints it, and all exit with code 2.

    Args:
        world_size: ranks of the layout.
        timeout: for the slowest rank, and of the store.

    Returns:
        A store for the default process group, and this rank.

    Raises:
        UsageError: the launcher started another number of ranks.
    """
    import torch.distributed as dist

    here = launched()
    if here.world_size != world_size:
        raise UsageError("world size", here.world_size, f"{world_size}, that of the layout")
    if here.alone:
        return dist.HashStore(), 0
    store = launcher_store("startup", timeout)
    barrier(store, "startup", here, timeout)
    if store.add(_ERROR_COUNT, 0):
        exit_together(store, here, STARTUP_TIMEOUT)
    return dist.PrefixStore("default", store), here.rank


class Rendezvous:
    """Communication of the ranks of a launch before there are process groups.

    All ranks call the same methods in the same order. A value is read by one rank and broadcast,
    since a thousand ranks that each read one file would be a thousand readers of it. A `Rendezvous`
    must live until the process groups are created: rank 0 may serve the store.

    Args:
        here: this rank, of several.
        timeout: for the slowest rank.
    """

    def __init__(self, here: Launched, timeout: timedelta) -> None:
        self._here, self._timeout = here, timeout
        self._store: dist.Store = launcher_store("startup", timeout)
        self._keys = (f"rendezvous/{number}" for number in count())

    def gather(self, value: str) -> list[str] | None:
        """Every rank's value, in rank order, on rank 0; `None` on the others."""
        key = next(self._keys)
        if self._here.rank != 0:
            self._store.set(f"{key}/{self._here.rank}", value)
            return None
        others = range(1, self._here.world_size)
        return [value, *(self._wait_for(f"{key}/{rank}") for rank in others)]

    def broadcast(self, value: str) -> str:
        """The value of rank 0, on every rank."""
        key = next(self._keys)
        if self._here.rank != 0:
            return self._wait_for(key)
        self._store.set(key, value)
        return value

    def _wait_for(self, key: str) -> str:
        """The value of a key. Exits, as at startup, if a rank reports a usage error meanwhile."""
        import torch.distributed as dist

        deadline = time.monotonic() + self._timeout.total_seconds()
        while True:
            try:
                self._store.wait([key], _POLL_INTERVAL)
                return self._store.get(key).decode()
            except dist.DistError:
                if self._store.add(_ERROR_COUNT, 0):
                    barrier(self._store, "startup", self._here, STARTUP_TIMEOUT)
                    exit_together(self._store, self._here, STARTUP_TIMEOUT)
                if time.monotonic() > deadline:
                    raise


def launcher_store(name: str, timeout: timedelta) -> dist.Store:
    """A new connection to the launcher's key-value store, or to one of rank 0 if it has none.

    Unlike `torch.distributed.rendezvous` it does not wait for the other ranks: where one never
    comes, the others can find out which.

    Args:
        name: of the part of the store that is used.
        timeout: of connecting, and of every operation.
    """
    import torch.distributed as dist

    served_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        _number("MASTER_PORT"),
        is_master=_number("RANK") == 0 and not served_by_launcher,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
    # A restarted job finds the keys of its previous attempt in the same store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"{name}-{attempt}", store)


def barrier(store: dist.Store, name: str, here: Launched, timeout: timedelta) -> None:
    """Wait until all ranks have arrived.

    Each rank makes two requests, one count and one wait, however many ranks there are: with a key
    for each rank, the store would have to serve the square of their number.

    Raises:
        torch.distributed.DistError: a rank has not arrived in time.
    """
    _count_in(store, name, here)
    store.wait([f"{name}/all"], timeout)


def _count_in(store: dist.Store, name: str, here: Launched) -> None:
    if store.add(f"{name}/count", 1) == here.world_size:
        store.set(f"{name}/all", "1")


def note_exit_status(status: int) -> None:
    """Tell `tools/torchrun.py` how the run ended, if it has started this rank.

    Args:
        status: 0, `PREEMPTED_EXIT_STATUS` or `USAGE_EXIT_CODE`; the same on all ranks of a node.
    """
    if path := os.environ.get(EXIT_STATUS_FILE):
        Path(path).write_text(str(status))


def note_end(*, finished: bool) -> None:
    """`note_exit_status` of a run that has saved: at its last step, or before."""
    note_exit_status(0 if finished else PREEMPTED_EXIT_STATUS)


def exit_together(store: dist.Store, here: Launched, timeout: timedelta) -> NoReturn:
    """Exit with code 2 on all ranks at once: a launcher terminates the others once one exits."""
    import torch.distributed as dist

    note_exit_status(USAGE_EXIT_CODE)
    # There is nothing left to do or to clean up, so a rank that is terminated a moment before its
    # exit may as well exit with its own code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(dist.DistError):  # some rank never arrived
        barrier(store, "exit", here, timeout)
        _count_in(store, "left", here)
        if here.rank == 0:  # it may serve the store, which the others still need
            store.wait(["left/all"], timeout)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(USAGE_EXIT_CODE)

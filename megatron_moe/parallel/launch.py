"""Starting and ending a program on many ranks, so that a mistake is said once and ends all of them.

torchrun (or Slurm) starts the ranks and tells each of them, in environment variables, who it is.
Ranks meet once before the first process group: if any of them found a mistake of the user's, all
exit with code 2, and the mistake is printed once, however many ranks found it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from megatron_moe.errors import USAGE_EXIT_CODE, UsageError

if TYPE_CHECKING:
    import torch.distributed as dist

MEETING_TIMEOUT = timedelta(seconds=120)
"""How long a rank that found a mistake waits for the others to get as far."""
_MISTAKES = "mistakes"
"""Key of the number of ranks that found one."""
_LATE_TIMEOUT = timedelta(seconds=10)
"""The same once process groups exist: ranks that found nothing may never come."""


@dataclass(frozen=True, kw_only=True)
class Launched:
    """What the launcher says about this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the ranks of this node."""
    alone: bool = True
    """Started directly: there is no launcher and nobody to meet."""


def launched() -> Launched:
    """Read torchrun's variables; without any, this is a world of one rank.

    Raises:
        UsageError: some are there and others missing, or they are no numbers.
    """
    names = ("RANK", "WORLD_SIZE")
    if not any(name in os.environ for name in names):
        return Launched()
    rank, world_size = (_number(name) for name in names)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UsageError(f"environment variable {name}", None, "set beside RANK", _FIX)
    if not 0 <= rank < world_size:
        raise UsageError("environment variable RANK", rank, f"0 to {world_size - 1}", _FIX)
    local_rank = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0
    return Launched(rank=rank, world_size=world_size, local_rank=local_rank, alone=False)


_FIX = "start the program with torchrun"


def _number(name: str) -> int:
    value = os.environ.get(name)
    if value is None or not value.isdigit():
        raise UsageError(f"environment variable {name}", value, "a number", _FIX)
    return int(value)


def run_or_exit(main: Callable[[], None], prog: str = "pretrain_openmoe.py") -> None:
    """Run a program; a `UsageError` becomes one line on standard error and exit code 2.

    Ranks that found the same mistake say it once. Before process groups exist the others, which
    found none, wait in `meet_at_start` and end with code 2 as well; later they are in the middle of
    their work, and it is the launcher that ends them.
    """
    try:
        main()
    except UsageError as error:
        _exit(f"{prog}: error: {error}")


@contextlib.contextmanager
def ended_reader_is_fine() -> Iterator[None]:
    """Print for a reader such as `head`, which may end before the text does."""
    try:
        yield
    except BrokenPipeError:
        # Else the interpreter fails once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit(line: str) -> NoReturn:
    here = _with_others()
    if here is None:
        print(line, file=sys.stderr, flush=True)
        sys.exit(USAGE_EXIT_CODE)
    import torch.distributed as dist

    late = dist.is_initialized()
    timeout = _LATE_TIMEOUT if late else MEETING_TIMEOUT
    store = _store("late" if late else "start", timeout)
    text = hashlib.sha256(line.encode()).hexdigest()
    if store.add(f"said/{text}", 1) == 1:
        print(line, file=sys.stderr, flush=True)
    store.add(_MISTAKES, 1)
    with contextlib.suppress(dist.DistError):  # some rank never came
        _arrive(store, "start", here, timeout)
    _leave(store, here, timeout)


def _with_others() -> Launched | None:
    """What the launcher says, if it says that there are other ranks."""
    try:
        here = launched()
    except UsageError:
        return None
    return here if here.world_size > 1 else None


def meet_at_start(world_size: int, timeout: timedelta) -> tuple[dist.Store, int]:
    """Wait until every rank is ready to make process groups.

    Args:
        world_size: ranks that the layout is for.
        timeout: for the slowest rank, and of the store.

    Returns:
        A store for the default process group, and this rank.

    Raises:
        UsageError: the launcher started another number of ranks.

    Does not return if a rank found a mistake: that rank says which, and all end with code 2.
    """
    import torch.distributed as dist

    here = launched()
    if here.world_size != world_size:
        raise UsageError("world size", here.world_size, f"{world_size}, as laid out")
    if here.alone:
        return dist.HashStore(), 0
    store = _store("start", timeout)
    _arrive(store, "start", here, timeout)
    if store.add(_MISTAKES, 0):
        _leave(store, here, MEETING_TIMEOUT)
    return dist.PrefixStore("default", store), here.rank


def _store(meeting: str, timeout: timedelta) -> dist.Store:
    """The launcher's store, or one that rank 0 serves if the launcher has none."""
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"{meeting}-{attempt}", store)


def _arrive(store: dist.Store, place: str, here: Launched, timeout: timedelta) -> None:
    """Wait until all ranks are there: one count and one key, so a thousand ranks ask little."""
    _count(store, place, here)
    store.wait([f"{place}/all"], timeout)


def _count(store: dist.Store, place: str, here: Launched) -> None:
    if store.add(f"{place}/count", 1) == here.world_size:
        store.set(f"{place}/all", "1")


def _leave(store: dist.Store, here: Launched, timeout: timedelta) -> NoReturn:
    """End with code 2, together: a launcher that sees one rank end terminates the others."""
    import torch.distributed as dist

    # Nothing is left to do or to put in order, so a rank that is terminated a moment before its end
    # may as well end with its own code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(dist.DistError):  # some rank never came
        _arrive(store, "heard", here, timeout)
        _count(store, "left", here)
        if here.rank == 0:  # it may be the one that serves the store
            store.wait(["left/all"], timeout)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(USAGE_EXIT_CODE)

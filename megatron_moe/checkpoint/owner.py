"""A process that writes to a directory, described so that others can tell whether it lives.

Process numbers are used again, containers number their own, and hosts restart: a description has
all that tells one process from the others.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

_TICKS = 19
"""Place of a process' start in `/proc/PID/stat`, counted from its state."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process that writes to a directory, as its lock describes it."""

    key: str
    """Random; tells owners apart."""
    user: str
    host: str
    boot: str
    """Identifies the start of the host's kernel."""
    namespace: str
    """Of process numbers: containers on one host have their own."""
    pid: int
    ticks: int
    """Start of the process, in clock ticks since the start of the host: numbers are used again."""
    started: str
    """The same, for people."""
    slurm_job: str
    slurm_restarts: int
    torchrun_id: str
    torchrun_restarts: int

    @classmethod
    def of_this_process(cls) -> Owner:
        """Describe this process."""
        run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
        return cls(
            key=secrets.token_hex(8),
            user=_user(),
            host=socket.gethostname(),
            boot=_boot(),
            namespace=_namespace(),
            pid=os.getpid(),
            ticks=_ticks_of_this_process(),
            started=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
            slurm_job=os.environ.get("SLURM_JOB_ID", ""),
            slurm_restarts=_count("SLURM_RESTART_COUNT"),
            torchrun_id="" if run_id == "none" else run_id,  # torchrun's default
            torchrun_restarts=_count("TORCHELASTIC_RESTART_COUNT"),
        )

    def to_json(self) -> bytes:
        """The content of a lock."""
        return json.dumps(asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> Owner | None:
        """The owner that a lock names; `None` if it was not written completely."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return None
        kinds = {field.name: int if field.type == "int" else str for field in fields(cls)}
        if not isinstance(values, dict) or values.keys() != kinds.keys():
            return None
        if any(type(values[name]) is not kind for name, kind in kinds.items()):
            return None
        return cls(**values)

    def is_alive(self, here: Owner) -> bool | None:
        """Whether this owner lives; `None` if a process of ``here`` cannot know."""
        place = (self.host, self.boot, self.namespace)
        if place == (here.host, here.boot, here.namespace):
            return _is_running(self.pid, self.ticks)
        same_job = self.slurm_job != "" and self.slurm_job == here.slurm_job
        if same_job and self.slurm_restarts < here.slurm_restarts:
            return False
        same_run = self.torchrun_id != "" and self.torchrun_id == here.torchrun_id
        if same_run and self.torchrun_restarts < here.torchrun_restarts:
            return False
        return None

    def __str__(self) -> str:
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} of {self.user} on {self.host}{job}, since {self.started}"


def _is_running(pid: int, ticks: int) -> bool:
    """Whether the process lives that had this number and start; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    stat = _stat_of(pid)
    return stat is None or (stat[0] not in "ZX" and int(stat[_TICKS]) == ticks)


def _stat_of(pid: int) -> list[str] | None:
    """`/proc/PID/stat` from the state on; `None` if it is hidden from this user."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The name before it, in parentheses, may contain anything.
    return text.rpartition(")")[2].split()


def _ticks_of_this_process() -> int:
    stat = _stat_of(os.getpid())
    return 0 if stat is None else int(stat[_TICKS])


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())


def _count(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() and len(value) < 10 else 0

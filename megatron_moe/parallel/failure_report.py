"""Who failed: from what the ranks answer, the ranks that caused it and those that wait for them.

The causes are, in this order: exceptions that are not about communication; processes that ended;
processes that are stopped; ranks that did not answer; ranks that wait in no collective while the
others do. The first kind that occurs is reported: the others follow from it. An error of a
collective, such as a closed connection, is a consequence and never a cause.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_moe.parallel.waiting import Wait, ranks_text
from megatron_moe.processes import ENDED, STOPPED

FILE = "failure-report.json"
"""Name of the report, in `--save`."""
EXCEPTION, COLLECTIVE, HANG, WAKED, TERMINATED = (
    *("exception", "error of a collective", "hang"),
    *("asked by another rank", "terminated"),
)
"""Why a rank answers."""
_NO_ANSWER, _BUSY = "did not answer", "waits in no collective"
_SHOWN = 8
"""Different stacks that the summary shows at most."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one rank knows at a failure."""

    rank: int
    host: str
    pid: int
    reason: str
    """One of the above."""
    doing: str
    """e.g. `step 17`."""
    seconds: float
    """Since it began that."""
    wait: Wait | None = None
    """The collective that it waits in."""
    error: str = ""
    """Traceback of its exception."""
    lost: dict[int, str] = field(default_factory=dict)
    """Ranks of its node that cannot answer, and why."""
    stacks: dict[str, list[str]] = field(default_factory=dict)
    """Of its threads; empty after an exception."""
    pending: list[dict[str, Any]] = field(default_factory=list)
    """Unfinished collectives of the flight recorder."""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Answer:
        """The inverse of `to_json`."""
        values = json.loads(line)
        wait = values["wait"]
        values["wait"] = wait and Wait(**{**wait, "ranks": tuple(wait["ranks"])})
        values["lost"] = {int(rank): state for rank, state in values["lost"].items()}
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A failure of a run."""

    world_size: int
    cause: str
    """`exception`, `ended`, `stopped`, `did not answer` or `waits in no collective`; empty if every
    rank waits in a collective."""
    culprits: tuple[int, ...]
    answers: tuple[Answer, ...]
    """Of the ranks that answered, in rank order."""

    def to_json(self) -> dict[str, Any]:
        """For `failure-report.json`."""
        return {
            "summary": self.lines(),
            "cause": self.cause or "every rank waits in a collective",
            "ranks": list(self.culprits),
            "world_size": self.world_size,
            "waits": [
                {"collective": wait.operation, "group": wait.group, "ranks": ranks}
                | {"group_ranks": list(wait.ranks)}
                for wait, ranks in self._waits().items()
            ],
            "answers": [asdict(answer) for answer in self.answers],
        }

    def lines(self) -> list[str]:
        """A summary: the cause, who waits where, and at the end the original traceback or stacks.

        Ranks with the same text share it, so that a thousand ranks fit on a screen.
        """
        who = ranks_text(self.culprits)
        nobody = "run failed: every rank waits in a collective, or failed in one"
        lines = [f"run failed: {who} {self._what()}" if self.culprits else nobody]
        doing = defaultdict(list)
        for answer in self.answers:
            doing[answer.doing].append(answer.rank)
        lines += [f"  {ranks_text(ranks)}: {text}" for text, ranks in doing.items() if text]
        lines += [f"  {ranks_text(ranks)}: waits in {w}" for w, ranks in self._waits().items()]
        if self.cause in (EXCEPTION, ""):
            return lines + self._texts({a.rank: a.error for a in self.answers})
        if any(answer.reason == HANG for answer in self.answers):
            return lines + self._texts({a.rank: _text_of(a.stacks) for a in self.answers})
        return lines

    def _what(self) -> str:
        if self.cause == EXCEPTION:
            culprit = next(a for a in self.answers if a.rank == self.culprits[0])
            return f"raised {culprit.error.strip().splitlines()[-1]}"
        return {
            ENDED: "ended: killed, or out of memory (the launcher knows the exit code)",
            STOPPED: "is stopped (SIGSTOP, or a debugger)",
        }.get(self.cause, self.cause)

    def _waits(self) -> dict[Wait, list[int]]:
        found: dict[Wait, list[int]] = defaultdict(list)
        for answer in self.answers:
            if answer.wait is not None:
                found[answer.wait].append(answer.rank)
        return found

    def _texts(self, texts: dict[int, str]) -> list[str]:
        ranks = defaultdict(list)
        for rank, text in texts.items():
            if text and (self.cause != EXCEPTION or rank in self.culprits):
                ranks[text].append(rank)
        lines = [
            line
            for text, same in list(ranks.items())[:_SHOWN]
            for line in (f"{ranks_text(same)}:", *text.rstrip().splitlines())
        ]
        return [*lines, f"... and {len(ranks) - _SHOWN} more"] if len(ranks) > _SHOWN else lines

    def write(self, directory: Path) -> Path | None:
        """Write `failure-report.json`, whole or not at all; `None` if that is impossible."""
        path, unfinished = directory / FILE, directory / f"{FILE}.{os.getpid()}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(self.to_json(), indent=1))
            unfinished.replace(path)
        except OSError:  # the disk may be what has failed
            return None
        return path


def report_of(answers: Sequence[Answer], world_size: int) -> Report:
    """Find the cause.

    Args:
        answers: of the ranks that answered.
        world_size: number of ranks.
    """
    answers = sorted(answers, key=lambda answer: answer.rank)
    answered = {answer.rank for answer in answers}
    lost: dict[int, str] = {}
    for answer in answers:
        lost |= {rank: state for rank, state in answer.lost.items() if rank not in answered}
    missing = [rank for rank in range(world_size) if rank not in answered]
    kinds = [
        (EXCEPTION, [a.rank for a in answers if a.reason == EXCEPTION]),
        (ENDED, [rank for rank in missing if lost.get(rank) == ENDED]),
        (STOPPED, [rank for rank in missing if lost.get(rank) == STOPPED]),
        (_NO_ANSWER, missing),
        (_BUSY, [a.rank for a in answers if a.wait is None and a.reason != COLLECTIVE]),
    ]
    cause, culprits = next(((c, ranks) for c, ranks in kinds if ranks), ("", []))
    return Report(
        world_size=world_size, cause=cause, culprits=tuple(culprits), answers=tuple(answers)
    )


def _text_of(stacks: dict[str, list[str]]) -> str:
    return "\n".join(
        line
        for name, frames in stacks.items()
        for line in (f"  thread {name}:", *_indented(frames))
    )


def _indented(frames: list[str]) -> list[str]:
    return [f"    {frame}" for frame in frames]

"""The dry runs of some ranks side by side: a table, what does not fit, and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_moe.parallel.layout import Layout
from megatron_moe.planning.collective_log import mismatches
from megatron_moe.planning.dry_run import RankReport
from megatron_moe.planning.memory import CATEGORIES

GIB = 1 << 30
_KINDS = ("tp", "pp", "dp", "ep", "etp")


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """The dry runs of chosen ranks of one layout."""

    layout: Layout
    ranks: Sequence[RankReport]
    memory_limit: int | None
    """Bytes that a rank may need; `None` compares with nothing."""

    @property
    def faults(self) -> list[str]:
        """Why the real run would fail; empty if nothing is known."""
        return [*self._too_large(), *mismatches({r.rank: r.collectives for r in self.ranks})]

    def _too_large(self) -> list[str]:
        if self.memory_limit is None:
            return []
        return [
            f"rank {r.rank} needs {_gib(r.peak.total)} GiB, more than {_gib(self.memory_limit)}; "
            f"the largest part is {max(CATEGORIES, key=lambda name: getattr(r.peak, name))}; "
            f"the peak is at {r.peak_at}"
            for r in self.ranks
            if r.peak.total > self.memory_limit
        ]

    def text(self) -> str:
        """For people."""
        sections = (self._rank_table(), self._memory_table(), self._collective_table(), self._end())
        return "\n\n".join("\n".join(lines) for lines in sections)

    def to_json(self) -> str:
        """For programs: all numbers, and every collective in order."""
        values = {
            "layout": dataclasses.asdict(self.layout),
            "ranks": [_values(rank) for rank in self.ranks],
            "memory_limit": self.memory_limit,
            "faults": self.faults,
        }
        return json.dumps(values, indent=1)

    def _rank_table(self) -> list[str]:
        rows = [["rank", *_KINDS, "dense parameters", "expert parameters", "seconds"]]
        for r in self.ranks:
            places = [str(r.coordinates[kind]) for kind in _KINDS]
            counts = [f"{r.dense_parameters:,}", f"{r.expert_parameters:,}"]
            rows.append([str(r.rank), *places, *counts, f"{r.seconds:.0f}"])
        return [f"Ranks of {self.layout.world_size}", *_aligned(rows)]

    def _memory_table(self) -> list[str]:
        rows = [["rank", *(name.replace("_", " ") for name in CATEGORIES), "all", "at"]]
        for r in self.ranks:
            parts = [_gib(getattr(r.peak, name)) for name in (*CATEGORIES, "total")]
            rows.append([str(r.rank), *parts, r.peak_at])
        return ["Peak memory of a step, GiB of live tensors", *_aligned(rows)]

    def _collective_table(self) -> list[str]:
        rows = [["rank", "group", "ranks", "operation", "calls", "MiB"]]
        for r in self.ranks:
            calls: Counter[tuple[str, int, str]] = Counter()
            sizes: Counter[tuple[str, int, str]] = Counter()
            for call in r.collectives:
                key = (r.groups.get(call.group, "other"), len(call.group), call.operation)
                calls[key] += 1
                sizes[key] += call.size
            for key in sorted(calls):
                size = f"{sizes[key] / (1 << 20):,.1f}"
                rows.append([str(r.rank), key[0], str(key[1]), key[2], str(calls[key]), size])
        return ["Collectives of a step", *_aligned(rows)]

    def _end(self) -> list[str]:
        reads = Counter(place for r in self.ranks for place in set(r.host_reads))
        lines = [f"Reads by the host: {', '.join(sorted(reads)) or 'none'}"]
        if self.ranks[0].left_out:
            lines.append(f"Without what needs a GPU: {', '.join(self.ranks[0].left_out)}")
        if self.faults:
            return [*lines, *(f"FAULT: {fault}" for fault in self.faults)]
        compared = len(self.ranks) * (len(self.ranks) - 1) // 2
        return [*lines, f"The collectives of {compared} pairs of ranks fit."]


def _values(rank: RankReport) -> dict[str, Any]:
    groups = {f"{name} {list(ranks)}": name for ranks, name in rank.groups.items()}
    numbers = {ranks: index for index, ranks in enumerate({c.group for c in rank.collectives})}
    return {
        "rank": rank.rank,
        "coordinates": dict(rank.coordinates),
        "dense_parameters": rank.dense_parameters,
        "expert_parameters": rank.expert_parameters,
        "at_rest": rank.at_rest.to_dict(),
        "peak": {**rank.peak.to_dict(), "at": rank.peak_at},
        "named_groups": groups,
        "groups": [list(ranks) for ranks in numbers],
        "collectives": [
            {
                "operation": c.operation,
                "group": numbers[c.group],
                "bytes": c.size,
                "dtype": c.dtype,
                **({"peer": c.peer} if c.peer is not None else {}),
                **({"root": c.root} if c.root is not None else {}),
            }
            for c in rank.collectives
        ],
        "left_out": list(rank.left_out),
        "host_reads": list(rank.host_reads),
        "seconds": rank.seconds,
    }


def _gib(size: int) -> str:
    return f"{size / GIB:.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, numbers and names alike to the right, but the last to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i == last and not cell[:1].isdigit() else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

r"""Run a training step of a large cluster on this machine, without its GPUs and its memory.

Takes the flags of a real launch and runs two steps of one chosen rank after the other: the real
model, schedule and optimizer, on tensors without memory. Prints parameters, peak memory by category
and every kind of collective of each rank, and compares the orders of the collectives of all pairs
of ranks: a difference is a deadlock. Exit code 0: nothing was found; 1: a rank needs more than
--memory-gib, or two ranks do not fit; 2: a usage error, as training would report it.

    python tools/dry_run.py --world-size 128 --memory-gib 80 -- \
        --preset openmoe-34b-32e --vocab-size 256000 --bf16 --tensor-model-parallel-size 2 \
        --sequence-parallel --pipeline-model-parallel-size 4 --expert-model-parallel-size 8
    # or the whole command: what comes before pretrain_openmoe.py is ignored
    python tools/dry_run.py --world-size 16 --ranks 0,1,15 -- torchrun ... pretrain_openmoe.py ...

Without --ranks: the first rank of the first two, the middle and the last two pipeline stages, their
neighbours in the tensor-parallel and data-parallel groups, rank 0's in the groups of experts, and
the last rank. docs/dry_run.md says what the numbers are.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_moe.command_line import Parser
from megatron_moe.config import RunConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError, exit_on_usage_error

if TYPE_CHECKING:
    from megatron_moe.parallel.layout import Layout
    from megatron_moe.planning.dry_run import RankReport
    from megatron_moe.training.phases import Phase

FAULT_EXIT_CODE = 1
_PROGRAMS = ("pretrain_openmoe.py", "openmoe-pretrain")
MOST_RANKS = 4096


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The tool's own flags, and those of the launch after ``--``."""
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    own, launch = words[:cut], words[cut + 1 :]
    parser = Parser("dry_run.py", __doc__)
    add = parser.add_argument
    add("--world-size", type=int, required=True, help=f"ranks of the launch, up to {MOST_RANKS}")
    add("--ranks", help="global ranks to run, e.g. 0,1,64; see above for the default")
    add("--phase", type=int, default=1, help="of --phases, from 1 (1)")
    add("--memory-gib", type=float, help="memory of a GPU for live tensors; more is a fault")
    add("--jobs", type=int, default=1, help="ranks at once, a process each (1)")
    add("--json", type=Path, help="also write all numbers and every collective to this file")
    options = parser.parse_args(own)
    for index, word in enumerate(launch):
        if Path(word).name in _PROGRAMS:
            return options, launch[index + 1 :]
    return options, launch


def default_ranks(layout: Layout) -> list[int]:
    """Ranks of which some share each kind of group, at most 15.

    Megatron-Core numbers pipeline stages outermost and tensor-parallel ranks innermost.
    """
    stage = layout.world_size // layout.pp
    stages = {0, 1, layout.pp // 2, layout.pp - 2, layout.pp - 1} & set(range(layout.pp))
    # The neighbours of rank 0 over expert-parallel ranks and over replicas of its experts.
    ranks = {layout.world_size - 1, layout.etp % stage, layout.etp * layout.ep % stage}
    for number in stages:
        first = number * stage
        ranks |= {first, first + 1 % stage, first + layout.tp % stage}
    return sorted(ranks)


def chosen_ranks(text: str | None, layout: Layout) -> list[int]:
    """The ranks of ``--ranks``.

    Raises:
        UsageError: it names no ranks of the layout.
    """
    if text is None:
        return default_ranks(layout)
    words = text.split(",")
    if not all(w.isdecimal() and int(w) < layout.world_size for w in words):
        raise UsageError("--ranks", text, f"numbers < {layout.world_size} with commas between them")
    return sorted(set(map(int, words)))


def phase_of(config: RunConfig, world_size: int, number: int) -> tuple[Phase, int]:
    """A phase of the run, resolved as training resolves it, and the padded vocabulary.

    Raises:
        UsageError: what training would refuse, or there is no such phase.
    """
    from megatron_moe.tokenizer.build import build_tokenizer, padded_vocab_size
    from megatron_moe.training.phases import resolve_run_schedule

    if not 1 <= world_size <= MOST_RANKS:
        raise UsageError("--world-size", world_size, f">= 1 and <= {MOST_RANKS}")
    validate(config)
    vocab_size = padded_vocab_size(config.data, build_tokenizer(config.data))
    phases = resolve_run_schedule(config, world_size, vocab_size).phases
    if not 1 <= number <= len(phases):
        raise UsageError("--phase", number, f">= 1 and <= {len(phases)}, the phases of the run")
    return phases[number - 1], vocab_size


def reports(phase: Phase, vocab_size: int, ranks: Sequence[int], jobs: int) -> list[RankReport]:
    """The dry runs, in other processes: this one stays without Megatron-Core's global groups."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, spawn, _quiet) as pool:
        futures = [pool.submit(_report, phase, vocab_size, rank) for rank in ranks]
        return [future.result() for future in futures]


class RankFailedError(Exception):
    """The step of a rank failed; the text is its traceback."""


def _report(phase: Phase, vocab_size: int, rank: int) -> RankReport:
    """One rank's report, or errors that another process can be sent."""
    from megatron_moe.planning.dry_run import dry_run_rank

    try:
        return dry_run_rank(phase, vocab_size, rank)
    except UsageError:
        raise
    except Exception:
        raise RankFailedError(f"rank {rank}: {traceback.format_exc()}") from None


def _quiet() -> None:
    """A process of a dry run: no warnings of libraries about hardware that is not here."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def run(options: argparse.Namespace, launch: Sequence[str]) -> int:
    """Run the ranks and print the report; returns the exit code."""
    if options.jobs < 1:
        raise UsageError("--jobs", options.jobs, ">= 1")
    if options.memory_gib is not None and not 0 < options.memory_gib < 1e9:
        raise UsageError("--memory-gib", options.memory_gib, "> 0 and < 1e9")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise UsageError("--json", str(options.json), "a file in a directory that exists")
    config = parse_args(launch, "dry_run.py").config
    phase, vocab_size = phase_of(config, options.world_size, options.phase)
    ranks = chosen_ranks(options.ranks, phase.layout)
    # Imports Megatron-Core, which takes seconds; errors of the command line come before.
    from megatron_moe.planning.dry_run_report import GIB, DryRun

    limit = None if options.memory_gib is None else int(options.memory_gib * GIB)
    try:
        found = reports(phase, vocab_size, ranks, options.jobs)
    except RankFailedError as failure:
        print(failure, file=sys.stderr)
        return FAULT_EXIT_CODE
    dry_run = DryRun(layout=phase.layout, ranks=found, memory_limit=limit)
    if options.json is not None:
        options.json.write_text(dry_run.to_json())
    print(dry_run.text())
    return FAULT_EXIT_CODE if dry_run.faults else 0


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    with exit_on_usage_error("dry_run.py"):
        sys.exit(run(*parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    main()

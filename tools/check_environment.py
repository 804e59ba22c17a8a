r"""Check a node, or all nodes of a job, before a run: software, GPUs, links, clocks, disks.

On every rank that the launcher starts; alone on this machine. Prints a table, and for each problem
what to do. Exit code 0: no problem; 1: problems; 2: a usage error.

# this machine
python tools/check_environment.py

# all GPUs of a node, and the bandwidth of NCCL against the planner's profile
torchrun --nproc-per-node 8 tools/check_environment.py --cluster h100

# all nodes, with the flags of the run: --save is written from every rank, and its free space is
# compared with the size of checkpoints
srun torchrun ... tools/check_environment.py --cluster h100 --preset openmoe-8b-32e --bf16 \
    --save /shared/checkpoints

All flags of training are accepted. The Slurm scripts of examples/ run this before each job.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe.command_line import Parser
from megatron_moe.config import RunConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.errors import UsageError
from megatron_moe.parallel.launch import Launched, launched, run_or_exit
from megatron_moe.planning.cluster import Cluster, load_cluster, profile_names

if TYPE_CHECKING:
    from megatron_moe.parallel.collectives import RankGroup
    from megatron_moe.planning.cluster_check import Finding
    from megatron_moe.planning.link_speed import LinkSpeed
    from megatron_moe.planning.node_facts import NodeFacts

PROBLEM_EXIT_CODE = 1


def parser() -> Parser:
    """Return the parser of the tool's own flags."""
    made = Parser("check_environment.py", __doc__)
    add = made.add_argument
    names = ", ".join(profile_names())
    add("--cluster", help=f"{names}, or a .toml file, to compare with; without it, only measure")
    add("--tolerance", type=float, default=0.5, help="least share of its bandwidths (%(default)s)")
    add("--slowest", type=float, default=0.8, help="least share of the median GEMM (%(default)s)")
    add("--megabytes", type=int, help="size of collectives (256 for NCCL, 16 for gloo)")
    add("--timeout", type=float, default=120.0, help="seconds that ranks wait (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write everything to this file")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    words = list(sys.argv[1:] if argv is None else argv)
    found: list[bool] = []
    run_or_exit(lambda: found.append(check(words)), "check_environment.py")
    if not all(found):
        sys.exit(PROBLEM_EXIT_CODE)


def check(words: list[str]) -> bool:
    """Check, and print the table on rank 0; whether nothing is wrong, the same on all ranks.

    Raises:
        UsageError: a flag is wrong.
    """
    options, of_run = parser().parse_known_args(words)
    config = parse_args(of_run, "check_environment.py").config
    for flag, low in (("tolerance", 0.0), ("slowest", 0.0), ("timeout", 1.0)):
        if getattr(options, flag) < low:
            raise UsageError(f"--{flag}", getattr(options, flag), f">= {low:g}")
    if options.megabytes is not None and not 1 <= options.megabytes <= 4096:
        raise UsageError("--megabytes", options.megabytes, ">= 1 and <= 4096")
    cluster = None if options.cluster is None else load_cluster(options.cluster)
    here = launched()
    # Here, not above: they import torch, which `--help` and errors of flags do without.
    import torch.distributed as dist

    from megatron_moe.planning.cluster_check import table_lines

    ranks = _ranks(here, timedelta(seconds=options.timeout))
    try:
        findings, speeds = _findings(options, config, cluster, here, ranks)
        fine = not any(finding.fix for finding in findings)
        if ranks.rank == 0:
            print("\n".join(table_lines(findings)), flush=True)
            if options.json is not None:
                values = {
                    "problems": not fine,
                    "findings": [finding.to_json() for finding in findings],
                    "bandwidths": [speed.to_json() for speed in speeds],
                }
                options.json.write_text(json.dumps(values, indent=2) + "\n")
        return bool(ranks.broadcast(fine))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _ranks(here: Launched, timeout: timedelta) -> RankGroup:
    """All ranks, over a default group of gloo."""
    import torch.distributed as dist

    from megatron_moe.parallel.collectives import RankGroup
    from megatron_moe.parallel.launch import startup_barrier

    if here.alone:
        return RankGroup()
    store, rank = startup_barrier(here.world_size, timeout)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=here.world_size, timeout=timeout
    )
    return RankGroup(rank, here.world_size)


def _findings(
    options: argparse.Namespace,
    config: RunConfig,
    cluster: Cluster | None,
    here: Launched,
    ranks: RankGroup,
) -> tuple[list[Finding], list[LinkSpeed]]:
    """The table, on rank 0; on the others nothing that counts. All ranks measure."""
    import torch

    from megatron_moe.parallel.layout import resolve_layout
    from megatron_moe.planning import cluster_check as judge
    from megatron_moe.planning.link_speed import clock_offset
    from megatron_moe.planning.node_facts import NodeFacts, node_facts
    from megatron_moe.platform.device import gemm_tflops

    mine = node_facts(here.rank, here.local_rank)
    facts = [NodeFacts(**fact) for fact in _gathered(ranks, mine.to_json())]
    leaders = [fact.rank for fact in judge.nodes(facts).values()]
    device = torch.device("cpu" if mine.gpu is None else f"cuda:{here.local_rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    offsets = _gathered(ranks, clock_offset(ranks, leaders) if ranks.size > 1 else 0.0)
    tflops = _gathered(ranks, gemm_tflops(device))
    speeds = _speeds(options.megabytes, facts, ranks, device, timedelta(seconds=options.timeout))
    findings = [
        *judge.versions(facts),
        *judge.gpus(facts, cluster),
        *judge.links(facts),
        *judge.limits(facts),
        *judge.placement(facts, resolve_layout(config, ranks.size)),
        *judge.clocks(facts, {rank: offsets[rank] for rank in leaders}),
        *judge.arithmetic(dict(enumerate(tflops)), facts, options.slowest),
        *judge.bandwidths(speeds, cluster, options.tolerance),
        *_directory(config, ranks),
    ]
    return findings, speeds


def _gathered(ranks: RankGroup, value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    found: list[Any] = ranks.broadcast(ranks.gather(value))
    return found


def _directory(config: RunConfig, ranks: RankGroup) -> list[Finding]:
    """What is found of `--save`."""
    from megatron_moe.planning import cluster_check as judge
    from megatron_moe.planning.link_speed import shared_directory_error

    save = config.checkpoint.save
    if save is None:
        return []
    token = ranks.broadcast(uuid.uuid4().hex[:12])
    errors = _gathered(ranks, shared_directory_error(Path(save), ranks, token))
    existing = next(path for path in (Path(save), *Path(save).absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    size = _checkpoint_bytes(config) if ranks.rank == 0 else None
    return list(judge.shared_directory(save, dict(enumerate(errors)), free, size))


def _checkpoint_bytes(config: RunConfig) -> int | None:
    """Of the run's flags; `None` without a vocabulary."""
    from megatron_moe.planning.cluster_check import checkpoint_bytes
    from megatron_moe.planning.describe import known_vocab_size

    vocab_size, assumed = known_vocab_size(config)
    return None if assumed else checkpoint_bytes(config, vocab_size)


def _speeds(
    megabytes: int | None,
    facts: Sequence[NodeFacts],
    ranks: RankGroup,
    device: Any,
    timeout: timedelta,
) -> list[LinkSpeed]:
    """Bandwidth inside this rank's node and over all; on rank 0 of the first node."""
    import torch
    import torch.distributed as dist

    from megatron_moe.planning.link_speed import link_speed

    hosts: dict[str, list[int]] = {}
    for fact in facts:
        hosts.setdefault(fact.host, []).append(fact.rank)
    backends = ["nccl", "gloo"] if all(fact.gpu for fact in facts) else ["gloo"]
    found = []
    for backend in backends:
        place = device if backend == "nccl" else torch.device("cpu")
        size = megabytes or (256 if backend == "nccl" else 16)
        groups = [*hosts.values(), list(range(ranks.size))] if len(hosts) > 1 else hosts.values()
        for members in groups:
            if len(members) == 1:
                continue
            group = dist.new_group(members, timeout=timeout, backend=backend)
            if ranks.rank not in members:
                continue
            per_node = max(map(len, hosts.values()))
            for operation in ("all-reduce", "all-to-all"):
                speed = link_speed(backend, operation, group, per_node, size, place)
                found.append(speed)
    return found


if __name__ == "__main__":
    main()

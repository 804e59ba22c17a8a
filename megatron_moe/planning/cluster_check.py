"""What is wrong with a cluster, from what its ranks found: pure functions, one for each concern.

Each returns lines of the table of `tools/check_environment.py`; a line with a fix is a problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_moe.config import RunConfig
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.parallel.layout import Layout, resolve_layout
from megatron_moe.parallel.waiting import ranks_text
from megatron_moe.planning.cluster import Cluster
from megatron_moe.planning.link_speed import LinkSpeed
from megatron_moe.planning.memory import state_memory
from megatron_moe.planning.node_facts import PACKAGES, VARIABLES, NodeFacts
from megatron_moe.planning.rank_order import NAMES, broken_groups, groups_of
from megatron_moe.planning.traffic import GroupName
from megatron_moe.platform.release import RELEASES, pinned_release

CLOCK_SECONDS = 1.0
"""Largest difference of clocks: lines of two nodes' logs are then in order, and the heartbeats of
the lock on `--save` are as young as they are."""
OPEN_FILES = 4096
"""A rank of a thousand has a few sockets for each peer, and data has two files a source."""
_MEMORY_SHARE = 0.95
"""A driver keeps a few percent of a GPU's nominal memory."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table."""

    what: str
    found: str
    expected: str = ""
    fix: str = ""
    """What to do; empty where nothing is wrong."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def versions(facts: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Software and variables: the same on all ranks."""
    for name in ("python", *PACKAGES, "cuda", "nccl", "driver"):
        held = {fact.rank: fact.versions.get(name, "not installed") for fact in facts}
        if name == "megatron-core" and {*held.values()} not in [{one} for one in RELEASES]:
            fix = f"pip install megatron-core=={pinned_release()} on every node"
            yield _same(name, held, pinned_release(), fix)
        elif set(held.values()) != {"not installed"} or name in PACKAGES:
            yield _same(name, held, "", "use one image or one shared .venv on all nodes")
    for name in VARIABLES:
        held = {fact.rank: fact.variables.get(name, "not set") for fact in facts}
        if set(held.values()) != {"not set"}:
            yield _same(name, held, "", f"export {name} to all nodes (examples/common.sh)")


def gpus(facts: Sequence[NodeFacts], cluster: Cluster | None) -> Iterator[Finding]:
    """One GPU for each rank, all of one kind, with the memory that the planner counts on."""
    if not any(fact.gpus for fact in facts):
        yield Finding(what="GPUs", found="none: ranks run on CPUs, with gloo")
        return
    without = [fact.rank for fact in facts if fact.gpu is None]
    if without:
        fix = "start as many ranks as GPUs, and check nvidia-smi on the node"
        yield Finding(what="GPUs", found=f"none for {ranks_text(without)}", expected="1", fix=fix)
        return
    names = {fact.rank: str(fact.gpu) for fact in facts}
    yield _same("GPU", names, "", "plan with the smallest GPU, or leave these nodes out")
    least = min(facts, key=lambda fact: fact.gpu_bytes)
    wanted = 0.0 if cluster is None else _MEMORY_SHARE * cluster.memory_gb * 1e9
    short = least.gpu_bytes < wanted
    yield Finding(
        what="memory of a GPU",
        found=f"{least.gpu_bytes / 1e9:.1f} GB (rank {least.rank} on {least.host})",
        expected="" if cluster is None else f"{cluster.memory_gb:.0f} GB ({cluster.name})",
        fix="give the planner and --cluster the profile of this GPU" if short else "",
    )


def links(facts: Sequence[NodeFacts]) -> Iterator[Finding]:
    """NVLink inside nodes, adapters between them: the same number everywhere."""
    with_gpu = [fact for fact in facts if fact.gpu is not None]
    if with_gpu:
        alone = [f.rank for f in with_gpu if f.peers < f.gpus - 1]
        fix = "check nvidia-smi topo -m, and that the container sees all GPUs"
        yield Finding(
            what="peer access inside a node",
            found=f"missing for {ranks_text(alone)}" if alone else "all GPUs",
            expected="all GPUs",
            fix=fix if alone else "",
        )
        held = {fact.rank: f"{fact.nvlinks} active" for fact in with_gpu}
        yield _same("NVLinks of a GPU", held, "", "check nvidia-smi nvlink --status on the node")
    leaders = nodes(facts).values()
    ports = {fact.rank: ", ".join(fact.adapters) or "none" for fact in leaders}
    counts = {len(fact.adapters) for fact in leaders}
    missing = len(leaders) > 1 and bool(with_gpu) and 0 in counts
    if len(counts) > 1 or missing:
        fix = "check ibstat on the node; NCCL would use TCP, or fewer adapters than elsewhere"
        yield Finding(
            what="adapters", found=_by_value(ports), expected="as on the other nodes", fix=fix
        )
    else:
        yield Finding(what="adapters", found=_by_value(ports))


def limits(facts: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Open files, and with adapters pinned memory."""
    least = min(facts, key=lambda fact: fact.open_files)
    yield Finding(
        what="open files",
        found=f"{least.open_files} (rank {least.rank} on {least.host})",
        expected=f">= {OPEN_FILES}",
        fix="" if least.open_files >= OPEN_FILES else f"ulimit -n {OPEN_FILES} or more",
    )
    bound = [f.rank for f in facts if f.adapters and f.locked_bytes >= 0]
    if any(fact.adapters for fact in facts):
        fix = "ulimit -l unlimited (in Slurm: PropagateResourceLimitsExcept=MEMLOCK on the nodes)"
        yield Finding(
            what="pinned memory",
            found=f"limited for {ranks_text(bound)}" if bound else "unlimited",
            expected="unlimited",
            fix=fix if bound else "",
        )


def placement(facts: Sequence[NodeFacts], layout: Layout) -> Iterator[Finding]:
    """Tensor-parallel groups inside a node; expert-parallel ones on as few nodes as hold them."""
    hosts = [fact.host for fact in facts]
    kinds: tuple[GroupName, ...] = ("tp", "etp", "ep")
    for group in kinds:
        groups = groups_of(layout, group)
        if len(groups[0]) == 1:
            continue
        broken = broken_groups(layout, hosts, group)
        where = f"{ranks_text(broken[0][0])} on {broken[0][1]} nodes" if broken else "as expected"
        yield Finding(
            what=f"{NAMES[group]} groups",
            found=where,
            expected="on as few nodes as hold them" if group == "ep" else "inside a node",
            fix=f"number the ranks node by node, or lower the size ({len(groups[0])})"
            if broken
            else "",
        )


def clocks(facts: Sequence[NodeFacts], offsets: Mapping[int, float]) -> Iterator[Finding]:
    """Clocks of the nodes, against that of rank 0."""
    hosts = {fact.rank: fact.host for fact in facts}
    rank = max(offsets, key=lambda rank: abs(offsets[rank]))
    far = abs(offsets[rank]) > CLOCK_SECONDS
    yield Finding(
        what="clocks",
        found=f"{1000 * offsets[rank]:+.1f} ms ({hosts[rank]})" if len(offsets) > 1 else "one node",
        expected=f"within {CLOCK_SECONDS:g} s",
        fix=f"start chrony or ntpd on {hosts[rank]}" if far else "",
    )


def shared_directory(
    directory: str, errors: Mapping[int, str], free: int, needed: int | None
) -> Iterator[Finding]:
    """`--save`: written and seen by all ranks, with space for two checkpoints.

    Args:
        directory: as given.
        errors: of each rank, from `shared_directory_error`.
        free: bytes.
        needed: bytes of one checkpoint; `None` if the run is not known.
    """
    states = {rank: error or "fine" for rank, error in errors.items()}
    bad = any(errors.values())
    yield Finding(
        what=directory,
        found=_by_value(states) if bad else f"written and seen by {len(errors)} ranks",
        expected="shared by all ranks",
        fix="mount it on every node, writable, or choose another --save" if bad else "",
    )
    if needed is not None:
        short = free < 2 * needed
        yield Finding(
            what="space for checkpoints",
            found=f"{free / 1e9:.1f} GB",
            expected=f">= {2 * needed / 1e9:.1f} GB: the newest, and the one being written",
            fix="free space, or choose another --save; --keep-last bounds it" if short else "",
        )


def bandwidths(
    speeds: Sequence[LinkSpeed], cluster: Cluster | None, tolerance: float
) -> Iterator[Finding]:
    """Measured collectives against what the planner assumes of the cluster.

    gloo beside NCCL is only reported: its messages are small, and the planner has no figure of it.
    """
    backends = {speed.backend for speed in speeds}
    for speed in speeds:
        inside = speed.place.nodes == 1
        where = "a node" if inside else f"{speed.place.nodes} nodes"
        compared = cluster is not None and (speed.backend == "nccl" or backends == {"gloo"})
        assumed = speed.assumed(cluster) if cluster is not None and compared else 0.0
        slow = speed.gigabytes_per_second < tolerance * assumed
        fix = "check NVLinks (nvidia-smi topo -m) and NCCL_DEBUG=INFO"
        if not inside:
            fix = "check adapters (ibstat), NCCL_IB_HCA and NCCL_DEBUG=INFO for NET/IB"
        yield Finding(
            what=f"{speed.backend} {speed.operation}, {where}",
            found=f"{speed.gigabytes_per_second:.2f} GB/s ({speed.place.size} ranks)",
            expected=f"{assumed:.4g} GB/s, at least {tolerance:.0%}" if compared else "",
            fix=fix if slow else "",
        )


def arithmetic(
    tflops: Mapping[int, float], facts: Sequence[NodeFacts], slowest: float
) -> Iterator[Finding]:
    """A matrix product on every rank: one slow rank slows all of them."""
    ordered = sorted(tflops.values())
    median = ordered[len(ordered) // 2]
    late = [rank for rank, value in tflops.items() if value < slowest * median]
    hosts = {fact.rank: fact.host for fact in facts}
    rank = min(tflops, key=lambda rank: tflops[rank])
    where = ", ".join(dict.fromkeys(hosts[number] for number in late))
    yield Finding(
        what="matrix product",
        found=f"{median:.3g} TFLOP/s, slowest {tflops[rank]:.3g} (rank {rank} on {hosts[rank]})",
        expected=f"all within {slowest:.0%} of the median",
        fix=f"check clocks, temperature and other processes on {where}" if late else "",
    )


def checkpoint_bytes(config: RunConfig, vocab_size: int) -> int:
    """Bytes of a checkpoint: weights, and unless `--no-save-optim` optimizer state, each once."""
    train = replace(config.train, micro_batch_size=1, global_batch_size=1, rampup_batch_size=None)
    whole = replace(config, parallel=ParallelConfig(), train=train)
    (state,) = state_memory(whole, resolve_layout(whole, 1, vocab_size), vocab_size)
    return state.parameters + (0 if config.checkpoint.no_save_optim else state.optimizer)


def nodes(facts: Sequence[NodeFacts]) -> dict[str, NodeFacts]:
    """The first rank of each node, by host name."""
    found: dict[str, NodeFacts] = {}
    for fact in facts:
        found.setdefault(fact.host, fact)
    return found


def table_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """The table, then every problem with its fix."""
    rows = [("", "check", "found", "expected")]
    rows += [("FAIL" if f.fix else "ok", f.what, f.found, f.expected) for f in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False))
        yield "  ".join((*cells, row[3])).rstrip()
    problems = [finding for finding in findings if finding.fix]
    yield ""
    for number, finding in enumerate(problems, 1):
        expected = f" must be {finding.expected}" if finding.expected else " is wrong"
        yield f"{number}. {finding.what}{expected} (found {finding.found}); {finding.fix}"
    if not problems:
        yield "no problem found"


def _same(what: str, held: Mapping[int, str], expected: str, fix: str) -> Finding:
    """A value that all ranks must share; if one is expected, that one."""
    values = set(held.values())
    wrong = len(values) > 1 or (bool(expected) and values != {expected})
    wanted = expected or ("one on all ranks" if wrong else "")
    return Finding(what=what, found=_by_value(held), expected=wanted, fix=fix if wrong else "")


def _by_value(held: Mapping[int, str]) -> str:
    """`a` if all ranks have it, else `a (ranks 0-6), b (rank 7)`."""
    ranks: dict[str, list[int]] = {}
    for rank, value in held.items():
        ranks.setdefault(value, []).append(rank)
    if len(ranks) == 1:
        return next(iter(ranks))
    return ", ".join(f"{value} ({ranks_text(numbers)})" for value, numbers in ranks.items())

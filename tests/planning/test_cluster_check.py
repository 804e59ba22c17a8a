"""What counts as a problem of a cluster, from facts written by hand; a table line for each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_moe.checkpoint import latest_step
from megatron_moe.config.cli import parse_args
from megatron_moe.parallel.collectives import RankGroup
from megatron_moe.parallel.layout import resolve_layout
from megatron_moe.planning import cluster_check
from megatron_moe.planning.cluster import load_cluster
from megatron_moe.planning.cluster_check import Finding, checkpoint_bytes, table_lines
from megatron_moe.planning.link_speed import LinkSpeed, clock_offset, shared_directory_error
from megatron_moe.planning.node_facts import NodeFacts, active_adapters, active_links
from megatron_moe.planning.placement import GroupPlace
from megatron_moe.platform.release import pinned_release
from tests.training.tiny import MODEL, pretrain_rank, write_corpus

H100 = load_cluster("h100")
GOOD = NodeFacts(
    rank=0,
    local_rank=0,
    host="a",
    versions={"python": "3.12.3", "torch": "2.13.0", "megatron-core": "0.16.1", "driver": "580.1"},
    variables={"NCCL_IB_HCA": "mlx5"},
    gpu="NVIDIA H100 80GB HBM3",
    gpu_bytes=79_600_000_000,
    gpus=2,
    peers=1,
    nvlinks=18,
    adapters=["mlx5_0:1 400 Gb/sec (4X NDR)"],
    open_files=65536,
)


def cluster_of(**changes: Any) -> list[NodeFacts]:
    """Two nodes of two GPUs; the last rank differs by ``changes``."""
    ranks = [replace(GOOD, rank=r, local_rank=r % 2, host="ab"[r // 2]) for r in range(4)]
    return [*ranks[:3], replace(ranks[3], **changes)]


def problems(findings: Any) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings if finding.fix}


def everything(facts: list[NodeFacts]) -> dict[str, Finding]:
    return problems(
        [
            *cluster_check.versions(facts),
            *cluster_check.gpus(facts, H100),
            *cluster_check.links(facts),
            *cluster_check.limits(facts),
        ]
    )


def test_a_good_cluster_has_no_problem() -> None:
    assert everything(cluster_of()) == {}


@pytest.mark.parametrize(
    ("changes", "what", "found", "fix"),
    [
        (
            {"versions": {**GOOD.versions, "torch": "2.12.1"}},
            "torch",
            "2.13.0 (ranks 0-2), 2.12.1 (rank 3)",
            "one image",
        ),
        (
            {"versions": {**GOOD.versions, "megatron-core": "0.17.0"}},
            "megatron-core",
            "0.16.1 (ranks 0-2), 0.17.0 (rank 3)",
            f"pip install megatron-core=={pinned_release()}",
        ),
        ({"variables": {}}, "NCCL_IB_HCA", "mlx5 (ranks 0-2), not set (rank 3)", "export"),
        ({"gpu": None, "gpu_bytes": 0}, "GPUs", "none for rank 3", "nvidia-smi"),
        ({"gpu": "NVIDIA A100"}, "GPU", "(ranks 0-2), NVIDIA A100 (rank 3)", "smallest GPU"),
        ({"gpu_bytes": 40_000_000_000}, "memory of a GPU", "40.0 GB (rank 3 on b)", "--cluster"),
        ({"peers": 0}, "peer access inside a node", "missing for rank 3", "topo -m"),
        ({"nvlinks": 17}, "NVLinks of a GPU", "17 active (rank 3)", "nvlink --status"),
        ({"open_files": 1024}, "open files", "1024 (rank 3 on b)", "ulimit -n"),
        ({"locked_bytes": 65536}, "pinned memory", "limited for rank 3", "ulimit -l"),
    ],
)
def test_each_problem_is_named_with_its_rank_and_its_fix(
    changes: dict[str, Any], what: str, found: str, fix: str
) -> None:
    (finding,) = everything(cluster_of(**changes)).values()
    assert finding.what == what
    assert found in finding.found
    assert fix in finding.fix


def test_adapters_are_counted_on_each_node() -> None:
    facts = cluster_of()
    without = [*facts[:2], *(replace(fact, adapters=[]) for fact in facts[2:])]
    found = problems(cluster_check.links(without))["adapters"].found
    assert found == "mlx5_0:1 400 Gb/sec (4X NDR) (rank 0), none (rank 2)"
    nowhere = [replace(fact, adapters=[]) for fact in facts]
    assert "NCCL would use TCP" in problems(cluster_check.links(nowhere))["adapters"].fix
    assert problems(cluster_check.links(nowhere[:2])) == {}, "one node needs none"


def test_groups_belong_inside_nodes() -> None:
    """Four ranks, TP 2 and EP 4 on two nodes of two."""
    words = "--preset openmoe-tiny --tensor-model-parallel-size 2 --sequence-parallel"
    words += " --expert-model-parallel-size 4 --expert-tensor-parallel-size 1"
    layout = resolve_layout(parse_args(words.split()).config, 4)
    facts = cluster_of()
    findings = list(cluster_check.placement(facts, layout))
    assert [finding.what for finding in findings] == ["tensor groups", "expert groups"]
    assert problems(findings) == {}, "four experts' ranks need both nodes"
    cyclic = [replace(fact, host="ab"[fact.rank % 2]) for fact in facts]
    (broken,) = problems(cluster_check.placement(cyclic, layout)).values()
    assert (broken.what, broken.found) == ("tensor groups", "ranks 0-1 on 2 nodes")


def test_clocks_and_arithmetic() -> None:
    facts = cluster_of()
    assert problems(cluster_check.clocks(facts, {0: 0.0, 2: 0.2})) == {}
    late = problems(cluster_check.clocks(facts, {0: 0.0, 2: -1.5}))["clocks"]
    assert (late.found, late.fix) == ("-1500.0 ms (b)", "start chrony or ntpd on b")
    speeds = {0: 700.0, 1: 690.0, 2: 710.0, 3: 500.0}
    slow = problems(cluster_check.arithmetic(speeds, facts, 0.8))["matrix product"]
    assert "slowest 500 (rank 3 on b)" in slow.found
    assert slow.fix.endswith(" on b")
    assert problems(cluster_check.arithmetic(speeds, facts, 0.7)) == {}


def test_bandwidth_is_compared_with_what_the_planner_assumes() -> None:
    """A ring of 8 sends 2 x 7 / 8 of 256 MB, 448 MB, in 1.211 ms + 15 us at 370 GB/s."""
    speed = LinkSpeed(
        backend="nccl",
        operation="all-reduce",
        place=GroupPlace(8, 1, 8),
        bytes=256_000_000,
        seconds=0.0025,
    )
    assert speed.gigabytes_per_second == pytest.approx(448 / 2.5, rel=1e-9)
    assert speed.assumed(H100) == pytest.approx(448e6 / (448e6 / 370e9 + 15e-6) / 1e9)
    assert problems(cluster_check.bandwidths([speed], H100, 0.4)) == {}
    (slow,) = problems(cluster_check.bandwidths([speed], H100, 0.5)).values()
    assert slow.what == "nccl all-reduce, a node"
    assert slow.expected == "365.5 GB/s, at least 50%"
    across = replace(speed, operation="all-to-all", place=GroupPlace(16, 1, 8), seconds=1.0)
    assert across.gigabytes_per_second == pytest.approx(0.256 * 15 / 16), "over both kinds of link"
    (slow,) = problems(cluster_check.bandwidths([across], H100, 0.5)).values()
    assert slow.what == "nccl all-to-all, 2 nodes"
    assert "NCCL_IB_HCA" in slow.fix
    gloo = replace(across, backend="gloo")
    assert problems(cluster_check.bandwidths([speed, gloo], H100, 0.1)) == {}, "only reported"
    assert problems(cluster_check.bandwidths([gloo], H100, 0.1)), "the only one there is"
    assert problems(cluster_check.bandwidths([gloo], None, 0.1)) == {}


def test_directory_and_space() -> None:
    errors = {0: "", 1: "cannot write: Read-only file system"}
    bad = problems(cluster_check.shared_directory("/ckpt", errors, 10**12, None))["/ckpt"]
    assert "cannot write: Read-only file system (rank 1)" in bad.found
    (full,) = problems(cluster_check.shared_directory("/c", {0: ""}, 10**9, 6 * 10**8)).values()
    assert full.expected.startswith(">= 1.2 GB")
    assert problems(cluster_check.shared_directory("/c", {0: ""}, 12 * 10**8, 6 * 10**8)) == {}


@pytest.mark.parametrize(
    "flags",
    [["--bf16"], ["--optimizer", "adafactor"], ["--no-save-optim"]],
)
def test_the_size_of_a_checkpoint(flags: list[str], pool: Any, tmp_path: Path) -> None:
    """Of the tensors of a real one; the headers of its files do not grow with the model."""
    corpus = write_corpus(tmp_path / "corpus")
    argv = [*MODEL, *flags, "--lr-warmup-iters", "0", "--train-iters", "1"]
    run = [*argv, "--data-path", corpus, "--save", str(tmp_path)]
    ((code, _, message),) = pool.run(pretrain_rank, 1, argv=run)
    assert code == 0, message
    assert latest_step(tmp_path) == 1
    real = sum(map(tensor_bytes, tmp_path.rglob("*.safetensors")))
    assert real == pytest.approx(checkpoint_bytes(parse_args(argv).config, 128), rel=0.02)


def tensor_bytes(path: Path) -> int:
    """A safetensors file begins with the length of its header, in 8 bytes."""
    header = int.from_bytes(path.read_bytes()[:8], "little")
    return path.stat().st_size - 8 - header


def probed(rank: int, world_size: int, *, directory: str) -> tuple[str, str, float]:
    """The shared directory, one that only rank 0 has, and the clock; rank 1 as another node."""
    group = dist.new_group(backend="gloo")
    ranks = RankGroup(rank, world_size, group=group)
    shared = shared_directory_error(Path(directory) / "new", ranks, "a")
    own = shared_directory_error(Path(directory) / f"of-{rank}", ranks, "b")
    return shared, own, clock_offset(ranks, [0, 1])


def test_real_ranks_probe_a_directory_and_their_clocks(pool: Any, tmp_path: Path) -> None:
    found = pool.run(probed, 2, directory=str(tmp_path))
    assert [shared for shared, _, _ in found] == ["", ""]
    assert [own for _, own, _ in found] == [
        "does not see what rank 1 wrote",
        "does not see what rank 0 wrote",
    ]
    assert list(tmp_path.rglob(".check*")) == [], "nothing stays"
    assert found[0][2] == 0.0
    assert abs(found[1][2]) < 1.0, "one machine has one clock"


def test_what_the_kernel_and_nvidia_smi_say(tmp_path: Path) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert active_adapters(tmp_path) == ["mlx5_0:1 400 Gb/sec (4X NDR)"]
    assert active_adapters(tmp_path / "none") == []
    status = "GPU 0: NVIDIA H100\n\t Link 0: 26.562 GB/s\n\t Link 1: <inactive>\n"
    assert active_links(status) == 1


def test_the_table_lists_problems_with_their_fixes() -> None:
    lines = list(
        table_lines(
            [
                Finding(what="torch", found="2.13.0"),
                Finding(what="open files", found="1024", expected=">= 4096", fix="ulimit -n 4096"),
            ]
        )
    )
    assert lines[1:3] == ["ok    torch       2.13.0", "FAIL  open files  1024    >= 4096"]
    assert lines[-1] == "1. open files must be >= 4096 (found 1024); ulimit -n 4096"
    assert list(table_lines([]))[-1] == "no problem found"

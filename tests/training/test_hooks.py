"""Around steps: garbage collection at the same steps on all ranks, profiles, determinism."""

from __future__ import annotations

import gc
import gzip
import json
import os
import re
from pathlib import Path

import pytest
import torch

from megatron_moe.config import RunConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.config.validate import validate
from megatron_moe.errors import UsageError
from megatron_moe.platform import activate
from megatron_moe.platform.determinism import make_deterministic
from megatron_moe.training.hooks import build_hooks
from tests.training.tiny import MODEL, pretrain_rank

RUN = "--train-iters 6 --split 80,20,0 --eval-iters 1 --eval-interval 4"


def collections(rank: int, world_size: int, *, argv: list[str]) -> list[tuple[int, int]]:
    """A run; generation of every full or forced collection, and steps done so far.

    Steps are counted by the optimizer's update, which allocates too little for the automatic
    collector to run inside.
    """
    from megatron.core.optimizer import FP32Optimizer

    seen: list[tuple[int, int]] = []
    steps = 0
    update = FP32Optimizer.step_with_ready_grads

    def counted(self):
        nonlocal steps
        steps += self is first_of(self)
        return update(self)

    firsts: list[FP32Optimizer] = []

    def first_of(optimizer):
        firsts.append(optimizer)
        return firsts[0]

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append((info["generation"], steps))

    FP32Optimizer.step_with_ready_grads = counted
    gc.callbacks.append(note)
    try:
        assert pretrain_rank(rank, world_size, argv=argv)[0] == 0
        assert gc.isenabled()
    finally:
        gc.callbacks.remove(note)
        FP32Optimizer.step_with_ready_grads = update
    # Before the first step the automatic collector is on while the model is built.
    return [event for index, event in enumerate(seen) if event[1] or event == seen[-1]]


def test_with_manual_gc_ranks_collect_at_these_steps_and_no_others(pool, corpus) -> None:
    argv = [*MODEL, *RUN.split(), "--data-path", corpus, "--manual-gc"]
    interval = ["--manual-gc-interval", "2"]
    found = pool.run(collections, 2, argv=[*argv, *interval])
    # After steps 2, 4 and 6, and all and then the youngest around evaluations after 4 and 6. The
    # last collector is restored with the end of the run.
    manual = [(2, 2), (2, 4), (2, 4), (0, 4), (2, 6), (2, 6), (0, 6)]
    for events in found:
        assert events[: len(manual)] == manual
    found = pool.run(collections, 2, argv=[*argv, "--no-manual-gc-eval"])
    for events in found:
        assert [event for event in events if 0 < event[1] < 6] == []


def test_a_profile_of_pytorch_has_the_steps_of_its_range(pool, corpus, tmp_path: Path) -> None:
    line = (
        "--profile --use-pytorch-profiler --profile-step-start 2 --profile-step-end 4 "
        f"--profile-ranks 1 --pytorch-profiler-collect-shapes --tensorboard-dir {tmp_path}"
    )
    argv = [*MODEL, *RUN.split(), "--data-path", corpus, *line.split()]
    assert [result[0] for result in pool.run(pretrain_rank, 2, argv=argv)] == [0, 0]
    (file,) = tmp_path.glob("*.pt.trace.json.gz")
    assert file.name.startswith("rank-1.")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    updates = [e for e in events if e.get("name", "").startswith("Optimizer.step")]
    assert len(updates) == 2, "steps 3 and 4"
    products = [e for e in events if e.get("name") == "aten::mm"]
    assert products
    assert all("Input Dims" in e["args"] for e in products)


WRONG = {
    "--profile": "--profile must be used with --use-pytorch-profiler on a CPU",
    "--use-pytorch-profiler": "--use-pytorch-profiler must be used with --profile",
    "--profile --use-pytorch-profiler": (
        "--use-pytorch-profiler must be used with --tensorboard-dir"
    ),
    "--profile --profile-step-start 5 --profile-step-end 5": (
        "--profile-step-end must be > --profile-step-start (5) (got 5)"
    ),
    "--profile-ranks 0 -1": "--profile-ranks must be numbers that are each >= 0",
    "--straggler-minmax-count 2": "--straggler-minmax-count must be used with --log-straggler",
    "--memory-snapshot-path a": "--memory-snapshot-path must be used with --record-memory-history",
    "--record-memory-history": "--record-memory-history must be unset on a CPU",
    "--manual-gc-interval 3": "--manual-gc-interval must be used with --manual-gc",
}


@pytest.mark.parametrize("line", list(WRONG))
def test_wrong_combinations_are_errors(line: str) -> None:
    config = parse_args(["--train-iters", "9", *line.split()]).config
    with pytest.raises(UsageError) as error:
        _check(config)
    assert WRONG[line] in str(error.value)


def _check(config: RunConfig) -> None:
    validate(config)
    build_hooks(config, 0, activate())


def deterministic_run(rank: int, world_size: int, *, argv: list[str]) -> tuple[int, bool, str]:
    """Exit code, whether other operations were errors during the run, and NCCL's algorithm."""
    from megatron_moe.training.trainer import Trainer

    seen = []
    step = Trainer.train_step

    def noted(self):
        algorithm = os.environ.get("NCCL_ALGO", "")
        holds = torch.are_deterministic_algorithms_enabled()
        holds &= not torch.is_deterministic_algorithms_warn_only_enabled()
        seen.append((holds, algorithm))
        step(self)

    Trainer.train_step = noted
    try:
        code = pretrain_rank(rank, world_size, argv=argv)[0]
    finally:
        Trainer.train_step = step
        torch.use_deterministic_algorithms(False)
    return code, *seen[-1]


def test_deterministic_mode_holds_during_training(pool, corpus, tmp_path) -> None:
    """And twice the same run has the same bits."""
    argv = [*MODEL, "--train-iters", "3", "--data-path", corpus, "--hidden-dropout", "0.1"]
    off, on, again = (tmp_path / name for name in ("off", "on", "again"))
    argv.append("--metrics-file")
    assert pool.run(deterministic_run, 1, argv=[*argv, str(off)]) == [(0, False, "")]
    for file in (on, again):
        flags = [str(file), "--deterministic-mode"]
        assert pool.run(deterministic_run, 1, argv=[*argv, *flags]) == [(0, True, "Ring")]
    assert len(on.read_text().splitlines()) == 3
    assert on.read_text() == again.read_text()


def test_libraries_are_set_up_and_contradicting_variables_are_errors() -> None:
    try:
        environment = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "NCCL_ALGO": "Ring,CollnetChain"}
        make_deterministic(environment)
        assert environment == {
            "CUBLAS_WORKSPACE_CONFIG": ":16:8",
            "NCCL_ALGO": "Ring,CollnetChain",
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        }
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in {
        "NCCL_ALGO": "Ring,Tree",
        "CUBLAS_WORKSPACE_CONFIG": ":0:0",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1",
    }.items():
        with pytest.raises(UsageError, match=f"environment variable {name} must be"):
            make_deterministic({name: value})
        assert not torch.are_deterministic_algorithms_enabled()


def test_every_line_of_a_run_with_forced_routing_says_so(pool, corpus) -> None:
    argv = [*MODEL, "--train-iters", "8", "--data-path", corpus]
    for flags, marks in (([], 0), (["--moe-router-force-load-balancing"], 2)):
        ((code, log, error),) = pool.run(pretrain_rank, 1, argv=[*argv, *flags])
        assert (code, error) == (0, "")
        lines = [line for line in log.splitlines() if line.startswith(" iteration ")]
        assert len(lines) == 2
        assert sum(" | FORCED ROUTING | " in line for line in lines) == marks
        assert bool(re.search("WARNING: --moe-router-force-load-balancing", log)) == bool(marks)

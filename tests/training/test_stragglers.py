"""`--log-straggler` names the rank that slows the others down, and `--record-memory-history`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_moe.config import LoggingConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.errors import UsageError
from megatron_moe.training.hooks import build_hooks
from megatron_moe.training.stragglers import straggler_line
from tests.training.tiny import MODEL, pretrain_rank


def test_the_line_has_the_slowest_and_the_fastest_ranks() -> None:
    speeds = {0: 700.0, 1: 710.0, 2: 455.0, 3: 690.0}
    data = {0: 0.001, 1: 0.002, 2: 0.001, 3: 0.5}
    assert straggler_line(100, speeds, data, 1) == (
        " stragglers at iteration 100 | matrix product: median 695 TFLOP/s,"
        " slowest rank 2 455 TFLOP/s, fastest rank 1 710 TFLOP/s"
        " | data: median 1.5 ms, slowest rank 3 500 ms"
    )
    line = straggler_line(100, speeds, data, 2)
    assert (
        "slowest rank 2 455 TFLOP/s, rank 3 690 TFLOP/s, fastest rank 1 710 TFLOP/s, rank 0" in line
    )
    assert "slowest rank 3 500 ms, rank 1 2 ms" in line


def delayed(rank: int, world_size: int, *, argv: list[str]) -> tuple[int, str, str]:
    """A run in which rank 1 waits 50 ms for each batch."""
    from megatron_moe.training import trainer

    fetch = trainer.fetch_batches

    def late(*arguments: Any) -> Any:
        if rank == 1:
            time.sleep(0.05)
        return fetch(*arguments)

    trainer.fetch_batches = late
    try:
        return pretrain_rank(rank, world_size, argv=argv)
    finally:
        trainer.fetch_batches = fetch


def test_a_rank_that_waits_for_its_data_is_named(pool: Any, corpus: str) -> None:
    argv = [*MODEL, "--data-path", corpus, "--train-iters", "6", "--log-interval", "3"]
    results = pool.run(delayed, 2, argv=[*argv, "--log-straggler"])
    assert [code for code, _, _ in results] == [0, 0]
    lines = [line for line in results[0][1].splitlines() if line.startswith(" stragglers at")]
    assert [line.split(" | ")[0] for line in lines] == [
        " stragglers at iteration 3",
        " stragglers at iteration 6",
    ]
    for line in lines:
        found = re.search(r"data: median .* ms, slowest rank (\d) ([\d.e+]+) ms$", line)
        assert found is not None, line
        assert found[1] == "1"
        assert float(found[2]) >= 50.0, "milliseconds of a step"
    quiet = pool.run(pretrain_rank, 2, argv=argv)
    assert "stragglers" not in quiet[0][1]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the hook asks of PyTorch's allocator, which exists on GPUs alone."""
    calls: list[Any] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda **k: calls.append(k))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda name: calls.append(Path(name).name))
    attach = "_cuda_attach_out_of_memory_observer"
    monkeypatch.setattr(torch._C, attach, calls.append, raising=False)
    return calls


def history(words: str, rank: int, folder: Path) -> list[Any]:
    path = ["--memory-snapshot-path", str(folder / "memory.pickle")]
    line = ["--train-iters", "9", "--record-memory-history", *path, *words.split()]
    gpu: Any = SimpleNamespace(kind="cuda")
    return build_hooks(parse_args(line).config, rank, gpu)


def test_snapshots_of_memory(recorded: list[Any], tmp_path: Path) -> None:
    (hook,) = history("--profile-step-end 2", 3, tmp_path)
    hook.start()
    (settings, observer) = recorded
    assert settings == {"max_entries": 100_000}
    for step in (1, 2, 3):
        hook.after_step(step)
    observer(0, 1, 2, 3)
    hook.close()
    hook.close()
    assert recorded[2:] == [
        "memory-rank-3.pickle",
        "memory-rank-3-out-of-memory.pickle",
        {"enabled": None},
    ]


def test_memory_is_recorded_on_chosen_ranks_into_an_existing_directory(tmp_path: Path) -> None:
    assert history("--profile-ranks 1", 0, tmp_path) == []
    assert len(history("--profile-ranks 1", 1, tmp_path)) == 1
    for rank in (0, 1):  # the error is on every rank
        with pytest.raises(UsageError, match="--memory-snapshot-path must be a file in an exist"):
            history("--profile-ranks 1", rank, tmp_path / "none")
    assert LoggingConfig().memory_snapshot_path == "snapshot.pickle"

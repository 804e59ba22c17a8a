"""The command: which ranks, whose flags, exit codes. What a rank reports: tests/planning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.config.cli import parse_args
from megatron_moe.errors import UsageError
from megatron_moe.parallel.layout import resolve_layout
from tests.training.tiny import MODEL
from tools.dry_run import chosen_ranks, default_ranks, parse, phase_of, run

ROOT = Path(__file__).resolve().parents[2]
TP2_PP2 = [
    *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    *("--pipeline-model-parallel-size", "2"),
]
RUN = [*MODEL, *TP2_PP2, "--train-iters", "10", "--data-path", "none", "--vocab-size", "20000"]


def test_ranks_by_default_are_in_every_kind_of_group():
    """16 ranks: TP 2 innermost, DP 4, two stages of 8 ranks."""
    layout = resolve_layout(parse_args(RUN).config, 16)
    assert default_ranks(layout) == [0, 1, 2, 8, 9, 10, 15]
    assert default_ranks(resolve_layout(parse_args(MODEL).config, 1)) == [0]
    experts = ["--expert-model-parallel-size", "4", "--expert-tensor-parallel-size", "1"]
    layout = resolve_layout(parse_args([*RUN, *experts, "--num-experts", "4"]).config, 16)
    assert 4 in default_ranks(layout), "the second replica of the experts of ranks 0 to 3"
    assert chosen_ranks("3,0,3", layout) == [0, 3]
    for text in ("16", "a", "", "-1"):
        with pytest.raises(UsageError, match=r"--ranks must be numbers < 16"):
            chosen_ranks(text, layout)


def test_a_whole_launch_command_is_read_from_its_program_on():
    words = [
        "--world-size",
        "4",
        "--",
        "torchrun",
        "--nproc-per-node",
        "4",
        "x/pretrain_openmoe.py",
    ]
    assert parse([*words, "--bf16"])[1] == ["--bf16"]
    assert parse(["--world-size", "4", "--", "--bf16"])[1] == ["--bf16"]


@pytest.mark.parametrize(
    ("world_size", "flags", "phase", "message"),
    [
        (4097, RUN, 1, "--world-size must be >= 1 and <= 4096"),
        (4, RUN, 2, "--phase must be >= 1 and <= 1"),
        (6, RUN, 1, "must be a divisor of the 6 ranks"),
        (4, [*RUN, "--lr", "-1"], 1, "--lr must be"),
        (4, [*RUN, "--moe-router-topk", "9"], 1, "--moe-router-topk must be"),
    ],
)
def test_what_training_refuses_is_refused(world_size, flags, phase, message):
    with pytest.raises(UsageError, match=message):
        phase_of(parse_args(flags).config, world_size, phase)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--memory-gib", "nan"], "--memory-gib must be > 0"),
        (["--json", "no/such/found.json"], "--json must be a file in a directory that exists"),
        (["--jobs", "0"], "--jobs must be >= 1"),
    ],
)
def test_own_flags_are_checked_before_a_step(flags, message):
    with pytest.raises(UsageError, match=message):
        run(*parse(["--world-size", "4", *flags, "--", *RUN]))


@pytest.mark.slow
def test_two_stages_in_a_fixed_memory(tmp_path):
    """The tables, the record, and exit code 1 where a rank needs more than there is."""
    words = ["--world-size", "4", "--ranks", "0,2", "--memory-gib", "1e-5", "--json", "found.json"]
    needs_a_gpu = ["--transformer-impl", "transformer_engine", "--gradient-accumulation-fusion"]
    needs_a_gpu += ["--bf16", "--fp8-format", "hybrid"]
    command = [sys.executable, str(ROOT / "tools/dry_run.py"), *words, "--", *RUN, *needs_a_gpu]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "FAULT: rank 0 needs 0.00" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    first, last = found["ranks"]
    assert (first["coordinates"]["pp"], last["coordinates"]["pp"]) == (0, 1)
    assert len(found["faults"]) == 2, "no order differs"
    left_out = "--transformer-impl transformer_engine, --gradient-accumulation-fusion"
    assert f"Without what needs a GPU: {left_out}, --fp8-format hybrid" in done.stdout
    assert first["peak"]["logits"] == 0 < last["peak"]["logits"]
    assert first["peak"]["dispatch_buffers"] > 0
    sums = [rank["peak"] for rank in (first, last)]
    assert all(s["total"] == sum(v for k, v in s.items() if k not in ("total", "at")) for s in sums)
    sent = [c for c in first["collectives"] if c["operation"] == "send"]
    received = [c for c in last["collectives"] if c["operation"] == "receive"]
    assert [c["bytes"] for c in sent] == [c["bytes"] for c in received] != []

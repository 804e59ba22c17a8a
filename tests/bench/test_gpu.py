"""The benchmark of a GPU: refused without one; its parts run, slowly, on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench._moe_layer_cases import Shape
from bench.run import names
from fused_kernels.triton.cases import CASES, Size

ROOT = Path(__file__).resolve().parents[2]
CLOCK = gpu.Clock(torch.device("cpu"), rounds=1)
SIZE = Size(
    tokens=4,
    topk=2,
    experts=4,
    groups=1,
    slots=3,
    hidden=8,
    ffn=8,
    heads=1,
    head_dim=4,
    columns=40,
    chunk=4,
    dtype=torch.float32,
)


def test_it_is_refused_in_one_line_without_a_gpu() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    line = "bench.gpu: error: this device must be a GPU (got 'no CUDA device'); `make bench` needs"
    assert done.stderr.splitlines()[-1].startswith(line)


def test_it_is_no_part_of_the_benchmarks_of_a_cpu() -> None:
    assert "gpu" not in names()


@pytest.mark.slow
def test_every_kernel_is_measured_and_transfers_have_a_target() -> None:
    records = gpu.kernels(CLOCK, SIZE, copied=1024)
    assert [r.name for r in records[1:]] == [f"gpu/{case.name}/share of a copy" for case in CASES]
    assert all(record.value > 0 for record in records)
    judged = {record.name for record in records if record.target}
    assert len(judged) == 4
    assert all("dispatch" in name or "combine" in name for name in judged)


@pytest.mark.slow
def test_both_ways_of_moving_tokens_run() -> None:
    (record,) = gpu.permutation(CLOCK, SIZE)
    assert record.value > 0
    assert record.target == ">= 3.0"


@pytest.mark.slow
def test_both_layers_run() -> None:
    records = gpu.layer(CLOCK, Shape(4, 2, 32, 16, 16), torch.float32)
    assert [record.unit for record in records] == ["ms", "ms", "x"]


def test_the_step_is_one_of_the_widths_of_the_large_model() -> None:
    config = gpu.step_config()
    assert (config.model.hidden_size, config.moe.num_experts) == (2048, 32)
    assert config.moe.moe_layer_freq == "[0,1]"
    assert config.train.bf16


@pytest.mark.gpu
def test_all_of_it_on_a_gpu() -> None:
    assert gpu.main() == 0

"""State of routers that each step changes: a run that resumes equals one that never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_moe.checkpoint.reading import load_logical
from tests.support.pool import Pool
from tests.training.tiny import MODEL, pretrain_rank

RECOMPUTED = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
STATES = {
    "sign": "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0.01 --bf16",
    "quantile": "--moe-router-load-balancing-type quantile_balancing "
    "--moe-router-quantile-balancing-ema 0.5",
    "global": "--moe-router-load-balancing-type global_aux_loss seq_aux_loss "
    "--moe-aux-loss-coeff 0.05 0.01 --moe-z-loss-over chosen",
    "contextual": "--moe-router-type contextual --bf16",
    "pools": "--moe-router-document-pool 2 3 --reset-attention-mask",
    "token hash": "--moe-router-type token_hash --no-moe-router-pre-softmax",
}
BIASED = ("sign", "quantile")


def _run(pool: Pool, world: int, corpus: str, directory: Path, flags: list[str]) -> list[dict]:
    """Train up to step 6; returns the metrics of each step."""
    argv = [*MODEL, "--data-path", corpus, "--split", "100,0,0", "--train-iters", "6"]
    argv += ["--metrics-file", str(directory / "metrics.jsonl"), "--save", str(directory), *flags]
    for code, _, error in pool.run(pretrain_rank, world, argv=argv):
        assert code == 0, error
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def _tensors(directory: Path) -> dict[str, bytes]:
    files = sorted((directory / "iter_0000006").glob("*.safetensors"))
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, RECOMPUTED),
        pytest.param(
            2, "--tensor-model-parallel-size 2 --sequence-parallel", marks=pytest.mark.slow
        ),
        pytest.param(2, "--expert-model-parallel-size 2", marks=pytest.mark.slow),
        pytest.param(2, "--pipeline-model-parallel-size 2", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", STATES)
def test_three_steps_and_three_more_are_six(
    pool: Pool, corpus: str, tmp_path: Path, name: str, world: int, layout: str
) -> None:
    flags = [*STATES[name].split(), *layout.split()]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steps = _run(pool, world, corpus, whole, flags)
    _run(pool, world, corpus, parts, [*flags, "--exit-interval", "3"])
    assert _run(pool, world, corpus, parts, [*flags, "--load", str(parts)]) == steps
    tensors = _tensors(whole)
    assert len(tensors) == world
    assert _tensors(parts) == tensors
    saved = {name: value for name, value in load_logical(parts) if name.endswith("expert_bias")}
    assert bool(saved) == (name in BIASED)
    assert all(value.any() and value.dtype == torch.float32 for value in saved.values())


@pytest.mark.slow
def test_middle_stages_have_the_ids_of_the_tokens(pool: Pool, corpus: str, tmp_path: Path) -> None:
    flags = [
        *STATES["token hash"].split(),
        "--num-layers",
        "6",
        "--moe-layer-freq",
        "[0,1,0,1,0,1]",
    ]
    alone = _run(pool, 1, corpus, tmp_path / "alone", flags)
    stages = [*flags, "--pipeline-model-parallel-size", "3"]
    split = _run(pool, 3, corpus, tmp_path / "split", stages)
    losses = [[float.fromhex(step["lm_loss_hex"]) for step in run] for run in (alone, split)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)

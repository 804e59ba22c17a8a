"""`--check-weight-hash-across-dp-replicas-interval`: one flipped bit on one rank is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_moe.training.replicas import weight_hash
from megatron_moe.training.trainer import Trainer
from tests.training.tiny import MODEL, pretrain_rank

LAYOUTS = {
    "DP2": (2, []),
    "DP2 overlapped": (
        2,
        ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
    ),
    "EP2": (2, ["--expert-model-parallel-size", "2"]),
    "TP2xDP2": (
        4,
        ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--micro-batch-size", "1"],
    ),
}


def flipped(
    rank: int, world_size: int, *, argv: list[str], local: str, who: int
) -> tuple[int, str, str]:
    """A run in which the last bit of one element flips on one rank after step 3."""
    whole = Trainer.train_step

    def step(trainer: Any) -> None:
        whole(trainer)
        if rank == who and trainer.state.iteration == 3:
            params = {n: p for c in trainer.run.chunks for n, p in c.named_parameters()}
            chosen = next(p for n, p in params.items() if local in n)
            chosen.data.view(-1)[:1].view(torch.int32)[0] ^= 1

    Trainer.train_step = step
    try:
        return pretrain_rank(rank, world_size, argv=argv)
    finally:
        Trainer.train_step = whole


def argv_of(corpus: str, *flags: str) -> list[str]:
    argv = [*MODEL, "--data-path", corpus, "--train-iters", "5", "--log-interval", "1"]
    return [*argv, "--check-weight-hash-across-dp-replicas-interval", "2", *flags]


@pytest.mark.parametrize(
    ("name", "local", "who", "named"),
    [
        ("DP2", "router.weight", 1, "moe.router.weight: rank"),
        ("EP2", "input_layernorm", 1, "norm"),
        ("TP2xDP2", "input_layernorm", 3, "norm"),
    ],
)
def test_a_flipped_bit_ends_the_run_on_every_rank(pool, corpus, name, local, who, named):
    world, flags = LAYOUTS[name]
    results = pool.run(flipped, world, argv=argv_of(corpus, *flags), local=local, who=who)
    assert [code for code, *_ in results] == [1] * world, results
    last = results[0][1].splitlines()[-1]
    assert last.startswith(
        " error: weights of data-parallel replicas must be equal (got, at iteration 4, "
    )
    assert named in last
    # Of two replicas nobody knows which is right: the first is named, and the other.
    peer = who - world // 2
    assert any(f"rank {a} not as rank {b}" in last for a, b in ((who, peer), (peer, who)))


@pytest.mark.parametrize("name", ["DP2 overlapped", "TP2xDP2"])
def test_healthy_replicas_are_equal(pool, corpus, name):
    world, flags = LAYOUTS[name]
    results = pool.run(pretrain_rank, world, argv=argv_of(corpus, *flags))
    assert [code for code, *_ in results] == [0] * world, results


def test_experts_with_one_replica_are_not_compared(pool, corpus):
    """With EP2 on two ranks each expert is on one rank: a change of it is no difference."""
    argv = argv_of(corpus, *LAYOUTS["EP2"][1])
    results = pool.run(flipped, 2, argv=argv, local="experts", who=1)
    assert [code for code, *_ in results] == [0, 0], results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_sees_every_bit_and_every_exchange(dtype):
    weight = torch.randn(5_000_000, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = weight_hash(weight).tolist()
    bits = weight.view(torch.int32 if dtype == torch.float32 else torch.int16)
    for place in (0, 4_194_303, 4_194_304, 4_999_999):
        bits[place] ^= 1
        assert weight_hash(weight).tolist() != before
        bits[place] ^= 1
    assert weight_hash(weight).tolist() == before
    weight[[1, 4_999_999]] = weight[[4_999_999, 1]]
    assert weight_hash(weight).tolist() != before
    assert weight_hash(-torch.zeros(3)).tolist() != weight_hash(torch.zeros(3)).tolist()

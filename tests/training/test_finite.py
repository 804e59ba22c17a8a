"""Numbers that are not finite: never in a checkpoint, and the end of the run on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.checkpoint import latest_step, verify
from megatron_moe.checkpoint.finite import check_finite
from megatron_moe.errors import NonFinite
from megatron_moe.model.layer import OpenMoELayer
from megatron_moe.model.sharding.blocks import Block, Part
from megatron_moe.training.trainer import Trainer
from tests.training.tiny import MODEL, pretrain_rank

EP2 = ["--expert-model-parallel-size", "2"]
SHARDED = [*EP2, "--use-distributed-optimizer"]


def damaged(
    rank: int, world_size: int, *, argv: list[str], where: str, after: int
) -> tuple[int, str, str]:
    """A run of which one element becomes NaN or infinite on the last rank after some step."""
    whole = Trainer.train_step

    def step(trainer: Any) -> None:
        whole(trainer)
        if rank != world_size - 1 or trainer.state.iteration != after:
            return
        run = trainer.run
        if where == "weight":
            name = "decoder.layers.1.mlp.moe.experts"
            params = {n: p for c in run.chunks for n, p in c.named_parameters()}
            chosen = next((p for n, p in params.items() if "experts" in n), None)
            assert chosen is not None, f"{name} not in {list(params)}"
            chosen.data.view(-1)[3] = torch.nan
        elif where == "norm":
            layers = [
                m
                for chunk in run.chunks
                for m in chunk.modules()
                if isinstance(m, OpenMoELayer) and m.layer_number == 3
            ]
            for layer in layers:
                layer.input_layernorm.weight.data[0] = torch.nan
        else:
            state = next(
                s
                for part in run.optimizer.chained_optimizers
                for s in part.optimizer.state.values()
            )
            state["exp_avg_sq"].view(-1)[0] = torch.inf

    Trainer.train_step = step
    try:
        return pretrain_rank(rank, world_size, argv=argv)
    finally:
        Trainer.train_step = whole


def argv_of(corpus: str, save: Path, *flags: str) -> list[str]:
    argv = [*MODEL, "--optimizer", "adam", "--data-path", corpus, "--train-iters", "6"]
    return [*argv, "--save", str(save), "--save-interval", "3", "--keep-last", "1", *flags]


@pytest.mark.parametrize(
    ("world", "flags", "where", "kind"),
    [
        (1, [], "moment", "exp_avg_sq of "),
        (2, EP2, "weight", "model of layers.1.moe.experts."),
        (2, [*SHARDED, "--async-save"], "moment", "exp_avg_sq of "),
    ],
)
def test_the_last_good_checkpoint_stays_the_newest(
    pool, corpus, tmp_path, world, flags, where, kind
):
    """Step 6 leaves an element that is not finite: its save fails on all ranks, and writes nothing.

    The moment is damaged when no further gradient can show it.
    """
    argv = argv_of(corpus, tmp_path, *flags)
    results = pool.run(damaged, world, argv=argv, where=where, after=6)
    assert [code for code, *_ in results] == [1] * world, results
    lines = results[0][1].splitlines()
    assert lines[-1] == (
        " error: weights and optimizer state of iteration 6 must be finite to be saved (got 'NaN or"
        " infinity'); nothing was saved: resume from the newest checkpoint"
    )
    named = [line for line in lines if "elements are NaN or infinite" in line]
    assert len(named) == 1
    assert named[0].startswith(f" rank {world - 1}: {kind}")
    assert ": 1 of " in named[0]
    assert latest_step(tmp_path) == 3
    verify(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["iter_0000003", "latest_checkpointed_iteration.txt"]


def test_a_held_out_loss_that_is_not_finite_ends_the_run(pool, corpus, tmp_path):
    """An expert's weight becomes NaN after step 5, which validation sees first."""
    flags = ["--eval-iters", "1", "--eval-interval", "5", "--split", "8,2,0"]
    argv = argv_of(corpus, tmp_path, *EP2, *flags)
    results = pool.run(damaged, 2, argv=argv, where="weight", after=5)
    assert [code for code, *_ in results] == [1, 1], results
    last = results[0][1].splitlines()[-1]
    assert last == " error: validation loss must be finite (got nan at iteration 5)"
    assert latest_step(tmp_path) == 3


PP2 = ["--pipeline-model-parallel-size", "2"]


@pytest.mark.parametrize(("world", "flags"), [(1, []), (2, EP2), (2, PP2)])
def test_a_failed_step_names_layer_samples_and_that_it_comes_again(
    pool, corpus, tmp_path, world, flags
):
    """A norm of layer 2 is NaN after step 2: of the eight samples of step 3, 16 to 23, all fail."""
    argv = argv_of(corpus, tmp_path, *flags)
    results = pool.run(damaged, world, argv=argv, where="norm", after=2)
    assert [code for code, *_ in results] == [1] * world
    last = results[0][1].splitlines()[-1]
    assert " at iteration 3)" in last
    # Under EP2 rank 1 alone is damaged, and reads the second half of each four.
    rows = [18, 19, 22, 23] if flags == EP2 else range(16, 24)
    listed = ", ".join(map(str, rows))
    assert (
        f"the first output that is not finite is that of layer 2 for samples {listed} on ranks"
        f" {world - 1}; repeated, the step has gradient norm nan again"
    ) in last


def _glitch(rank: int, world_size: int, *, argv: list[str]) -> tuple[int, str, str]:
    """A run whose gradient is NaN once, in step 3 on the last rank."""
    from megatron_moe.training.step import LocalGradients

    whole, calls = LocalGradients.record, [0]

    def record(local: Any) -> None:
        calls[0] += 1
        if calls[0] == 3 and rank == world_size - 1:
            local._run.wrapped[0].buffers[0].grad_data.view(-1)[0] = torch.nan
        whole(local)

    LocalGradients.record = record
    try:
        return pretrain_rank(rank, world_size, argv=argv)
    finally:
        LocalGradients.record = whole


def test_a_transient_fault_is_told_from_one_that_comes_again(pool, corpus, tmp_path):
    results = pool.run(_glitch, 2, argv=argv_of(corpus, tmp_path, *EP2))
    assert [code for code, *_ in results] == [1, 1]
    last = results[0][1].splitlines()[-1]
    assert "ranks with non-finite local gradients: 1;" in last
    assert "repeated, the forward pass is finite in all layers; repeated, the step has" in last
    assert last.endswith(": suspect the hardware")


def parts_of(*tensors: torch.Tensor) -> list[Part]:
    return [
        Part("exp_avg", f"t{n}", tuple(t.shape), Block.whole(t.shape), t, writer=True)
        for n, t in enumerate(tensors)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_every_element_counts(dtype, value):
    good, bad = torch.ones(7, dtype=dtype), torch.ones(3, 1000, dtype=dtype)
    check_finite(parts_of(good, bad, torch.zeros(0)), 4, 2)
    for place in (0, 1499, 2999):
        bad.fill_(1).view(-1)[place] = value
        with pytest.raises(NonFinite) as caught:
            check_finite(parts_of(good, bad), 4, 2)
        line = "rank 2: exp_avg of t1: 1 of 3000 elements are NaN or infinite"
        assert caught.value.details == (line,)


def test_large_finite_numbers_are_no_error():
    """Their squares and their sum overflow."""
    check_finite(parts_of(torch.full((100,), 3e38), torch.full((100,), -3e38)), 1, 0)


def test_an_error_names_few_of_many_tensors():
    with pytest.raises(NonFinite) as caught:
        check_finite(parts_of(*[torch.tensor([torch.nan])] * 20), 1, 0)
    assert len(caught.value.details) == 9
    assert caught.value.details[-1] == "rank 0: and 12 more tensors"

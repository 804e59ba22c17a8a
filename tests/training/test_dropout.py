"""Dropout by flags and by phase: in all its places, and equal where ranks hold equal tensors.

S positions, B rows, H hidden; tensor-parallel ranks hold a share of S under sequence parallelism.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.pool import Pool
from tests.training.tiny import MODEL, pretrain_rank

BOTH = ["--hidden-dropout", "0.3", "--attention-dropout", "0.3"]
DENSE = ["--moe-layer-freq", "[0]*4", "--tensor-model-parallel-size", "2"]


def _first_loss(pool: Pool, world: int, corpus: str, path: Path, flags: list[str]):
    """Training loss of the first step, and held-out loss of the model that it started from."""
    argv = [*MODEL, "--data-path", corpus, "--split", "80,20,0", "--train-iters", "1"]
    argv += ["--lr", "0", "--lr-decay-style", "constant", "--lr-warmup-iters", "0"]
    argv += ["--eval-iters", "2", "--metrics-file", str(path), *flags]
    results = pool.run(pretrain_rank, world, argv=argv)
    for code, _, error in results:
        assert code == 0, error
    (held_out,) = [line for line in results[0][1].splitlines() if line.startswith(" validation at")]
    return json.loads(path.read_text().splitlines()[0])["lm_loss_hex"], held_out


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, []),
        (1, ["--recompute-granularity", "full", "--recompute-method", "uniform"]),
        (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
        (2, ["--pipeline-model-parallel-size", "2"]),
        (2, ["--expert-model-parallel-size", "2"]),
    ],
    ids=["one process", "recomputed", "TP2", "PP2", "EP2"],
)
def test_flags_change_training_and_not_evaluation(world, layout, pool, corpus, tmp_path):
    if "full" in layout:
        layout = [*layout, "--recompute-num-layers", "1"]
    train, held_out = _first_loss(pool, world, corpus, tmp_path / "none", layout)
    losses = [train]
    for flag in ("--hidden-dropout", "--attention-dropout"):
        found = _first_loss(pool, world, corpus, tmp_path / flag, [*layout, flag, "0.3"])
        losses.append(found[0])
        assert found[1] == held_out
    assert len(set(losses)) == 3


def _chunk(flags: list[str]):
    from tests.training.ranks import tiny_run

    run = tiny_run(torch.distributed.get_world_size(), flags)
    return run, run.chunks[0]


def residual_streams(rank: int, world_size: int, *, flags: list[str]) -> dict[str, Tensor]:
    """What enters the first layer and leaves the last, for rows of one token alone, [S, B, H]."""
    run, chunk = _chunk(flags)
    found: dict[str, Tensor] = {}

    def keep_first(module, args, kwargs):
        found["embedded"] = kwargs["hidden_states"].detach()

    def keep_last(module, args, output):
        found["last"] = output[0].detach()

    chunk.decoder.layers[0].register_forward_pre_hook(keep_first, with_kwargs=True)
    chunk.decoder.layers[-1].register_forward_hook(keep_last)
    chunk.train()
    chunk(torch.full((2, run.config.data.seq_length), 7))
    return found


def test_ranks_that_hold_the_same_positions_drop_the_same(pool):
    one, other = pool.run(residual_streams, 2, flags=[*DENSE, "--hidden-dropout", "0.5"])
    assert 0.3 < (one["embedded"] == 0).float().mean() < 0.7
    for name in ("embedded", "last"):
        assert torch.equal(one[name], other[name])


def test_ranks_that_hold_different_positions_drop_differently(pool):
    flags = [*DENSE, "--sequence-parallel", "--hidden-dropout", "0.5"]
    one, other = pool.run(residual_streams, 2, flags=flags)
    assert len(one["embedded"]) == 16
    for rank in (one, other):
        assert 0.3 < (rank["embedded"] == 0).float().mean() < 0.7
    assert not torch.equal(one["embedded"] == 0, other["embedded"] == 0)
    # Without dropout all positions of rows of one token are embedded alike.
    plain, same = pool.run(residual_streams, 2, flags=flags[:-2])
    assert torch.equal(plain["embedded"], same["embedded"])


def attended(rank: int, world_size: int, *, flags: list[str]) -> Tensor:
    """Core attention of the first layer in a training pass, of the same heads on every rank."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    run, chunk = _chunk(flags)
    core = chunk.decoder.layers[0].self_attention.core_attention.train()
    generator = torch.Generator().manual_seed(3)
    query, key, value = torch.randn((3, 16, 2, 2, 8), generator=generator)
    if not run.ctx.layout.sequence_parallel:
        return core(query, key, value)
    with get_cuda_rng_tracker().fork():  # as Megatron-Core's block does
        return core(query, key, value)


@pytest.mark.parametrize("sequence", [[], ["--sequence-parallel"]], ids=["TP", "TP and SP"])
def test_heads_of_different_ranks_drop_differently(sequence, pool):
    one, other = pool.run(attended, 2, flags=[*DENSE, *sequence, "--attention-dropout", "0.5"])
    assert not torch.equal(one, other)
    plain, same = pool.run(attended, 2, flags=[*DENSE, *sequence])
    assert torch.equal(plain, same)


def changed(rank: int, world_size: int, *, before: list[str], after: list[str]) -> list[Tensor]:
    """Logits in training of a model whose dropout was changed, and of one built so."""
    from megatron_moe.training.run import set_dropout
    from tests.training.ranks import tiny_config

    outputs = []
    for flags in (before, after):
        _, chunk = _chunk(flags)
        chunk.train()
        set_dropout([chunk], tiny_config(after).model)
        torch.manual_seed(1)
        outputs.append(chunk(torch.arange(64).view(2, 32)).detach())
        torch.distributed.barrier()
        from megatron_moe.parallel.context import destroy_parallel

        destroy_parallel()
    return outputs


@pytest.mark.parametrize(("before", "after"), [([], BOTH), (BOTH, []), (BOTH[:2], BOTH[2:])])
def test_a_model_whose_dropout_was_changed_is_one_built_so(before, after, pool):
    ((found, expected),) = pool.run(changed, 1, before=before, after=after)
    assert torch.equal(found, expected)

"""Micro-batches: the same samples a step in every layout, exact resume, no side effects."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.config import RunConfig
from megatron_moe.data.batch import Batch
from megatron_moe.data.loader import collate, to_batch
from megatron_moe.data.pipeline import Data, build_data
from megatron_moe.errors import UsageError
from tests.data.corpus import random_documents, run_config, write

GLOBAL = 8
STEPS = 5


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    return write(folder / "x", random_documents(200))


def data_of(
    prefix: str, dp: tuple[int, int] = (0, 1), micro: int = 2, consumed: int = 0, **changes: Any
) -> Data:
    settings = {"micro_batch_size": micro, "train_iters": STEPS, "split": "7,2,1", **changes}
    return build_data(
        run_config(prefix, **settings),
        dp_rank=dp[0],
        dp_size=dp[1],
        num_microbatches=GLOBAL // (micro * dp[1]),
        consumed_train_samples=consumed,
        reads_data=True,
    )


def rows(batches: Iterator[Batch] | None) -> list[list[int]]:
    assert batches is not None
    return [row.tolist() for batch in batches for row in batch.tokens_BS]


def order(prefix: str, dp_size: int, micro: int, consumed: int = 0) -> list[list[int]]:
    """Rows of the global order, put together from what every rank reads."""
    ranks = [
        rows(data_of(prefix, (rank, dp_size), micro, consumed).train) for rank in range(dp_size)
    ]
    blocks = len(ranks[0]) // micro
    return [
        row
        for block in range(blocks)
        for rank in ranks
        for row in rank[block * micro : (block + 1) * micro]
    ]


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 1), (1, 8), (2, 2), (2, 4), (4, 1), (8, 1)])
def test_order_does_not_depend_on_the_layout(prefix: str, dp_size: int, micro: int) -> None:
    expected = order(prefix, 1, 2)
    assert len(expected) == STEPS * GLOBAL
    assert len({tuple(row) for row in expected}) == len(expected)
    assert order(prefix, dp_size, micro) == expected


@pytest.mark.parametrize("done", [1, 3, 5])
def test_resume_in_another_layout(prefix: str, done: int) -> None:
    expected = order(prefix, 1, 2)
    assert order(prefix, 4, 2, consumed=done * GLOBAL) == expected[done * GLOBAL :]


def test_resume_after_another_batch_size(prefix: str) -> None:
    assert order(prefix, 2, 2, consumed=12) == order(prefix, 1, 2)[12:36]


def test_batch_holds_what_it_says(prefix: str) -> None:
    data = data_of(prefix)
    assert data.train is not None
    batch = next(data.train)
    assert batch.tokens_BS.shape == batch.labels_BS.shape == batch.loss_mask_BS.shape == (2, 16)
    assert batch.tokens_BS.dtype == batch.labels_BS.dtype == torch.int64
    assert batch.loss_mask_BS.dtype == torch.float32
    assert torch.equal(batch.tokens_BS[:, 1:], batch.labels_BS[:, :-1])
    assert batch.loss_mask_BS.eq(1).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(prefix: str, workers: int) -> None:
    plain, background = data_of(prefix), data_of(prefix, num_workers=workers)
    assert rows(background.train) == rows(plain.train)
    expected = rows(plain.valid())
    assert [rows(background.valid()) for _ in range(3)] == [expected] * 3
    partly = background.valid()
    assert partly is not None
    next(partly)
    assert rows(background.valid()) == expected


def test_evaluation_is_the_same_each_time_and_other_documents(prefix: str) -> None:
    data = data_of(prefix, eval_iters=3)
    valid = rows(data.valid())
    assert rows(data.valid()) == valid
    assert len(valid) == len(rows(data.test())) == 3 * GLOBAL
    in_training, held_out = ({id_ for row in part for id_ in pieces(row)} for part in
                             (rows(data.train), valid))  # fmt: skip
    assert held_out
    assert not in_training & held_out


def pieces(row: list[int]) -> list[tuple[int, ...]]:
    """Runs of four ids, which hardly two random documents share."""
    return [tuple(row[i : i + 4]) for i in range(len(row) - 3) if 999 not in row[i : i + 4]]


def test_torchs_generator_is_left_alone(prefix: str) -> None:
    before = torch.get_rng_state()
    data = data_of(prefix, num_workers=1)
    rows(data.train)
    rows(data.valid())
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_that_do_not_read(prefix: str) -> None:
    config = run_config(prefix, split="8,2,0")
    shape = {"dp_rank": 0, "dp_size": 1, "num_microbatches": 1, "consumed_train_samples": 0}
    idle = build_data(config, reads_data=False, **shape)
    reader = build_data(config, reads_data=True, **shape)
    assert (idle.train, idle.valid(), idle.test()) == (None, None, None)
    assert (idle.has_valid, idle.has_test) == (reader.has_valid, reader.has_test) == (True, False)
    assert idle.fingerprint == reader.fingerprint
    none = build_data(run_config(prefix, eval_iters=0), reads_data=True, **shape)
    assert (none.has_valid, none.valid()) == (False, None)


def test_samples_or_steps(prefix: str) -> None:
    data = data_of(prefix, train_iters=None, train_samples=3 * GLOBAL + 5)
    assert len(rows(data.train)) == 3 * GLOBAL
    with pytest.raises(UsageError, match=r"--train-iters must be a number of steps \(got None\)"):
        data_of(prefix, train_iters=None)


def test_fingerprint(prefix: str, tmp_path: Path) -> None:
    """Follows what decides the order, not where the files are, the layout or the run's length."""
    base = data_of(prefix)
    for kind in ("bin", "idx"):
        (tmp_path / f"moved.{kind}").write_bytes(Path(f"{prefix}.{kind}").read_bytes())
    moved = data_of(str(tmp_path / "moved"), (1, 2), 4, 16, train_iters=9, num_workers=1)
    assert moved.fingerprint == base.fingerprint
    for change in ({"seed": 5}, {"seq_length": 8}, {"split": "1,0,0"}, {"vocab_size": 1200}):
        assert data_of(prefix, **change).fingerprint != base.fingerprint
    write(tmp_path / "moved", random_documents(200, seed=9))
    assert data_of(str(tmp_path / "moved")).fingerprint != base.fingerprint


def refused(config: RunConfig, reads: bool) -> str:
    with pytest.raises(UsageError) as caught:
        build_data(
            config,
            dp_rank=0,
            dp_size=1,
            num_microbatches=1,
            consumed_train_samples=0,
            reads_data=reads,
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_rank_refuses_bad_data(prefix: str, tmp_path: Path) -> None:
    """With the same words, whether it reads or not."""
    write(tmp_path / "cut", random_documents(10))
    os.truncate(tmp_path / "cut.bin", 10)
    write(tmp_path / "big", [[1], [2, 999]])
    good = run_config(prefix)
    cases = {
        r"size of .*cut.bin must be .*\(got 10\)": run_config(str(tmp_path / "cut")),
        r"data path must be .*got '/no/such'": run_config("/no/such"),
        "token id in document 1": run_config(str(tmp_path / "big"), vocab_size=999),
        "--split must be a share": run_config(str(tmp_path / "big"), split="9,1,0"),
        r"a tokenizer must be given \(got None\)": replace(
            good, data=replace(good.data, vocab_size=None)
        ),
    }
    for says, config in cases.items():
        assert re.search(says, refused(config, True))
        assert refused(config, True) == refused(config, False)


def test_data_shorter_than_a_batch_repeats(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[7] * 5])
    data = data_of(prefix, split="1,0,0")
    assert rows(data.train) == [[7] * 16] * (STEPS * GLOBAL)


def test_collate_makes_a_mask_of_floats() -> None:
    import numpy as np

    sample = {
        "tokens": np.arange(3),
        "labels": np.arange(3),
        "loss_mask": np.array([1, 0, 1], bool),
    }
    batch = to_batch(collate([sample, sample]))
    assert batch.loss_mask_BS.tolist() == [[1.0, 0.0, 1.0]] * 2

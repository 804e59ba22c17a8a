"""Synthetic documents: ids in range, the next one after each, the same for every rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe.config import DataConfig
from megatron_moe.config.cli import parse_args
from megatron_moe.config.validate import validate
from megatron_moe.data.mock import DOCUMENTS, LONGEST, with_mock_data
from megatron_moe.data.pipeline import build_data
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.build import build_tokenizer

FAMILIES = {"NullTokenizer": ["--vocab-size", "50"], "ByteTokenizer": []}


def settings(kind: str, folder: Path) -> list[str]:
    line = ["--mock-data", "--data-cache-path", str(folder), "--tokenizer-type", kind]
    return [*line, *FAMILIES[kind], "--train-iters", "4", "--seq-length", "64", "--eval-iters", "1"]


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_documents_count_up_and_end(kind: str, tmp_path: Path) -> None:
    data = parse_args(settings(kind, tmp_path)).config.data
    tokenizer = build_tokenizer(data)
    (prefix,) = with_mock_data(data, tokenizer).data_path
    documents = IndexedDataset(prefix)
    assert len(documents) == DOCUMENTS
    eod, others = tokenizer.eod, [i for i in range(tokenizer.vocab_size) if i != tokenizer.eod]
    following = dict(zip(others, [*others[1:], others[0]], strict=True))
    for ids in documents[:50]:
        assert 2 <= len(ids) <= LONGEST
        assert ids[-1] == eod
        assert eod not in ids[:-1]
        assert [following[int(i)] for i in ids[:-2]] == ids[1:-1].tolist()
    before = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").unlink()
    with_mock_data(data, tokenizer)  # another rank, or a later run
    assert Path(f"{prefix}.bin").read_bytes() == before


def test_a_run_reads_them_in_every_split(tmp_path: Path) -> None:
    config = parse_args([*settings("NullTokenizer", tmp_path), "--micro-batch-size", "2"]).config
    validate(config)
    ranks = [
        build_data(
            config,
            dp_rank=rank,
            dp_size=2,
            num_microbatches=1,
            consumed_train_samples=0,
            reads_data=True,
        )
        for rank in range(2)
    ]
    assert ranks[0].fingerprint == ranks[1].fingerprint
    assert ranks[0].has_valid
    for data in ranks:
        batch = next(data.train)
        tokens, labels = batch.tokens_BS.numpy(), batch.labels_BS.numpy()
        assert tokens.shape == (2, 64)
        assert np.mean((tokens + 1) % 49 == labels) > 0.9


WRONG = {
    "--data-path x": "--mock-data must be used without other data",
    "--train-data-path x": "--mock-data must be used without other data",
    "--objective sft": "--mock-data must be unset with --objective sft",
}


@pytest.mark.parametrize("line", list(WRONG))
def test_other_data_is_an_error(line: str) -> None:
    config = parse_args(["--mock-data", "--train-iters", "1", *line.split()]).config
    with pytest.raises(UsageError) as error:
        validate(config)
    assert WRONG[line] in str(error.value)


def test_without_the_flag_nothing_is_written() -> None:
    data = DataConfig(data_path=("a",))
    assert with_mock_data(data, build_tokenizer(DataConfig(vocab_size=9))) is data

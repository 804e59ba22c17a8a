"""Packing against a plain re-statement of it and against Megatron-Core; Megatron-Core's defects."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_moe.config import RunConfig
from megatron_moe.data.blend import Blend
from megatron_moe.data.causal import CheckedIndexedDataset
from megatron_moe.data.datasets import build_split
from megatron_moe.data.indexed.check import inspect_source
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.build import build_tokenizer
from megatron_moe.tokenizer.simple import NullTokenizer
from tests.data.corpus import VOCAB, random_documents, run_config, write


class Padded(NullTokenizer):
    """With a pad id, as a text tokenizer has."""

    def __init__(self) -> None:
        super().__init__(VOCAB)
        self.pad = 0


def ours(
    prefix: str,
    samples: int,
    tokenizer: Tokenizer | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    **changes: Any,
) -> Any:
    config: RunConfig = run_config(prefix, **changes)
    blend = Blend(flag="--data-path", prefixes=(prefix,), weights=None, bounds=bounds)
    sources = {prefix: inspect_source(prefix)}
    chosen = tokenizer or build_tokenizer(config.data)
    return build_split("train", blend, samples, config, chosen, sources)


def engines(
    prefix: str,
    samples: int,
    tokenizer: Tokenizer | None = None,
    documents: tuple[int, int] | None = None,
    cache: str = "",
    seed: int = 1234,
) -> GPTDataset:
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=16,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=tokenizer or NullTokenizer(VOCAB),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    low = IndexedDataset(prefix)
    first, last = documents or (0, len(low))
    indices = np.arange(first, last, dtype=np.int32)
    return GPTDataset(low, prefix, indices, samples, Split.train, config)


def packed(documents: Sequence[Sequence[int]], seed: int, seq_length: int) -> list[list[int]]:
    """One epoch said plainly: shuffle documents, join, cut with one token shared, shuffle."""
    state = np.random.RandomState(seed)
    order = np.arange(len(documents), dtype=np.int32)
    state.shuffle(order)
    stream = [token for number in order for token in documents[number]]
    count = (len(stream) - 1) // seq_length
    places = np.arange(count, dtype=np.uint32)
    state.shuffle(places)
    return [stream[p * seq_length : (p + 1) * seq_length + 1] for p in map(int, places)]


def text_of(sample: dict[str, np.ndarray]) -> list[int]:
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
    return [*sample["tokens"].tolist(), int(sample["labels"][-1])]


@pytest.mark.parametrize("seed", [1, 99])
@pytest.mark.parametrize("mmap", [True, False])
def test_one_epoch(tmp_path: Path, seed: int, mmap: bool) -> None:
    documents = random_documents(60)
    prefix = write(tmp_path / "x", documents)
    expected = packed(documents, seed, 16)
    dataset = ours(prefix, len(expected), seed=seed, mmap_bin_files=mmap)
    assert len(dataset) == len(expected)
    assert [text_of(dataset[i]) for i in range(len(dataset))] == expected
    assert all(dataset[i]["loss_mask"].all() for i in range(len(dataset)))


@pytest.mark.parametrize(("samples", "documents"), [(30, 60), (200, 60), (173, 7), (9, 1)])
def test_equals_megatron_core_over_epochs(tmp_path: Path, samples: int, documents: int) -> None:
    prefix = write(tmp_path / "x", random_documents(documents, seed=documents))
    dataset, reference = ours(prefix, samples), engines(prefix, samples)
    assert len(dataset) == len(reference) >= samples
    for i in range(len(dataset)):
        for key in ("tokens", "labels"):
            assert dataset[i][key].tolist() == reference[i][key].tolist()


def test_part_of_the_documents(tmp_path: Path) -> None:
    documents = random_documents(50)
    prefix = write(tmp_path / "x", documents)
    dataset = ours(prefix, 5, bounds=(0.2, 0.9))
    assert [text_of(dataset[i]) for i in range(5)] == packed(documents[10:45], 1234, 16)[:5]


def test_short_documents_and_repeats(tmp_path: Path) -> None:
    """Documents of no and of one token, and data shorter than a sample, by hand."""
    prefix = write(tmp_path / "x", [[], [5], []])
    dataset = ours(prefix, 2)
    assert [text_of(dataset[i]) for i in range(2)] == [[5] * 17] * 2
    prefix = write(tmp_path / "y", [[], [3, 4], [5], list(range(100, 120))])
    dataset = ours(prefix, 12)
    # 23 tokens an epoch; 12 samples of 16 need 193 tokens, 9 epochs
    stream = dataset.document_index
    assert sorted(stream.tolist()) == [0] * 9 + [1] * 9 + [2] * 9
    flat = [t for d in stream for t in [[3, 4], [5], list(range(100, 120))][d]]
    cuts = [flat[i * 16 : i * 16 + 17] for i in range((23 * 9 - 1) // 16)]
    assert sorted(text_of(dataset[i]) for i in range(len(dataset))) == sorted(cuts)


def test_each_sample_has_its_own_loss_mask(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[0, 1, 2, 0] * 5, list(range(1, 300))])
    dataset = ours(prefix, 18, Padded())
    for i in range(18):
        sample = dataset[i]
        assert sample["loss_mask"].tolist() == (sample["labels"] != 0).tolist()
    assert 0 < sum(not dataset[i]["loss_mask"].all() for i in range(18)) < 18


def test_megatron_core_applies_the_first_mask_to_all(tmp_path: Path) -> None:
    """The defect that the mask of our own avoids."""
    prefix = write(tmp_path / "x", [[0, 1, 2, 0] * 5, list(range(1, 300))])
    reference = engines(prefix, 18, Padded())
    padded = next(i for i in range(18) if 0 in reference[i]["labels"].tolist())
    fresh = engines(prefix, 18, Padded())
    assert not fresh[padded]["loss_mask"].all()
    other = next(i for i in range(18) if 0 not in fresh[i]["labels"].tolist())
    assert not fresh[other]["loss_mask"].all()


def test_a_split_without_tokens_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, 2, 3], []])
    with pytest.raises(UsageError, match="0 documents without tokens"):
        ours(prefix, 4, bounds=(0.1, 0.2))


def test_megatron_core_counts_epochs_of_nothing_for_ever(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1, 2, 3]])

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(TimeoutError):
            engines(prefix, 4, documents=(1, 1))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_replaced_corpus_gets_new_indices(tmp_path: Path) -> None:
    first, second = random_documents(40, seed=1), random_documents(40, seed=2, longest=90)
    prefix = write(tmp_path / "x", first)
    assert text_of(ours(prefix, 9)[0]) == packed(first, 1234, 16)[0]
    stale = engines(prefix, 9, cache=str(tmp_path / "engine"))[0]["tokens"].tolist()
    write(tmp_path / "x", second)
    assert text_of(ours(prefix, 9)[0]) == packed(second, 1234, 16)[0]
    # Megatron-Core keeps the old indices: what it reads is in neither order
    kept = engines(prefix, 9, cache=str(tmp_path / "engine"))[0]["tokens"].tolist()
    assert kept not in (stale, packed(second, 1234, 16)[0][:-1])


def test_indices_are_shared_and_follow_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    prefix = write(tmp_path / "a" / "x", random_documents(40))
    ours(prefix, 9)
    entries = sorted(path.name for path in (tmp_path / "a" / "cache").glob("samples-*"))
    ours(prefix, 9, data_cache_path=str(tmp_path / "elsewhere"))
    assert sorted(path.name for path in (tmp_path / "elsewhere").glob("samples-*")) == entries
    ours(prefix, 9, seed=3)
    ours(prefix, 9, seq_length=8)
    ours(prefix, 10)
    ours(prefix, 9, bounds=(0.0, 0.5))
    assert len(list((tmp_path / "a" / "cache").glob("samples-*"))) == 5


def test_an_id_that_came_later_is_refused(tmp_path: Path) -> None:
    documents = [[1] * 20, [], [2] * 20, [3] * 20]
    prefix = write(tmp_path / "x", documents)
    dataset = ours(prefix, 3)
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.seek(2 * 25)
        stream.write((60000).to_bytes(2, "little"))
    # document 2: the second, which is empty, has no sequence
    with pytest.raises(UsageError, match=r"document 2 of .*must be >= 0 and <= 999 \(got 60000\)"):
        [dataset[i] for i in range(3)]


@pytest.mark.parametrize("vocab_size", [65499, 65500, 65510, 65536, 65537])
def test_token_type_comes_from_the_index(tmp_path: Path, vocab_size: int) -> None:
    """Between 65500 and 65536 Megatron-Core's fast path reads i32 files as u16."""
    documents = [[vocab_size - 1 - i for i in range(40)]]
    prefix = write(tmp_path / "x", documents, vocab_size)
    dataset = ours(prefix, 2, vocab_size=vocab_size)
    assert sorted(text_of(dataset[i]) for i in range(2)) == sorted(
        [documents[0][:17], documents[0][16:33]]
    )


def test_short_reads(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [list(range(100, 200))])
    checked = CheckedIndexedDataset(prefix, mmap=False)
    assert checked[0].tolist() == list(range(100, 200))
    assert checked.get(0, offset=90, length=5).tolist() == list(range(190, 195))
    os.truncate(f"{prefix}.bin", 150)
    with pytest.raises(
        UsageError, match=r"tokens at byte 0 of .*x\.bin must be 200 bytes \(got 150\)"
    ):
        checked.get(0)
    assert len(IndexedDataset(prefix, mmap=False)[0]) == 100  # Megatron-Core makes up the rest


def test_beyond_two_to_the_31_tokens(tmp_path: Path) -> None:
    """Three documents of 2^30 tokens in a file that is all hole but for the last tokens."""
    length, prefix = 1 << 30, str(tmp_path / "x")
    write(prefix, [[1], [2], [3]])
    with open(f"{prefix}.idx", "r+b") as stream:
        stream.seek(34)
        stream.write(np.full(3, length, "<i4").tobytes())
        stream.write((np.arange(3) * 2 * length).astype("<i8").tobytes())
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.truncate(3 * length * 2)
        stream.seek(3 * length * 2 - 20)
        stream.write(np.arange(1, 11, dtype="<u2").tobytes())
    source = inspect_source(prefix)
    assert source.tokens == 3 * length > 2**31
    low = CheckedIndexedDataset(prefix)
    assert low.get(2, offset=length - 10, length=10).tolist() == list(range(1, 11))
    dataset = ours(prefix, 3, seq_length=1 << 29, vocab_size=60000)
    starts = {tuple(row) for row in dataset.sample_index.tolist()}
    assert starts == {(d, o) for d in range(3) for o in (0, 1 << 29)}

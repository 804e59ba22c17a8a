"""Blends and splits: what is asked for, against Megatron-Core, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list

from megatron_moe.config import DataConfig
from megatron_moe.data.blend import SPLITS, blends_of, parse_blend, parse_split, tokens_in, usable
from megatron_moe.data.datasets import build_split
from megatron_moe.data.indexed.check import inspect_source
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.simple import NullTokenizer
from tests.data.corpus import VOCAB, random_documents, run_config, write


@pytest.mark.parametrize(
    "values",
    [
        ("a",),
        ("a", "b"),
        ("a", "b", "c"),
        ("1", "a"),
        ("0.3", "a", "0.7", " b "),
        ("30", "a", "1e2", "b"),
    ],
)
def test_parse_like_megatron_core(values: tuple[str, ...]) -> None:
    prefixes, weights = get_blend_from_list(list(values))
    assert parse_blend("--data-path", values) == (
        tuple(prefixes),
        None if weights is None else tuple(weights),
    )


def test_a_quoted_list_and_a_file_of_a_pair_are_errors_with_their_fix(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"take the quotes off: --data-path 0\.3 a 0\.7 b"):
        parse_blend("--data-path", ("0.3 a 0.7 b",))
    prefix = tmp_path / "2 words"
    for suffix in (".bin", ".idx"):
        prefix.with_name(prefix.name + suffix).touch()
        with pytest.raises(UsageError, match=rf"a prefix, without \{suffix} .*; use {prefix}$"):
            parse_blend("--data-path", (f"{prefix}{suffix}",))
    # A prefix may have spaces, and end with .bin.
    assert parse_blend("--data-path", (str(prefix),)) == ((str(prefix),), None)
    odd = f"{prefix}.bin"
    Path(f"{odd}.idx").touch()
    assert parse_blend("--data-path", (odd,)) == ((odd,), None)


def test_weight_zero_is_left_out() -> None:
    assert parse_blend("--data-path", ("1", "a", "0", "b")) == (("a",), (1.0,))


@pytest.mark.parametrize(
    "values",
    [
        ("0", "a", "0", "b"),
        ("-1", "a", "2", "b"),
        ("nan", "a"),
        ("inf", "a"),
        ("1", "a", "b", "c"),
        ("a", "1"),
        ("1", "a", "2"),
        ("1",),
    ],
)
def test_bad_weights(values: tuple[str, ...]) -> None:
    with pytest.raises(
        UsageError, match=r"--train-data-path must be a list of (prefixes, or WEIGHT|weights >= 0)"
    ):
        parse_blend("--train-data-path", values)


@pytest.mark.parametrize("split", ["969,30,1", "1,0,0", "99,1", "1", "0.8, 0.1, 0.1", "5,0,5"])
def test_splits_like_megatron_core(split: str) -> None:
    engine = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    assert parse_split(split) == engine


@pytest.mark.parametrize("split", ["", "a,b", "0,1,1", "1,-1,1", "1,1,1,1", "inf,1,1", "nan"])
def test_bad_splits(split: str) -> None:
    with pytest.raises(UsageError, match="--split must be one to three shares of documents"):
        parse_split(split)


def test_blends_of_flags() -> None:
    shared = blends_of(DataConfig(data_path=("a",), split="9,1,0"))
    assert [shared[name] is not None for name in SPLITS] == [True, True, False]
    own = blends_of(DataConfig(train_data_path=("a",), test_data_path=("2", "b", "1", "c")))
    assert own["train"] is not None
    assert own["test"] is not None
    assert own["valid"] is None
    assert (own["train"].bounds, own["test"].weights) == ((0.0, 1.0), (2.0, 1.0))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (DataConfig(), r"--data-path must be .*\(got ''\)"),
        (DataConfig(valid_data_path=("a",)), r"--data-path must be .*\(got ''\)"),
        (
            DataConfig(data_args_path="/no/such"),
            r"--data-args-path must be .*got '/no/such'\); .*No such file",
        ),
    ],
)
def test_refused_flags(data: DataConfig, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        blends_of(data)


def test_words_of_a_file(tmp_path: Path) -> None:
    """As Megatron-LM reads it: words between any blanks."""
    path = tmp_path / "words"
    path.write_text("0.3 a\n\t0.7  b\n")
    as_words = blends_of(DataConfig(data_path=("0.3", "a", "0.7", "b")))
    from_file = blends_of(DataConfig(data_args_path=str(path)))
    for name in SPLITS:
        one, other = as_words[name], from_file[name]
        assert one is not None
        assert other is not None
        assert (one.prefixes, one.weights, one.bounds) == (
            other.prefixes,
            other.weights,
            other.bounds,
        )
    for content, says in ((" \n", "the file is empty"), ("1 a b", "a list of prefixes, or WEIGHT")):
        path.write_text(content)
        with pytest.raises(UsageError, match=f"--data-args-path must be .*{says}"):
            blends_of(DataConfig(data_args_path=str(path)))
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"--data-args-path .*words must be UTF-8"):
        blends_of(DataConfig(data_args_path=str(path)))


def engine_splits(blend: tuple[list[str], Any], split: str, sizes: list[int]) -> list[Any]:
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=16,
        blend=blend,
        split=split,
        path_to_cache="",
        tokenizer=NullTokenizer(VOCAB),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


def our_split(name: str, samples: int, *paths: str, **changes: Any) -> Any:
    config = run_config(*paths, **changes)
    blend = blends_of(config.data)[name]
    assert blend is not None
    sources = {prefix: inspect_source(prefix) for prefix in blend.prefixes}
    return build_split(name, blend, samples, config, NullTokenizer(VOCAB), sources)


def rows(dataset: Any, count: int) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(count)]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    a = write(tmp_path / "a", random_documents(60, seed=1))
    return a, write(tmp_path / "b", random_documents(30, seed=2))


@pytest.mark.parametrize("samples", [1, 20, 150])
def test_blend_equals_megatron_core(pair: tuple[str, str], samples: int) -> None:
    reference = engine_splits((list(pair), [0.3, 0.7]), "8,1,1", [samples, 7, 3])
    for name, engine, count in zip(SPLITS, reference, (samples, 7, 3), strict=True):
        dataset = our_split(name, count, "0.3", pair[0], "0.7", pair[1], split="8,1,1")
        assert len(dataset) >= count
        assert rows(dataset, count) == rows(engine, count)


def test_without_weights_equals_megatron_core_until_it_runs_dry(pair: tuple[str, str]) -> None:
    engine = engine_splits((list(pair), None), "1,0,0", [10_000, 0, 0])[0]
    epoch = len(engine)
    few = engine_splits((list(pair), None), "1,0,0", [epoch - 9, 0, 0])[0]
    assert rows(our_split("train", epoch - 9, *pair), epoch - 9) == rows(few, epoch - 9)
    assert len(our_split("train", 4 * epoch, *pair)) >= 4 * epoch > epoch


def test_blends_are_kept_by_content(pair: tuple[str, str]) -> None:
    cache = Path(pair[0]).parent / "cache"

    def entries(*words: str) -> int:
        our_split("train", 20, *words)
        return len(list(cache.glob("blend-*")))

    weighted = ("0.3", pair[0], "0.7", pair[1])
    assert [entries(*weighted), entries(*weighted)] == [1, 1]
    assert entries("0.4", pair[0], "0.6", pair[1]) == 2
    write(pair[1], random_documents(30, seed=3))
    assert entries(*weighted) == 3


def test_one_weighted_source_is_the_source(pair: tuple[str, str]) -> None:
    alone = rows(our_split("train", 20, pair[0]), 20)
    assert rows(our_split("train", 20, "3", pair[0]), 20) == alone
    assert rows(our_split("train", 20, "3", pair[0], "0", "/not/there"), 20) == alone


def test_blends_never_draw_more_than_was_built(tmp_path: Path) -> None:
    """Over random weights and sizes: Megatron-Core's surplus always covers its own rounding."""
    rng = np.random.default_rng(0)
    prefixes = [write(tmp_path / str(i), random_documents(5, seed=i)) for i in range(5)]
    for _ in range(12):
        used = prefixes[: rng.integers(2, 6)]
        values = [w for p in used for w in (str(float(rng.random() ** 4 + 1e-3)), p)]
        count = int(rng.integers(1, 60))
        dataset = our_split("train", count, *values)
        assert len(rows(dataset, count)) == count


def test_tokens_of_a_split(pair: tuple[str, str]) -> None:
    documents = random_documents(60, seed=1)
    source = inspect_source(pair[0])
    assert tokens_in(source, (0.0, 1.0)) == sum(map(len, documents))
    assert tokens_in(source, (0.1, 0.15)) == sum(map(len, documents[6:9]))


def test_splits_without_tokens(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", random_documents(20))
    blends = blends_of(DataConfig(data_path=(prefix,)))
    sources = {prefix: inspect_source(prefix)}
    assert usable("train", blends["train"], "969,30,1", sources) is blends["train"]
    assert usable("test", blends["test"], "969,30,1", sources) is None
    few = blends_of(DataConfig(data_path=(prefix,), split="999,1,0"))["valid"]
    with pytest.raises(
        UsageError, match=r"--split must be a share .*got '999,1,0 of 20 documents'"
    ):
        usable("valid", few, "999,1,0", sources)

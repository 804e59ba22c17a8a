"""`--decoder-start-token-id` and the padding plane, on exact ids.

The expected rows are those of seqio's `DecoderFeatureConverter`: targets, and the same shifted by
one with id 0 at the start of the row and, in packed rows, of each part of it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_moe.config import DataConfig, ObjectiveConfig, RunConfig
from megatron_moe.config.validate import validate
from megatron_moe.data.batch import extra_planes, inputs_of
from megatron_moe.data.blend import Blend
from megatron_moe.data.datasets import build_split
from megatron_moe.data.indexed.check import inspect_source
from megatron_moe.data.objectives.select import plan_objective
from megatron_moe.data.objectives.ul2 import pack_row
from megatron_moe.data.pipeline import build_data
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.build import build_tokenizer
from tests.data import corpus as corpora


def config_of(path: str, **objective: Any) -> RunConfig:
    return replace(corpora.run_config(path), objective=ObjectiveConfig(**objective))


def dataset_of(path: str, samples: int, **objective: Any) -> Any:
    config = config_of(path, **objective)
    blend = Blend(flag="--data-path", prefixes=(path,), weights=None, bounds=(0.0, 1.0))
    sources = {path: inspect_source(path)}
    return build_split("train", blend, samples, config, build_tokenizer(config.data), sources)


def test_inputs_by_hand() -> None:
    """The example of seqio's documentation: targets 3 8 1 9 1 5 4 1, packed from three texts."""
    targets = np.array([3, 8, 1, 9, 1, 5, 4, 1])
    begins = np.array([1, 0, 0, 1, 0, 1, 0, 0], dtype=bool)
    assert inputs_of(targets, 0, begins).tolist() == [0, 3, 8, 0, 9, 0, 5, 4]
    assert inputs_of(targets, 0, begins & False).tolist() == [0, 3, 8, 1, 9, 1, 5, 4]


def test_a_denoised_row_by_hand() -> None:
    inputs, targets = np.array([5, 6, 99]), np.array([99, 7])
    sample = pack_row(inputs, targets, 9, end=1, pad=0, start=0)
    assert sample["tokens"].tolist() == [0, 5, 6, 99, 1, 99, 7, 1, 0]
    assert sample["labels"].tolist() == [5, 6, 99, 1, 99, 7, 1, 0, 0]
    assert sample["loss_mask"].tolist() == [False] * 4 + [True] * 3 + [False] * 2
    assert sample["padding"].tolist() == [False] * 7 + [True] * 2
    full = pack_row(inputs, targets, 7, end=1, pad=0, start=0)
    assert full["tokens"].tolist() == [0, 5, 6, 99, 1, 99, 7]
    assert full["labels"].tolist() == [5, 6, 99, 1, 99, 7, 1]
    assert not full["padding"].any()


def test_padding_without_a_start_token() -> None:
    """The end of the row's text has no target: it is padding, as in packed rows of seqio."""
    sample = pack_row(np.array([5, 6, 99]), np.array([99, 7]), 9, end=1, pad=0)
    assert sample["tokens"].tolist() == [5, 6, 99, 1, 99, 7, 1, 0, 0]
    assert sample["labels"].tolist() == [6, 99, 1, 99, 7, 1, 0, 0, 0]
    assert sample["padding"].tolist() == [False] * 6 + [True] * 3


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return corpora.write(tmp_path / "text", corpora.random_documents(60, seed=5, longest=12))


def rows(dataset: Any, count: int) -> list[tuple[list[int], list[int], list[bool]]]:
    samples = [dataset[i] for i in range(count)]
    return [tuple(s[name].tolist() for name in ("tokens", "labels", "loss_mask")) for s in samples]


def test_rows_predict_all_their_text(corpus: str) -> None:
    """The same text as without: what were S + 1 ids are S, the last being the next row's first."""
    plain, started = (
        rows(dataset_of(corpus, 8), 8),
        rows(dataset_of(corpus, 8, decoder_start_token_id=7), 8),
    )
    for (tokens, _, _), (inputs, labels, mask) in zip(plain, started, strict=True):
        assert labels == tokens
        assert inputs == [7, *tokens[:-1]]
        assert all(mask)


def test_separate_documents_start_too(corpus: str) -> None:
    dataset = dataset_of(
        corpus,
        8,
        decoder_start_token_id=7,
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=True,
    )
    eod, ends = dataset.config.tokenizer.eod, 0
    for sample in map(dataset.__getitem__, range(8)):
        labels, tokens = sample["labels"].tolist(), sample["tokens"].tolist()
        document = position = 0
        for place, token in enumerate(tokens):
            first = place == 0 or labels[place - 1] == eod
            if first and place:
                document, position, ends = document + 1, 0, ends + 1
            assert token == (7 if first else labels[place - 1])
            assert sample["documents"][place] == document
            assert sample["positions"][place] == position
            assert sample["loss_mask"][place] == (not first or place == 0)
            position += 1
    assert ends > 3


def test_prefixes_are_of_the_same_ids(corpus: str) -> None:
    """Loss on a suffix, which may be all but the first id: the first id is never predicted."""
    dataset = dataset_of(corpus, 40, objective="prefix-lm", decoder_start_token_id=7)
    firsts = []
    for sample in map(dataset.__getitem__, range(40)):
        first = int(sample["loss_mask"].argmax())
        assert sample["loss_mask"][first:].all()
        firsts.append(first)
    assert min(firsts) >= 1
    assert max(firsts) <= len(sample["labels"]) - 1


def test_the_start_token_is_part_of_the_data(corpus: str) -> None:
    config = config_of(corpus, decoder_start_token_id=7)
    tokenizer = build_tokenizer(config.data)
    assert plan_objective(config, tokenizer).identity == {"decoder_start_token_id": 7}
    assert plan_objective(config_of(corpus), tokenizer).identity == {}
    beyond = config_of(corpus, decoder_start_token_id=1 << 20)
    validate(beyond)
    with pytest.raises(
        UsageError, match="--decoder-start-token-id must be an id of the vocabulary"
    ):
        plan_objective(beyond, tokenizer)


@pytest.mark.parametrize(("objective", "wanted"), [("causal", ()), ("ul2", ("padding",))])
def test_padding_is_read_where_rows_have_any(objective: str, wanted: tuple[str, ...]) -> None:
    config = config_of("x", objective=objective)
    assert extra_planes(config) == wanted, "counted apart in statistics of routing"
    model = replace(config.model, zero_padding_activations=True)
    assert extra_planes(replace(config, model=model)) == wanted


def test_conversations(tmp_path: Path) -> None:
    """Rows of 96 ids, all of them targets; each conversation starts where they are separate."""
    path = tmp_path / "chat.jsonl"
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": q}] for q in "abc"]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))

    def row(**settings: Any) -> dict[str, list[int]]:
        config = config_of(str(path), objective="sft", **settings)
        data = DataConfig(tokenizer_type="ByteTokenizer", seq_length=96, data_path=(str(path),))
        model = replace(config.model, zero_padding_activations=True)
        config = replace(config, data=replace(data, num_workers=0, split="1,0,0"), model=model)
        run = {"dp_rank": 0, "dp_size": 1, "num_microbatches": 1, "reads_data": True}
        batch = next(build_data(config, consumed_train_samples=0, **run).train)
        names = ("tokens", "labels", "loss_mask", "padding", "documents")
        planes = {name: getattr(batch, f"{name}_BS") for name in names}
        return {name: plane[0].tolist() for name, plane in planes.items() if plane is not None}

    plain, started = row(), row(decoder_start_token_id=0)
    text = plain["tokens"]
    length = text.index(0)
    assert 60 < length < 96
    assert started["labels"] == text
    assert started["tokens"] == [0, *text[:-1]]
    assert started["loss_mask"] == [0.0, *plain["loss_mask"][:-1]]
    assert started["padding"] == [0] * length + [1] * (96 - length)
    assert plain["padding"] == [0] * (length - 1) + [1] * (97 - length)
    apart = row(decoder_start_token_id=0, reset_attention_mask=True)
    assert apart["labels"] == text
    places = [i for i in range(1, 96) if apart["documents"][i] != apart["documents"][i - 1]]
    assert len(places) == 3
    assert [apart["tokens"][i] for i in places] == [0, 0, 0]
    kept = [i for i in range(1, 96) if i not in places]
    assert [apart["tokens"][i] for i in kept] == [text[i - 1] for i in kept]

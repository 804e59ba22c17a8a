"""Where documents are in a row: by hand, and as Megatron-Core finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_moe.config import RunConfig
from megatron_moe.data.batch import Batch, document_planes, extra_planes
from megatron_moe.tokenizer.simple import NullTokenizer
from tests.data.corpus import VOCAB, random_documents, write
from tests.data.objectives.runs import data_of

BOTH = {"reset_position_ids": True, "reset_attention_mask": True}


def planes(batch: Batch) -> tuple[Any, Any]:
    found = (batch.positions_BS, batch.documents_BS)
    return tuple(None if plane is None else plane.tolist() for plane in found)


def test_by_hand() -> None:
    begins = np.array([1, 0, 0, 1, 1, 0, 0], dtype=bool)
    names = ("positions", "documents")
    found = document_planes(begins, names)
    assert found["positions"].tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert found["documents"].tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert list(document_planes(begins, names[1:])) == ["documents"]
    assert document_planes(begins, ()) == {}
    # a row may begin in the middle of a document
    begins[0] = False
    assert document_planes(begins, names)["documents"].tolist() == [0, 0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize("objective", ["causal", "prefix-lm"])
def test_as_megatron_core_cuts_rows(tmp_path: Path, objective: str) -> None:
    """Positions and mask of the same samples, made by Megatron-Core for every sample of its own."""
    documents = random_documents(300, longest=12)
    prefix = write(tmp_path / "x", documents)
    batches = list(data_of(prefix, objective=objective, **BOTH).train or ())
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=16,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache="",
        tokenizer=NullTokenizer(VOCAB),
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=False,
        create_attention_mask=True,
    )
    low, rows = IndexedDataset(prefix), len(batches) * 2
    engine = GPTDataset(low, prefix, np.arange(len(low)), rows, Split.train, config)
    cuts = 0
    for number in range(rows):
        batch, row = batches[number // 2], number % 2
        sample = engine[number]
        assert batch.tokens_BS[row].tolist() == sample["tokens"].tolist()
        assert batch.positions_BS is not None
        assert batch.documents_BS is not None
        assert batch.positions_BS[row].tolist() == sample["position_ids"].tolist()
        ids = batch.documents_BS[row]
        sees = (ids[:, None] == ids[None]).tril()
        assert sees.tolist() == (~sample["attention_mask"][0]).tolist()
        cuts += int(ids[-1])
    assert cuts > rows


def test_each_flag_by_itself(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", random_documents(300, longest=12))

    def first(**flags: bool) -> Batch:
        return next(data_of(prefix, **flags).train)  # type: ignore[arg-type]

    plain, both = first(), first(**BOTH)
    assert planes(plain) == (None, None)
    assert planes(first(reset_position_ids=True)) == (planes(both)[0], None)
    assert planes(first(reset_attention_mask=True)) == (None, planes(both)[1])
    assert plain.tokens_BS.tolist() == both.tokens_BS.tolist()
    assert plain.loss_mask_BS.tolist() == both.loss_mask_BS.tolist()
    assert extra_planes(RunConfig()) == ()


def test_conversations_of_a_row(tmp_path: Path) -> None:
    """Cut where a conversation begins, not at the end of each of its turns; pads by themselves."""
    talks = [
        [{"role": ("user", "assistant")[i % 2], "content": str(i)} for i in range(turns)]
        for turns in (2, 4)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    settings = {"objective": "sft", "tokenizer_type": "ByteTokenizer", "vocab_size": None}
    data = data_of(str(path), seq_length=128, **settings, **BOTH)
    # "<s>[INST] 0 [/INST]" is 19 ids, an answer and its end 2
    short, long = 21, 42
    seen = set()
    for batch in data.train or ():
        positions, documents = planes(batch)
        for row in range(2):
            expected: list[int] = []
            lengths = (short, long) if documents[row][short] else (long, short)
            for number, length in enumerate((*lengths, 128 - short - long)):
                expected += [number] * length
            assert documents[row] == expected
            places = [*range(lengths[0]), *range(lengths[1]), *range(128 - short - long)]
            assert positions[row] == places
            seen.add(lengths)
    assert len(seen) == 2
    alone = next(data_of(str(path), seq_length=128, sft_pack=False, **settings, **BOTH).train)  # type: ignore[arg-type]
    assert [row[-1] for row in planes(alone)[1]] == [1, 1]


def test_a_conversation_that_fills_its_row(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "x" * 99}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(talk) + "\n")
    settings = {"objective": "sft", "tokenizer_type": "ByteTokenizer", "vocab_size": None}
    batch = next(data_of(str(path), seq_length=32, **settings, **BOTH).train)  # type: ignore[arg-type]
    assert planes(batch) == ([list(range(32))] * 2, [[0] * 32] * 2)


def test_a_run_does_not_go_on_with_other_flags(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", random_documents(300))
    prints = {
        data_of(prefix, **flags).fingerprint
        for flags in ({}, BOTH, {"reset_position_ids": True}, {"reset_attention_mask": True})
    }
    assert len(prints) == 4
    assert data_of(prefix).identity.get("reset") is None

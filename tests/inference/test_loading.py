"""What is loaded is what was saved, from either layout, and with the right tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.config import DataConfig
from megatron_moe.convert import model as convert_model
from megatron_moe.errors import UsageError
from megatron_moe.inference.loading import LoadOptions, load
from tests.inference.cases import CONFIG, model, save
from tests.tokenizer.test_huggingface import make


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("hf") / "weights", layout="hf")


def _options(path: Path, **more: Any) -> LoadOptions:
    return LoadOptions(path=path, **more)


@pytest.mark.parametrize("part", [convert_model.PART_BYTES, 1000])
def test_a_native_checkpoint(native: Path, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_model, "PART_BYTES", part)
    found = load(_options(native))
    expected = model().state_dict()
    assert expected.keys() == found.model.state_dict().keys()
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, expected[name])
    assert not found.model.training
    assert (found.step, found.max_length, found.tokenizer.size, found.tokenizer.eod) == (
        7,
        40,
        259,
        1,
    )
    assert not found.drops_tokens


def test_hugging_face_weights_are_the_same_model(native: Path, hf: Path) -> None:
    found = load(_options(hf, tokenizer_type="ByteTokenizer"))
    tokens = torch.tensor([[70, 80, 90]])
    expected = load(_options(native)).model(tokens, training_capacity=False).logits
    assert torch.equal(found.model(tokens, training_capacity=False).logits, expected)


def test_the_capacity_is_the_checkpoints_own(native: Path) -> None:
    found = load(_options(native, capacity="eval"))
    assert found.drops_tokens
    assert found.model.moe.moe_eval_capacity_factor == 0.25


def test_bf16_is_a_cast_with_logits_of_full_precision(native: Path) -> None:
    found = load(_options(native, dtype="bf16"))
    tokens = torch.tensor([[70, 80, 90]])
    expected = model().to(torch.bfloat16)(tokens, training_capacity=False).logits
    # The logits matrix keeps the checkpoint's precision, so it is off by a cast of it at most.
    torch.testing.assert_close(
        found.model(tokens, training_capacity=False).logits, expected, rtol=0.05, atol=0.3
    )
    assert found.model.layers[0].attention.query.weight.dtype == torch.bfloat16
    assert torch.equal(found.model.output.weight, model().output.weight)


def test_tokenizers_beside_hugging_face_weights_are_found(hf: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(hf, weights)
    with pytest.raises(
        UsageError, match=r"--tokenizer-model must be given \(got None\).*beside the"
    ):
        load(_options(weights))
    file = make(weights, ["<pad>", "</s>", "<unk>"])
    with pytest.raises(UsageError, match=r"a tokenizer of <= 384 ids.*it has 400"):
        load(_options(weights))
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    values["model"]["vocab"] = {word: i for word, i in vocabulary.items() if i < 300}
    values["model"]["merges"] = []
    file.write_text(json.dumps(values))
    found = load(_options(weights))
    assert (found.tokenizer.size, found.tokenizer.decode(found.tokenizer.encode("wörd"))) == (
        300,
        "wörd",
    )
    elsewhere = tmp_path / "tokenizer.json"
    file.rename(elsewhere)
    assert load(_options(weights, tokenizer_model=str(elsewhere))).tokenizer.size == 300


def test_numbers_for_a_model_without_a_tokenizer(hf: Path) -> None:
    assert load(_options(hf, tokenizer_type="NullTokenizer")).tokenizer.encode("5 383") == [5, 383]


def test_sentinels_of_the_run_are_known(tmp_path: Path) -> None:
    data = DataConfig(tokenizer_type="ByteTokenizer", vocab_extra_ids=4)
    found = load(_options(save(tmp_path, replace(CONFIG, data=data))))
    assert found.tokenizer.encode("<extra_id_0>") == [262]
    assert found.tokenizer.size == 263


def test_what_is_not_there_is_refused(native: Path, hf: Path, tmp_path: Path) -> None:
    cases: list[tuple[LoadOptions, str]] = [
        (_options(tmp_path / "none"), "none"),
        (_options(native, step=8), "8"),
        (_options(hf, step=8), "--ckpt-step"),
        (_options(native, format="hf"), r"config\.json"),
        (_options(native, device="abacus"), "--device"),
        (_options(native, tokenizer_type="NullTokenizer"), "tokenizer of the checkpoint"),
        (_options(native, tokenizer_type="Abacus"), "--tokenizer-type"),
    ]
    for wanted, message in cases:
        with pytest.raises(UsageError, match=message):
            load(wanted)

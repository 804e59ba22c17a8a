"""Exported folders where this project is not installed, in lm-eval, and with their tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.convert.formats import ConversionTarget, write
from tests.convert.cases import CONFIG, VOCAB, model_of
from tests.convert.exported import VARIANTS, export, reference_of, varied
from tests.data.pieces import train

PROGRAM = Path(__file__).with_name("modeling_program.py")
SENTENCES = [
    "The router sends each token to its experts.",
    "Zwei Experten, ein Token: naïve Wörter.",
    "def route(x):\n    return x  # 東京 と 京都",
] * 20


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_without_this_project(tmp_path: Path, variant: str) -> None:
    """In a process that has torch and `transformers`, but neither the checkout nor its package."""
    model = export(tmp_path / "hf", varied(VARIANTS[variant]))
    tokens = torch.tensor([[5, 90, 3, 3, 41, 17], [8, 66, 2, 7, 7, 30]])
    site = Path(torch.__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    # Neither the environment's variables nor its path files, one of which names the checkout.
    python = [sys.executable, "-I", "-S", str(PROGRAM)]
    done = subprocess.run(
        [*python, str(tmp_path / "hf"), str(site), json.dumps(tokens.tolist())],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["class"], found["config"]) == ("OpenMoeForCausalLM", "OpenMoeConfig")
    assert found["ours"] == []
    reference, rows = reference_of(model), tokens
    with torch.no_grad():
        logits = reference(tokens, training_capacity=False).logits
        for _ in range(6):
            best = reference(rows, training_capacity=False).logits[:, -1].argmax(-1, keepdim=True)
            rows = torch.cat((rows, best), dim=1)
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=1e-4, atol=1e-4)
    assert found["chosen"] == rows.tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model with a SentencePiece tokenizer beside it."""
    path = tmp_path_factory.mktemp("exported")
    train(
        path / "mine.model",
        SENTENCES,
        vocab_size=VOCAB - 2,
        byte_fallback=False,
        hard_vocab_limit=False,
    )
    data = replace(CONFIG.data, tokenizer_type="SentencePieceTokenizer")
    config = replace(CONFIG, model=replace(CONFIG.model, max_position_embeddings=64), data=data)
    model = replace(model_of(config), tokenizer_files=(path / "mine.model",))
    write(model, ConversionTarget(format="hf", path=path / "hf"), lambda _: None)
    return path / "hf"


TEXTS = (
    "The experts of each token.",
    "  two  spaces, \ttab\nand a line\n",
    "naïve 東京 \U0001f600 ﬁ ① \uff21",
    "</s> <pad> <unk> ▁ are text",
    "",
)


def test_the_tokenizer_has_the_ids_of_training(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from megatron_moe.tokenizer.sentencepiece import SentencePieceTokenizer

    ours = SentencePieceTokenizer(str(folder / "tokenizer.model"))
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for text in TEXTS:
        ids = ours.tokenize(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == ours.detokenize(ids)
    assert (theirs.pad_token_id, theirs.eos_token_id) == (ours.pad, ours.eod) == (0, 1)
    ended = [*ours.tokenize("The router"), 1]
    assert theirs.decode(ended) == "The router</s>"
    assert theirs.decode(ended, skip_special_tokens=True) == "The router"
    both = theirs(["The router", "a"], padding=True)
    assert both["attention_mask"][1][0] == 0, "padding belongs on the left"
    theirs.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again(TEXTS[0])["input_ids"] == ours.tokenize(TEXTS[0])


def test_the_ends_of_texts_are_the_tokenizer_s(tmp_path: Path) -> None:
    """Of a tokenizer with other ids than the released one: generation ends where documents end."""
    train(
        tmp_path / "tokenizer.model",
        SENTENCES,
        vocab_size=VOCAB - 2,
        byte_fallback=False,
        hard_vocab_limit=False,
        pad_id=-1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
    )
    data = replace(CONFIG.data, tokenizer_type="SentencePieceTokenizer")
    model = model_of(replace(CONFIG, data=data))
    model = replace(model, tokenizer_files=(tmp_path / "tokenizer.model",))
    write(model, ConversionTarget(format="hf", path=tmp_path / "hf"), lambda _: None)
    values = json.loads((tmp_path / "hf/config.json").read_text())
    ids = [values[f"{role}_token_id"] for role in ("pad", "bos", "eos")]
    assert ids == [2, 2, 2]


def test_lm_eval_s_own_backend(folder: Path) -> None:
    """All three kinds of requests, in batches, against this project's answers to them."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from megatron_moe.inference.harness import HarnessModel
    from megatron_moe.inference.loading import LoadOptions, load

    theirs = HFLM(
        pretrained=str(folder), trust_remote_code=True, device="cpu", batch_size=2, dtype="float32"
    )
    ours = HarnessModel(load(LoadOptions(path=folder)), 2)
    assert theirs.max_length == 64

    def ask(kind: Any, *arguments: Any) -> tuple[Any, Any]:
        requests = [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]
        return getattr(theirs, kind)(requests), getattr(ours, kind)(requests)

    pairs = [("The router sends", " each token"), ("The", " experts"), ("def", " route(x):")]
    for found, right in zip(*ask("loglikelihood", *pairs), strict=True):
        assert found[0] == pytest.approx(right[0], rel=1e-4)
        assert found[1] == right[1]
    texts = [("The router sends each token to its experts. " * 4,), ("Zwei Experten",)]
    theirs.custom_prefix_token_id = ours.eot_token_id
    for found, right in zip(*ask("loglikelihood_rolling", *texts), strict=True):
        assert found == pytest.approx(right, rel=1e-4)
    options = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    found, right = ask("generate_until", ("The router", options), ("def route of each", options))
    # That backend decodes a continuation alone, where SentencePiece drops the space in front.
    assert found == [each.lstrip() for each in right]
    assert all(found)

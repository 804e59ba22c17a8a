"""Conversations: the ids that tuning makes of the same turns."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import sentencepiece
import torch

from megatron_moe.config import DataConfig
from megatron_moe.data.objectives.chat import read_line
from megatron_moe.data.objectives.chat_source import encode_exchanges
from megatron_moe.errors import UsageError
from megatron_moe.inference.loading import LoadedModel
from megatron_moe.inference.prompts import (
    ANSWER_BEGIN,
    ANSWER_END,
    Conversation,
    conversation_text,
    encode_conversation,
    unfinished_answer,
)
from megatron_moe.inference.scoring import Scorer
from megatron_moe.inference.text import TextTokenizer
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.build import build_tokenizer
from tests.inference.cases import CONFIG, TOKENIZER, model

TEXT = TextTokenizer(TOKENIZER, CONFIG.data)
TURNS = [
    ("system", "Be brief."),
    ("user", "What is a mixture?"),
    ("assistant", "A sum."),
    ("user", "Of what?"),
    ("assistant", "Experts."),
]


def _tuned(turns: list[tuple[str, str]], tokenizer: Tokenizer = TOKENIZER) -> list[list[int]]:
    """Prompts and answers in turn, as the data of `--objective sft` has them."""
    line = json.dumps([{"role": role, "content": content} for role, content in turns]).encode()
    return [ids for ids, _ in encode_exchanges(read_line(line, "messages", "the case"), tokenizer)]


def test_a_conversation_has_the_ids_of_tuning() -> None:
    first, answer, second, last = _tuned(TURNS)
    talk = Conversation(TEXT, "Be brief.")
    prompt = talk.ask("What is a mixture?")
    assert prompt == first
    talk.add_answer(prompt, TEXT.encode("A sum."))
    assert talk.ask("Of what?") == [*first, *answer, *second]
    assert last[-1] == answer[-1] == TEXT.eod


def test_without_a_system_turn() -> None:
    prompt, _ = _tuned(TURNS[1:3])
    talk = Conversation(TEXT)
    assert talk.ask("What is a mixture?") == prompt
    assert talk.ask("What is a mixture?") == prompt, "a question alone is not remembered"


def _dicts(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A tokenizer to which it matters whether texts come together or each by itself."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "words.txt").write_text(
        "\n".join(f"A sum of {i} experts. Of what?" for i in range(200))
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "words.txt"),
        model_prefix=str(folder / "pieces"),
        vocab_size=300,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    kind, file = "SentencePieceTokenizer", str(folder / "pieces.model")
    return DataConfig(tokenizer_type=kind, tokenizer_model=file)


def test_a_conversation_as_one_text_has_the_ids_of_tuning(pieces: DataConfig) -> None:
    tokenizer = build_tokenizer(pieces)
    text = TextTokenizer(tokenizer, pieces)
    first, answer, second, last = _tuned(TURNS, tokenizer)
    asked = conversation_text(_dicts(TURNS[:4]), to_answer=True)
    assert encode_conversation(text, asked) == [*first, *answer, *second]
    # What is appended is the answer; begun by the task or not, it is tokenized as a whole.
    assert encode_conversation(text, asked + "Experts.") == [*first, *answer, *second, *last[:-1]]
    begun = conversation_text(_dicts([*TURNS[:4], ("assistant", "Exp")]), to_answer=False)
    assert encode_conversation(text, begun + "erts.") == encode_conversation(
        text, asked + "Experts."
    )
    together = tokenizer.tokenize(asked.replace(ANSWER_BEGIN, "").replace(ANSWER_END, ""))
    assert together != [i for i in encode_conversation(text, asked) if i != text.eod], (
        "the case shows nothing"
    )
    assert encode_conversation(text, "Of what?") == tokenizer.tokenize("Of what?")


def test_an_answer_is_a_text_of_its_own(pieces: DataConfig) -> None:
    tokenizer = build_tokenizer(pieces)
    text = TextTokenizer(tokenizer, pieces)
    made, config = model(), replace(CONFIG, data=pieces)
    asked = conversation_text(_dicts([("user", "Of?")]), to_answer=True)
    ids, (word, *_) = encode_conversation(text, asked), text.encode("experts")
    with torch.no_grad():  # a model that says this word
        x_BSH, _ = made.hidden_states(torch.tensor([ids]), training_capacity=False)
        made.output.weight[word] = 100 * x_BSH[0, -1]
    scorer = Scorer(LoadedModel(model=made, config=config, tokenizer=text, source="", step=0), 1)
    said = text.decode([word])
    assert text.decode([*ids, word]).endswith(f" {said}"), "the case needs a blank after a question"
    assert scorer.continuations([(asked, {"max_gen_toks": 1})]) == [said]


def test_what_is_said_of_the_last_answer() -> None:
    assert unfinished_answer(conversation_text(_dicts(TURNS[:4]), to_answer=True)) == ""
    assert unfinished_answer(conversation_text(_dicts(TURNS), to_answer=False)) == "Experts."
    assert unfinished_answer("Of what?") is None


@pytest.mark.parametrize(
    ("turns", "to_answer", "named"),
    [
        (TURNS, True, r"role of the last turn in .* must be user \(got 'assistant'\)"),
        (TURNS[:4], False, r"last turn .* must be assistant \(got 'user'\)"),
        ([], True, "last turn"),
        (TURNS[2:], True, r"role of turn 1 in a task's conversation .* \(got 'assistant'\)"),
        ([("user", f"a{ANSWER_END}b")], True, "content of turn 1"),
        ([("user", "a"), ("assistant", f"b{ANSWER_BEGIN}")], False, "content of turn 2"),
    ],
)
def test_turns_that_tuning_does_not_have(
    turns: list[tuple[str, str]], to_answer: bool, named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        conversation_text(_dicts(turns), to_answer=to_answer)

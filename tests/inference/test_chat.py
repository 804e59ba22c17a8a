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
from megatron_moe.inference.answers import Scorer
from megatron_moe.inference.chat import BEGINS, ENDS, Conversation, answer_of, as_text, ids_of
from megatron_moe.inference.loading import Loaded
from megatron_moe.inference.text import Text
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.build import build_tokenizer
from tests.inference.cases import CONFIG, TOKENIZER, model

TEXT = Text(TOKENIZER, CONFIG.data)
TURNS = [
    ("system", "Be brief."),
    ("user", "What is a mixture?"),
    ("assistant", "A sum."),
    ("user", "Of what?"),
    ("assistant", "Experts."),
]


def _tuned(turns: list[tuple[str, str]], tokenizer: Tokenizer = TOKENIZER) -> list[list[int]]:
    """Prompts and answers in turn, as the data of `--objective sft` has them."""
    line = json.dumps([{"role": role, "content": content} for role, content in turns])
    return [ids for ids, _ in encode_exchanges(read_line(line, "messages", "the case"), tokenizer)]


def test_a_conversation_has_the_ids_of_tuning() -> None:
    first, answer, second, last = _tuned(TURNS)
    talk = Conversation(TEXT, "Be brief.")
    prompt = talk.ask("What is a mixture?")
    assert prompt == first
    talk.remember(prompt, TEXT.encode("A sum."))
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
    text = Text(tokenizer, pieces)
    first, answer, second, last = _tuned(TURNS, tokenizer)
    asked = as_text(_dicts(TURNS[:4]), to_answer=True)
    assert ids_of(text, asked) == [*first, *answer, *second]
    # What is appended is the answer; begun by the task or not, it is tokenized as a whole.
    assert ids_of(text, asked + "Experts.") == [*first, *answer, *second, *last[:-1]]
    begun = as_text(_dicts([*TURNS[:4], ("assistant", "Exp")]), to_answer=False)
    assert ids_of(text, begun + "erts.") == ids_of(text, asked + "Experts.")
    together = tokenizer.tokenize(asked.replace(BEGINS, "").replace(ENDS, ""))
    assert together != [i for i in ids_of(text, asked) if i != text.eod], "the case shows nothing"
    assert ids_of(text, "Of what?") == tokenizer.tokenize("Of what?")


def test_an_answer_is_a_text_of_its_own(pieces: DataConfig) -> None:
    tokenizer = build_tokenizer(pieces)
    text = Text(tokenizer, pieces)
    made, config = model(), replace(CONFIG, data=pieces)
    asked = as_text(_dicts([("user", "Of?")]), to_answer=True)
    ids, (word, *_) = ids_of(text, asked), text.encode("experts")
    with torch.no_grad():  # a model that says this word
        x_BSH, _ = made.hidden_states(torch.tensor([ids]), training_capacity=False)
        made.output.weight[word] = 100 * x_BSH[0, -1]
    scorer = Scorer(Loaded(model=made, config=config, text=text, source="", step=0), 1)
    said = text.decode([word])
    assert text.decode([*ids, word]).endswith(f" {said}"), "the case needs a blank after a question"
    assert scorer.texts([(asked, {"max_gen_toks": 1})]) == [said]


def test_what_is_said_of_the_last_answer() -> None:
    assert answer_of(as_text(_dicts(TURNS[:4]), to_answer=True)) == ""
    assert answer_of(as_text(_dicts(TURNS), to_answer=False)) == "Experts."
    assert answer_of("Of what?") is None


@pytest.mark.parametrize(
    ("turns", "to_answer", "named"),
    [
        (TURNS, True, "last turn in a task's conversation is 'assistant', expected user"),
        (TURNS[:4], False, "is 'user', expected assistant"),
        ([], True, "last turn"),
        (TURNS[2:], True, "role of turn 1 in a task's conversation is 'assistant'"),
        ([("user", f"a{ENDS}b")], True, "content of turn 1"),
        ([("user", "a"), ("assistant", f"b{BEGINS}")], False, "content of turn 2"),
    ],
)
def test_turns_that_tuning_does_not_have(
    turns: list[tuple[str, str]], to_answer: bool, named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        as_text(_dicts(turns), to_answer=to_answer)

"""The command: what it prints, where prompts come from, the errors."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.config import DataConfig
from tests.inference.cases import CONFIG, TOKENIZER, greedy, model, save
from tests.support.usage_errors import usage_error
from tools.generate import main

GREEDY = ("--temperature", "0", "--max-new-tokens")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoint"))


def _text(capsys: pytest.CaptureFixture[str], checkpoint: Path, *flags: str) -> str:
    main(["--load", str(checkpoint), *flags])
    return capsys.readouterr().out.removesuffix("\n")


def _objects(capsys: pytest.CaptureFixture[str], checkpoint: Path, *flags: str) -> list[Any]:
    text = _text(capsys, checkpoint, "--json", *flags)
    return [json.loads(line) for line in text.splitlines()]


def _expected(prompt: str, tokens: int, **moe: Any) -> str:
    ids = TOKENIZER.tokenize(prompt)
    made = model(replace(CONFIG.moe, **{"moe_eval_capacity_factor": None, **moe}))
    return TOKENIZER.detokenize([*ids, *greedy(made, ids, tokens)])


@pytest.mark.parametrize("cache", [(), ("--no-kv-cache",)])
@pytest.mark.parametrize("stream", [(), ("--no-stream",)])
def test_greedy_text_is_the_models_own_without_drops(
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    cache: tuple[str, ...],
    stream: tuple[str, ...],
) -> None:
    found = _text(capsys, checkpoint, "--prompt", "abcd", *GREEDY, "12", *cache, *stream)
    assert found == _expected("abcd", 12)


def test_the_capacity_of_the_run_on_request(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    flags = ("--prompt", "abcd", *GREEDY, "12", "--moe-capacity", "eval", "--no-kv-cache")
    text = _text(capsys, checkpoint, *flags)
    assert text == _expected("abcd", 12, moe_eval_capacity_factor=0.25)
    assert text != _expected("abcd", 12), "the case cannot tell dropless from dropping"


def test_a_seed_repeats_a_sample_and_another_gives_another(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    flags = ("--prompt", "ab", "--max-new-tokens", "16", "--temperature", "2", "--seed")
    first = _text(capsys, checkpoint, *flags, "1")
    assert first == _text(capsys, checkpoint, *flags, "1")
    assert first != _text(capsys, checkpoint, *flags, "2")
    assert first.startswith("ab")


def test_the_seed_of_a_prompt_does_not_depend_on_its_batch(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    flags = (*("--prompt", "ab") * 4, "--max-new-tokens", "8", "--temperature", "2")
    together = _objects(capsys, checkpoint, *flags)
    assert _objects(capsys, checkpoint, *flags, "--batch-size", "3") == together
    assert len({each["text"] for each in together}) == 4
    alone = _objects(capsys, checkpoint, *flags[6:], "--seed", "1237")
    assert alone == together[3:]


def test_several_prompts_in_batches_are_as_each_alone(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    prompts = ["abcd", "x", "longer prompt"]
    flags = [word for prompt in prompts for word in ("--prompt", prompt)]
    text = _text(capsys, checkpoint, *flags, *GREEDY, "9", "--batch-size", "2")
    wanted = [f"--- prompt {n}\n{_expected(p, 9)}" for n, p in enumerate(prompts, 1)]
    assert text == "\n".join(wanted)


def test_prompts_of_a_file_and_of_standard_input(
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("ab\n\ncdé\n")
    objects.write_text('{"prompt": "two\\nlines"}\n{"prompt": "", "more": 1}\n')
    found = _objects(capsys, checkpoint, "--prompts-file", str(plain), *GREEDY, "3")
    assert [each["prompt"] for each in found] == ["ab", "cdé"]
    found = _objects(capsys, checkpoint, "--prompts-file", str(objects), *GREEDY, "3")
    assert [each["prompt"] for each in found] == ["two\nlines", ""]
    assert found[1]["prompt_ids"] == [1], "an empty prompt begins a document"
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    (found,) = _objects(capsys, checkpoint, "--prompts-file", "-", *GREEDY, "3")
    assert found["prompt"] == "from a pipe"


def test_json_holds_ids_text_and_why_it_ends(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    (found,) = _objects(capsys, checkpoint, "--prompt", "abcd", *GREEDY, "5", "--append-eod")
    prompt = [*TOKENIZER.tokenize("abcd"), 1]
    ids = greedy(model(), prompt, 5)
    assert found == {
        "prompt": "abcd",
        "text": TOKENIZER.detokenize(ids),
        "finish": "length",
        "prompt_ids": prompt,
        "ids": ids,
    }


def test_routing_as_a_table_and_as_json(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    flags = ("--prompt", "abcd", *GREEDY, "3", "--show-routing")
    ids = TOKENIZER.tokenize("abcd")
    read = [*ids, *greedy(model(), ids, 3)[:-1]]
    (routing,) = model()(torch.tensor([read]), training_capacity=False).routing
    (found,) = _objects(capsys, checkpoint, *flags)
    assert found["routing"][0]["layer"] == 1
    assert found["routing"][0]["experts"] == routing.ids_TK.tolist()
    assert found["tokens"][:4] == ["'a'", "'b'", "'c'", "'d'"]
    table = _text(capsys, checkpoint, *flags).splitlines()[-7:]
    assert table[0].split() == ["token", "layer", "1"]
    for place, line in enumerate(table[1:]):
        best, second = routing.ids_TK[place].tolist()
        p, q = routing.probs_TK[place].tolist()
        assert line.split()[0] == str(place)
        assert line.endswith(f"{best}:{p:.2f} {second}:{q:.2f}")


def test_hugging_face_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    weights = save(tmp_path / "weights", layout="hf")
    flags = ("--tokenizer-type", "ByteTokenizer", "--prompt", "abcd", *GREEDY, "6")
    assert _text(capsys, weights, *flags) == _expected("abcd", 6)


def test_bf16_runs(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    assert _text(capsys, checkpoint, "--dtype", "bf16", "--prompt", "a", "--max-new-tokens", "4")


def test_interactive_answers_line_by_line_and_survives_mistakes(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"abcd\n{'x' * 40}\nef\n"))
    main(["--load", str(checkpoint), "--interactive", *GREEDY, "6"])
    printed = capsys.readouterr()
    assert printed.out == f"{_expected('abcd', 6)}\n{_expected('ef', 6)}\n"
    assert "the prompt has 40 tokens" in printed.err


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for a conversation."""
    config = replace(CONFIG, model=replace(CONFIG.model, max_position_embeddings=100))
    return save(tmp_path_factory.mktemp("talker"), config)


def _turn(question: str) -> list[int]:
    return TOKENIZER.tokenize(f"<s>[INST] {question} [/INST]")


def test_questions_are_put_into_the_template_and_answers_alone_are_printed(
    capsys: pytest.CaptureFixture[str], talker: Path
) -> None:
    flags = ("--chat", "--system", "S", "--prompt", "ab", *GREEDY, "6")
    prompt = [*TOKENIZER.tokenize("<<SYS>>\nS\n<</SYS>>\n\n"), *_turn("ab")]
    assert _text(capsys, talker, *flags) == TOKENIZER.detokenize(greedy(model(), prompt, 6))
    (found,) = _objects(capsys, talker, *flags)
    assert (found["prompt"], found["prompt_ids"]) == ("ab", prompt)


def test_a_conversation_goes_on_until_it_is_reset_or_full(
    capsys: pytest.CaptureFixture[str], talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = f"1\n2\n/reset\n2\n{'x' * 80}\n3\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(asked))
    main(["--load", str(talker), "--interactive", "--chat", *GREEDY, "14"])
    printed = capsys.readouterr()
    first = greedy(model(), _turn("1"), 14)
    second = greedy(model(), [*_turn("1"), *first, 1, *_turn("2")], 14)
    anew = greedy(model(), _turn("2"), 14)
    last = greedy(model(), [*_turn("2"), *anew, 1, *_turn("3")], 14)
    expected = [TOKENIZER.detokenize(ids) for ids in (first, second, anew, last)]
    assert printed.out.removesuffix("\n") == "\n".join(expected)
    assert expected[1] != expected[2], "the case cannot tell a conversation from its end"
    assert "--max-new-tokens must be <= " in printed.err


class _Closed(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def fileno(self) -> int:
        return self.end.fileno()


def test_a_reader_that_has_seen_enough_is_no_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed = _Closed()
    with (tmp_path / "end").open("w") as closed.end:
        monkeypatch.setattr(sys, "stdout", closed)
        main(["--load", str(checkpoint), "--prompt", "a", "--max-new-tokens", "1"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--temperature", "-1"], "--temperature must be a finite number >= 0 (got -1.0)"),
        (["--top-p", "0"], "--top-p"),
        (["--top-k", "-1"], "--top-k"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--batch-size", "0"], "--batch-size"),
        (["--seed", "-1"], "--seed"),
        (["--prompt", "x" * 30, "--max-new-tokens", "11"], "<= 10 (got 11); the prompt has 30"),
        (["--prompt", "a", "--prompt", "x" * 30, "--max-new-tokens", "11"], "prompt 2 has 30"),
        (["--ckpt-step", "8"], "8"),
        (["--device", "abacus"], "--device"),
        (["--moe-capacity", "eval"], "dropless without --no-kv-cache"),
        (["--prompts-file", "/none/x"], "--prompts-file"),
        (["--prompts-file", "/dev/null"], "it is a device, not a regular file"),
        (["--prompt", "a", "--prompts-file", "-"], "absent with --prompt"),
        (["--interactive", "--prompt", "a"], "absent with --interactive"),
        (["--interactive", "--json"], "--json"),
        (["--system", "x"], "absent without --chat"),
        (["--chat", "--append-eod"], "absent with --chat"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, flags: list[str], named: str
) -> None:
    assert named in usage_error(main, ["--load", str(checkpoint), *flags], capsys)


def test_a_prompts_file_with_a_line_that_is_no_prompt(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n["b"]\n')
    words = ["--load", str(checkpoint), "--prompts-file", str(path)]
    assert f"line 2 of {path}" in usage_error(main, words, capsys)


def test_a_missing_checkpoint_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    absent = str(tmp_path / "none")
    assert absent in usage_error(main, ["--load", absent], capsys)


def test_another_tokenizer_than_the_trained_one_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save(tmp_path, replace(CONFIG, data=DataConfig(vocab_size=300)))
    words = ["--load", str(tmp_path), "--tokenizer-type", "ByteTokenizer", "--prompt", "1 2"]
    assert "tokenizer of the checkpoint" in usage_error(main, words, capsys)

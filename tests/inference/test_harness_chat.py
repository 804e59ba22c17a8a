"""Tasks of lm-eval asked in conversations: what the model reads, in ids written by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from megatron_moe.errors import UsageError
from megatron_moe.inference.harness import HarnessModel
from megatron_moe.inference.loading import LoadedModel, LoadOptions, load
from megatron_moe.inference.text import TextTokenizer
from megatron_moe.tokenizer.simple import NullTokenizer
from tests.inference.cases import CONFIG, model, save
from tools.evaluate import main

CHOICES = ["four", "a lot"]
DATA = f"""
import datasets

def rows(**_):
    return {{"test": datasets.Dataset.from_list([{{"q": "2 + 2?", "choices": {CHOICES}}}])}}
"""
COMMON = """
custom_dataset: !function rows.rows
test_split: test
doc_to_text: "{{q}}"
fewshot_config:
  sampler: first_n
  samples: [{q: "1 + 1?", choices: [two]}]
"""
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "begun": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: 0
gen_prefix: "So:"
metric_list: [{metric: acc}]
""",
    "text": """
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
    "likely": """
output_type: loglikelihood
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: perplexity}]
""",
}


def _ids(text: str) -> list[int]:
    """Of the tokenizer of bytes."""
    return [byte + 3 for byte in text.encode()]


SYSTEM = _ids("<<SYS>>\nBe brief.\n<</SYS>>\n\n")
# An example is a turn, and its answer ends like a document (1) ...
TURNS = [*SYSTEM, *_ids("<s>[INST] 1 + 1? [/INST]two"), 1, *_ids("<s>[INST] 2 + 2? [/INST]")]
# ... or stands in the question.
ONE_TURN = [*SYSTEM, *_ids("<s>[INST] 1 + 1? two\n\n2 + 2? [/INST]")]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.py").write_text(DATA)
    for name, own in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}{COMMON}{own}")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(CONFIG, model=replace(CONFIG.model, max_position_embeddings=280))
    return save(tmp_path_factory.mktemp("checkpoint"), config)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load(LoadOptions(path=checkpoint))


def _read(loaded: LoadedModel, tasks: Path, name: str, **settings: Any) -> list[list[int]]:
    """The rows that the model reads during a task with one example, one by one."""
    seen: list[list[int]] = []
    hook = loaded.model.embedding.register_forward_pre_hook(
        lambda _, given: seen.extend(given[0].tolist())
    )
    manager = TaskManager(include_path=tasks, include_defaults=False)
    with hook:
        simple_evaluate(
            model=HarnessModel(loaded, batch_size=1),
            tasks=[name],
            task_manager=manager,
            num_fewshot=1,
            bootstrap_iters=0,
            system_instruction="Be brief.",
            **settings,
        )
    return seen


@pytest.mark.parametrize(("as_turns", "prompt"), [(True, TURNS), (False, ONE_TURN)])
def test_choices_are_read_as_answers_in_a_conversation(
    loaded: LoadedModel, tasks: Path, as_turns: bool, prompt: list[int]
) -> None:
    found = _read(loaded, tasks, "choice", apply_chat_template=True, fewshot_as_multiturn=as_turns)
    # The longest first; the last id of each is predicted and not read.
    assert found == [prompt + _ids(choice)[:-1] for choice in ("a lot", "four")]


def test_an_answer_that_the_task_begins_goes_on(loaded: LoadedModel, tasks: Path) -> None:
    found = _read(loaded, tasks, "begun", apply_chat_template=True, fewshot_as_multiturn=True)
    # lm-eval lets the answers of examples begin in the same way.
    talk = "<<SYS>>\nBe brief.\n<</SYS>>\n\n<s>[INST] 1 + 1? [/INST]So: two"
    prompt = [*_ids(talk), 1, *_ids("<s>[INST] 2 + 2? [/INST]So:")]
    assert found == [prompt + _ids(f" {choice}")[:-1] for choice in ("a lot", "four")]


@pytest.mark.parametrize(("as_turns", "prompt"), [(True, TURNS), (False, ONE_TURN)])
def test_answers_are_written_after_a_conversation(
    loaded: LoadedModel, tasks: Path, as_turns: bool, prompt: list[int]
) -> None:
    found = _read(loaded, tasks, "text", apply_chat_template=True, fewshot_as_multiturn=as_turns)
    assert found[0] == prompt


def test_without_the_template_there_is_none(loaded: LoadedModel, tasks: Path) -> None:
    plain = _ids("Be brief.1 + 1? two\n\n2 + 2?")
    assert _read(loaded, tasks, "text")[0] == plain


@pytest.mark.parametrize(
    ("flags", "prompt"),
    [
        (["--apply-chat-template"], TURNS),
        (["--apply-chat-template", "--fewshot-as-multiturn"], TURNS),
        (["--apply-chat-template", "--fewshot-as-multiturn", "false"], ONE_TURN),
        ([], _ids("Be brief.1 + 1? two\n\n2 + 2?")),
    ],
)
def test_flags_of_the_command(
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    tasks: Path,
    flags: list[str],
    prompt: list[int],
) -> None:
    argv = ["--load", str(checkpoint), "--tasks", "likely", "--include-path", str(tasks)]
    more = ["--num-fewshot", "1", "--system-instruction", "Be brief.", "--json", *flags]
    main([*argv, *more])
    found = json.loads(capsys.readouterr().out)["results"]["likely"]["perplexity,none"]
    answer = _ids("four")
    logits = model()(torch.tensor([[*prompt, *answer[:-1]]]), training_capacity=False).logits[0]
    chosen = logits.double().log_softmax(dim=-1)[-len(answer) :]
    likely = sum(row[token].item() for row, token in zip(chosen, answer, strict=True))
    assert math.log(found) == pytest.approx(-likely, rel=1e-5)


def test_what_lm_eval_keeps_of_the_template(loaded: LoadedModel) -> None:
    harness = HarnessModel(loaded, batch_size=1)
    template = "<<SYS>>\n{system}\n<</SYS>>\n\n<s>[INST] {question} [/INST]"
    assert harness.chat_template(True) == template
    assert harness.chat_template(False) is None
    with pytest.raises(
        UsageError, match=r"must be absent, as there is a single template \(got 'llama'\)"
    ):
        harness.chat_template("llama")
    other = replace(loaded, tokenizer=TextTokenizer(NullTokenizer(300), CONFIG.data))
    assert harness.tokenizer_name != HarnessModel(other, batch_size=1).tokenizer_name

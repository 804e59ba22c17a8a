"""The shipped tasks through lm-eval itself, without a network, against plain computations."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.errors import UsageError
from megatron_moe.inference.loading import LoadOptions, load
from tests.inference.cases import TOKENIZER, greedy, model, save

ROOT = Path(__file__).resolve().parents[2]
TASKS = "openmoe_demo_choice,openmoe_demo_completion,openmoe_demo_text"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
LONGEST = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoint"))


def _run(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, as where files are cached is read from the environment once."""
    return subprocess.run(
        [sys.executable, "tools/evaluate.py", *flags],
        cwd=ROOT,
        env=os.environ | OFFLINE | {"HF_HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def results(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    flags = ("--load", str(checkpoint), "--tasks", TASKS, "--include-path", "examples/lm_eval")
    done = _run(tmp_path_factory.mktemp("cache"), *flags, "--json", "--batch-size", "3")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["results"]


def _lines(name: str) -> list[Any]:
    path = ROOT / "examples" / "lm_eval" / name
    return [json.loads(line) for line in path.read_text().splitlines()]


def _logprob(ids: list[int], last: int) -> float:
    """Log probability of the last ids after those before them, at most 40 of which are read."""
    ids = ids[-(LONGEST + 1) :]
    logits = model()(torch.tensor([ids[:-1]]), training_capacity=False).logits[0].double()
    chosen = zip(logits.log_softmax(dim=-1)[-last:], ids[-last:], strict=True)
    return sum(each[token].item() for each, token in chosen)


def test_multiple_choice(results: Any) -> None:
    right, right_by_length = [], []
    for line in _lines("choice.jsonl"):
        # Blanks at the end of a context belong to what continues it.
        question, choices = line["question"].rstrip(), line["choices"]
        blanks = line["question"][len(question) :]
        scores = [
            _logprob(TOKENIZER.tokenize(question + blanks + choice), len(blanks + choice))
            for choice in choices
        ]
        by_length = [s / len(c) for s, c in zip(scores, choices, strict=True)]
        right.append(scores.index(max(scores)) == line["answer"])
        right_by_length.append(by_length.index(max(by_length)) == line["answer"])
    assert 0 < sum(right) < 8, "the case needs answers of both kinds"
    found = results["openmoe_demo_choice"]
    share = sum(right) / 8
    assert found["acc,none"] == share
    assert found["acc_stderr,none"] == pytest.approx(math.sqrt(share * (1 - share) / 7))
    assert found["acc_norm,none"] == sum(right_by_length) / 8


def test_texts_that_must_come_out_exactly(results: Any) -> None:
    exact = []
    for line in _lines("choice.jsonl"):
        prompt = TOKENIZER.tokenize(line["question"])[-(LONGEST - 12) :]
        text = TOKENIZER.detokenize(greedy(model(), prompt, 12))
        text = text.split("\n")[0].split(".")[0]
        exact.append(text == line["choices"][line["answer"]])
    assert results["openmoe_demo_completion"]["exact_match,none"] == sum(exact) / 8


def test_whole_texts(results: Any) -> None:
    total, words, size = 0.0, 0, 0
    for line in _lines("texts.jsonl"):
        ids = [1, *TOKENIZER.tokenize(line["text"])]
        assert len(ids) > LONGEST, "the case needs windows"
        # Each id once: windows of 40 begin where the last one ended, and the last, which predicts
        # fewer, reaches back to read 40 as well.
        for start in range(0, len(ids) - 1, LONGEST):
            stop = min(start + LONGEST, len(ids) - 1)
            total += _logprob(ids[: stop + 1], stop - start)
        words += len(re.split(r"\s+", line["text"]))
        size += len(line["text"].encode())
    found = results["openmoe_demo_text"]
    assert found["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert found["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-4)


def test_a_task_that_is_not_there_is_refused(checkpoint: Path) -> None:
    from megatron_moe.inference.harness import evaluate_tasks

    loaded, tasks = load(LoadOptions(path=checkpoint)), ROOT / "examples" / "lm_eval"
    with pytest.raises(
        UsageError, match=r"--tasks must be .* openmoe_demo_choice.*\(got 'abacus'\)"
    ):
        evaluate_tasks(loaded, ["abacus"], batch_size=1, include_path=tasks)


def test_a_continuation_has_at_least_one_token(checkpoint: Path) -> None:
    """Where both texts are one token together, it is tokenized alone; without tokens, an error."""
    from lm_eval.api.instance import Instance

    from megatron_moe.inference.harness import HarnessModel

    class Merging(HarnessModel):
        """Of a tokenizer in which "ab" is the token of "b" alone."""

        def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
            return super().tok_encode(string.replace("ab", "b"), *args, **kwargs)

    def ask(model: HarnessModel, context: str, more: str) -> tuple[float, bool]:
        request = Instance("loglikelihood", {}, (context, more), 0)
        return model.loglikelihood([request])[0]

    loaded = load(LoadOptions(path=checkpoint))
    score = ask(Merging(loaded, 1), "xa", "b")[0]
    assert score == pytest.approx(_logprob(TOKENIZER.tokenize("xab"), 1), rel=1e-5)
    assert score < 0.0
    for context in ("", "What?"):
        with pytest.raises(
            UsageError, match=r"continuation of a request must be .* at least one token \(got ''\)"
        ):
            ask(HarnessModel(loaded, 1), context, "")

"""EleutherAI's lm-eval on a model of ours: the three kinds of requests that its tasks make.

lm-eval is in the extra [eval], so this module is imported where tasks are asked for and nowhere
else. Its rules are kept: a pair is tokenized together and split at the length of the context alone;
what is too long loses its left end; whole texts are scored in windows in which every token is
predicted once. Conversations are in the template of `--objective sft`.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from megatron_moe.data.objectives.chat import SYSTEM, USER
from megatron_moe.errors import UsageError
from megatron_moe.inference.answers import Scorer
from megatron_moe.inference.chat import as_text, ids_of
from megatron_moe.inference.loading import Loaded

BOOTSTRAP = 1000
"""Resamples for the standard error of a metric that has no formula for it."""


class HarnessModel(TemplateLM):
    """Answers lm-eval's requests.

    Args:
        loaded: the model.
        batch_size: rows at a time.
    """

    def __init__(self, loaded: Loaded, batch_size: int) -> None:
        super().__init__()
        self.loaded = loaded
        self.scorer = Scorer(loaded, batch_size)
        self.batch_size = batch_size
        self.max_length = loaded.longest

    @property
    def eot_token_id(self) -> int:
        """Stands before a text without a context, as before a document."""
        return self.loaded.text.eod

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text, which may be a conversation. Nothing is put around it."""
        return ids_of(self.loaded.text, string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in OpenMoE's template, as the text that `tok_encode` knows.

        Args:
            chat_history: turns, each with `role` and `content`.
            add_generation_prompt: the last turn is to be answered, not continued.

        Raises:
            UsageError: turns in an order that tuning does not have.
        """
        return as_text(chat_history, to_answer=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, for lm-eval's records of what was done.

        Raises:
            UsageError: a template is asked for by its name.
        """
        if isinstance(chat_template, str):
            raise UsageError("name of a chat template", chat_template, "none: there is one")
        return SYSTEM.format("{system}") + USER.format("{question}") if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Tells apart what lm-eval caches: by tokenizer and template."""
        found = "\0".join((self.loaded.text.tokenizer.identity, SYSTEM, USER))
        return f"openmoe-chat-{hashlib.sha256(found.encode()).hexdigest()[:16]}"

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_more: Any
    ) -> list[tuple[float, bool]]:
        found = self.scorer.pairs([(context, more) for _, context, more in requests])
        for (key, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log likelihood of whole texts."""
        windows = [self._windows(request.args[0]) for request in requests]
        found = iter(self.scorer.pairs([window for text in windows for window in text]))
        sums = [sum(next(found)[0] for _ in text) for text in windows]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Context and continuation of each window of a text."""
        ids, longest = self.tok_encode(text), self.max_length
        windows = get_rolling_token_windows(ids, self.eot_token_id, longest, context_len=1)
        return [make_disjoint_window(window) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of contexts, up to the stops of their tasks."""
        found = self.scorer.texts([request.args for request in requests])
        for request, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found


def evaluate_tasks(
    loaded: Loaded,
    tasks: Sequence[str],
    *,
    batch_size: int,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    system_instruction: str | None = None,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool = True,
) -> dict[str, Any]:
    """Run tasks by name.

    Args:
        loaded: the model.
        tasks: names, as lm-eval knows them.
        batch_size: rows at a time.
        include_path: where tasks are defined, instead of lm-eval's own.
        num_fewshot: examples in a context; `None` leaves it to the task.
        limit: documents of each task; `None` takes all.
        system_instruction: stands before everything; with a template, as its system turn.
        apply_chat_template: ask in conversations.
        fewshot_as_multiturn: in them, examples are turns rather than part of the question.

    Returns:
        lm-eval's results, without its samples.

    Raises:
        UsageError: no such task, or no such directory.
    """
    if include_path is not None and not include_path.is_dir():
        raise UsageError("--include-path", str(include_path), "a directory of tasks")
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        some = ", ".join(manager.all_tasks[:10])
        raise UsageError("--tasks", unknown[0], f"tasks of lm-eval, such as {some}")
    # What lm-eval prints on its way is no part of the results.
    with contextlib.redirect_stdout(sys.stderr):
        results = simple_evaluate(
            model=HarnessModel(loaded, batch_size),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            system_instruction=system_instruction,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template and fewshot_as_multiturn,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP,
        )
    return dict(results)


def results_table(results: dict[str, Any]) -> str:
    """A line for each task and metric."""
    return str(make_table(results)).rstrip()

"""EleutherAI's lm-eval: a `TemplateLM` that answers the three kinds of requests of its tasks.

lm-eval is in the extra [eval], so this module is imported only for `--tasks`. Its conventions hold:
context and continuation are tokenized together and split at the length of the context alone;
contexts that are too long are truncated on the left; whole texts are scored in windows in which
every token is predicted once. Conversations use the template of `--objective sft`.
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
from megatron_moe.inference.loading import LoadedModel
from megatron_moe.inference.prompts import conversation_text, encode_conversation
from megatron_moe.inference.scoring import Scorer

BOOTSTRAP = 1000
"""Bootstrap resamples for the standard error of metrics without a formula for it."""


class HarnessModel(TemplateLM):
    """Answers lm-eval's requests.

    Args:
        loaded: the model.
        batch_size: requests per batch.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int) -> None:
        super().__init__()
        self.loaded = loaded
        self.scorer = Scorer(loaded, batch_size)
        self.batch_size = batch_size
        self.max_length = loaded.max_length

    @property
    def eot_token_id(self) -> int:
        """The end of document, which precedes a text without a context."""
        return self.loaded.tokenizer.eod

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text, which may be a conversation, without special tokens."""
        return encode_conversation(self.loaded.tokenizer, string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in OpenMoE's template, as a text for `tok_encode`.

        Args:
            chat_history: turns, each with `role` and `content`.
            add_generation_prompt: the last turn is a question to answer, not an answer to continue.

        Raises:
            UsageError: the turns are not in the order of tuning data.
        """
        return conversation_text(chat_history, to_answer=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, for the record in lm-eval's results.

        Raises:
            UsageError: a template is requested by name.
        """
        if isinstance(chat_template, str):
            expected = "absent, as there is a single template"
            raise UsageError("name of the chat template", chat_template, expected)
        return SYSTEM.format("{system}") + USER.format("{question}") if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Key of lm-eval's caches: differs by tokenizer and template."""
        found = "\0".join((self.loaded.tokenizer.base.identity, SYSTEM, USER))
        return f"openmoe-chat-{hashlib.sha256(found.encode()).hexdigest()[:16]}"

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log likelihoods of continuations, and whether each is greedy.

        Raises:
            UsageError: a continuation without a token.
        """
        for request in requests:  # the base class fails at these, without a context
            if request.args[0] == "" and not self.tok_encode(request.args[1]):
                raise _without_tokens(*request.args)
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return found

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of its continuation, tokenized together.

        Where the tokens of the context take in the whole continuation ("ab" may be one token), the
        continuation is tokenized on its own: without tokens its log likelihood would be 0, the best
        of all.
        """
        before, more = super()._encode_pair(context, continuation)
        return before, more or self.tok_encode(continuation)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_more: Any
    ) -> list[tuple[float, bool]]:
        for (context, continuation), _, more in requests:
            if not more:
                raise _without_tokens(context, continuation)
        found = self.scorer.loglikelihoods([(context, more) for _, context, more in requests])
        for (key, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log likelihoods of whole texts."""
        windows = [self._windows(request.args[0]) for request in requests]
        found = iter(self.scorer.loglikelihoods([window for text in windows for window in text]))
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
        """Continuations of contexts, up to the stop texts of their tasks."""
        found = self.scorer.continuations([request.args for request in requests])
        for request, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found


def _without_tokens(context: str, continuation: str) -> UsageError:
    expected = "a text of at least one token"
    fix = f"without one it would score 0, the best of all; its context ends {context[-40:]!r}"
    return UsageError("continuation of a request", continuation, expected, fix)


def evaluate_tasks(
    loaded: LoadedModel,
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
        tasks: lm-eval's names of the tasks.
        batch_size: requests per batch.
        include_path: directory of task definitions that replace lm-eval's own.
        num_fewshot: examples in a context; `None` means the task's number.
        limit: documents of each task; `None` means all.
        system_instruction: text before everything; with a template, its system turn.
        apply_chat_template: pass requests as conversations.
        fewshot_as_multiturn: in conversations, examples are turns rather than part of the question.

    Returns:
        lm-eval's results, without its samples.

    Raises:
        UsageError: a task or the directory does not exist.
    """
    if include_path is not None and not include_path.is_dir():
        raise UsageError("--include-path", str(include_path), "a directory of task definitions")
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        some = ", ".join(manager.all_tasks[:10])
        raise UsageError("--tasks", unknown[0], f"names of lm-eval tasks, such as {some}")
    # Standard output is for the results alone; lm-eval prints progress there.
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
    """lm-eval's table: a line per task and metric."""
    return str(make_table(results)).rstrip()

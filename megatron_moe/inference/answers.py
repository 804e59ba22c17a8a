"""What a model answers to an evaluation harness, from token ids and texts.

Nothing of any harness is imported here; `megatron_moe.inference.harness` is what lm-eval calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_moe.errors import UsageError
from megatron_moe.inference.chat import answer_of, ids_of
from megatron_moe.inference.generation import Rules, generate
from megatron_moe.inference.loading import Loaded
from megatron_moe.inference.sampling import Sampling
from megatron_moe.inference.scoring import Row, score
from megatron_moe.inference.text import TextStream

NEW_TOKENS = 256
"""New tokens of a text whose task does not say, and at most half of the model's longest row."""
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class Scorer:
    """The answers, from token ids; knows nothing of lm-eval."""

    def __init__(self, loaded: Loaded, batch_size: int) -> None:
        self.loaded, self.batch_size = loaded, batch_size

    def pairs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """By context and continuation: log likelihood, and whether greedy decoding would say it.

        What does not fit into the model's longest row is cut off the context, from the left.

        Raises:
            UsageError: a continuation is longer than that.
        """
        longest, rows = self.loaded.longest, []
        for context, more in pairs:
            if len(more) > longest:
                expected = f"at most --max-position-embeddings ({longest})"
                raise UsageError("tokens of a continuation", len(more), expected)
            ids = [*(context or [self.loaded.text.eod]), *more]
            rows.append(Row(ids[-(longest + 1) :], len(more)))
        return [
            (found.double().sum().item(), bool(greedy.all()))
            for found, greedy in score(self.loaded, rows, self.batch_size)
        ]

    def texts(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """By context and options: the continuation, without what it stopped at."""
        found: dict[int, str] = {}
        for numbers in self._alike([options for _, options in requests]):
            contexts = [requests[number][0] for number in numbers]
            texts = self._continued(contexts, requests[numbers[0]][1], seeds=numbers)
            found.update(zip(numbers, texts, strict=True))
        return [found[number] for number in range(len(requests))]

    def _alike(self, options: Sequence[dict[str, Any]]) -> Iterator[list[int]]:
        """Batches of requests with the same options."""
        groups: dict[str, list[int]] = {}
        for number, each in enumerate(options):
            groups.setdefault(repr(sorted(each.items())), []).append(number)
        for numbers in groups.values():
            for first in range(0, len(numbers), self.batch_size):
                yield numbers[first : first + self.batch_size]

    def _continued(
        self, contexts: Sequence[str], options: dict[str, Any], seeds: Sequence[int]
    ) -> list[str]:
        text, tokens = self.loaded.text, new_tokens(options, self.loaded.longest)
        room = self.loaded.longest - tokens
        prompts = [(ids_of(text, context) or [text.eod])[-room:] for context in contexts]
        begun = [
            # An answer is a text of its own, whose first word has no blank before it.
            prompt if answer is None else text.encode(answer)
            for prompt, answer in zip(prompts, map(answer_of, contexts), strict=True)
        ]
        stops, streams = stops_of(options), [TextStream(text, ids) for ids in begun]
        said = [""] * len(prompts)

        def stopped(row: int, token: int) -> bool:
            said[row] += streams[row].push(token)
            return any(stop in said[row] for stop in stops)

        rules = Rules(
            tokens=tokens,
            vocab_size=text.size,
            eod=text.eod,
            sampling=sampling_of(options),
            cached=not self.loaded.drops,
            stop=stopped,
        )
        for _ in generate(self.loaded.model, prompts, rules, seeds):
            pass
        whole = [part + stream.finish() for part, stream in zip(said, streams, strict=True)]
        return [cut(each, stops) for each in whole]


def new_tokens(options: dict[str, Any], longest: int) -> int:
    """How many at most.

    Raises:
        UsageError: an option that is not known, or so many that no context fits.
    """
    unknown = sorted(options.keys() - _KNOWN)
    if unknown:
        raise UsageError("option of generation", unknown[0], f"one of {', '.join(sorted(_KNOWN))}")
    tokens = options.get("max_gen_toks", min(NEW_TOKENS, longest // 2))
    if not 1 <= tokens < longest:
        expected = f"1 to {longest - 1}, below --max-position-embeddings"
        raise UsageError("max_gen_toks of a task", tokens, expected)
    return int(tokens)


def stops_of(options: dict[str, Any]) -> list[str]:
    """The texts at which a continuation ends; empty ones say nothing."""
    until = options.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def sampling_of(options: dict[str, Any]) -> Sampling:
    """Greedy, unless the task asks for something else."""
    temperature = options.get("temperature", 1.0 if options.get("do_sample") else 0.0)
    sampling = Sampling(
        temperature=float(temperature if options.get("do_sample", True) else 0.0),
        top_k=int(options.get("top_k") or 0),
        top_p=float(options.get("top_p") or 1.0),
    )
    sampling.check()
    return sampling


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops."""
    places = [text.find(stop) for stop in stops]
    return text[: min((place for place in places if place >= 0), default=len(text))]

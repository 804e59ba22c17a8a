"""Log probabilities of given tokens, and answers to the requests of an evaluation harness.

`predictions` never holds the logits of a whole batch. `Scorer` answers requests in token ids and
texts; it does not import any harness: `megatron_moe.inference.harness` connects it to lm-eval.

Shapes: B rows, S tokens of a row, H hidden, V vocabulary, N scored labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_moe.errors import UsageError
from megatron_moe.inference.generation import GenerationConfig, SamplingParams, generate
from megatron_moe.inference.loading import LoadedModel
from megatron_moe.inference.prompts import encode_conversation, unfinished_answer
from megatron_moe.inference.text import DecodeStream

LOGITS = 1 << 26
"""Elements of logits at a time: 256 MiB in fp32. A row of 2048 tokens of the released vocabulary
would need 2 GiB."""
NEW_TOKENS = 256
"""New tokens of a continuation whose task sets none, at most half of the model's maximal length."""
_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
"""Generation options of a task that are supported."""


@torch.no_grad()
def predictions(
    loaded: LoadedModel,
    tokens_BS: Tensor,
    labels_BS: Tensor,
    scored_BS: Tensor,
    *,
    positions_BS: Tensor | None = None,
    documents_BS: Tensor | None = None,
    padding_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log probabilities of labels, and whether greedy decoding would produce each; both [N].

    Probabilities are over the padded vocabulary, as in training; greedy decoding never produces
    padding.

    Args:
        loaded: the model.
        tokens_BS: int64 ids.
        labels_BS: int64 ids.
        scored_BS: bool, which labels to score; N of them, row by row.
        positions_BS: see `ReferenceOpenMoE.forward`.
        documents_BS: see `ReferenceOpenMoE.forward`.
        padding_BS: see `ReferenceOpenMoE.forward`.
    """
    model = loaded.model
    device = model.embedding.weight.device
    planes = {
        "positions_BS": positions_BS,
        "documents_BS": documents_BS,
        "padding_BS": padding_BS,
    }
    x_BSH, _ = model.hidden_states(
        tokens_BS.to(device),
        training_capacity=False,
        **{name: None if plane is None else plane.to(device) for name, plane in planes.items()},
    )
    scored = scored_BS.to(device)
    labels_N = labels_BS.to(device)[scored]
    sizes = (model.vocab_size, loaded.tokenizer.size)
    found, best = in_parts(model.logits, x_BSH[scored], labels_N, *sizes)
    return found.cpu(), (best == labels_N).cpu()


def in_parts(
    logits: Callable[[Tensor], Tensor], x_NH: Tensor, labels_N: Tensor, vocab_size: int, ids: int
) -> tuple[Tensor, Tensor]:
    """Log probability of each label and the most probable id, with `LOGITS` logits at a time.

    Args:
        logits: from hidden states [n, H] to logits [n, V] in fp32.
        x_NH: hidden states.
        labels_N: ids whose probability is wanted.
        vocab_size: V.
        ids: only ids below it are candidates for the most probable one; the rest is padding.
    """
    found, best = [], []
    step = max(1, LOGITS // vocab_size)
    for x, labels in zip(x_NH.split(step), labels_N.split(step), strict=True):
        logits_NV = logits(x)
        target = logits_NV.gather(-1, labels[:, None])[:, 0]
        found.append(target - logits_NV.logsumexp(dim=-1))
        best.append(logits_NV[:, :ids].argmax(dim=-1))
    return torch.cat(found), torch.cat(best)


@dataclass(frozen=True)
class ScoringRequest:
    """Token ids, of which the last ones are scored given all before them."""

    ids: Sequence[int]
    num_scored: int
    """Fewer than there are ids."""


def score(
    loaded: LoadedModel, requests: Sequence[ScoringRequest], batch_size: int
) -> list[tuple[Tensor, Tensor]]:
    """Per request, in order: log probabilities of its scored ids, and whether each is greedy.

    Requests of similar lengths share a batch, padded at the end, which causal attention does not
    see. Under a capacity each is processed alone, since padding would take slots.

    Args:
        loaded: the model.
        requests: each of at most one id more than the model's maximal length.
        batch_size: requests per batch.
    """
    # Longest first: padding is least, and the first batch shows whether memory suffices.
    order = sorted(range(len(requests)), key=lambda number: -len(requests[number].ids))
    size = 1 if loaded.drops_tokens else batch_size
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for first in range(0, len(order), size):
        numbers = order[first : first + size]
        batch = [requests[number] for number in numbers]
        length = len(batch[0].ids) - 1
        tokens_BS = torch.zeros(len(batch), length, dtype=torch.long)
        labels_BS, scored_BS = tokens_BS.clone(), tokens_BS.bool()
        for row, request in enumerate(batch):
            ids, last = torch.tensor(request.ids), len(request.ids) - 1
            tokens_BS[row, :last], labels_BS[row, :last] = ids[:-1], ids[1:]
            scored_BS[row, last - request.num_scored : last] = True
        counts = [request.num_scored for request in batch]
        both = predictions(loaded, tokens_BS, labels_BS, scored_BS)
        parts = zip(both[0].split(counts), both[1].split(counts), strict=True)
        found.update(zip(numbers, parts, strict=True))
    return [found[number] for number in range(len(requests))]


class Scorer:
    """Answers the requests of an evaluation harness.

    Args:
        loaded: the model.
        batch_size: requests per batch.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int) -> None:
        self.loaded, self.batch_size = loaded, batch_size

    def loglikelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """Per context and continuation: log likelihood, and whether the continuation is greedy.

        A pair that exceeds the model's maximal length loses the left end of its context.

        Raises:
            UsageError: a continuation alone exceeds the maximal length.
        """
        longest, requests = self.loaded.max_length, []
        for context, more in pairs:
            if len(more) > longest:
                expected = f"<= --max-position-embeddings ({longest})"
                raise UsageError("tokens of a continuation", len(more), expected)
            ids = [*(context or [self.loaded.tokenizer.eod]), *more]
            # One id more than the maximal length: the last is only a label.
            requests.append(ScoringRequest(ids[-(longest + 1) :], len(more)))
        return [
            (found.double().sum().item(), bool(greedy.all()))
            for found, greedy in score(self.loaded, requests, self.batch_size)
        ]

    def continuations(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Per context and options: the generated continuation, without its stop text."""
        found: dict[int, str] = {}
        for numbers in self._batches([options for _, options in requests]):
            contexts = [requests[number][0] for number in numbers]
            texts = self._continue(contexts, requests[numbers[0]][1], seeds=numbers)
            found.update(zip(numbers, texts, strict=True))
        return [found[number] for number in range(len(requests))]

    def _batches(self, options: Sequence[dict[str, Any]]) -> Iterator[list[int]]:
        """Batches of requests that share their options."""
        groups: dict[str, list[int]] = {}
        for number, each in enumerate(options):
            groups.setdefault(repr(sorted(each.items())), []).append(number)
        for numbers in groups.values():
            for first in range(0, len(numbers), self.batch_size):
                yield numbers[first : first + self.batch_size]

    def _continue(
        self, contexts: Sequence[str], options: dict[str, Any], seeds: Sequence[int]
    ) -> list[str]:
        tokenizer, tokens = self.loaded.tokenizer, new_tokens(options, self.loaded.max_length)
        room = self.loaded.max_length - tokens
        prompts = [
            (encode_conversation(tokenizer, context) or [tokenizer.eod])[-room:]
            for context in contexts
        ]
        preceding = [
            # An answer is a text of its own: its first word is decoded without a leading space.
            prompt if answer is None else tokenizer.encode(answer)
            for prompt, answer in zip(prompts, map(unfinished_answer, contexts), strict=True)
        ]
        stops = stop_texts(options)
        streams = [DecodeStream(tokenizer, ids) for ids in preceding]
        generated = [""] * len(prompts)

        def stopped(row: int, token: int) -> bool:
            generated[row] += streams[row].push(token)
            return any(stop in generated[row] for stop in stops)

        config = GenerationConfig(
            max_new_tokens=tokens,
            vocab_size=tokenizer.size,
            eod=tokenizer.eod,
            sampling=sampling_params(options),
            use_cache=not self.loaded.drops_tokens,
            stop=stopped,
        )
        for _ in generate(self.loaded.model, prompts, config, seeds):
            pass  # `stopped` collects the text
        whole = [text + stream.finish() for text, stream in zip(generated, streams, strict=True)]
        return [cut_at_stop(each, stops) for each in whole]


def new_tokens(options: dict[str, Any], longest: int) -> int:
    """Maximal number of new tokens of a task.

    Raises:
        UsageError: an option is not supported, or the number leaves no room for a context.
    """
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        expected = f"one of {', '.join(sorted(_OPTIONS))}"
        raise UsageError("generation option of a task", unknown[0], expected)
    tokens = options.get("max_gen_toks", min(NEW_TOKENS, longest // 2))
    if not 1 <= tokens < longest:
        expected = f"from 1 to {longest - 1}, below --max-position-embeddings"
        raise UsageError("max_gen_toks of a task", tokens, expected)
    return int(tokens)


def stop_texts(options: dict[str, Any]) -> list[str]:
    """Texts that end a continuation; empty ones are ignored."""
    until = options.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def sampling_params(options: dict[str, Any]) -> SamplingParams:
    """Greedy decoding unless the task asks for sampling."""
    temperature = options.get("temperature", 1.0 if options.get("do_sample") else 0.0)
    sampling = SamplingParams(
        temperature=float(temperature if options.get("do_sample", True) else 0.0),
        top_k=int(options.get("top_k") or 0),
        top_p=float(options.get("top_p") or 1.0),
    )
    sampling.check()
    return sampling


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text."""
    places = [text.find(stop) for stop in stops]
    return text[: min((place for place in places if place >= 0), default=len(text))]

"""Generate continuations of a batch of prompts: sampling, and the decoding loop.

The continuation of a text does not depend on the batch it is in: texts share forward passes, but
neither padding, expert slots nor random numbers. With the KV cache each token is processed once.
Without it every step processes each text as a whole, which is required under a capacity: there, the
state of an early token may depend on a later one (`docs/generation.md`).

Shapes: B unfinished texts, S new tokens of a text, H hidden, V vocabulary without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_moe.errors import UsageError
from megatron_moe.inference.routing_log import RoutingLog
from megatron_moe.model.reference import ReferenceOpenMoE

FinishReason = Literal["eod", "length", "stop"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is sampled from its logits."""

    temperature: float = 1.0
    """Divisor of the logits; 0 takes the most probable token."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0 means all."""
    top_p: float = 1.0
    """Sample from the most probable tokens whose probabilities add up to p; 1 means all."""

    def check(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a value is out of range.
        """
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UsageError("--temperature", self.temperature, "a finite number >= 0")
        if self.top_k < 0:
            raise UsageError("--top-k", self.top_k, ">= 0")
        if not 0 < self.top_p <= 1:
            raise UsageError("--top-p", self.top_p, "> 0 and <= 1")


GREEDY = SamplingParams(temperature=0)


def next_token(logits_V: Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
    """Sample one token: temperature first, then top-k, then top-p of the remaining tokens.

    Args:
        logits_V: fp32, on the CPU, so that a seed gives the same token on every device.
        sampling: how to sample.
        generator: source of random numbers.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    best = (logits_V / sampling.temperature).sort(descending=True, stable=True)
    logits_V = best.values[: sampling.top_k or None]
    probs_V = logits_V.softmax(dim=-1)
    # A token is kept while the sum before it is below p, so the token that reaches p is included:
    # probabilities .5 .3 .2 with p = .6 have sums 0 .5 .8 before them, and the first two are kept.
    before_V = probs_V.cumsum(dim=-1) - probs_V
    probs_V = probs_V.where(before_V < sampling.top_p, 0.0)
    return int(best.indices[torch.multinomial(probs_V, 1, generator=generator)])


@dataclass(frozen=True)
class GeneratedToken:
    """One new token of a text."""

    text: int
    """Index of the prompt that it continues."""
    token: int | None
    """`None` if the text ends with an end of document, which is not part of it."""
    finish_reason: FinishReason | None
    """Why the text ends: end of document, `max_new_tokens`, or `stop`; `None` if it does not."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings shared by all texts of a batch."""

    max_new_tokens: int
    vocab_size: int
    """V, ids of the tokenizer; the padding of the vocabulary is never sampled."""
    eod: int
    """Id of the end of document."""
    sampling: SamplingParams
    use_cache: bool = True
    stop: Callable[[int, int], bool] | None = None
    """Called with the index of a text and its new token; true ends the text with it."""


@torch.no_grad()
def generate(
    model: ReferenceOpenMoE,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    seeds: Sequence[int],
    log: RoutingLog | None = None,
) -> Iterator[GeneratedToken]:
    """Yield the new tokens of all texts, step by step, those of a step in prompt order.

    Args:
        model: in evaluation mode.
        prompts: token ids, at least one each.
        config: shared settings.
        seeds: one seed of the random numbers per text.
        log: records the experts of each token that is processed. The last new token never is.

    Raises:
        UsageError: a text would exceed the model's maximal length, or a KV cache is used with a
            capacity.
    """
    check_lengths(model, prompts, config.max_new_tokens)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    slots = max(map(len, prompts)) + config.max_new_tokens - 1
    decoder = (
        _CachedDecoder(model, len(prompts), slots, log)
        if config.use_cache
        else _UncachedDecoder(model, log)
    )
    texts = list(range(len(prompts)))  # indices of the unfinished texts, one per row
    new = [list(prompt) for prompt in prompts]  # tokens of each row not processed yet
    for step in range(config.max_new_tokens):
        logits_BV = decoder.forward(texts, new)[:, : config.vocab_size].float().cpu()
        unfinished: list[int] = []
        for row, text in enumerate(texts):
            token = next_token(logits_BV[row], config.sampling, generators[text])
            generated = _classify(text, token, step, config)
            new[row] = [token]
            if generated.finish_reason is None:
                unfinished.append(row)
            yield generated
        if not unfinished:
            return
        if len(unfinished) < len(texts):
            # Finished rows are dropped from the batch, so it shrinks as texts end.
            decoder.select_rows(unfinished)
            texts, new = [texts[row] for row in unfinished], [new[row] for row in unfinished]


def check_lengths(
    model: ReferenceOpenMoE, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Check that every prompt with its new tokens fits into the model's positions.

    Raises:
        UsageError: names the first prompt that does not, and how many new tokens would.
    """
    longest = model.model.max_position_embeddings
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) + max_new_tokens > longest:
            which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
            raise UsageError(
                "--max-new-tokens",
                max_new_tokens,
                f"<= {max(longest - len(prompt), 0)}",
                f"{which} has {len(prompt)} tokens, --max-position-embeddings is {longest}",
            )


def _classify(text: int, token: int, step: int, config: GenerationConfig) -> GeneratedToken:
    """The sampled token, and whether the text ends with it."""
    if token == config.eod:
        return GeneratedToken(text, None, "eod")
    if config.stop is not None and config.stop(text, token):
        return GeneratedToken(text, token, "stop")
    is_last = step + 1 == config.max_new_tokens
    return GeneratedToken(text, token, "length" if is_last else None)


class _CachedDecoder:
    """Processes only the new tokens; keys and values of earlier ones are cached."""

    def __init__(
        self, model: ReferenceOpenMoE, rows: int, slots: int, log: RoutingLog | None
    ) -> None:
        self.model, self.log = model, log
        self.cache = model.new_cache(rows, slots)
        self.device = model.embedding.weight.device

    def forward(self, texts: Sequence[int], new: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, V] after the new tokens of each text."""
        counts = [len(ids) for ids in new]
        padded = [[*ids, *[0] * (max(counts) - len(ids))] for ids in new]
        tokens_BS = torch.tensor(padded, device=self.device)
        x_BSH, routing = self.model.hidden_states_with_cache(tokens_BS, self.cache, counts)
        if self.log is not None:
            self.log.add(texts, counts, routing)
        # Rows are padded at their end, so the last token of a row is at its own index.
        rows = torch.arange(len(counts), device=self.device)
        last_BH = x_BSH[rows, torch.tensor(counts, device=self.device) - 1]
        return self.model.logits(last_BH)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.cache.select_rows(rows)


class _UncachedDecoder:
    """Processes every text as a whole at each step.

    Each text is a micro-batch of its own, so texts do not compete for the slots of experts.
    """

    def __init__(self, model: ReferenceOpenMoE, log: RoutingLog | None) -> None:
        self.model, self.log = model, log
        self.ids: list[list[int]] = []
        self.device = model.embedding.weight.device

    def forward(self, texts: Sequence[int], new: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, V] after the new tokens of each text."""
        self.ids = self.ids or [[] for _ in texts]
        logits = []
        for text, ids, more in zip(texts, self.ids, new, strict=True):
            ids += more
            tokens_BS = torch.tensor([ids], device=self.device)
            x_BSH, routing = self.model.hidden_states(tokens_BS, training_capacity=False)
            logits.append(self.model.logits(x_BSH[0, -1]))
            if self.log is not None:
                # The whole text is routed again, and under a capacity differently.
                self.log.clear(text)
                self.log.add([text], [len(ids)], routing)
        return torch.stack(logits)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        self.ids = [self.ids[row] for row in rows]

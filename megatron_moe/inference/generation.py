"""Continues several texts at once.

A text's continuation is that of the text alone: rows share a batch, but neither padding nor slots
of experts nor random numbers. With a cache each token is read once. Without one, every step reads
each text whole, which is the only way to apply a capacity: under one, what an early token becomes
may depend on a later one (`docs/generation.md`).

B texts that are not finished, S new tokens of a row, H hidden, V ids that may be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_moe.errors import UsageError
from megatron_moe.inference.routing_log import RoutingLog
from megatron_moe.inference.sampling import Sampling, next_token
from megatron_moe.model.reference import ReferenceOpenMoE

Finish = Literal["eod", "length", "stop"]


@dataclass(frozen=True)
class Drawn:
    """A new token of a text."""

    text: int
    """Which prompt it continues."""
    token: int | None
    """`None` where the text ends with an end of document, which is no part of it."""
    finish: Finish | None
    """Why the text ends here: end of document, enough tokens, or `stop` said so."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What continuations have in common."""

    tokens: int
    """How many new tokens at most."""
    vocab_size: int
    """Ids that the tokenizer has; padding beyond is never drawn."""
    eod: int
    sampling: Sampling
    cached: bool = True
    stop: Callable[[int, int], bool] | None = None
    """Told of each text and new token; whether the text ends with it."""


@torch.no_grad()
def generate(
    model: ReferenceOpenMoE,
    prompts: Sequence[Sequence[int]],
    rules: Rules,
    seeds: Sequence[int],
    log: RoutingLog | None = None,
) -> Iterator[Drawn]:
    """New tokens of all texts, those of one step in the order of the prompts.

    Args:
        model: in evaluation mode.
        prompts: ids, at least one each.
        rules: how to go on.
        seeds: of each text's random numbers.
        log: told which experts the tokens took. The last new token is never read.

    Raises:
        UsageError: a text becomes longer than the model allows, or a cache and a capacity.
    """
    check_lengths(model, prompts, rules.tokens)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    longest = max(map(len, prompts)) + rules.tokens - 1
    reader = (
        _CachedReader(model, len(prompts), longest, log) if rules.cached else _Reader(model, log)
    )
    texts = list(range(len(prompts)))
    new = [list(prompt) for prompt in prompts]
    for step in range(rules.tokens):
        logits_BV = reader.read(texts, new)[:, : rules.vocab_size].float().cpu()
        rows: list[int] = []
        for row, text in enumerate(texts):
            token = next_token(logits_BV[row], rules.sampling, generators[text])
            drawn = _judged(text, token, step, rules)
            new[row] = [token]
            if drawn.finish is None:
                rows.append(row)
            yield drawn
        if not rows:
            return
        if len(rows) < len(texts):
            reader.keep(rows)
            texts, new = [texts[row] for row in rows], [new[row] for row in rows]


def check_lengths(model: ReferenceOpenMoE, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    """Refuse texts that become longer than the model allows.

    Raises:
        UsageError: the number of new tokens, with the first prompt that is too long for it.
    """
    longest = model.model.max_position_embeddings
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) + tokens > longest:
            which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
            raise UsageError(
                "--max-new-tokens",
                tokens,
                f"at most {max(longest - len(prompt), 0)}: {which} has {len(prompt)} tokens, "
                f"--max-position-embeddings is {longest}",
            )


def _judged(text: int, token: int, step: int, rules: Rules) -> Drawn:
    if token == rules.eod:
        return Drawn(text, None, "eod")
    if rules.stop is not None and rules.stop(text, token):
        return Drawn(text, token, "stop")
    return Drawn(text, token, "length" if step + 1 == rules.tokens else None)


class _CachedReader:
    """Reads new tokens alone; the cache knows the others."""

    def __init__(
        self, model: ReferenceOpenMoE, rows: int, slots: int, log: RoutingLog | None
    ) -> None:
        self.model, self.log = model, log
        self.cache = model.new_cache(rows, slots)
        self.device = model.embedding.weight.device

    def read(self, texts: Sequence[int], new: Sequence[Sequence[int]]) -> Tensor:
        """Logits after the new tokens of each text, [B, V]."""
        counts = [len(ids) for ids in new]
        padded = [[*ids, *[0] * (max(counts) - len(ids))] for ids in new]
        tokens_BS = torch.tensor(padded, device=self.device)
        x_BSH, routing = self.model.hidden_states_with_cache(tokens_BS, self.cache, counts)
        if self.log is not None:
            self.log.add(texts, counts, routing)
        rows = torch.arange(len(counts), device=self.device)
        last_BH = x_BSH[rows, torch.tensor(counts, device=self.device) - 1]
        return self.model.logits(last_BH)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.cache.select_rows(rows)


class _Reader:
    """Reads every text whole at each step, each by itself, so that none competes with another."""

    def __init__(self, model: ReferenceOpenMoE, log: RoutingLog | None) -> None:
        self.model, self.log = model, log
        self.ids: list[list[int]] = []
        self.device = model.embedding.weight.device

    def read(self, texts: Sequence[int], new: Sequence[Sequence[int]]) -> Tensor:
        """Logits after the new tokens of each text, [B, V]."""
        self.ids = self.ids or [[] for _ in texts]
        logits = []
        for text, ids, more in zip(texts, self.ids, new, strict=True):
            ids += more
            tokens_BS = torch.tensor([ids], device=self.device)
            x_BSH, routing = self.model.hidden_states(tokens_BS, training_capacity=False)
            logits.append(self.model.logits(x_BSH[0, -1]))
            if self.log is not None:
                self.log.forget(text)
                self.log.add([text], [len(ids)], routing)
        return torch.stack(logits)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these texts alone."""
        self.ids = [self.ids[row] for row in rows]

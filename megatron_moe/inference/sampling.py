"""How the next token is chosen. V ids of the vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from its logits."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token."""
    top_k: int = 0
    """Only the k most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Only the most probable tokens whose probabilities reach p together; 1 for all."""

    def check(self) -> None:
        """Refuse what is no distribution.

        Raises:
            UsageError: a value is out of range.
        """
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UsageError("--temperature", self.temperature, "a number of at least 0")
        if self.top_k < 0:
            raise UsageError("--top-k", self.top_k, "at least 0")
        if not 0 < self.top_p <= 1:
            raise UsageError("--top-p", self.top_p, "above 0 and at most 1")


GREEDY = Sampling(temperature=0)


def next_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token: temperature first, then top-k, then top-p of what is left.

    Args:
        logits_V: fp32, on the CPU.
        sampling: how.
        generator: source of randomness.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    best = (logits_V / sampling.temperature).sort(descending=True, stable=True)
    logits_V = best.values[: sampling.top_k or None]
    probs_V = logits_V.softmax(dim=-1)
    # A token stays if those before it have not reached p: the one that reaches it is in.
    before_V = probs_V.cumsum(dim=-1) - probs_V
    probs_V = probs_V.where(before_V < sampling.top_p, 0.0)
    return int(best.indices[torch.multinomial(probs_V, 1, generator=generator)])

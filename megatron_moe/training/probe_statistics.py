"""What the choices of a fixed set of tokens say about a router; on the host, in NumPy.

Shapes: N tokens, K choices, E experts, V distinct token ids, D domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]
PERMUTATIONS = 4
"""Shuffles of the token ids whose mean is the chance level of `token_share`."""
LEAST_ROOM = 1e-9
"""Nats that ids can explain, at least; less is the rounding of equal entropies."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How many choices of two probes are equal.

    Args:
        choices: mean over tokens of |A & B| / K; by chance K / E.
        top1: share of tokens whose first choice is the same; by chance 1 / E.
    """

    choices: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class LayerProbe:
    """One MoE layer at one probe.

    Args:
        previous: agreement with the probe before; `None` at the first one.
        first: agreement with the first probe of the run; `None` at the first one.
        token_share: share of the entropy of the expert that the token id alone explains,
            I(expert; id) / (H(expert) - log K), as in the analysis `context`; `None` if all tokens
            choose the same experts.
        token_share_chance: the same with the ids shuffled: what a sample of this size shows if the
            id explains nothing.
        logit_rms: root of the mean squared router logit.
        logit_drift: it over that of the first probe.
        domain_shares: [D][E] share of the choices of each domain.
    """

    previous: Agreement | None
    first: Agreement | None
    token_share: float | None
    token_share_chance: float | None
    logit_rms: float
    logit_drift: float
    domain_shares: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """One probe of the whole model.

    Args:
        iteration: completed steps.
        tokens: N, without padding.
        chance: agreement of two random routers, K / E.
        domains: names of the domains.
        layers: by 0-based layer number.
    """

    iteration: int
    tokens: int
    chance: float
    domains: tuple[str, ...]
    layers: dict[int, LayerProbe]

    def to_json(self) -> dict[str, Any]:
        """As plain values, domains by name."""
        return {
            "tokens": self.tokens,
            "chance": self.chance,
            "layers": {str(n): self._layer(layer) for n, layer in self.layers.items()},
        }

    def _layer(self, layer: LayerProbe) -> dict[str, Any]:
        values = dict(vars(layer))
        for name in ("previous", "first"):
            values[name] = None if values[name] is None else dict(vars(values[name]))
        shares = zip(self.domains, layer.domain_shares, strict=True)
        return {**values, "domain_shares": {name: list(share) for name, share in shares}}


def agreement(now_NK: Ints, before_NK: Ints) -> Agreement:
    """Compare the choices of the same tokens; the order counts for the first choice only."""
    same_NKK = now_NK[:, :, None] == before_NK[:, None, :]
    return Agreement(
        choices=float(same_NKK.any(axis=2).mean()),
        top1=float((now_NK[:, 0] == before_NK[:, 0]).mean()),
    )


def token_share(ids_N: Ints, choices_NK: Ints, experts: int) -> tuple[float | None, float | None]:
    """I(expert; id) / (H(expert) - log K) over all choices, and its mean over shuffles of the ids.

    1 if the id decides the K experts of a token, which then still differ by log K; 0 if it says
    nothing. The definition is that of the analysis of checkpoints (`context`).

    A small sample makes the first number large even if ids explain nothing: an id that occurs once
    seems to explain its choices completely. Example: ids 5 5 7 7 with choices 0 0 1 1 explain all,
    1.0; with choices 0 1 0 1 nothing, 0.0.
    """
    _, index_N = np.unique(ids_N, return_inverse=True)
    size = int(index_N.max()) + 1
    entropy = _entropy(np.bincount(choices_NK.reshape(-1), minlength=experts))
    room = entropy - float(np.log(choices_NK.shape[1]))
    if room < LEAST_ROOM:
        return None, None
    of_ids = _entropy(np.bincount(index_N, minlength=size))

    def share(order_N: Ints) -> float:
        pairs_NK = order_N[:, None] * experts + choices_NK
        joint = _entropy(np.bincount(pairs_NK.reshape(-1), minlength=size * experts))
        return (entropy + of_ids - joint) / room

    draw = np.random.default_rng(0)
    shuffled = [share(draw.permutation(index_N)) for _ in range(PERMUTATIONS)]
    return share(index_N), float(np.mean(shuffled))


def _entropy(counts: Ints) -> float:
    """Entropy in nats of the distribution with these counts."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def domain_shares(
    domains_N: Ints, choices_NK: Ints, count: int, experts: int
) -> tuple[tuple[float, ...], ...]:
    """[D][E]: of the choices of each domain's tokens, the share of each expert."""
    pairs_NK = domains_N[:, None] * experts + choices_NK
    table_DE = np.bincount(pairs_NK.reshape(-1), minlength=count * experts).reshape(count, experts)
    total_D1 = np.maximum(table_DE.sum(axis=1, keepdims=True), 1)
    return tuple(tuple(row) for row in (table_DE / total_D1).tolist())


def spread_over(count: int, most: int) -> Sequence[int]:
    """At most ``most`` of the numbers below ``count``, evenly spread; the same at every call."""
    return range(0, count, -(-count // max(most, 1)))

"""Which experts each token took, for people and for programs.

L MoE layers, T tokens of a text, K choices per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_moe.inference.text import Text
from megatron_moe.model.reference.routing import Routing


@dataclass
class LayerLog:
    """What the router of one layer decided, token by token."""

    layer: int
    """Index in the network, from 0."""
    experts_TK: list[list[int]] = field(default_factory=list)
    """Best first."""
    probs_TK: list[list[float]] = field(default_factory=list)
    kept_TK: list[list[bool]] = field(default_factory=list)
    """False where the expert was full."""


class RoutingLog:
    """The decisions for several texts, in the order in which their tokens were read."""

    def __init__(self, texts: int) -> None:
        self._texts: list[list[LayerLog]] = [[] for _ in range(texts)]

    def add(self, texts: Sequence[int], counts: Sequence[int], routing: Sequence[Routing]) -> None:
        """Take over one forward pass of a batch.

        Args:
            texts: which text each row is of.
            counts: tokens of each row that are no padding.
            routing: by MoE layer.
        """
        for place, (text, count) in enumerate(zip(texts, counts, strict=True)):
            if not self._texts[text]:
                self._texts[text] = [LayerLog(decided.layer) for decided in routing]
            for log, decided in zip(self._texts[text], routing, strict=True):
                log.experts_TK += _row(decided.ids_TK, len(texts), place, count)
                log.probs_TK += _row(decided.probs_TK, len(texts), place, count)
                log.kept_TK += _row(decided.kept_TK, len(texts), place, count)

    def forget(self, text: int) -> None:
        """Drop what is known of a text: it is read again from its start."""
        self._texts[text] = []

    def layers(self, text: int) -> list[LayerLog]:
        """By MoE layer."""
        return self._texts[text]


def _row(values: Tensor, rows: int, place: int, count: int) -> Any:
    return values.unflatten(0, (rows, -1))[place, :count].tolist()


def routing_json(layers: Sequence[LayerLog]) -> list[dict[str, Any]]:
    """By layer: experts, probabilities and whether they were kept; each [T, K]."""
    return [
        {
            "layer": log.layer,
            "experts": log.experts_TK,
            "probabilities": [[round(p, 6) for p in probs] for probs in log.probs_TK],
            "kept": log.kept_TK,
        }
        for log in layers
    ]


def routing_table(layers: Sequence[LayerLog], ids: Sequence[int], text: Text) -> str:
    """A line per token: its place, text, and by layer its experts with their probabilities.

    A choice in parentheses was dropped. Ids that no layer has read have no line.
    """
    if not layers:
        return "no layer has experts"
    read = len(layers[0].experts_TK)
    rows = [["", "token", *(f"layer {log.layer}" for log in layers)]]
    for place, token in enumerate(ids[:read]):
        rows.append([str(place), text.piece(token), *(_choices(log, place) for log in layers)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].rjust(widths[0])
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _choices(log: LayerLog, place: int) -> str:
    chosen = zip(log.experts_TK[place], log.probs_TK[place], log.kept_TK[place], strict=True)
    words = [f"{expert}:{p:.2f}" for expert, p, _ in chosen]
    return " ".join(
        word if kept else f"({word})" for word, kept in zip(words, log.kept_TK[place], strict=True)
    )

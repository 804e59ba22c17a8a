"""The experts of each token during generation, as a table and as JSON.

Shapes: T tokens of a text, K choices per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_moe.inference.text import TextTokenizer
from megatron_moe.model.reference import Routing


@dataclass
class LayerLog:
    """Routing decisions of one layer for the tokens of a text."""

    layer: int
    """Index in the network, from 0."""
    experts_TK: list[list[int]] = field(default_factory=list)
    """Best first."""
    probs_TK: list[list[float]] = field(default_factory=list)
    kept_TK: list[list[bool]] = field(default_factory=list)
    """False where the expert had no free slot."""


class RoutingLog:
    """Routing decisions for several texts, in the order of their tokens."""

    def __init__(self, texts: int) -> None:
        self._texts: list[list[LayerLog]] = [[] for _ in range(texts)]

    def add(self, texts: Sequence[int], counts: Sequence[int], routing: Sequence[Routing]) -> None:
        """Append the decisions of one forward pass of a batch.

        Args:
            texts: index of the text of each row.
            counts: tokens of each row that are not padding.
            routing: one record per MoE layer.
        """
        for place, (text, count) in enumerate(zip(texts, counts, strict=True)):
            if not self._texts[text]:
                self._texts[text] = [LayerLog(decisions.layer) for decisions in routing]
            for log, decisions in zip(self._texts[text], routing, strict=True):
                log.experts_TK += _row(decisions.ids_TK, len(texts), place, count)
                log.probs_TK += _row(decisions.probs_TK, len(texts), place, count)
                log.kept_TK += _row(decisions.kept_TK, len(texts), place, count)

    def clear(self, text: int) -> None:
        """Delete the decisions of a text, before it is processed again from its start."""
        self._texts[text] = []

    def layers(self, text: int) -> list[LayerLog]:
        """The decisions of a text, by MoE layer."""
        return self._texts[text]


def _row(values: Tensor, rows: int, place: int, count: int) -> Any:
    return values.unflatten(0, (rows, -1))[place, :count].tolist()


def routing_json(layers: Sequence[LayerLog]) -> list[dict[str, Any]]:
    """By layer: experts, probabilities and whether each was kept, [T][K] each."""
    return [
        {
            "layer": log.layer,
            "experts": log.experts_TK,
            "probabilities": [[round(p, 6) for p in probs] for probs in log.probs_TK],
            "kept": log.kept_TK,
        }
        for log in layers
    ]


def routing_table(layers: Sequence[LayerLog], ids: Sequence[int], tokenizer: TextTokenizer) -> str:
    """A line per token: position, text, and per layer its experts with their probabilities.

    A choice in parentheses was dropped. Ids that no layer has processed have no line.
    """
    if not layers:
        return "the model has no MoE layer"
    processed = len(layers[0].experts_TK)
    rows = [["", "token", *(f"layer {log.layer}" for log in layers)]]
    for place, token in enumerate(ids[:processed]):
        rows.append([str(place), tokenizer.piece(token), *(_choices(log, place) for log in layers)])
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

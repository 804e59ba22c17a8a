"""Denoisers of UL2: a mixture is read from TOML, and each denoiser is fitted to a row.

S tokens of a row; P tokens of a prefix text; L tokens of the text that a denoiser takes; I and T,
the largest lengths of inputs and targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_moe.data.objectives.spans import span_counts
from megatron_moe.errors import UsageError
from megatron_moe.text import read_text, toml_value

OPENMOE = Path(__file__).parent / "denoisers" / "openmoe.toml"
"""The six denoisers of the paper."""
_FLAG = "--ul2-mixture"
Kind = Literal["span", "prefix-lm"]
_KEYS: dict[Kind, set[str]] = {"span": {"mean_span", "rate"}, "prefix-lm": set()}
"""Keys of a `[[denoiser]]` table by kind, besides `prefix`, `weight` and `kind`."""


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """One way to hide a part of a text."""

    prefix: str
    """Plain text before the inputs."""
    kind: Kind
    """`span`: random spans are hidden. `prefix-lm`: the text is split at a uniformly random place
    into inputs and targets."""
    mean_span: float
    """Hidden tokens per span; 0 for `prefix-lm`."""
    rate: float
    """Share of hidden tokens; 0 for `prefix-lm`."""
    weight: float
    """Share of samples, relative to the other weights."""

    def lengths(self, text: int, prefix: int) -> tuple[int, int]:
        """Return the largest lengths of inputs and targets with their ends, for L = ``text``.

        Span corruption: P + (L - n) + k + 1 and n + k + 1 with n hidden tokens in k spans, always.
        Prefix LM with a split s in 1 .. L - 1: P + s + 1 and L - s + 1, so at most P + L and L.

        Example, T5's own: 568 tokens at rate 0.15 and mean span 3 have 85 hidden tokens in 28
        spans, so inputs of 568 - 85 + 28 + 1 = 512 and targets of 85 + 28 + 1 = 114.
        """
        if self.kind == "prefix-lm":
            return prefix + text, text
        if self.kind == "span":
            hidden, spans = span_counts(text, self.rate, self.mean_span)
            return prefix + text - hidden + spans + 1, hidden + spans + 1
        raise not_implemented(self.kind)

    def total(self, text: int, prefix: int) -> int:
        """Return the tokens of a row without pads: P + L + 2 ends + 2 sentinels per span."""
        return prefix + text + 2 * self.spans(text) + 2

    def spans(self, text: int) -> int:
        """Return the number of hidden spans, each of which has a sentinel, for L = ``text``."""
        if self.kind == "prefix-lm":
            return 0
        if self.kind == "span":
            return span_counts(text, self.rate, self.mean_span)[1]
        raise not_implemented(self.kind)

    def fit(self, prefix: int, row: int, inputs: int | None) -> int:
        """Return the largest L whose inputs and targets fit, 0 if there is none.

        Args:
            prefix: P.
            row: S.
            inputs: I, and T = S - I; `None` bounds only the sum, by S.
        """
        # A search, not a formula, because the numbers of hidden tokens and spans are rounded.
        for text in range(row, 1, -1):
            most = self.lengths(text, prefix)
            apart = inputs is None or (most[0] <= inputs and most[1] <= row - inputs)
            if apart and self.total(text, prefix) <= row:
                return text
        return 0


def not_implemented(kind: str) -> NotImplementedError:
    """The error of a method that has no branch for a kind of denoiser."""
    return NotImplementedError(f"denoisers of kind {kind!r} are not implemented here")


def read_denoisers(path: str | None) -> tuple[Denoiser, ...]:
    """Read the denoisers of a file; `None` reads OpenMoE's.

    Raises:
        UsageError: the file cannot be read, or an entry is invalid.
    """
    where = path or str(OPENMOE)
    try:
        content = toml_value(read_text(where, _FLAG, "a readable file"))
    except ValueError as error:
        raise UsageError(_FLAG, where, "a TOML file", str(error)) from None
    entries = content.get("denoiser")
    if set(content) != {"denoiser"} or not isinstance(entries, list) or not entries:
        expected = "one or more [[denoiser]] tables and nothing else"
        raise UsageError(f"content of {_FLAG}", sorted(content), expected)
    mixture = tuple(_denoiser(entry, i) for i, entry in enumerate(entries, 1))
    if not any(denoiser.weight for denoiser in mixture):
        raise UsageError(f"one of the weights in {where}", [0] * len(mixture), "> 0")
    return tuple(denoiser for denoiser in mixture if denoiser.weight)


def _denoiser(entry: Any, number: int) -> Denoiser:
    where = f"denoiser {number} of {_FLAG}"
    if not isinstance(entry, dict):
        raise UsageError(where, entry, "a table")
    kind = entry.get("kind", "span")
    if kind not in list(_KEYS):  # a list, because a value of TOML may be unhashable
        raise UsageError(f"kind of {where}", kind, " or ".join(_KEYS))
    wanted = {"prefix", "weight"} | _KEYS[kind]
    if set(entry) - {"kind"} != wanted:
        raise UsageError(f"keys of {where}", sorted(entry), ", ".join(sorted(wanted)))
    if not isinstance(entry["prefix"], str):
        raise UsageError(f"prefix of {where}", entry["prefix"], "a string, which may be empty")
    mean_span, rate = (_number(entry, key, where) for key in ("mean_span", "rate"))
    if kind == "span" and not mean_span >= 1:
        raise UsageError(f"mean_span of {where}", mean_span, ">= 1")
    # Each of k = rate L / mean_span kept spans needs one of the (1 - rate) L kept tokens.
    if kind == "span" and not 0 < rate <= mean_span / (1 + mean_span):
        raise UsageError(f"rate of {where}", rate, "> 0 and <= mean_span / (1 + mean_span)")
    weight = _number(entry, "weight", where)
    return Denoiser(
        prefix=entry["prefix"], kind=kind, mean_span=mean_span, rate=rate, weight=weight
    )


def _number(entry: dict[str, Any], key: str, where: str) -> float:
    value = entry.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UsageError(f"{key} of {where}", value, "a number >= 0")
    return float(value)

"""A mixture of denoisers: read from TOML, and fitted to a row.

S tokens of a row; P tokens of a prefix text; L tokens of the text a denoiser works on; I and T, the
most that inputs and targets may have.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_moe.data.objectives.spans import span_counts
from megatron_moe.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OPENMOE = Path(__file__).parent / "denoisers" / "openmoe.toml"
"""The six denoisers of the paper."""
_FLAG = "--ul2-mixture"


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """One way of hiding a part of a text."""

    prefix: str
    """Plain text put before the inputs."""
    kind: Literal["span", "prefix-lm"]
    """`span`: hidden spans. `prefix-lm`: the inputs are the text up to a uniformly random split,
    the targets the rest."""
    mean_span: float
    """Hidden tokens per span; 0 for `prefix-lm`."""
    rate: float
    """Share of hidden tokens; 0 for `prefix-lm`."""
    weight: float
    """Share of samples, in proportion to the others'."""

    def lengths(self, text: int, prefix: int) -> tuple[int, int]:
        """Most tokens of inputs and of targets, each with its end, for L = ``text``.

        Span corruption: P + (L - n) + k + 1 and n + k + 1 with n hidden tokens in k spans, always.
        Prefix LM with a split s in 1 .. L - 1: P + s + 1 and L - s + 1, so at most P + L and L.
        """
        if self.kind == "prefix-lm":
            return prefix + text, text
        hidden, spans = span_counts(text, self.rate, self.mean_span)
        return prefix + text - hidden + spans + 1, hidden + spans + 1

    def total(self, text: int, prefix: int) -> int:
        """Tokens of inputs and targets together: P + L + 2 with two sentinels per span."""
        spans = 0
        if self.kind == "span":
            spans = span_counts(text, self.rate, self.mean_span)[1]
        return prefix + text + 2 * spans + 2

    def fit(self, prefix: int, row: int, inputs: int | None) -> int:
        """The largest L whose inputs and targets fit, 0 if none does.

        Args:
            prefix: P.
            row: S.
            inputs: I, and T = S - I; `None` if only the sum is bounded, by S.
        """
        for text in range(row, 1, -1):
            most = self.lengths(text, prefix)
            apart = inputs is None or (most[0] <= inputs and most[1] <= row - inputs)
            if apart and self.total(text, prefix) <= row:
                return text
        return 0


def read_mixture(path: str | None) -> tuple[Denoiser, ...]:
    """The denoisers of a file; `None` takes OpenMoE's.

    Raises:
        UsageError: the file is unreadable, or an entry cannot be meant.
    """
    where = path or str(OPENMOE)
    try:
        content = tomllib.loads(Path(where).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(_FLAG, where, "a readable file", str(error)) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(_FLAG, where, "a TOML file", str(error)) from None
    entries = content.get("denoiser")
    if set(content) != {"denoiser"} or not isinstance(entries, list) or not entries:
        raise UsageError(_FLAG, sorted(content), "one or more [[denoiser]] tables and nothing else")
    mixture = tuple(_denoiser(entry, i) for i, entry in enumerate(entries, 1))
    if not any(denoiser.weight for denoiser in mixture):
        raise UsageError(f"weights in {where}", [0] * len(mixture), "one at least above 0")
    return tuple(denoiser for denoiser in mixture if denoiser.weight)


def _denoiser(entry: Any, number: int) -> Denoiser:
    where = f"denoiser {number} of {_FLAG}"
    if not isinstance(entry, dict):
        raise UsageError(where, entry, "a table")
    kind = entry.get("kind", "span")
    if kind not in ("span", "prefix-lm"):
        raise UsageError(f"kind of {where}", kind, "span or prefix-lm")
    wanted = {"prefix", "weight"} | ({"mean_span", "rate"} if kind == "span" else set())
    if set(entry) - {"kind"} != wanted:
        raise UsageError(f"keys of {where}", sorted(entry), ", ".join(sorted(wanted)))
    if not isinstance(entry["prefix"], str):
        raise UsageError(f"prefix of {where}", entry["prefix"], "a text, which may be empty")
    mean_span, rate = (_number(entry, key, where) for key in ("mean_span", "rate"))
    if kind == "span" and not mean_span >= 1:
        raise UsageError(f"mean_span of {where}", mean_span, "1 or more")
    # k kept spans have to stay: k = rate L / mean of them in (1 - rate) L tokens.
    if kind == "span" and not 0 < rate <= mean_span / (1 + mean_span):
        raise UsageError(f"rate of {where}", rate, "above 0, at most mean_span / (1 + mean_span)")
    weight = _number(entry, "weight", where)
    return Denoiser(
        prefix=entry["prefix"], kind=kind, mean_span=mean_span, rate=rate, weight=weight
    )


def _number(entry: dict[str, Any], key: str, where: str) -> float:
    value = entry.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UsageError(f"{key} of {where}", value, "a number, 0 or more")
    return float(value)

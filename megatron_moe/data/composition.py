"""What training data is made of, by source, for the log and for `--describe`.

Imports no torch, because `--describe` does not. S tokens of a row.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from megatron_moe.config import RunConfig
from megatron_moe.config.rampup import BatchSizes
from megatron_moe.data.blend import Blend, blends_of, domains_of, parse_blend, tokens_in, weights_of
from megatron_moe.data.indexed.check import Source, inspect_source
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.build import build_tokenizer


@dataclass(frozen=True, kw_only=True)
class Share:
    """One source of the training split."""

    domain: str
    prefix: str
    weight: float | None
    """Share of the samples, summing to 1; `None` if it depends on sizes that are unknown."""
    tokens: int | None
    """Tokens of one epoch; `None` if unknown."""
    exists: bool
    """Whether the files exist."""
    epochs: float | None
    """Epochs of the source in the whole run; `None` if unknown, as for conversations: a row takes a
    varying number of them."""


def shares_of(
    blend: Blend,
    sources: Mapping[str, Source],
    seq_length: int,
    samples: int | None,
    text_per_row: float | None,
) -> tuple[Share, ...]:
    """Return the sources of a blend, in its order.

    Args:
        blend: of the training split.
        sources: the opened sources by prefix; some may be missing.
        seq_length: S.
        samples: rows of the whole run; `None` if its length is unknown.
        text_per_row: tokens of text that a row consumes on average; `None` if unknown.
    """
    known = all(prefix in sources for prefix in blend.prefixes)
    weights: Sequence[float] | None = blend.weights
    if weights is None and known:
        weights = weights_of(blend, sources, seq_length)
    if weights is None and len(blend.prefixes) == 1:
        weights = (1.0,)
    found: list[Share] = []
    domains = blend.domains or blend.prefixes
    for i, (domain, prefix) in enumerate(zip(domains, blend.prefixes, strict=True)):
        weight = None if weights is None else weights[i] / sum(weights)
        tokens = tokens_in(sources[prefix], blend.bounds) if prefix in sources else None
        epochs = None
        if tokens and weight is not None and samples is not None and text_per_row is not None:
            epochs = samples * weight * text_per_row / tokens
        found.append(
            Share(
                domain=domain,
                prefix=prefix,
                weight=weight,
                tokens=tokens,
                exists=prefix in sources,
                epochs=epochs,
            )
        )
    return tuple(found)


def share_of(config: RunConfig) -> Fraction:
    """Return s, the fraction that the digits of `--sft-share` are."""
    return Fraction(repr(config.objective.sft_share))


def rows_before(share: Fraction, row: int) -> int:
    """Return the rows of conversations before a row: floor(row s)."""
    return row * share.numerator // share.denominator


def beside_chat(shares: Sequence[Share], chat: Sequence[Share], part: float) -> tuple[Share, ...]:
    """Return the sources of text and those of conversations, of which a part of all rows is."""
    sizes = [*((share, 1.0 - part) for share in shares), *((share, part) for share in chat)]
    return tuple(
        replace(share, weight=None if share.weight is None else share.weight * size)
        for share, size in sizes
    )


def described_shares(config: RunConfig, global_batch_size: int) -> tuple[Share, ...]:
    """Return what `--describe` prints, from headers and lengths alone.

    Empty if no data is named, and for conversations, which would have to be tokenized. Missing
    files are reported as such, since a run may be described before its data is made.

    Raises:
        UsageError: files are broken, or flags conflict.
    """
    data = config.data
    named = (data.data_path, data.data_args_path, data.mixture, data.train_data_path)
    if not any(named) or config.objective.objective == "sft":
        return ()
    blend = blends_of(data)["train"]
    assert blend is not None
    opened = {prefix: _source_if_present(prefix) for prefix in blend.prefixes}
    sources = {prefix: source for prefix, source in opened.items() if source is not None}
    samples, iterations = config.train.train_samples, config.train.train_iters
    if samples is None and iterations is not None:
        samples = BatchSizes.of(config.train, global_batch_size).samples_of(iterations)
    text = text_per_row(config) if sources else None
    part, objective = config.objective.sft_share, config.objective
    own = samples if samples is None else samples - rows_before(share_of(config), samples)
    found = shares_of(blend, sources, data.seq_length, own, text)
    if not part:
        return found
    files, weights = parse_blend("--sft-data-path", objective.sft_data_path)
    chat = Blend(
        flag="--sft-data-path",
        prefixes=files,
        weights=weights,
        bounds=blend.bounds,
        domains=domains_of(files),
    )
    # Tokens are unknown before the files are tokenized, which a description does not do.
    of_chat = shares_of(chat, {}, data.seq_length, None, None)
    of_chat = tuple(replace(share, exists=os.path.exists(share.prefix)) for share in of_chat)
    return beside_chat(found, of_chat, part)


def _source_if_present(prefix: str) -> Source | None:
    try:
        return inspect_source(prefix)
    except UsageError as error:
        if error.what == "data path":
            return None
        raise


def text_per_row(config: RunConfig, tokenizer: Tokenizer | None = None) -> float | None:
    """Return the tokens of text that a row consumes on average; `None` for conversations.

    Example: UL2 with windows of 1131 and 1019 tokens and weights 1 and 1 consumes 1075.
    """
    name = config.objective.objective
    if name == "sft":
        return None
    if name != "ul2":
        return float(config.data.seq_length)
    from megatron_moe.data.objectives.ul2 import plan_ul2

    fitted = plan_ul2(config, tokenizer or build_tokenizer(config.data)).denoisers
    weights = [f.denoiser.weight for f in fitted]
    texts = [f.text * w for f, w in zip(fitted, weights, strict=True)]
    return sum(texts) / sum(weights)


def share_lines(shares: Sequence[Share]) -> list[str]:
    """Return a table of domain, share, tokens, epochs and prefix."""
    rows = [("domain", "share", "tokens", "epochs", "prefix")]
    for share in shares:
        rows.append(
            (
                share.domain,
                _or_dash(share.weight, "{:.2%}"),
                _or_dash(share.tokens, "{:,}") if share.exists else "no file",
                _or_dash(share.epochs, "{:.3g}"),
                share.prefix,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return [
        f"{name:<{widths[0]}}  {weight:>{widths[1]}}  {tokens:>{widths[2]}}"
        f"  {epochs:>{widths[3]}}  {prefix}"
        for name, weight, tokens, epochs, prefix in rows
    ]


def _or_dash(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)

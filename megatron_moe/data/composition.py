"""What training data is made of, by source: said in the log and by `--describe`.

No torch here. S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_moe.config import RunConfig
from megatron_moe.config.rampup import BatchSizes
from megatron_moe.data.blend import Blend, blends_of, tokens_in, weights_of
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
    """Share of the samples, all together 1; `None` if it follows from sizes that are not known."""
    tokens: int | None
    """Tokens of one epoch; `None` if that is not known."""
    there: bool
    """Whether the files are there, as far as was looked."""
    epochs: float | None
    """How often the run goes through them; `None` if that is not known: conversations fill rows as
    they fit."""


def shares_of(
    blend: Blend,
    sources: Mapping[str, Source],
    seq_length: int,
    samples: int | None,
    text_per_row: float | None,
) -> tuple[Share, ...]:
    """The sources of a blend, in its order.

    Args:
        blend: of the training split.
        sources: what is known of its prefixes; some may be missing.
        seq_length: S.
        samples: rows of the whole run; `None` if its length is not known.
        text_per_row: tokens of text that a row uses up on average; `None` if that is not known.
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
                there=prefix in sources,
                epochs=epochs,
            )
        )
    return tuple(found)


def described_shares(config: RunConfig, global_batch_size: int) -> tuple[Share, ...]:
    """What `--describe` tells, from headers and lengths alone; empty if no data is named,
    or if it is conversations, which would have to be tokenized.

    Files that are not there are described as such, since a run may be described before its data is
    made; files that are broken are refused.
    """
    data = config.data
    named = (data.data_path, data.data_args_path, data.mixture, data.train_data_path)
    if not any(named) or config.objective.objective == "sft":
        return ()
    blend = blends_of(data)["train"]
    assert blend is not None
    opened = {prefix: _source_if_there(prefix) for prefix in blend.prefixes}
    sources = {prefix: source for prefix, source in opened.items() if source is not None}
    samples, iterations = config.train.train_samples, config.train.train_iters
    if samples is None and iterations is not None:
        samples = BatchSizes.of(config.train, global_batch_size).samples_of(iterations)
    text = text_per_row(config) if sources else None
    return shares_of(blend, sources, data.seq_length, samples, text)


def _source_if_there(prefix: str) -> Source | None:
    try:
        return inspect_source(prefix)
    except UsageError as error:
        if error.what == "data path":
            return None
        raise


def text_per_row(config: RunConfig, tokenizer: Tokenizer | None = None) -> float | None:
    """Tokens of text that a row uses up on average; `None` for conversations."""
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
    """A table: domain, share, tokens, epochs, prefix."""
    rows = [("domain", "share", "tokens", "epochs", "prefix")]
    for share in shares:
        rows.append(
            (
                share.domain,
                _or_dash(share.weight, "{:.2%}"),
                _or_dash(share.tokens, "{:,}") if share.there else "no file",
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

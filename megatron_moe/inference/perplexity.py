"""Perplexity of indexed data: every token is predicted once.

`held_out.py` evaluates a run's own validation samples instead. Losses are in nats per token.

Shapes: B batch rows, S tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from megatron_moe.data.batch import Batch, document_planes, inputs_of, reset_planes
from megatron_moe.data.blend import domains_of, parse_blend
from megatron_moe.data.indexed.check import Source, inspect_source
from megatron_moe.data.indexed.manifest import check_compatibility, read_manifest
from megatron_moe.errors import UsageError
from megatron_moe.inference.loading import LoadedModel
from megatron_moe.inference.scoring import predictions


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Loss of some data."""

    name: str
    """A domain, or `all`."""
    prefix: str | None
    """Prefix of the indexed data; `None` for several, or for samples of a run."""
    weight: float | None
    """Share in the loss of `all`; `None` if prefixes are weighted by tokens."""
    loss: float
    """Mean cross entropy per token."""
    tokens: int
    """Number of predicted tokens."""
    bits_per_byte: float | None
    """Loss in bits per byte of text; `None` if no manifest records the number of bytes."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    def to_json(self) -> dict[str, Any]:
        """JSON values of the command's output."""
        values = {name: value for name, value in vars(self).items() if name != "weight"}
        share = {} if self.weight is None else {"weight": self.weight}
        return values | share | {"perplexity": self.perplexity}


def evaluate_batches(loaded: LoadedModel, batches: Iterable[Batch]) -> tuple[float, int]:
    """Sum of cross entropies where the loss mask is positive, and their number."""
    total, count = 0.0, 0
    for batch in batches:
        scored = batch.loss_mask_BS > 0
        if scored.any():
            found, _ = predictions(
                loaded,
                batch.tokens_BS,
                batch.labels_BS,
                scored,
                positions_BS=batch.positions_BS,
                documents_BS=batch.documents_BS,
                padding_BS=batch.padding_BS,
            )
            total -= found.sum(dtype=torch.float64).item()
            count += len(found)
    return total, count


def evaluate_data(
    loaded: LoadedModel,
    words: Sequence[str],
    *,
    seq_length: int,
    batch_size: int,
    max_tokens: int | None = None,
) -> list[Perplexity]:
    """Loss of each prefix, in order, and of all if there are several.

    Args:
        loaded: the model.
        words: prefixes, or weight and prefix pairs; the weights are those of the loss of all.
        seq_length: S; each token is predicted from the tokens before it in its row.
        batch_size: B.
        max_tokens: tokens of each prefix, from its start; `None` for all.

    Raises:
        UsageError: data is missing, damaged or made with another tokenizer.
    """
    prefixes, weights = parse_blend("--data-path", words)
    sources = [_open(prefix, loaded) for prefix in prefixes]
    found = []
    for number, (name, source) in enumerate(zip(domains_of(prefixes), sources, strict=True)):
        batches = rows_of(source, loaded, seq_length, batch_size, max_tokens)
        total, count = evaluate_batches(loaded, batches)
        manifest = read_manifest(source.prefix)
        density = manifest.tokens_per_byte if manifest is not None else 0.0
        found.append(
            Perplexity(
                name=name,
                prefix=source.prefix,
                weight=None if weights is None else weights[number] / sum(weights),
                loss=total / count,
                tokens=count,
                bits_per_byte=total / count / math.log(2) * density if density else None,
            )
        )
    return [*found, _all(found)] if len(found) > 1 else found


def _open(prefix: str, loaded: LoadedModel) -> Source:
    check_compatibility(
        prefix,
        tokenizer_type=loaded.config.data.tokenizer_type,
        tokenizer_hash=loaded.tokenizer.base.identity,
        needs_eod=bool(reset_planes(loaded.config.objective)),
    )
    return inspect_source(prefix)


def _all(parts: Sequence[Perplexity]) -> Perplexity:
    """Loss of all parts, weighted by their weights if given, else by their tokens."""
    shares = [part.tokens if part.weight is None else part.weight for part in parts]
    loss = sum(share * part.loss for share, part in zip(shares, parts, strict=True)) / sum(shares)
    return Perplexity(
        name="all",
        prefix=None,
        weight=None,
        loss=loss,
        tokens=sum(part.tokens for part in parts),
        bits_per_byte=None,
    )


def rows_of(
    source: Source, loaded: LoadedModel, seq_length: int, batch_size: int, max_tokens: int | None
) -> Iterator[Batch]:
    """All tokens of a source in file order, each as a label once.

    An end of document precedes the first token, so that it is predicted too; with
    `--decoder-start-token-id` each row begins with that token. Rows follow each other without
    overlap. The last row is shorter and a batch of its own, so there is no padding, which
    would take slots of experts under a capacity.

    Raises:
        UsageError: an id is not in the vocabulary, or the last row is not a multiple of the
            capacity group.
    """
    tokens, eod = source.token_ids(), loaded.tokenizer.eod
    end = min(len(tokens), max_tokens or len(tokens))
    whole = end // seq_length
    cuts = [*range(0, whole * seq_length, batch_size * seq_length), whole * seq_length, end]
    for start, stop in pairwise(cuts):
        if start == stop:
            continue
        rows = -(-(stop - start) // seq_length)
        # A batch of n labels needs n + 1 tokens: the last one of the batch before, and its own.
        before = [eod] if start == 0 else [tokens[start - 1]]
        text = np.concatenate([before, tokens[start:stop]]).astype(np.int64)
        _check_ids(text, start, source, loaded)
        yield batch_of(text[:-1].reshape(rows, -1), text[1:].reshape(rows, -1), loaded)


def batch_of(
    before: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], loaded: LoadedModel
) -> Batch:
    """A batch of ids as the rows of the model's run have them; every label counts.

    Args:
        before: [B, S], the id before each label in the text.
        labels: [B, S], ids to predict.
        loaded: the model.
    """
    return _batch(_inputs(before, labels, loaded), labels, loaded)


def _inputs(
    before: np.ndarray[Any, Any], targets: np.ndarray[Any, Any], loaded: LoadedModel
) -> np.ndarray[Any, Any]:
    start = loaded.config.objective.decoder_start_token_id
    if start is None:
        return before
    begins = np.zeros(targets.shape, dtype=bool)
    if reset_planes(loaded.config.objective):
        begins[:, 1:] = targets[:, :-1] == loaded.tokenizer.eod
    starts = [start] * len(targets)
    return np.stack([inputs_of(*row) for row in zip(targets, starts, begins, strict=True)])


def _check_ids(text: np.ndarray[Any, Any], start: int, source: Source, loaded: LoadedModel) -> None:
    wrong = np.flatnonzero((text < 0) | (text >= loaded.tokenizer.size))
    if len(wrong):
        place, size = start + int(wrong[0]) - 1, loaded.tokenizer.size
        expected = f"from 0 to {size - 1}, the ids of the tokenizer"
        raise UsageError(f"token {place} of {source.prefix}", int(text[wrong[0]]), expected)


def _batch(
    tokens: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], loaded: LoadedModel
) -> Batch:
    """A batch in which every label counts, with documents separated if the run separated them."""
    names = reset_planes(loaded.config.objective)
    # A token after an end of document begins one; with a start token ends are no inputs.
    started = loaded.config.objective.decoder_start_token_id is not None
    ends = (labels if started else tokens)[:, :-1] == loaded.tokenizer.eod
    begins = np.concatenate([np.ones((len(tokens), 1), bool), ends], axis=1)
    planes = [document_planes(row, names) for row in begins]
    return Batch(
        tokens_BS=torch.from_numpy(tokens),
        labels_BS=torch.from_numpy(labels),
        loss_mask_BS=torch.ones(tokens.shape),
        **{f"{n}_BS": torch.from_numpy(np.stack([plane[n] for plane in planes])) for n in names},
    )

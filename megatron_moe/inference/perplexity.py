"""How well a model predicts indexed data: every token once, or the held-out samples of its run.

S tokens of a row, V vocabulary. Losses are natural logarithms, per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch

from megatron_moe.config import RunConfig
from megatron_moe.data.batch import Batch, document_planes, extra_planes
from megatron_moe.data.blend import domains_of, parse_blend
from megatron_moe.data.indexed.check import Source, inspect_source
from megatron_moe.data.indexed.manifest import check_compatibility, read_manifest
from megatron_moe.errors import UsageError
from megatron_moe.inference.loading import Loaded
from megatron_moe.inference.scoring import predictions


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The loss on some data."""

    name: str
    """A domain, or `all`."""
    prefix: str | None
    """The indexed data; `None` for several, or for samples of a run."""
    weight: float | None
    """Share of `all`; `None` where tokens decide."""
    loss: float
    """Mean cross entropy per token."""
    tokens: int
    """How many were predicted."""
    bits_per_byte: float | None
    """Loss in bits per byte of text; `None` where no manifest says how many bytes there were."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    def to_json(self) -> dict[str, Any]:
        """As it is printed."""
        values = {name: value for name, value in vars(self).items() if name != "weight"}
        share = {} if self.weight is None else {"weight": self.weight}
        return values | share | {"perplexity": self.perplexity}


def evaluate_batches(loaded: Loaded, batches: Iterable[Batch]) -> tuple[float, int]:
    """Sum of cross entropies over what the loss masks count, and how many that are."""
    total, count = 0.0, 0
    for batch in batches:
        wanted = batch.loss_mask_BS > 0
        if wanted.any():
            found, _ = predictions(
                loaded,
                batch.tokens_BS,
                batch.labels_BS,
                wanted,
                positions_BS=batch.positions_BS,
                documents_BS=batch.documents_BS,
            )
            total -= found.sum(dtype=torch.float64).item()
            count += len(found)
    return total, count


def evaluate_data(
    loaded: Loaded,
    words: Sequence[str],
    *,
    seq_length: int,
    batch_size: int,
    max_tokens: int | None = None,
) -> list[Perplexity]:
    """The loss of each prefix, in order, and of all if there are several.

    Args:
        loaded: the model.
        words: prefixes, or weight and prefix pairs, which then weigh the loss of all.
        seq_length: S; each token is predicted from those before it in its row.
        batch_size: rows at a time.
        max_tokens: of each prefix, from its start; `None` for all.

    Raises:
        UsageError: data that is missing, broken or made with another tokenizer.
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


def _open(prefix: str, loaded: Loaded) -> Source:
    check_compatibility(
        prefix,
        tokenizer_type=loaded.config.data.tokenizer_type,
        tokenizer_hash=loaded.text.tokenizer.identity,
        needs_eod=bool(extra_planes(loaded.config.objective)),
    )
    return inspect_source(prefix)


def _all(parts: Sequence[Perplexity]) -> Perplexity:
    """The loss of all parts, by their weights, or else by their tokens."""
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
    source: Source, loaded: Loaded, seq_length: int, batch_size: int, max_tokens: int | None
) -> Iterator[Batch]:
    """All tokens of a source in file order, each a label once.

    An end of document stands before the first, so that it is predicted too. Rows follow each other
    without overlap. The last is shorter and comes by itself: there is no padding.

    Raises:
        UsageError: an id that the model has not, or a capacity group that the last row is no
            multiple of.
    """
    tokens, eod = source.token_ids(), loaded.text.eod
    end = min(len(tokens), max_tokens or len(tokens))
    whole = end // seq_length
    cuts = [*range(0, whole * seq_length, batch_size * seq_length), whole * seq_length, end]
    for start, stop in pairwise(cuts):
        if start == stop:
            continue
        rows = -(-(stop - start) // seq_length)
        before = [eod] if start == 0 else [tokens[start - 1]]
        text = np.concatenate([before, tokens[start:stop]]).astype(np.int64)
        _check_ids(text, start, source, loaded)
        yield _batch(text[:-1].reshape(rows, -1), text[1:].reshape(rows, -1), loaded)


def _check_ids(text: np.ndarray[Any, Any], start: int, source: Source, loaded: Loaded) -> None:
    wrong = np.flatnonzero((text < 0) | (text >= loaded.text.size))
    if len(wrong):
        place, size = start + int(wrong[0]) - 1, loaded.text.size
        expected = f"an id from 0 to {size - 1}, those of the tokenizer"
        raise UsageError(f"token {place} of {source.prefix}", int(text[wrong[0]]), expected)


def _batch(tokens: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], loaded: Loaded) -> Batch:
    """Every label counts. Documents are kept apart if the run kept them apart."""
    names = extra_planes(loaded.config.objective)
    begins = np.concatenate(
        [np.ones((len(tokens), 1), bool), tokens[:, :-1] == loaded.text.eod], axis=1
    )
    planes = [document_planes(row, names) for row in begins]
    return Batch(
        tokens_BS=torch.from_numpy(tokens),
        labels_BS=torch.from_numpy(labels),
        loss_mask_BS=torch.ones(tokens.shape),
        **{f"{n}_BS": torch.from_numpy(np.stack([plane[n] for plane in planes])) for n in names},
    )


def evaluate_held_out(loaded: Loaded, config: RunConfig, split: str) -> list[Perplexity]:
    """The loss on a run's own held-out samples, as training measures it: of all, then by domain.

    Args:
        loaded: the model.
        config: of the run with its data, or of one of its stages alone.
        split: `valid` or `test`.

    Raises:
        UsageError: the run's data is missing or broken, or there is no such split.
    """
    from megatron_moe.data.pipeline import build_data  # brings the engine, which takes seconds

    train = config.train
    assert train.stages is None, "a stage by itself, as its data is not the run's"
    size = train.global_batch_size
    if size is None:
        fix = "the run left it to its layout; give it"
        raise UsageError("--global-batch-size", None, "sequences of one step", fix)
    per_step, rest = divmod(size, train.micro_batch_size)
    if rest:
        expected = f"a multiple of the run's --micro-batch-size ({train.micro_batch_size})"
        raise UsageError("--global-batch-size", size, expected)
    # The length of the run decides nothing about held-out samples.
    config = replace(config, train=replace(train, train_iters=1, train_samples=None))
    data = build_data(
        config,
        dp_rank=0,
        dp_size=1,
        num_microbatches=per_step,
        consumed_train_samples=0,
        reads_data=True,
    )
    batches = data.valid() if split == "valid" else data.test()
    if batches is None:
        raise UsageError("--held-out", split, "a split of the run that has data")
    found = [_of_samples("all", loaded, batches, train.eval_iters * per_step)]
    for name, iterations in data.domains[split].items():
        own = data.domain(split, name)
        assert own is not None
        found.append(_of_samples(name, loaded, own, iterations * per_step))
    return found


def _of_samples(
    name: str, loaded: Loaded, batches: Iterable[Batch], micro_batches: int
) -> Perplexity:
    total, count = evaluate_batches(loaded, islice(batches, micro_batches))
    return Perplexity(
        name=name,
        prefix=None,
        weight=None,
        loss=total / max(count, 1),
        tokens=count,
        bits_per_byte=None,
    )

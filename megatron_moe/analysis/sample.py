"""The tokens that are analysed: rows of indexed datasets, spread evenly over each.

A sample is a function of the datasets and four numbers, so that several checkpoints, or one that is
analysed again after an interruption, read the same tokens.

Shapes: B rows, S tokens of a row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_moe.analysis.model import MoEModel
from megatron_moe.analysis.observation import TokenBatch
from megatron_moe.data.blend import domains_of
from megatron_moe.data.indexed.check import Source, inspect_source
from megatron_moe.data.indexed.manifest import check_compatibility
from megatron_moe.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One named dataset and the rows that are read of it.

    Args:
        name: as given, or as the dataset's manifest says.
        source: the dataset.
        starts: position of the first token of each row in the `.bin` file, ascending.
        ends: position behind the last token of each document.
    """

    name: str
    source: Source
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Rows of all domains, in order.

    Args:
        domains: none if only weights are analysed.
        seq_length: S.
        batch_size: most rows of a batch.
        group_rows: each batch has a multiple of this number of rows, and rows cannot be shortened;
            `None` if batches have any number of rows, of any length.
    """

    domains: tuple[Domain, ...]
    seq_length: int
    batch_size: int
    group_rows: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the domains."""
        return tuple(domain.name for domain in self.domains)

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return sum(len(domain.starts) for domain in self.domains) * self.seq_length

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the tokens."""
        parts = [(d.name, d.source.fingerprint, d.starts.tobytes()) for d in self.domains]
        text = repr((self.seq_length, self.batch_size, self.group_rows, parts))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def vocabulary(self) -> npt.NDArray[np.int64]:
        """The ids that occur, inputs and labels, ascending."""
        rows = (
            self._rows(d, d.starts[i : i + 256])
            for d in self.domains
            for i in range(0, len(d.starts), 256)
        )
        found: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        for each in rows:
            found = np.union1d(found, each)
        return found

    def batches(self, first: int = 0) -> Iterator[TokenBatch]:
        """The batches from number ``first`` on; each has rows of one domain."""
        number = 0
        for index, domain in enumerate(self.domains):
            for place in range(0, len(domain.starts), self.batch_size):
                if number >= first:
                    yield self._batch(domain, index, number, place)
                number += 1

    @property
    def num_batches(self) -> int:
        """Batches in all."""
        return sum(-(-len(domain.starts) // self.batch_size) for domain in self.domains)

    def _rows(self, domain: Domain, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Ids [B, S + 1] from each start on."""
        places = starts[:, None] + np.arange(self.seq_length + 1)
        return domain.source.token_ids()[places].astype(np.int64)

    def _batch(self, domain: Domain, index: int, number: int, place: int) -> TokenBatch:
        starts = domain.starts[place : place + self.batch_size]
        ids = self._rows(domain, starts)
        places = starts[:, None] + np.arange(self.seq_length)
        return TokenBatch(
            tokens_BS=ids[:, :-1],
            next_BS=ids[:, 1:],
            documents_BS=np.searchsorted(domain.ends, places, side="right").astype(np.int64),
            domain=index,
            number=number,
        )


def read_sample(
    words: Sequence[str], *, tokens: int | None, seq_length: int, batch_size: int
) -> Sample:
    """Choose the rows.

    Args:
        words: `NAME=PREFIX` or a prefix, whose name is that of its manifest or file.
        tokens: most tokens of each domain; `None` for all.
        seq_length: S.
        batch_size: most rows of a batch.

    Raises:
        UsageError: a dataset is missing, damaged or shorter than a row, or two have one name.
    """
    pairs = [word.split("=", 1) if "=" in word else ["", word] for word in words]
    defaults = domains_of([prefix for _, prefix in pairs])
    names = [name or default for (name, _), default in zip(pairs, defaults, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise UsageError("--data", name, "a name for each dataset", "give them as NAME=PREFIX")
    sources = [inspect_source(prefix) for _, prefix in pairs]
    domains = [
        _domain(name, source, tokens, seq_length)
        for name, source in zip(names, sources, strict=True)
    ]
    return Sample(domains=tuple(domains), seq_length=seq_length, batch_size=batch_size)


def _domain(name: str, source: Source, tokens: int | None, seq_length: int) -> Domain:
    rows = (source.tokens - 1) // seq_length  # the last token of a row needs the one behind it
    if rows < 1:
        what = f"tokens of {source.prefix}"
        raise UsageError(what, source.tokens, f"> {seq_length}, one row", "or a lower --seq-length")
    wanted = rows if tokens is None else min(rows, max(1, tokens // seq_length))
    # Spread evenly, so that a file that is sorted by source is represented as a whole.
    chosen = np.arange(wanted, dtype=np.int64) * rows // wanted
    bounds = np.concatenate([[0], np.cumsum(source.lengths(), dtype=np.int64)])
    ends = bounds[np.asarray(source.document_bounds()[1:], dtype=np.int64)]
    return Domain(name=name, source=source, starts=chosen * seq_length, ends=ends)


def in_whole_groups(sample: Sample, models: Sequence[MoEModel]) -> Sample:
    """The sample in batches that every model can read, see `MoEModel.rows_per_group`.

    Of a domain whose rows are no whole groups, evenly spread ones are left out.

    Raises:
        UsageError: rows do not fit a model's groups, or a batch or a domain has less than a group.
    """
    groups = [model.rows_per_group(sample.seq_length) for model in models]
    needed = [group for group in groups if group is not None]
    if not needed:
        return sample
    rows = math.lcm(*needed)
    if sample.batch_size < rows:
        expected = f">= {rows}, the rows of a capacity group"
        raise UsageError("--batch-size", sample.batch_size, expected)
    for domain in sample.domains:
        if len(domain.starts) < rows:
            expected = f">= {rows}, a capacity group"
            fix = f"--tokens {rows * sample.seq_length} or more, if there are as many"
            raise UsageError(f"rows of {domain.name}", len(domain.starts), expected, fix)
    domains = tuple(
        replace(domain, starts=domain.starts[spread(count, count // rows * rows)])
        for domain in sample.domains
        for count in [len(domain.starts)]
    )
    batch_size = sample.batch_size // rows * rows
    return replace(sample, domains=domains, batch_size=batch_size, group_rows=rows)


def spread(count: int, wanted: int) -> npt.NDArray[np.int64]:
    """At most ``wanted`` of ``count`` places, evenly from the first on."""
    wanted = min(count, wanted)
    return np.arange(wanted, dtype=np.int64) * count // max(1, wanted)


def first_rows(sample: Sample) -> list[int]:
    """Place in its domain of the first row of each batch, by the number of the batch."""
    return [
        place
        for domain in sample.domains
        for place in range(0, len(domain.starts), sample.batch_size)
    ]


def check_sample(sample: Sample, model: MoEModel) -> None:
    """Check that a model can read a sample.

    Raises:
        UsageError: rows are longer than the model's longest, the data is another tokenizer's, or
            an id is beyond the vocabulary.
    """
    sizes = model.sizes
    if sample.seq_length > sizes.max_length:
        expected = f"<= {sizes.max_length}, the longest row of {model.label}"
        raise UsageError("--seq-length", sample.seq_length, expected)
    for domain in sample.domains:
        if model.tokenizer_hash:
            check_compatibility(
                domain.source.prefix,
                tokenizer_type="tokenizer",
                tokenizer_hash=model.tokenizer_hash,
                needs_eod=False,
            )
    largest = int(sample.vocabulary[-1])
    if largest >= sizes.vocab_size:
        expected = f"< {sizes.vocab_size}, the vocabulary of {model.label}"
        raise UsageError("largest token id of --data", largest, expected)

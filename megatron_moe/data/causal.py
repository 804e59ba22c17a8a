"""Next-token samples: documents packed one after the other and cut every S tokens.

Packing, epochs and shuffles are those of Megatron-Core's `GPTDataset`, so the ids of sample i are
those that Megatron-LM trains on. Example, S = 3, documents [a b 1], [c 1] and [d e f 1], in this
order after the shuffle: sample 0 is a b 1 c, that is tokens a b 1 and labels b 1 c; sample 1 is
c 1 d e; sample 2 is e f 1 and the first token of the next epoch. Neighbours share one token, which
is a label in the first and an input in the second.

Differences from Megatron-Core, whose own code is unsafe there:

- The index cache is ours (`indexed.cache`): keyed by content, complete or absent, no pickles.
- The loss mask is made for every sample. Megatron-Core makes that of the first sample, with its
  padding, and applies it to all others.
- The token type comes from the index, never from the vocabulary size, and short reads are errors.
- A split without tokens is an error; Megatron-Core would count epochs in an endless loop.

S tokens of a sample.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, _BinReader

from megatron_moe.data.batch import document_planes, inputs_of
from megatron_moe.data.indexed.cache import Array, IndexCache
from megatron_moe.data.indexed.check import Source
from megatron_moe.data.indexed.format import paths_of
from megatron_moe.errors import UsageError

Sample = dict[str, npt.NDArray[Any]]


@dataclass
class CausalConfig(GPTDatasetConfig):
    """Megatron-Core's configuration, extended by what our datasets need."""

    sources: Mapping[str, Source] = field(default_factory=dict)
    """The checked sources, by prefix."""
    caches: Mapping[str, IndexCache] = field(default_factory=dict)
    """Where the sample indices of each are kept, by prefix."""
    token_limit: int = 0
    """All token ids must be below it."""
    plan: Any = None
    """Settings of the objective; see `objectives.select`."""
    start: int | None = None
    """Input token at the start of rows and separate documents; `None`: they start with text."""
    planes: tuple[str, ...] = ()
    """What samples contain besides tokens, labels and loss mask; see `batch.extra_planes`."""


class CheckedFileReader(_BinReader):
    """Reads a `.bin` without mapping it; a short read is an error, not uninitialised memory."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)

    def read(self, dtype: type[np.number[Any]], count: int, offset: int) -> npt.NDArray[Any]:
        """Return ``count`` items from byte ``offset``."""
        wanted = int(count) * np.dtype(dtype).itemsize
        content = b""
        while len(content) < wanted:
            more = os.pread(self._file, wanted - len(content), int(offset) + len(content))
            if not more:
                what = f"length of the tokens at byte {offset} of {self.path}"
                raise UsageError(what, len(content), f"{wanted} bytes")
            content += more
        return np.frombuffer(content, dtype=dtype)

    def __del__(self) -> None:
        os.close(self._file)


class CheckedIndexedDataset(IndexedDataset):
    """Megatron-Core's indexed dataset with checked reads."""

    def initialize(self, path_prefix: str, multimodal: bool, mmap: bool, *rest: Any) -> None:
        """Open both files; also called in a worker process that receives this dataset."""
        super().initialize(path_prefix, multimodal, mmap, *rest)
        if not mmap:
            self.bin_reader = CheckedFileReader(paths_of(path_prefix)[0])


class CausalDataset(GPTDataset):
    """Samples of one source and one split."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: CausalConfig) -> IndexedDataset:
        """Open the indexed dataset."""
        return CheckedIndexedDataset(dataset_path, mmap=config.mmap_bin_files)

    def _build_document_sample_shuffle_indices(self) -> Sequence[Array]:
        self.source = self.config.sources[self.dataset_path]
        if self._get_num_tokens_per_epoch() == 0:
            raise UsageError(
                f"{self.index_split.name} split of {self.dataset_path}",
                f"{len(self.indices)} documents without tokens",
                "documents with at least one token",
            )
        description = self._description()
        self.key = digest(description)
        with _quiet_megatron_core():
            return self.config.caches[self.dataset_path].arrays(
                f"samples-{self.key}", description, self._build_indices
            )

    def _build_indices(self) -> Sequence[Array]:
        """Build what is kept in the index cache."""
        indices: Sequence[Array] = super()._build_document_sample_shuffle_indices()
        return indices

    def _description(self) -> dict[str, Any]:
        """Return everything the indices depend on; its hash is the name in the cache."""
        return {
            "class": "CausalDataset",
            "content": self.source.fingerprint,
            "documents": [int(self.indices[0]), int(self.indices[-1]) + 1],
            "samples": self.num_samples,
            "seq_length": self.config.sequence_length,
            "seed": self.config.random_seed,
        }

    def __getitem__(self, idx: int) -> Sample:
        """Return sample ``idx``: tokens [S] and labels [S], int64, and loss_mask [S], bool.

        With `planes`, also positions or documents [S], int64. As in Megatron-LM an end of document
        belongs to the document that it ends, and the token after it begins the next one.
        """
        # S + 1 ids, their documents, and from release 0.19 on lengths of these.
        text, documents, *_ = self._query_document_sample_shuffle_indices(idx)
        pad = self._pad_token_id
        padding = text == pad
        if padding.any():
            # The pad id may be -1 or beyond the vocabulary: neither is a row of the embedding.
            text = np.where(padding, 0, text)
        self._check_ids(text, documents)
        if self.config.start is not None:
            return self._started(text[:-1], ~padding[:-1])
        counts, ends = ~padding[1:], text[:-1] == self.config.tokenizer.eod
        if self.config.eod_mask_loss:
            counts &= ~ends
        sample = {"tokens": text[:-1], "labels": text[1:], "loss_mask": counts}
        if self.config.planes:
            begins = np.concatenate(([True], ends[:-1]))
            sample |= document_planes(begins, self.config.planes)
        return sample | self._unpadded(len(counts))

    def _unpadded(self, length: int) -> Sample:
        """The plane of padding, of which these rows have none; conversations among them may."""
        wanted = "padding" in self.config.planes
        return {"padding": np.zeros(length, dtype=bool)} if wanted else {}

    def _started(self, targets: npt.NDArray[np.integer], counts: npt.NDArray[np.bool_]) -> Sample:
        """Return the sample that predicts these ids, the first of them from the start token.

        The last of the S + 1 ids of a sample is the first target of the next one.
        """
        after_end = np.concatenate(([False], targets[:-1] == self.config.tokenizer.eod))
        if self.config.eod_mask_loss:
            counts &= ~after_end
        begins = after_end.copy() if self.config.planes else np.zeros_like(after_end)
        begins[0] = True
        tokens = inputs_of(targets, self.config.start, begins)
        sample = {"tokens": tokens, "labels": targets, "loss_mask": counts}
        return sample | document_planes(begins, self.config.planes) | self._unpadded(len(counts))

    def _check_ids(self, text: npt.NDArray[np.integer], sequences: npt.NDArray[np.integer]) -> None:
        if text.min() < 0 or text.max() >= self.config.token_limit:
            self._reject_ids(sequences)

    def _reject_ids(self, sequences: npt.NDArray[np.integer]) -> None:
        """Raise an error that names the document of an id that the scan did not find."""
        for sequence in map(int, sequences):
            ids = self.dataset.get(sequence)
            wrong = (ids < 0) | (ids >= self.config.token_limit)
            if wrong.any():
                document = self.source.document_of_sequence(sequence)
                raise UsageError(
                    f"token id in document {document} of {self.dataset_path}",
                    int(ids[wrong][0]),
                    f">= 0 and <= {self.config.token_limit - 1}",
                    "the file has changed since this run or its index cache was started",
                )


class BlendedCausalDataset(BlendedDataset):
    """Samples of several sources in proportion to their weights."""

    def _build_indices(self) -> Sequence[Array]:
        description = {
            "class": type(self).__name__,
            "sources": [dataset.key for dataset in self.datasets],
            "weights": self.weights,
            "samples": self.size,
        }
        cache = self.config.caches[self.datasets[0].dataset_path]
        with _quiet_megatron_core():
            return cache.arrays(f"blend-{digest(description)}", description, super()._build_indices)


def digest(description: Mapping[str, Any]) -> str:
    """Return a hash of a description, to name what is made from it."""
    text = json.dumps(description, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def _quiet_megatron_core() -> Iterator[None]:
    """Suppress the warning that Megatron-Core has no cache directory, which is intended."""
    logger = logging.getLogger("megatron.core.datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

"""Next-token samples: documents packed one after the other and cut every S tokens.

The packing, the epochs and the shuffles are those of Megatron-Core's `GPTDataset`, and so the ids
of sample i are those that Megatron-LM trains on. What differs, as the engine's own is unsafe:

- The index cache is ours (`index_cache`): keyed by content, whole or absent, no pickles.
- The loss mask is made for every sample. The engine makes the first sample's, pads and all, and
  applies it to the others.
- Token types come from the index, never from the vocabulary size, and short reads are errors.
- A split without tokens is refused; the engine would count epochs for ever.

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

from megatron_moe.data.batch import document_planes
from megatron_moe.data.indexed.cache import Array, IndexCache
from megatron_moe.data.indexed.check import Source, document_of_sequence
from megatron_moe.data.indexed.format import paths_of
from megatron_moe.errors import UsageError

Sample = dict[str, npt.NDArray[Any]]


@dataclass
class CausalConfig(GPTDatasetConfig):
    """The engine's configuration with what our data sets need besides."""

    sources: Mapping[str, Source] = field(default_factory=dict)
    """The checked data sets, by prefix."""
    caches: Mapping[str, IndexCache] = field(default_factory=dict)
    """Where the indices of each are kept, by prefix."""
    token_limit: int = 0
    """No token id may reach it."""
    plan: Any = None
    """What the objective's data set needs besides."""
    planes: tuple[str, ...] = ()
    """What samples hold besides tokens, labels and loss mask; see `batch.extra_planes`."""


class CheckedFileReader(_BinReader):
    """Reads a `.bin` without mapping it; a short read is an error, not uninitialised memory."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)

    def read(self, dtype: type[np.number[Any]], count: int, offset: int) -> npt.NDArray[Any]:
        """``count`` items from byte ``offset``."""
        wanted = int(count) * np.dtype(dtype).itemsize
        content = b""
        while len(content) < wanted:
            more = os.pread(self._file, wanted - len(content), int(offset) + len(content))
            if not more:
                raise UsageError(
                    f"tokens at byte {offset} of {self.path}", len(content), f"{wanted} bytes"
                )
            content += more
        return np.frombuffer(content, dtype=dtype)

    def __del__(self) -> None:
        os.close(self._file)


class CheckedIndexedDataset(IndexedDataset):
    """The engine's indexed data set with checked reads."""

    def initialize(self, path_prefix: str, multimodal: bool, mmap: bool, *rest: Any) -> None:
        """Open both files; also called in a worker process that was sent this data set."""
        super().initialize(path_prefix, multimodal, mmap, *rest)
        if not mmap:
            self.bin_reader = CheckedFileReader(paths_of(path_prefix)[0])


class CausalDataset(GPTDataset):
    """Samples of one source and one split."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: CausalConfig) -> IndexedDataset:
        """Open the indexed data set."""
        return CheckedIndexedDataset(dataset_path, mmap=config.mmap_bin_files)

    def _build_document_sample_shuffle_indices(self) -> Sequence[Array]:
        self.source = self.config.sources[self.dataset_path]
        if self._get_num_tokens_per_epoch() == 0:
            raise UsageError(
                f"{self.index_split.name} split of {self.dataset_path}",
                f"{len(self.indices)} documents without tokens",
                "at least one token",
            )
        description = self._description()
        self.key = digest(description)
        with _quiet_engine():
            return self.config.caches[self.dataset_path].arrays(
                f"samples-{self.key}", description, self._build_indices
            )

    def _build_indices(self) -> Sequence[Array]:
        """What is kept in the index cache."""
        indices: Sequence[Array] = super()._build_document_sample_shuffle_indices()
        return indices

    def _description(self) -> dict[str, Any]:
        """What the indices depend on."""
        return {
            "class": "CausalDataset",
            "content": self.source.fingerprint,
            "documents": [int(self.indices[0]), int(self.indices[-1]) + 1],
            "samples": self.num_samples,
            "seq_length": self.config.sequence_length,
            "seed": self.config.random_seed,
        }

    def __getitem__(self, idx: int) -> Sample:
        """Sample ``idx``: tokens [S] and labels [S], int64, and loss_mask [S], bool.

        With `planes`, also positions or documents [S], int64. As in Megatron-LM an end of document
        belongs to the document that it ends, and what follows it begins another.
        """
        text, documents = self._query_document_sample_shuffle_indices(idx)
        pad = self._pad_token_id
        padding = text == pad
        if padding.any():
            text = np.where(padding, 0, text)
        self._check_ids(text, documents)
        counts, ends = ~padding[1:], text[:-1] == self.config.tokenizer.eod
        if self.config.eod_mask_loss:
            counts &= ~ends
        sample = {"tokens": text[:-1], "labels": text[1:], "loss_mask": counts}
        if self.config.planes:
            begins = np.concatenate(([True], ends[:-1]))
            sample |= document_planes(begins, self.config.planes)
        return sample

    def _check_ids(self, text: npt.NDArray[np.integer], sequences: npt.NDArray[np.integer]) -> None:
        if text.min() < 0 or text.max() >= self.config.token_limit:
            self._refuse(sequences)

    def _refuse(self, sequences: npt.NDArray[np.integer]) -> None:
        """Name the document of an id that was not there when the source was scanned."""
        for sequence in map(int, sequences):
            ids = self.dataset.get(sequence)
            wrong = (ids < 0) | (ids >= self.config.token_limit)
            if wrong.any():
                document = document_of_sequence(self.source, sequence)
                raise UsageError(
                    f"token id in document {document} of {self.dataset_path}",
                    int(ids[wrong][0]),
                    f"an id from 0 to {self.config.token_limit - 1}",
                    "the file has changed since this run began or its index cache was made",
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
        with _quiet_engine():
            return cache.arrays(f"blend-{digest(description)}", description, super()._build_indices)


def digest(description: Mapping[str, Any]) -> str:
    """A name that two descriptions share only if they are equal."""
    text = json.dumps(description, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def _quiet_engine() -> Iterator[None]:
    """The engine warns that it has no cache directory of its own, which is meant."""
    logger = logging.getLogger("megatron.core.datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

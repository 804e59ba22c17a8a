"""Supervised fine-tuning: rows of conversations, with the loss on the assistant's turns.

Packing is next-fit: a conversation goes into the current row if it fits, else it begins a new one.
None is divided. Example, rows of 10 ids and conversations of 4, 5, 3, 6 and 10 ids in this order:

    row 0   0 0 0 0 1 1 1 1 1 pad
    row 1   2 2 2 3 3 3 3 3 3 pad
    row 2   4 4 4 4 4 4 4 4 4 4

`plan_rows` stores the order of the conversations, 0 1 2 3 4, and where rows start in it, 0 2 4 and
the end 5: row i has the conversations from starts[i] to starts[i + 1].

S tokens of a row. A row has S + 1 ids; position t predicts id t + 1. With a start token it has S
ids; position t predicts id t.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.megatron_dataset import MegatronDataset

from megatron_moe.data.batch import document_planes, inputs_of
from megatron_moe.data.causal import Sample, digest
from megatron_moe.data.indexed.cache import Array
from megatron_moe.data.objectives.chat_source import ChatSource, Conversations
from megatron_moe.data.objectives.rng import SampleRng, sample_rng
from megatron_moe.errors import UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SftPlan:
    """Settings of a run."""

    pack: bool
    """Whether rows hold several conversations."""


class SftDataset(MegatronDataset):
    """Rows of one file and one split."""

    dataset: Conversations

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        source: ChatSource = self.config.sources[self.dataset_path]
        # Ids of a row, the start token not counted.
        capacity = self.config.sequence_length + (self.config.start is None)
        usable = self._usable(capacity - 1)
        part = (source.fingerprint, int(self.indices[0]), int(self.indices[-1]) + 1)
        description = {
            "class": "SftDataset",
            "part": part,
            "tokenizer": self.config.tokenizer.identity,
            "samples": self.num_samples,
            "seq_length": self.config.sequence_length,
            "seed": self.config.random_seed,
            "pack": self.config.plan.pack,
        }
        if self.config.start is not None:
            description["ids"] = capacity
        self.key = digest(description)
        lengths = np.minimum(source.lengths()[usable], capacity if self.config.plan.pack else 0)
        rng = sample_rng(self.config.random_seed, "sft", *part)
        self.conversations, self.rows = self.config.caches[self.dataset_path].arrays(
            f"rows-{self.key}",
            description,
            lambda: plan_rows(rng, usable, lengths, capacity, self.num_samples),
        )

    def _usable(self, longest: int) -> npt.NDArray[np.int64]:
        """Return the conversations whose first answer begins within a row."""
        usable = self.indices[self.dataset.prompts[self.indices] <= longest]
        where = f"{self.index_split.name} split of {self.dataset_path}"
        if len(usable) == 0:
            raise UsageError(
                where,
                f"{len(self.indices)} conversations, none with an answer that begins in a row",
                "conversations with at least one shorter question",
                "raise --seq-length",
            )
        if len(usable) < len(self.indices):
            left = len(self.indices) - len(usable)
            reason = "because their first answer would begin after the end of a row"
            logger.warning("%s: %d conversations are left out %s", where, left, reason)
        return usable.astype(np.int64)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> Conversations:
        """Return the conversations of a file."""
        conversations: Conversations = config.sources[dataset_path].conversations
        return conversations

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Conversations) -> int:
        """Return the number of conversations, which are divided among the splits."""
        return len(low_level_dataset)

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __getitem__(self, idx: int) -> Sample:
        """Return row ``idx``: tokens [S] and labels [S], int64, and loss_mask [S], bool.

        With `planes`, also positions or documents [S], int64. A conversation counts as a document,
        and the pads as another one. Also padding [S], bool, if `planes` has it.
        """
        size = self.config.sequence_length + 1
        most = size - (self.config.start is not None)
        text = np.full(size, max(self.config.tokenizer.pad, 0), dtype=np.int64)
        counts = np.zeros(size, dtype=bool)
        begins, end = np.zeros(size, dtype=bool), 0
        for number in self.conversations[self.rows[idx] : self.rows[idx + 1]].tolist():
            first, last = map(int, self.dataset.bounds[number : number + 2])
            start, last = end, min(last, first + most)
            begins[start] = True
            end += last - first
            text[start:end] = self.dataset.ids[first:last]
            counts[start:end] = self.dataset.loss_mask[first:last]
        begins[end:][:1] = True  # the first pad, if there is one
        padding = np.arange(size) >= end
        sample = {"tokens": text[:-1], "labels": text[1:], "loss_mask": counts[1:]}
        if self.config.start is not None:
            separate = {"positions", "documents"} & set(self.config.planes)
            parts = begins[:-1] if separate else np.zeros(size - 1, dtype=bool)
            tokens = inputs_of(text[:-1], self.config.start, parts)
            sample = {"tokens": tokens, "labels": text[:-1], "loss_mask": counts[:-1]}
        if "padding" in self.config.planes:
            sample["padding"] = padding[1:] if self.config.start is None else padding[:-1]
        return sample | document_planes(begins[:-1], self.config.planes)


def plan_rows(
    rng: SampleRng,
    usable: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.integer],
    capacity: int,
    samples: int,
) -> list[Array]:
    """Return the conversations in the order of use, and where rows start in it, with its end.

    Every epoch has an order and rows of its own, so a longer run begins with the same rows.

    Args:
        rng: decides the order.
        usable: numbers of the conversations.
        lengths: ids of each, at most ``capacity``; 0 gives a conversation a row of its own.
        capacity: ids of a row.
        samples: number of rows that will be used.
    """
    order: list[Array] = []
    starts: list[Array] = []
    rows = placed = 0
    while rows < max(samples, 1):
        shuffled = rng.permutation(0, len(order), len(usable))
        fresh = np.fromiter(row_starts(lengths[shuffled].tolist(), capacity), dtype=np.int64)
        order.append(usable[shuffled])
        starts.append(fresh + placed)
        placed, rows = placed + len(usable), rows + len(fresh)
    return [np.concatenate(order), np.append(np.concatenate(starts), placed)]


def row_starts(lengths: list[int], capacity: int) -> Iterator[int]:
    """Yield where rows start if each conversation goes into the current row, or a new one if full.

    A length of 0 always starts a row.
    """
    free = 0
    for place, length in enumerate(lengths):
        if length == 0 or length > free:
            yield place
            free = capacity
        free -= length

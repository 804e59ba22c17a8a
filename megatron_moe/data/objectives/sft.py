"""Supervised fine-tuning: rows of conversations, with the loss on the assistant's turns.

S tokens of a row. A row has S + 1 ids, of which position t predicts id t + 1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.megatron_dataset import MegatronDataset

from megatron_moe.data.batch import document_planes
from megatron_moe.data.causal import Sample, digest
from megatron_moe.data.indexed.cache import Array
from megatron_moe.data.objectives.chat_source import ChatSource, Conversations
from megatron_moe.data.objectives.noise import Noise, noise_of
from megatron_moe.errors import UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SftPlan:
    """The settings of a run."""

    pack: bool
    """Several conversations a row."""


class SftDataset(MegatronDataset):
    """Rows of one file and one split."""

    dataset: Conversations

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        source: ChatSource = self.config.sources[self.dataset_path]
        capacity = self.config.sequence_length + 1
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
        self.key = digest(description)
        lengths = np.minimum(source.lengths()[usable], capacity if self.config.plan.pack else 0)
        noise = noise_of(self.config.random_seed, "sft", *part)
        self.conversations, self.rows = self.config.caches[self.dataset_path].arrays(
            f"rows-{self.key}",
            description,
            lambda: plan_rows(noise, usable, lengths, capacity, self.num_samples),
        )

    def _usable(self, longest: int) -> npt.NDArray[np.int64]:
        """Conversations of which something is learnt within a row."""
        usable = self.indices[self.dataset.prompts[self.indices] <= longest]
        where = f"{self.index_split.name} split of {self.dataset_path}"
        if len(usable) == 0:
            raise UsageError(
                where,
                f"{len(self.indices)} conversations without an answer that begins in a row",
                "a shorter question at least",
                "raise --seq-length",
            )
        if len(usable) < len(self.indices):
            left = len(self.indices) - len(usable)
            logger.warning("%s: %d conversations left out, questions too long", where, left)
        return usable.astype(np.int64)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> Conversations:
        """The conversations of a file."""
        conversations: Conversations = config.sources[dataset_path].conversations
        return conversations

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Conversations) -> int:
        """What is divided among the splits."""
        return len(low_level_dataset)

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __getitem__(self, idx: int) -> Sample:
        """Row ``idx``: tokens [S] and labels [S], int64, and loss_mask [S], bool.

        With `planes`, also positions or documents [S], int64: of conversations, and of the pads.
        """
        size = self.config.sequence_length + 1
        text = np.full(size, max(self.config.tokenizer.pad, 0), dtype=np.int64)
        counts = np.zeros(size, dtype=bool)
        begins, end = np.zeros(size, dtype=bool), 0
        for number in self.conversations[self.rows[idx] : self.rows[idx + 1]].tolist():
            first, last = map(int, self.dataset.bounds[number : number + 2])
            start, last = end, min(last, first + size)
            begins[start] = True
            end += last - first
            text[start:end] = self.dataset.ids[first:last]
            counts[start:end] = self.dataset.learnt[first:last]
        begins[end:][:1] = True
        sample = {"tokens": text[:-1], "labels": text[1:], "loss_mask": counts[1:]}
        return sample | document_planes(begins[:-1], self.config.planes)


def plan_rows(
    noise: Noise,
    usable: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.integer],
    capacity: int,
    samples: int,
) -> list[Array]:
    """Conversations in the order of use, and where each row starts and the last one ends in it.

    Every epoch has an order of its own and rows of its own, so a longer run begins as a shorter.

    Args:
        noise: decides the order.
        usable: the conversations.
        lengths: ids of each, at most ``capacity``; 0 gives each a row of its own.
        capacity: ids of a row.
        samples: how many rows will be used.
    """
    order: list[Array] = []
    starts: list[Array] = []
    rows = placed = 0
    while rows < max(samples, 1):
        shuffled = noise.order(0, len(order), len(usable))
        fresh = np.fromiter(row_starts(lengths[shuffled].tolist(), capacity), dtype=np.int64)
        order.append(usable[shuffled])
        starts.append(fresh + placed)
        placed, rows = placed + len(usable), rows + len(fresh)
    return [np.concatenate(order), np.append(np.concatenate(starts), placed)]


def row_starts(lengths: list[int], capacity: int) -> Iterator[int]:
    """Where rows start if each conversation goes into the current row, or, if it does not fit, into
    a new one. A length of 0 takes a row.
    """
    free = 0
    for place, length in enumerate(lengths):
        if length == 0 or length > free:
            yield place
            free = capacity
        free -= length

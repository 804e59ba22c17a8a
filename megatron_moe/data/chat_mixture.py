"""Rows of conversations among the rows of another objective (`--sft-data-path`, `--sft-share`).

Row i holds conversations iff floor((i + 1) s) > floor(i s), with the share s as an exact fraction;
it is then row floor(i s) of those that `--objective sft` would make of the files, and else row
i - floor(i s) of the objective's own. So the rows of both keep their order, conversations are
spread evenly, and which row comes when follows from its number alone: nothing is drawn or saved.

    s = 2/5     row    0      1      2      3      4      5      6      7
                holds  text0  text1  chat0  text2  chat1  text3  text4  chat2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch.utils.data import Dataset

from megatron_moe.config import DataConfig, RunConfig
from megatron_moe.data.blend import Blend, domains_of_samples
from megatron_moe.data.causal import Sample
from megatron_moe.data.composition import rows_before, share_of
from megatron_moe.data.datasets import build_split, open_sources
from megatron_moe.data.indexed.check import Source
from megatron_moe.data.objectives.select import plan_objective
from megatron_moe.tokenizer.base import Tokenizer


class MixedRows(Dataset[Sample]):
    """Training rows of an objective and of conversations.

    Args:
        text: rows of the objective.
        chat: rows of conversations.
        share: s, the share of the latter.
        samples: rows in all.
    """

    def __init__(
        self, text: Dataset[Sample], chat: Dataset[Sample], share: Fraction, samples: int
    ) -> None:
        self.text, self.chat, self.share, self.samples = text, chat, share, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Sample:
        """Row ``index``; see `place_of`."""
        is_chat, place = place_of(self.share, index)
        return (self.chat if is_chat else self.text)[place]


def place_of(share: Fraction, row: int) -> tuple[bool, int]:
    """Whether a row holds conversations, and its number among the rows that do, or do not."""
    before = rows_before(share, row)
    is_chat = rows_before(share, row + 1) > before
    return is_chat, before if is_chat else row - before


@dataclass(frozen=True, kw_only=True)
class ChatRows:
    """The conversations of a run that mixes them in, checked."""

    config: RunConfig
    """Of a run of them alone."""
    blend: Blend
    sources: Mapping[str, Source]
    share: Fraction
    tokenizer: Tokenizer

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which rows there are; see `Data.identity`."""
        weights = self.blend.weights
        return {
            "conversations": {
                "share": str(self.share),
                "sources": [self.sources[prefix].fingerprint for prefix in self.blend.prefixes],
                "weights": None if weights is None else list(weights),
                "documents": list(self.blend.bounds),
                "pack": self.config.objective.sft_pack,
            }
        }

    def mixed_into(self, text: Dataset[Sample], samples: int) -> MixedRows:
        """Rows of both."""
        rows = max(rows_before(self.share, samples), 1)
        chat = build_split("train", self.blend, rows, self.config, self.tokenizer, self.sources)
        return MixedRows(text, chat, self.share, samples)


def open_chat(config: RunConfig, tokenizer: Tokenizer) -> ChatRows | None:
    """Check the conversations that a run mixes in; `None` if it mixes none.

    Raises:
        UsageError: a file cannot be read, is not one of conversations, or has none for training.
    """
    if not config.objective.sft_share:
        return None
    alone = chat_config(config)
    blends, sources = open_sources(alone, tokenizer, plan_objective(alone, tokenizer))
    blend = blends["train"]
    assert blend is not None
    return ChatRows(
        config=alone,
        blend=replace(blend, flag="--sft-data-path"),
        sources=sources,
        share=share_of(config),
        tokenizer=tokenizer,
    )


def chat_config(config: RunConfig) -> RunConfig:
    """The configuration of a run of the conversations alone, without evaluation."""
    own, none = config.objective, DataConfig()
    names = ["data_args_path", "mixture", "data_root", "mock_data"]
    names += ["train_data_path", "valid_data_path", "test_data_path"]
    unset: dict[str, Any] = {name: getattr(none, name) for name in names}
    objective = replace(own, objective="sft", eod_mask_loss=False, sft_data_path=(), sft_share=0.0)
    return replace(
        config,
        objective=objective,
        data=replace(config.data, data_path=own.sft_data_path, **unset),
        train=replace(config.train, eval_iters=0),
    )


def domains_of_rows(
    blend: Blend, chat: ChatRows | None, dataset: Any, samples: Sequence[int]
) -> list[str]:
    """Return the domain of each training row, by number.

    Args:
        blend: of the objective's own rows.
        chat: the conversations among them.
        dataset: of the training loader.
        samples: numbers.
    """
    if chat is None:
        return domains_of_samples(blend, dataset, samples)
    found = []
    for sample in samples:
        is_chat, place = place_of(chat.share, sample)
        own, rows = (chat.blend, dataset.chat) if is_chat else (blend, dataset.text)
        found += domains_of_samples(own, rows, [place])
    return found

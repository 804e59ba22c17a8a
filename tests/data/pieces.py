"""SentencePiece models trained within a test."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_moe.config import DataConfig


def train(path: Path, sentences: Iterable[str], **options: Any) -> DataConfig:
    """Train a model with the special ids of umT5 and bytes for what is in no piece.

    Args:
        path: where to save it.
        sentences: to learn from.
        options: of the library's trainer, beside these or instead.

    Returns:
        The flags of data that was tokenized with it.
    """
    model = io.BytesIO()
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        minloglevel=2,
        **(special | options),
    )
    path.write_bytes(model.getvalue())
    return DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path))

"""What an export in the Hugging Face layout says about texts: special ids, tokenizer, generation.

All of it follows from the tokenizer beside the weights; without one, the published ids remain.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_moe.convert.model import LogicalModel
from megatron_moe.convert.modeling import TOKENIZER_CONFIG
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.files import stored_name
from megatron_moe.tokenizer.huggingface import HuggingFaceTokenizer
from megatron_moe.tokenizer.sentencepiece import SentencePieceTokenizer

_SENTENCEPIECE = ("tokenizer.model", "spiece.model")
"""Names by which the exported tokenizer class finds a SentencePiece model."""


def text_files(model: LogicalModel, *, own: bool) -> dict[str, dict[str, Any]]:
    """Contents of `generation_config.json` and, where it is needed, `tokenizer_config.json`.

    Generation ends at `eos_token_id`, begins a text without a prompt after `bos_token_id`, and
    never gives ids of the rows that only round the vocabulary up.

    Args:
        model: the model that is written.
        own: whether the exported tokenizer class is beside the weights.

    Returns:
        JSON objects by file name; none without a tokenizer.

    Raises:
        UsageError: the file is no tokenizer.
    """
    names = {stored_name(file) for file in model.tokenizer_files}
    tokenizer = _tokenizer(model.tokenizer_files)
    if tokenizer is None:
        return {}
    generation: dict[str, Any] = _special_ids(tokenizer)
    size = tokenizer.vocab_size + model.config.data.vocab_extra_ids
    # More rows than rounding adds are ids of their own, such as sentinels.
    if 0 < model.vocab_size - size < model.config.data.make_vocab_size_divisible_by:
        generation["suppress_tokens"] = list(range(size, model.vocab_size))
    found = {"generation_config.json": generation}
    if (
        own
        and names & set(_SENTENCEPIECE)
        and not names & {"tokenizer.json", "tokenizer_config.json"}
    ):
        longest = model.config.model.max_position_embeddings
        found["tokenizer_config.json"] = {**TOKENIZER_CONFIG, "model_max_length": longest}
    return found


def _tokenizer(files: Iterable[Path]) -> Tokenizer | None:
    by_name = {stored_name(file): str(file) for file in files}
    for name in _SENTENCEPIECE:
        if name in by_name:
            return SentencePieceTokenizer(by_name[name])
    name = "tokenizer.json"
    return HuggingFaceTokenizer(by_name[name]) if name in by_name else None


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    pad = tokenizer.pad if tokenizer.pad >= 0 else tokenizer.eod
    # The released model's rows begin with id 0, its padding; others follow an end of document.
    bos = pad if pad == 0 else tokenizer.eod
    return {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": tokenizer.eod}

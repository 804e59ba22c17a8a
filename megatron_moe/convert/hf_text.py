"""What an export in the Hugging Face layout says about texts: special ids, tokenizer, generation.

All of it follows from the tokenizer beside the weights; without one, the published ids remain.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_moe.convert.model import LogicalModel
from megatron_moe.convert.modeling import TOKENIZATION, TOKENIZER_CONFIG
from megatron_moe.files import read_small
from megatron_moe.text import json_value
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.build import build_tokenizer
from megatron_moe.tokenizer.files import TYPES, settings_for, stored_name

_SENTENCEPIECE = {name for name, kind in TYPES.items() if kind == "SentencePieceTokenizer"}
"""Names by which the exported tokenizer class finds a SentencePiece model."""


def text_files(model: LogicalModel, *, own: bool) -> dict[str, dict[str, Any]]:
    """Contents of `generation_config.json` and, where it is needed, `tokenizer_config.json`.

    Generation ends at `eos_token_id`, begins a text without a prompt after `bos_token_id`, and
    never gives ids of the rows that only round the vocabulary up.

    Args:
        model: the model that is written.
        own: whether it is written as OpenMoE, with the exported tokenizer class beside the weights.

    Returns:
        JSON objects by file name; none without a tokenizer.

    Raises:
        UsageError: the file is no tokenizer.
    """
    names = {stored_name(file) for file in model.tokenizer_files}
    data = settings_for(model.config.data, model.tokenizer_files)
    if data is None:
        return {}
    tokenizer = build_tokenizer(replace(data, vocab_size=None))
    generation: dict[str, Any] = _special_ids(tokenizer, own)
    size = tokenizer.vocab_size + model.config.data.vocab_extra_ids
    # More rows than rounding adds are ids of their own, such as sentinels.
    if 0 < model.vocab_size - size < model.config.data.make_vocab_size_divisible_by:
        generation["suppress_tokens"] = list(range(size, model.vocab_size))
    found = {"generation_config.json": generation}
    if own and names & _SENTENCEPIECE and not names & {"tokenizer.json", "tokenizer_config.json"}:
        longest = model.config.model.max_position_embeddings
        found["tokenizer_config.json"] = {**TOKENIZER_CONFIG, "model_max_length": longest}
    return found


def tokenizer_code(model: LogicalModel) -> tuple[Path, ...]:
    """The file with the exported tokenizer class, if a `tokenizer_config.json` names the class."""
    for file in model.tokenizer_files:
        if stored_name(file) == "tokenizer_config.json":
            try:
                values = json_value(read_small(file))
            except (OSError, ValueError):
                return ()
            theirs = values.get("auto_map") if isinstance(values, dict) else None
            if theirs == TOKENIZER_CONFIG["auto_map"]:
                return (TOKENIZATION,)
    return ()


def _special_ids(tokenizer: Tokenizer, own: bool) -> dict[str, int]:
    pad = tokenizer.pad if tokenizer.pad >= 0 else tokenizer.eod
    # The released model's rows begin with id 0, its padding; others follow an end of document.
    bos = pad if pad == 0 else tokenizer.eod
    if not own and tokenizer.bos >= 0:
        bos = tokenizer.bos  # which the tokenizers of other classes put before a text
    return {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": tokenizer.eod}

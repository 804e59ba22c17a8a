"""Flags of Megatron-LM's preprocessing scripts that this tool has no use for.

Command lines from public scripts, also for older releases and for Megatron-DeepSpeed, either mean
the same here or are an error with its own reason. Source: `tools/preprocess_data.py` and
`megatron/training/arguments.py` of Megatron-LM.
"""

from __future__ import annotations

import argparse
from typing import Any, get_args, get_type_hints

from megatron_moe.config import DataConfig
from megatron_moe.errors import UsageError

TOKENIZERS: tuple[str, ...] = get_args(get_type_hints(DataConfig)["tokenizer_type"])
ALIASES = {
    "GPTSentencePieceTokenizer": "SentencePieceTokenizer",
    "PretrainedFromHF": "HuggingFaceTokenizer",
    "HFTokenizer": "HuggingFaceTokenizer",
}
"""Tokenizer types of Megatron-LM and its forks that give the same ids."""
_BOS = (
    "SentencePieceTokenizer reads the same file, without the BOS that {} puts before each document"
)
_OTHERS = {
    "Llama2Tokenizer": _BOS.format("Llama2Tokenizer"),
    "Llama3Tokenizer": "HuggingFaceTokenizer reads the tokenizer.json of the same model",
    "MistralTokenizer": _BOS.format("MistralTokenizer"),
    "TikTokenizer": "HuggingFaceTokenizer reads the tokenizer.json of the same model",
    "BertWordPieceLowerCase": "BERT is not trained here",
    "BertWordPieceCase": "BERT is not trained here",
    "MultimodalTokenizer": "images are not supported",
    "NullMultimodalTokenizer": "images are not supported",
    "SFTTokenizer": "--objective sft reads conversations as JSON Lines, without preprocessing",
}
"""The reason for each type that exists there only."""
NO_EFFECT = {
    "--keep-sequential-samples": "the order of documents is always kept",
    "--dataset-impl": "mmap is the only format",
    "--chunk-size": "workers take batches of 512 KiB",
    "--performance-dir": "speeds are printed",
    "--keep-newlines": "it belongs to --split-sentences",
    "--lang": "it belongs to --split-sentences",
    "--legacy-tokenizer": "there is one implementation",
    "--trust-remote-code": "tokenizers are read from files, and no code of theirs runs",
    "--make-vocab-size-divisible-by": "padding of the vocabulary changes no id",
    "--padded-vocab-size": "padding of the vocabulary changes no id",
    "--tensor-model-parallel-size": "padding of the vocabulary changes no id",
}
"""The reason for each flag that is accepted without an effect; its meaning is the same."""
_WITH_VALUE: dict[str, type] = {
    "--dataset-impl": str,
    "--chunk-size": int,
    "--performance-dir": str,
    "--lang": str,
    "--make-vocab-size-divisible-by": int,
    "--padded-vocab-size": int,
    "--tensor-model-parallel-size": int,
}
"""The type of the value, of those that have one."""


def tokenizer_type(name: str) -> Any:
    """Return our name of a tokenizer type.

    Raises:
        UsageError: there is none; says what to use instead.
    """
    if name in ALIASES:
        return ALIASES[name]
    if name not in TOKENIZERS:
        expected = f"one of {', '.join(TOKENIZERS)}"
        raise UsageError("--tokenizer-type", name, expected, _OTHERS.get(name, ""))
    return name


def add_megatron_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that are accepted from Megatron-LM's scripts."""
    group = parser.add_argument_group("accepted from Megatron-LM's scripts, without effect")
    add = group.add_argument
    for flag, reason in NO_EFFECT.items():
        names = [flag, "--pad-vocab-size-to"] if flag == "--padded-vocab-size" else [flag]
        if flag in _WITH_VALUE:
            add(*names, type=_WITH_VALUE[flag], help=reason)
        else:
            add(*names, action="store_true", help=reason)
    add("--split-sentences", action="store_true", help="an error: objectives read documents")


def check_megatron_flags(values: argparse.Namespace) -> str:
    """Return a line about the given flags that have no effect; empty if there are none.

    Raises:
        UsageError: a flag asks for what does not exist here.
    """
    if values.split_sentences:
        reason = "sentences serve Megatron-LM's BERT and T5; the objectives here read documents"
        raise UsageError("--split-sentences", "given", "absent", reason)
    if values.dataset_impl not in (None, "mmap", "infer"):
        reason = "Megatron-Core reads no other format"
        raise UsageError("--dataset-impl", values.dataset_impl, "mmap", reason)
    values_of = vars(values)
    given = [
        f"{flag} ({reason})"
        for flag, reason in NO_EFFECT.items()
        if values_of[flag[2:].replace("-", "_")] not in (None, False)
    ]
    return f"without effect: {', '.join(given)}" if given else ""

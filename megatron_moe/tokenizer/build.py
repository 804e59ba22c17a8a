"""The tokenizer that the flags select, and the vocabulary size that follows from it.

Three sizes: the tokenizer's own ids; V, which adds the extra ids or is `--vocab-size`; and the
padded V, the rows of the embedding. Example, umT5 with `--vocab-extra-ids 300`: 256000 own ids,
V = 256300, and 256384 rows at a multiple of 128.
"""

from __future__ import annotations

from megatron_moe.config import DataConfig
from megatron_moe.errors import UsageError
from megatron_moe.tokenizer.base import Tokenizer
from megatron_moe.tokenizer.gpt2_bpe import Gpt2BpeTokenizer
from megatron_moe.tokenizer.huggingface import HuggingFaceTokenizer
from megatron_moe.tokenizer.sentencepiece import SentencePieceTokenizer
from megatron_moe.tokenizer.simple import ByteTokenizer, NullTokenizer


def build_tokenizer(data: DataConfig) -> Tokenizer:
    """Build the tokenizer that the flags select.

    Raises:
        UsageError: a flag the tokenizer needs is missing, its file cannot be read, or it has more
            ids than `--vocab-size`.
    """
    if data.allow_special_tokens and data.tokenizer_type != "HuggingFaceTokenizer":
        expected = "used with --tokenizer-type HuggingFaceTokenizer"
        reason = "other tokenizers never read special tokens in text"
        raise UsageError("--allow-special-tokens", True, expected, reason)
    if data.tokenizer_type == "SentencePieceTokenizer":
        if data.tokenizer_model is None:
            raise UsageError("--tokenizer-model", None, "a SentencePiece model file")
        tokenizer: Tokenizer = SentencePieceTokenizer(data.tokenizer_model)
    elif data.tokenizer_type == "HuggingFaceTokenizer":
        if data.tokenizer_model is None:
            raise UsageError("--tokenizer-model", None, "a tokenizer.json or the folder of one")
        tokenizer = HuggingFaceTokenizer(data.tokenizer_model, data.allow_special_tokens)
    elif data.tokenizer_type == "GPT2BPETokenizer":
        for flag, file in (("--vocab-file", data.vocab_file), ("--merge-file", data.merge_file)):
            if file is None:
                raise UsageError(flag, None, "a file of GPT-2's tokenizer with GPT2BPETokenizer")
        tokenizer = Gpt2BpeTokenizer(str(data.vocab_file), str(data.merge_file))
    elif data.tokenizer_type == "ByteTokenizer":
        tokenizer = ByteTokenizer()
    else:
        if data.vocab_size is None:
            fix = (
                "add --tokenizer-type SentencePieceTokenizer or HuggingFaceTokenizer with"
                " --tokenizer-model FILE, or --vocab-size for data that are ids alone"
            )
            raise UsageError("a tokenizer", None, "given", fix)
        if data.vocab_size < 1:
            raise UsageError("--vocab-size", data.vocab_size, ">= 1 with NullTokenizer")
        tokenizer = NullTokenizer(data.vocab_size - _extra_ids(data, data.vocab_size))
    unpadded_vocab_size(data, tokenizer)
    _check_files(data)
    return tokenizer


def _check_files(data: DataConfig) -> None:
    """Reject files that the tokenizer would not read."""
    if data.tokenizer_type == "GPT2BPETokenizer":
        return
    for flag, file in (("--vocab-file", data.vocab_file), ("--merge-file", data.merge_file)):
        if file is not None:
            raise UsageError(flag, file, "used with --tokenizer-type GPT2BPETokenizer")


def unpadded_vocab_size(data: DataConfig, tokenizer: Tokenizer) -> int:
    """Return V before padding: `--vocab-size`, else the tokenizer's. All token ids are below it.

    Raises:
        UsageError: the tokenizer, with `--vocab-extra-ids`, has more ids than `--vocab-size`.
    """
    extra = _extra_ids(data)
    ids = tokenizer.vocab_size + extra
    if data.vocab_size is None:
        return ids
    if data.vocab_size < ids:
        added = f" plus {extra} extra ids" if extra else ""
        expected = f">= the tokenizer's {tokenizer.vocab_size} ids{added}"
        raise UsageError("--vocab-size", data.vocab_size, expected)
    return data.vocab_size


def sentinel_ids(data: DataConfig, tokenizer: Tokenizer) -> range:
    """Return the sentinels of span corruption, first to last: from the highest extra id down.

    Source: T5 (arXiv 1910.10683) and its code; umT5's 300 extra ids start at 256299.

    Raises:
        UsageError: there are no extra ids.
    """
    own = _extra_ids(data) == 0
    count = tokenizer.extra_ids if own else data.vocab_extra_ids
    if count == 0:
        raise UsageError(
            "--vocab-extra-ids",
            0,
            "> 0 for span corruption with a tokenizer that has no sentinels",
            "set it to the number of sentinels of the model, 300 for umT5",
        )
    last = tokenizer.vocab_size + (0 if own else count) - 1
    return range(last, last - count, -1)


def _extra_ids(data: DataConfig, limit: int | None = None) -> int:
    """Return `--vocab-extra-ids`, checked."""
    extra = data.vocab_extra_ids
    if extra < 0 or (limit is not None and extra >= limit):
        expected = ">= 0" if limit is None else f">= 0 and < --vocab-size ({limit})"
        raise UsageError("--vocab-extra-ids", extra, expected)
    return extra


def padded_vocab_size(data: DataConfig, tokenizer: Tokenizer) -> int:
    """Return the rows of the embedding: V rounded up by `--make-vocab-size-divisible-by`.

    Independent of the layout, so that checkpoints are; the tensor-parallel size must divide it.
    `--padded-vocab-size` is taken as it is.

    Raises:
        UsageError: the multiple is not positive, or there are more ids than `--vocab-size` or
            `--padded-vocab-size`.
    """
    given, ids = data.padded_vocab_size, unpadded_vocab_size(data, tokenizer)
    if given is not None:
        if given < ids:
            raise UsageError("--padded-vocab-size", given, f">= the {ids} ids before padding")
        return given
    multiple = data.make_vocab_size_divisible_by
    if multiple < 1:
        raise UsageError("--make-vocab-size-divisible-by", multiple, ">= 1")
    return -(-ids // multiple) * multiple

r"""Tokenize text into an indexed dataset: `{prefix}_{key}_document.bin`, `.idx` and a manifest.

Flags and files are those of Megatron-LM's tool of this name. Input: JSON Lines (.jsonl, .json, also
as .gz and .zst), Parquet, plain text (.txt). A run that is started again keeps finished partitions.

    # one file
    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --append-eod

    # many files, 16 processes, 32 partitions that are merged at the end
    python tools/preprocess_data.py --input 'c4/*.jsonl.zst' --output-prefix data/c4 --domain c4 \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model umt5.model \
        --vocab-extra-ids 300 --append-eod --workers 16 --partitions 32

    # one task of a cluster: partition 3 of 32, to be merged with tools/merge_datasets.py
    python tools/preprocess_data.py --input 'c4/*.jsonl.zst' --output-prefix data/c4 \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model umt5.model \
        --append-eod --workers 16 --partitions 32 --partition 3
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import get_args, get_type_hints

from megatron_moe.config import DataConfig
from megatron_moe.data.preprocess.corpus import PreprocessOptions, output_prefixes, preprocess
from megatron_moe.data.preprocess.inputs import TextDocuments
from megatron_moe.errors import UsageError, exit_on_usage_error
from megatron_moe.tokenizer.build import build_tokenizer

TOKENIZERS = get_args(get_type_hints(DataConfig)["tokenizer_type"])


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="files or quoted globs")
    add("--output-prefix", required=True, help="path without suffix")
    add("--json-keys", nargs="+", default=["text"], help="fields or columns to tokenize (text)")
    add("--text-documents", choices=get_args(TextDocuments), default="file",
        help="a document of a .txt: the file, or a block between blank lines (file)")  # fmt: skip
    add("--append-eod", action="store_true", help="append the end-of-document id to each document")
    add("--domain", help="domain of the text, recorded in the manifest")
    add("--tokenizer-type", required=True, choices=TOKENIZERS)
    add("--tokenizer-model", help="tokenizer file")
    add("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    add("--merge-file", help="merges.txt of GPT2BPETokenizer")
    add("--vocab-size", type=int, help="exclusive upper bound of the ids (size of the tokenizer)")
    add("--vocab-extra-ids", type=int, default=0, help="sentinels after the tokenizer's ids (0)")
    add("--workers", type=int, default=1, help="worker processes (1)")
    add("--partitions", type=int, help="number of partitions of the input (one per GiB)")
    add("--partition", type=int, help="make only this partition, counted from 0, without merging")
    add("--no-word-cache", action="store_true", help="do not cache the ids of words")
    add("--log-interval", type=int, default=1000, help="documents between progress reports (1000)")
    return made


def parse(argv: Sequence[str] | None) -> tuple[PreprocessOptions, DataConfig]:
    """Parse the command line."""
    values = parser().parse_args(argv)
    for flag in ("workers", "partitions", "log_interval"):
        if (value := getattr(values, flag)) is not None and value < 1:
            name = "--" + flag.replace("_", "-")
            raise UsageError(name, value, ">= 1")
    if values.partition is not None and values.partitions is None:
        raise UsageError("--partitions", None, "set with --partition")
    if values.partition is not None and not 0 <= values.partition < values.partitions:
        expected = f"from 0 to {values.partitions - 1} with --partitions {values.partitions}"
        fix = "a partition that is made again needs the --partitions of the first time"
        raise UsageError("--partition", values.partition, expected, fix)
    if len(set(values.json_keys)) < len(values.json_keys):
        raise UsageError("--json-keys", " ".join(values.json_keys), "distinct keys")
    options = PreprocessOptions(
        input=tuple(values.input),
        output_prefix=values.output_prefix,
        json_keys=tuple(values.json_keys),
        append_eod=values.append_eod,
        workers=values.workers,
        partitions=values.partitions,
        partition=values.partition,
        domain=values.domain,
        text_documents=values.text_documents,
        word_cache=not values.no_word_cache,
        log_interval=values.log_interval,
    )
    data = DataConfig(
        tokenizer_type=values.tokenizer_type,
        tokenizer_model=values.tokenizer_model,
        vocab_file=values.vocab_file,
        merge_file=values.merge_file,
        vocab_size=values.vocab_size,
        vocab_extra_ids=values.vocab_extra_ids,
    )
    return options, data


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    with exit_on_usage_error("preprocess_data.py"):
        options, data = parse(argv)
        if options.word_cache:
            reason = build_tokenizer(data).enable_word_cache()
            print(f"word cache: {f'off, {reason}' if reason else 'on'}", flush=True)
        start = time.perf_counter()
        made = preprocess(options, data, report=lambda line: print(line, flush=True))
    seconds = time.perf_counter() - start
    for manifest in made:
        print(
            f"{manifest.key}: {manifest.documents} documents, {manifest.tokens} tokens, "
            f"{manifest.tokens_per_byte:.4f} tokens per byte"
        )
    if options.partition is None:
        names = ", ".join(f"{prefix}.bin and .idx" for prefix in output_prefixes(options))
        print(f"{made[0].documents} documents in {seconds:.1f} s: {names}")


if __name__ == "__main__":
    main()

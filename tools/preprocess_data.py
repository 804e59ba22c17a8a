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

    # how many workers tokenize fastest: only measures
    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model \
        --find-optimal-num-workers --workers-to-check 4 8 16
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import get_args

from megatron_moe.command_line import Parser
from megatron_moe.config import DataConfig
from megatron_moe.config.fields import flag_named
from megatron_moe.data.preprocess.corpus import PreprocessOptions, output_prefixes, preprocess
from megatron_moe.data.preprocess.inputs import TextDocuments
from megatron_moe.data.preprocess.megatron_flags import (
    TOKENIZERS,
    add_megatron_flags,
    check_megatron_flags,
    tokenizer_type,
)
from megatron_moe.data.preprocess.reading import BATCH
from megatron_moe.data.preprocess.speed import measure_workers, speed_table
from megatron_moe.errors import UsageError, exit_on_usage_error
from megatron_moe.text import LONGEST_RECORD, argument_text
from megatron_moe.tokenizer.build import build_tokenizer


def parser() -> Parser:
    """Return the parser of the flags."""
    made = Parser("preprocess_data.py", __doc__)
    add = made.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="files or quoted globs")
    add("--output-prefix", required=True, help="path without suffix")
    add("--json-keys", nargs="+", default=["text"], help="fields or columns to tokenize (text)")
    add("--text-documents", choices=get_args(TextDocuments), default="file",
        help="a document of a .txt: the file, or a block between blank lines (file)")  # fmt: skip
    add("--append-eod", action="store_true", help="append the end-of-document id to each document")
    add("--domain", help="domain of the text, recorded in the manifest")
    add("--tokenizer-type", required=True, metavar="TYPE", help=f"one of {', '.join(TOKENIZERS)}")
    add("--tokenizer-model", "--tokenizer-name-or-path", help="tokenizer file")
    add("--vocab-file", "--vocab", help="vocab.json of GPT2BPETokenizer")
    add("--merge-file", help="merges.txt of GPT2BPETokenizer")
    add("--allow-special-tokens", action="store_true",
        help="a text that spells a special token gets its id")  # fmt: skip
    add("--vocab-size", type=int, help="exclusive upper bound of the ids (size of the tokenizer)")
    add("--vocab-extra-ids", type=int, default=0, help="sentinels after the tokenizer's ids (0)")
    add("--workers", type=int, default=1, help="worker processes (1)")
    add("--partitions", type=int, help="number of partitions of the input (one per GiB)")
    add("--partition", type=int, help="make only this partition, counted from 0, without merging")
    add("--no-word-cache", action="store_true", help="do not cache the ids of words")
    add("--max-record-bytes", type=int, default=LONGEST_RECORD,
        help=f"longest line, block or row; largest window of .zst ({LONGEST_RECORD})")  # fmt: skip
    add("--log-interval", type=int, default=1000, help="documents between progress reports (1000)")
    add("--find-optimal-num-workers", action="store_true",
        help="only measure speeds with each of --workers-to-check")  # fmt: skip
    add("--workers-to-check", nargs="+", type=int, default=[16, 32, 64], help="(16 32 64)")
    add("--max-documents", type=int, default=100_000, help="documents of a measurement (100000)")
    add_megatron_flags(made)
    return made


def check(values: argparse.Namespace) -> None:
    """Check the flags.

    Raises:
        UsageError: the first invalid flag.
    """
    for flag in ("workers", "partitions", "log_interval", "max_documents"):
        if (value := getattr(values, flag)) is not None and value < 1:
            raise UsageError(flag_named(flag), value, ">= 1")
    if values.max_record_bytes < BATCH:
        raise UsageError("--max-record-bytes", values.max_record_bytes, f">= {BATCH}")
    if min(values.workers_to_check) < 1:
        found = " ".join(map(str, values.workers_to_check))
        raise UsageError("--workers-to-check", found, "numbers that are each >= 1")
    if values.partition is not None and values.partitions is None:
        raise UsageError("--partitions", None, "set with --partition")
    if values.partition is not None and not 0 <= values.partition < values.partitions:
        expected = f"from 0 to {values.partitions - 1} with --partitions {values.partitions}"
        fix = "a partition that is made again needs the --partitions of the first time"
        raise UsageError("--partition", values.partition, expected, fix)
    if len(set(values.json_keys)) < len(values.json_keys):
        raise UsageError("--json-keys", " ".join(values.json_keys), "distinct keys")


def settings(values: argparse.Namespace) -> tuple[PreprocessOptions, DataConfig]:
    """Return what the flags say, checked."""
    check(values)
    options = PreprocessOptions(
        input=tuple(values.input),
        output_prefix=values.output_prefix,
        json_keys=tuple(values.json_keys),
        append_eod=values.append_eod,
        workers=values.workers,
        partitions=values.partitions,
        partition=values.partition,
        domain=argument_text("--domain", values.domain) if values.domain else None,
        text_documents=values.text_documents,
        word_cache=not values.no_word_cache,
        max_record_bytes=values.max_record_bytes,
        log_interval=values.log_interval,
    )
    data = DataConfig(
        tokenizer_type=tokenizer_type(values.tokenizer_type),
        tokenizer_model=values.tokenizer_model,
        vocab_file=values.vocab_file,
        merge_file=values.merge_file,
        allow_special_tokens=values.allow_special_tokens,
        vocab_size=values.vocab_size,
        vocab_extra_ids=values.vocab_extra_ids,
    )
    return options, data


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    with exit_on_usage_error("preprocess_data.py"):
        values = parser().parse_args(argv)
        if note := check_megatron_flags(values):
            print(note, flush=True)
        options, data = settings(values)
        if values.find_optimal_num_workers:
            counts = list(dict.fromkeys(values.workers_to_check))
            print(speed_table(measure_workers(options, data, counts, values.max_documents)))
            return
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

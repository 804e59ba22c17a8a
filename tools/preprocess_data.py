r"""Tokenize text into indexed data: `{prefix}_{key}_document.bin` and `.idx`, with a manifest.

Flags and files are those of Megatron-LM's tool of this name. Input: JSON Lines (.jsonl, .json, also
.gz and .zst), Parquet, plain text (.txt). Started again, it makes only what is not finished.

    # one file
    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --append-eod

    # many files, 16 processes, 32 partitions that are merged in the end
    python tools/preprocess_data.py --input 'c4/*.jsonl.zst' --output-prefix data/c4 --domain c4 \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model umt5.model \
        --vocab-extra-ids 300 --append-eod --workers 16 --partitions 32

    # one task of a cluster: partition 3 of 32, to be merged by tools/merge_datasets.py
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
    """The flags."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="files, or globs in quotes")
    add("--output-prefix", required=True, help="path without suffix")
    add("--json-keys", nargs="+", default=["text"], help="fields, or columns, to tokenize (text)")
    add("--text-documents", choices=get_args(TextDocuments), default="file",
        help="a document of a .txt: the file, or a block between blank lines (file)")  # fmt: skip
    add("--append-eod", action="store_true", help="end documents with eod")
    add("--domain", help="what the text is; noted in the manifest")
    add("--tokenizer-type", required=True, choices=TOKENIZERS)
    add("--tokenizer-model", help="file of the tokenizer")
    add("--vocab-size", type=int, help="ids must be below it (the tokenizer's)")
    add("--vocab-extra-ids", type=int, default=0, help="sentinels after the tokenizer's own ids")
    add("--workers", type=int, default=1, help="processes that tokenize (1)")
    add("--partitions", type=int, help="cut the input into so many (one for each GiB)")
    add("--partition", type=int, help="make only this one, from 0, and do not merge")
    add("--no-word-cache", action="store_true", help="do not remember the ids of words")
    add("--log-interval", type=int, default=1000, help="documents a report (1000)")
    return made


def parse(argv: Sequence[str] | None) -> tuple[PreprocessOptions, DataConfig]:
    """Read the command line."""
    values = parser().parse_args(argv)
    for flag in ("workers", "partitions", "log_interval"):
        if (value := getattr(values, flag)) is not None and value < 1:
            name = "--" + flag.replace("_", "-")
            raise UsageError(name, value, "a positive number")
    if values.partition is not None and values.partitions is None:
        raise UsageError("--partitions", None, "their number, which --partition needs")
    if values.partition is not None and not 0 <= values.partition < values.partitions:
        raise UsageError("--partition", values.partition, f"0 to {values.partitions - 1}")
    if len(set(values.json_keys)) < len(values.json_keys):
        raise UsageError("--json-keys", " ".join(values.json_keys), "each key once")
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
        vocab_size=values.vocab_size,
        vocab_extra_ids=values.vocab_extra_ids,
    )
    return options, data


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
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

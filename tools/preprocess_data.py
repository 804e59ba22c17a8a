r"""Tokenize JSON Lines into indexed data: `{prefix}_{key}_document.bin` and `.idx`.

Flags and files are those of Megatron-LM's tool of this name.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --append-eod
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import get_args, get_type_hints

from megatron_moe.config import DataConfig
from megatron_moe.data.preprocess import PreprocessOptions, output_prefixes, preprocess
from megatron_moe.errors import USAGE_EXIT_CODE, UsageError

TOKENIZERS = get_args(get_type_hints(DataConfig)["tokenizer_type"])


def parse(argv: Sequence[str] | None) -> tuple[PreprocessOptions, DataConfig]:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON Lines")
    parser.add_argument("--output-prefix", required=True, help="path without suffix")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="fields to tokenize")
    parser.add_argument("--append-eod", action="store_true", help="end documents with eod")
    parser.add_argument("--tokenizer-type", required=True, choices=TOKENIZERS)
    parser.add_argument("--tokenizer-model", help="file of the tokenizer")
    parser.add_argument("--vocab-size", type=int, help="ids must be below it (the tokenizer's)")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize (1)")
    parser.add_argument("--log-interval", type=int, default=1000, help="documents a report (1000)")
    values = parser.parse_args(argv)
    for flag in ("workers", "log_interval"):
        if getattr(values, flag) < 1:
            name = "--" + flag.replace("_", "-")
            raise UsageError(name, getattr(values, flag), "a positive number")
    options = PreprocessOptions(
        input=tuple(values.input),
        output_prefix=values.output_prefix,
        json_keys=tuple(values.json_keys),
        append_eod=values.append_eod,
        workers=values.workers,
        log_interval=values.log_interval,
    )
    data = DataConfig(
        tokenizer_type=values.tokenizer_type,
        tokenizer_model=values.tokenizer_model,
        vocab_size=values.vocab_size,
    )
    return options, data


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    try:
        options, data = parse(argv)
        start = time.perf_counter()
        documents = preprocess(options, data)
    except UsageError as error:
        print(f"preprocess_data.py: error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_EXIT_CODE) from None
    names = ", ".join(f"{prefix}.bin and .idx" for prefix in output_prefixes(options))
    print(f"{documents} documents in {time.perf_counter() - start:.1f} s: {names}")


if __name__ == "__main__":
    main()

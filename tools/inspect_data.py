r"""Inspect an indexed dataset. Exit code 0: no fault; 1: damaged or different; 2: usage error.

# statistics and the manifest
python tools/inspect_data.py data/corpus_text_document

# document 7 as text, or as ids without a tokenizer
python tools/inspect_data.py data/corpus_text_document --document 7 \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model

# read everything: check the structure and that every id is in the vocabulary
python tools/inspect_data.py data/corpus_text_document --verify --vocab-size 256384

# compare the documents of two datasets
python tools/inspect_data.py data/corpus_text_document --compare other/corpus_text_document
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import get_args, get_type_hints

from megatron_moe.command_line import Parser
from megatron_moe.config import DataConfig
from megatron_moe.console import escape_unprintable, print_safely
from megatron_moe.data.indexed.check import Source, inspect_source
from megatron_moe.data.indexed.format import paths_of
from megatron_moe.data.indexed.inspection import (
    document,
    first_difference,
    prefix_of,
    statistics,
    verify,
)
from megatron_moe.data.indexed.manifest import read_manifest
from megatron_moe.data.progress import progress_bar
from megatron_moe.errors import USAGE_EXIT_CODE, UsageError
from megatron_moe.tokenizer.base import Tokenizer, vocabulary_of
from megatron_moe.tokenizer.build import build_tokenizer

TOKENIZERS = get_args(get_type_hints(DataConfig)["tokenizer_type"])
FAULT_EXIT_CODE = 1


def parser() -> Parser:
    """Return the parser of the flags."""
    made = Parser("inspect_data.py", __doc__)
    add = made.add_argument
    add("prefix", help="path without suffix")
    add("--document", type=int, metavar="N", help="print document N, counted from 0")
    add("--verify", action="store_true", help="read everything and check every number")
    add("--compare", metavar="PREFIX", help="another dataset, to compare the documents")
    add("--tokenizer-type", choices=TOKENIZERS, help="prints --document as text")
    add("--tokenizer-model", help="tokenizer file")
    add(
        "--vocab-size",
        type=int,
        help="exclusive upper bound of the ids (that of the manifest)",
    )
    return made


def tokenizer_of(options: argparse.Namespace, source: Source) -> Tokenizer | None:
    """Build the tokenizer of the flags, which must be the one the data was made with."""
    if options.tokenizer_type is None:
        return None
    tokenizer = build_tokenizer(
        DataConfig(
            tokenizer_type=options.tokenizer_type,
            tokenizer_model=options.tokenizer_model,
            vocab_size=options.vocab_size,
        )
    )
    manifest = read_manifest(source.prefix)
    made = "" if manifest is None else vocabulary_of(manifest.tokenizer_hash)
    if manifest is not None and made != vocabulary_of(tokenizer.identity):
        found = options.tokenizer_model or options.tokenizer_type
        made_with = f"{manifest.tokenizer} with hash {manifest.tokenizer_hash}"
        raise UsageError("tokenizer", found, f"that of the data, {made_with}")
    return tokenizer


def show(source: Source) -> None:
    """Print statistics and the manifest."""
    found = statistics(source)
    print(f"documents    {found.documents}, {found.empty_documents} of them empty")
    print(f"sequences    {found.sequences}")
    print(f"tokens       {found.tokens}, {source.dtype.name}")
    print(f"length       {found.shortest} to {found.longest}, median {found.median}")
    manifest = read_manifest(source.prefix)
    if manifest is None:
        print("manifest     none")
        return
    print_safely(f"tokenizer    {manifest.tokenizer} {manifest.tokenizer_hash}")
    print(f"vocabulary   {manifest.vocab_size}")
    print_safely(f"domain       {manifest.domain or 'none'}")
    print(
        f"text         {manifest.text_bytes} bytes, {manifest.tokens_per_byte:.4f} tokens per byte"
    )
    print_safely(f"from         {len(manifest.inputs)} files, first {manifest.inputs[0].path}")


def print_document(source: Source, number: int, tokenizer: Tokenizer | None) -> None:
    """Print one document, with a line break between its sequences."""
    for ids in document(source, number):
        values = ids.tolist()
        print_safely(
            " ".join(map(str, values)) if tokenizer is None else tokenizer.detokenize(values)
        )


def inspect(options: argparse.Namespace, source: Source) -> int:
    """Run what the flags select; return the exit code."""
    if options.document is not None:
        print_document(source, options.document, tokenizer_of(options, source))
    elif options.compare is not None:
        with progress_bar(source.tokens, " tokens") as bar:
            other = inspect_source(prefix_of(options.compare))
            unlike = first_difference(source, other, bar.update)
        print(f"different: {unlike}" if unlike else f"the same {source.documents} documents")
        return FAULT_EXIT_CODE if unlike else 0
    elif options.verify:
        with progress_bar(source.tokens, " tokens") as bar:
            found = verify(source, options.vocab_size, bar.update)
        print(f"no fault: {source.tokens} ids from {found.smallest} to {found.largest}")
    else:
        show(source)
    return 0


def fault_of(options: argparse.Namespace, opened: bool) -> int:
    """Return the exit code of an error: 1 for a fault in the data, 2 for a usage error."""
    prefixes = [prefix_of(name) for name in (options.prefix, options.compare) if name]
    exist = all(os.path.exists(path) for prefix in prefixes for path in paths_of(prefix))
    data_fault = exist and (not opened or options.verify or options.compare is not None)
    return FAULT_EXIT_CODE if data_fault else USAGE_EXIT_CODE


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    escape_unprintable()
    options = parser().parse_args(argv)
    opened = False
    try:
        source = inspect_source(prefix_of(options.prefix))
        opened = True
        code = inspect(options, source)
    except UsageError as error:
        print(f"inspect_data.py: error: {error}", file=sys.stderr)
        code = fault_of(options, opened)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()

r"""Merge indexed data sets into one, in the order of their names.

Flags and files are those of Megatron-LM's tool of this name. The parts must have the same type of
ids and, as far as their manifests tell, the same tokenizer; of partitions none may be missing.

    # all of a folder
    python tools/merge_datasets.py --input data/parts --output-prefix data/c4_text_document

    # some, by prefix or glob, in this order
    python tools/merge_datasets.py --input 'data/c4_part*_text_document' data/more_text_document \
        --output-prefix data/all_text_document
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import time
from collections.abc import Iterable, Sequence

from megatron_moe.data.indexed.format import paths_of
from megatron_moe.data.indexed.manifest import manifest_path
from megatron_moe.data.indexed.merge import merge
from megatron_moe.data.progress import progress_bar
from megatron_moe.errors import UsageError, exit_on_usage_error

_PART = re.compile(r"^(.*_part)(\d{5})of(\d{5})(_.*)$")
"""Prefix of a partition that tools/preprocess_data.py has made."""


def find_parts(patterns: Sequence[str]) -> list[str]:
    """The prefixes that folders, prefixes and globs stand for; those of one word are sorted.

    Raises:
        UsageError: a word stands for none, a `.bin` has no `.idx` or the reverse, one is named
            twice, or a partition is missing.
    """
    prefixes: list[str] = []
    for pattern in patterns:
        inside = os.path.join(glob.escape(pattern), "*") if os.path.isdir(pattern) else pattern
        found = {
            os.path.splitext(p)[0] for end in (".bin", ".idx") for p in glob.glob(inside + end)
        }
        if not found:
            raise UsageError("--input", pattern, "a folder, prefix or glob of PREFIX.bin and .idx")
        prefixes += sorted(found)
    for prefix in prefixes:
        missing = [path for path in paths_of(prefix) if not os.path.exists(path)]
        if missing:
            raise UsageError("--input", prefix, "a pair .bin and .idx", f"{missing[0]} is missing")
        if prefixes.count(prefix) > 1:
            raise UsageError("--input", prefix, "each data set once")
    refuse_gaps(prefixes)
    return prefixes


def refuse_gaps(prefixes: Iterable[str]) -> None:
    """Of each set of partitions, all have to be there, in order.

    Raises:
        UsageError: names one that is missing, or out of order, or two cuts of the same text.
    """
    sets: dict[tuple[str, str, str], list[int]] = {}
    for match in filter(None, map(_PART.match, prefixes)):
        stem, number, count, rest = match.groups()
        sets.setdefault((stem, count, rest), []).append(int(number))
    for (stem, count, rest), numbers in sets.items():
        others = [other for a, other, b in sets if (a, b) == (stem, rest) and other != count]
        if others:
            found = f"{stem}*{rest} cut into {int(count)} and into {int(others[0])}"
            raise UsageError("--input", found, "partitions of one cut", "remove the others")
        missing = sorted(set(range(int(count))) - set(numbers))
        if missing:
            name = f"{stem}{missing[0]:05d}of{count}{rest}"
            fix = f"make it with tools/preprocess_data.py --partition {missing[0]}"
            expected = f"all {int(count)} partitions; {name} is missing"
            raise UsageError("--input", f"{len(numbers)} partitions", expected, fix)
        if numbers != sorted(numbers):
            raise UsageError("--input", f"partitions {numbers} of {stem}", "them in order")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="DIR", help="folders, prefixes or globs"
    )
    parser.add_argument("--output-prefix", required=True, help="path without suffix")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    with exit_on_usage_error("merge_datasets.py"):
        prefixes = find_parts(options.input)
        print(f"merging {len(prefixes)} data sets ...", flush=True)
        with progress_bar(sum(os.path.getsize(paths_of(p)[0]) for p in prefixes), "B") as bar:
            parts = merge(prefixes, options.output_prefix, bar.update)
    size = sum(part.bytes for part in parts) / 1e6
    documents = sum(part.documents for part in parts)
    seconds = time.perf_counter() - start
    has = manifest_path(options.output_prefix).exists()
    print(
        f"{documents} documents, {size:.1f} MB of ids in {seconds:.1f} s: "
        f"{options.output_prefix}.bin and .idx"
        + ("" if has else " (no manifest: not every part has one)")
    )


if __name__ == "__main__":
    main()

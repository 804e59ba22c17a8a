r"""Merge indexed datasets into one, in the order of their names.

Flags and files are those of Megatron-LM's tool of this name. All parts must have the same id type
and, according to their manifests, the same tokenizer; partitions must be complete.

    # all datasets of a folder
    python tools/merge_datasets.py --input data/parts --output-prefix data/c4_text_document

    # by prefix or glob, in this order
    python tools/merge_datasets.py --input 'data/c4_part*_text_document' data/more_text_document \
        --output-prefix data/all_text_document
"""

from __future__ import annotations

import glob
import os
import re
import time
from collections.abc import Iterable, Sequence

from megatron_moe.command_line import Parser
from megatron_moe.data.indexed.format import paths_of
from megatron_moe.data.indexed.manifest import manifest_path
from megatron_moe.data.indexed.merge import merge
from megatron_moe.data.progress import progress_bar
from megatron_moe.errors import UsageError, exit_on_usage_error

_PART = re.compile(r"^(.*_part)(\d{5})of(\d{5})(_.*)$")
"""Prefix of a partition made by tools/preprocess_data.py."""


def find_parts(patterns: Sequence[str]) -> list[str]:
    """Return the prefixes of folders, prefixes and globs; those of one argument are sorted.

    Raises:
        UsageError: an argument matches nothing, a `.bin` has no `.idx` or the reverse, a dataset is
            given twice, or a partition is missing.
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
            raise UsageError(
                "--input", prefix, "a pair of .bin and .idx", f"{missing[0]} is missing"
            )
        if prefixes.count(prefix) > 1:
            raise UsageError("--input", prefix, "given once")
    check_partitions(prefixes)
    return prefixes


def check_partitions(prefixes: Iterable[str]) -> None:
    """Check that each set of partitions is complete and in order.

    Raises:
        UsageError: a partition is missing or out of order, or the same text is partitioned twice.
    """
    sets: dict[tuple[str, str, str], list[int]] = {}
    for match in filter(None, map(_PART.match, prefixes)):
        stem, number, count, rest = match.groups()
        sets.setdefault((stem, count, rest), []).append(int(number))
    for (stem, count, rest), numbers in sets.items():
        others = [other for a, other, b in sets if (a, b) == (stem, rest) and other != count]
        if others:
            found = f"{stem}*{rest} in {int(count)} and in {int(others[0])} partitions"
            raise UsageError("--input", found, "one set of partitions", "remove the other one")
        missing = sorted(set(range(int(count))) - set(numbers))
        if missing:
            name = f"{stem}{missing[0]:05d}of{count}{rest}"
            fix = f"make it with tools/preprocess_data.py --partition {missing[0]}"
            expected = f"all {int(count)} partitions; {name} is missing"
            raise UsageError("--input", f"{len(numbers)} partitions", expected, fix)
        if numbers != sorted(numbers):
            raise UsageError("--input", f"partitions {numbers} of {stem}", "in order")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser("merge_datasets.py", __doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="DIR", help="folders, prefixes or globs"
    )
    parser.add_argument("--output-prefix", required=True, help="path without suffix")
    parser.add_argument("--multimodal", action="store_true", help="an error: there is text only")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    with exit_on_usage_error("merge_datasets.py"):
        if options.multimodal:
            reason = "modes of sequences are not read here"
            raise UsageError("--multimodal", "given", "absent", reason)
        prefixes = find_parts(options.input)
        print(f"merging {len(prefixes)} datasets ...", flush=True)
        with progress_bar(sum(os.path.getsize(paths_of(p)[0]) for p in prefixes), "B") as bar:
            parts = merge(prefixes, options.output_prefix, bar.update)
    size = sum(part.bytes for part in parts) / 1e6
    documents = sum(part.documents for part in parts)
    seconds = time.perf_counter() - start
    has = manifest_path(options.output_prefix).exists()
    print(
        f"{documents} documents, {size:.1f} MB of ids in {seconds:.1f} s: "
        f"{options.output_prefix}.bin and .idx"
        + ("" if has else " (no manifest, because not every part has one)")
    )


if __name__ == "__main__":
    main()

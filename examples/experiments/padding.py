r"""UL2 with its padding routed as text, as published, and ignored: slots for text, and loss.

python -m examples.experiments.padding --out experiments
"""

from __future__ import annotations

from collections.abc import Sequence

from examples.experiments.lab import SIZES, Run, lab_of, lab_parser
from examples.experiments.records import read_record, write_records
from examples.experiments.remedies import about
from examples.experiments.variants import OPENMOE

SEEDS = 3
UL2 = ("--objective", "ul2", "--vocab-extra-ids", "100")
VARIANTS = {
    "routed": ("--no-moe-ignore-padding-tokens",),
    "ignored": ("--moe-ignore-padding-tokens",),
}


def runs_of(sizes: Sequence[str], seeds: int) -> list[Run]:
    """All runs, seed by seed."""
    return [
        Run(size=size, variant=name, flags=(*UL2, *flags), seed=seed)
        for seed in range(1, seeds + 1)
        for size in sizes
        for name, flags in VARIANTS.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = lab_parser(__doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", default=list(SIZES), choices=SIZES, help="model sizes (all)")
    options = parser.parse_args(argv)
    lab = lab_of(options)
    runs = runs_of(options.sizes, options.seeds or SEEDS)
    lab.take(runs, options.workers)
    records = [read_record(lab, run) for run in runs]
    if not options.no_records:
        print(write_records("padding", records, about(lab, [OPENMOE])))


if __name__ == "__main__":
    main()
